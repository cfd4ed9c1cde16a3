"""The CUDA backend on CPU tensors: its own Python, binding and kernels, with an emulator in place of the GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "gpu")]

import building  # noqa: E402

from esam_kernels.backends import cuda  # noqa: E402
from esam_kernels.backends.cuda import extension  # noqa: E402


@pytest.fixture(scope="session")
def emulated():
    if building.compiler() is None:
        pytest.skip("there is no C++ compiler")
    return building.emulated_module()


@pytest.fixture(params=["threads in order", "threads reversed"])
def order(request, emulated):
    """A barrier that is missing shows when threads run in another order."""
    emulated.set_emulator(request.param == "threads reversed", True, 3)
    yield
    emulated.set_emulator(False, True, 3)


@pytest.fixture
def backend(emulated, monkeypatch):
    monkeypatch.setattr(extension, "kernels", emulated)
    monkeypatch.setattr(extension, "where", lambda device: (0, 0))
    for name in ("empty", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    return cuda


def _poisoned(allocate):
    """Fresh memory holds NaN, or a number that is no index."""

    def allocate_poisoned(*args, **kwargs):
        fresh = allocate(*args, **kwargs)
        if fresh.is_floating_point() or fresh.is_complex():
            return fresh.fill_(torch.nan)
        return fresh.fill_(1 if fresh.dtype == torch.bool else torch.iinfo(fresh.dtype).max)

    return allocate_poisoned


@pytest.fixture
def device():
    return torch.device("cpu")
