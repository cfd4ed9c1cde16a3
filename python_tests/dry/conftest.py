"""The GPU backends' host code, on a machine without a GPU: see stand_in.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    raise RuntimeError("kernels that are bound to the interpreter cannot be compiled: unset TRITON_INTERPRET")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "gpu")]

torch.set_num_threads(1)


@pytest.fixture
def stand_in(monkeypatch):
    import stand_in

    with stand_in.installed(monkeypatch) as installed:
        yield installed


@pytest.fixture
def device():
    return torch.device("cpu")
