"""Triton kernels in Triton's interpreter, on CPU tensors: ``TRITON_INTERPRET`` binds when kernels are decorated."""

import os
import sys

import pytest
import torch

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("triton is imported already: run this tier in a process of its own, with TRITON_INTERPRET=1")
os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config):
    # numpy warns where a GPU says nothing: lanes that a mask throws away, log(0), inf - inf
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture
def kernels():
    from esam_kernels import backends

    return backends.load("triton")


@pytest.fixture
def three_programs(monkeypatch):
    """So few programs that each has to walk over several blocks."""
    from esam_kernels.backends.triton import blocks

    monkeypatch.setattr(blocks, "MAX_PROGRAMS", 3)


@pytest.fixture
def poisoned_memory():
    """Fresh memory is NaN: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
