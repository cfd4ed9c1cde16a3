"""A learning rate that is none is refused before any group is updated."""

import pytest
import torch
from torch import nn

from esam_kernels import ESAM, backends, cross_entropy

BATCH = (torch.randn(24, 12, generator=torch.Generator().manual_seed(1)), torch.arange(24) % 5)
BASES = [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {})]
cpu = torch.device("cpu")
# "reference" restores and calls the base optimizer's own step; "native" does both at once.
each_backend = pytest.mark.parametrize("backend", ["reference", "native"])


def training(base, options, backend):
    if backends.unavailable(backend, cpu) is not None:
        pytest.skip(f"{backend} is not available")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 5))
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    optimizer = ESAM(groups, base, lr=0.05, gamma=1.0, beta=1.0, rho=0.5, backend=backend, **options)
    return model, optimizer, lambda x, y: cross_entropy(model(x), y)


def held(model, optimizer):
    """Copies of the weights and of everything that the base optimizer keeps."""
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return [tensor.detach().clone() for tensor in (*model.parameters(), *states)]


@each_backend
@pytest.mark.parametrize(("base", "options"), BASES, ids=["SGD", "AdamW"])
@pytest.mark.parametrize("lr", ["oops", None, [0.1], 1j])
def test_it_names_the_group_and_no_weight_and_no_momentum_moves(base, options, backend, lr):
    model, optimizer, losses = training(base, options, backend)
    optimizer.step(losses, *BATCH)
    before = held(model, optimizer)
    optimizer.param_groups[1]["lr"] = lr
    with pytest.raises(TypeError, match=r"the lr of parameter group 1 must be a number or a tensor"):
        optimizer.step(losses, *BATCH)
    assert all(map(torch.equal, held(model, optimizer), before))


@each_backend
@pytest.mark.parametrize(("base", "options"), BASES, ids=["SGD", "AdamW"])
def test_the_next_steps_go_on_as_if_it_had_not_been(base, options, backend):
    ends = []
    for disturbed in (False, True):
        model, optimizer, losses = training(base, options, backend)
        optimizer.step(losses, *BATCH)
        if disturbed:
            optimizer.param_groups[1]["lr"] = None
            with pytest.raises(TypeError, match="parameter group 1"):
                optimizer.step(losses, *BATCH)
            optimizer.param_groups[1]["lr"] = 0.05
        optimizer.step(losses, *BATCH)
        ends.append(held(model, optimizer))
    assert all(map(torch.equal, *ends))
