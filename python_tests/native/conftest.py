"""The native tier: the C++ backend against the reference, on every instruction set that this machine has."""

import math

import pytest
import torch
from native_cases import extension

# Threads matter to the tests that ask for them; elsewhere they would spin on a shared machine.
torch.set_num_threads(1)


@pytest.fixture(params=extension.available_isas())
def isa(request):
    """Runs the test once an instruction set."""
    before = extension.isa()
    extension.use_isa(request.param)
    yield request.param
    extension.use_isa(before)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def exact_square_roots(monkeypatch):
    """torch's own square root may be MKL's, which is up to one unit off; the C++ rounds it correctly."""

    def sqrt(tensor):
        return (
            torch.tensor([math.sqrt(x) for x in tensor.flatten().tolist()], dtype=torch.float64)
            .view(tensor.shape)
            .to(tensor.dtype)
        )

    monkeypatch.setattr(torch.Tensor, "sqrt", sqrt)
