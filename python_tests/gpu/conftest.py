"""The GPU tier.

With ``ESAM_GPU_TESTS_DEVICE=cpu``, as in the tier ``gpu_on_cpu``, it runs on the reference backend what needs no GPU.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Before CUDA starts: cuBLAS otherwise picks workspaces, and with them the order of additions, by stream.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).parent))

from esam_kernels import backends

DEVICE = torch.device(os.environ.get("ESAM_GPU_TESTS_DEVICE", "cuda"))
BACKENDS = ("triton", "cuda") if DEVICE.type == "cuda" else ("reference",)


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", BACKENDS, indirect=True)


@pytest.fixture(scope="session")
def device():
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    return torch.device(DEVICE.type, 0) if DEVICE.type == "cuda" else DEVICE


@pytest.fixture
def backend(request, device):
    reason = backends.unavailable(request.param, device)
    if reason is not None:
        pytest.skip(reason)
    return backends.load(request.param)


@pytest.fixture
def backend_name(backend):
    return backend.__name__.split(".")[-1]


@pytest.fixture
def poisoned(device):
    """Memory that is allocated next has been left full of NaN."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        for size in (1 << 12, 1 << 16, 1 << 20, 1 << 24):
            left = [torch.full((size // 4,), torch.nan, device=device) for _ in range(16)]
            del left
