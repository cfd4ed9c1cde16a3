"""The debug line that says why the base optimizer's update is not part of the restore."""

import logging

import pytest
import torch

from esam_kernels import SAM, logs


@pytest.fixture
def lines(monkeypatch, caplog):
    """What is said of updates that are not fused, with nothing said before."""
    monkeypatch.setattr(logs, "_said", set())
    with caplog.at_level(logging.DEBUG, "esam_kernels"):
        yield lambda: [line for line in caplog.messages if line.startswith("the update of")]


def step(model, base=torch.optim.SGD, before_update=lambda optimizer: None, **kwargs):
    optimizer = SAM(model.parameters(), base, lr=0.1, backend="native", **kwargs)
    for _ in range(2):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.first_step(zero_grad=True)
        model(torch.ones(2, 4)).sum().backward()
        before_update(optimizer)
        optimizer.second_step(zero_grad=True)


def linear():
    return torch.nn.Linear(4, 3)


def tied():
    first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    second.weight.data = first.weight.data
    return torch.nn.Sequential(first, second)


def transpose_gradients(optimizer):
    for param in optimizer.param_groups[0]["params"]:
        param.grad = param.grad.t().contiguous().t() if param.grad.dim() == 2 else param.grad


def transpose_momentum(optimizer):
    for state in optimizer.base_optimizer.state.values():
        momentum = state["momentum_buffer"]
        state["momentum_buffer"] = momentum.t().contiguous().t() if momentum.dim() == 2 else momentum


def hook(optimizer):
    optimizer.base_optimizer.register_step_pre_hook(lambda *args: None)


NOT_KNOWN = "Adagrad is neither SGD nor Adam nor AdamW of torch.optim itself"
HOOKS = "there are step hooks on the base optimizer, or on all optimizers"
UNLIKE = "does not lie in memory as its parameter does, or is of another dtype"


@pytest.mark.parametrize(
    ("model", "how", "name", "reason"),
    [
        (linear, {"base": torch.optim.Adagrad}, "Adagrad", NOT_KNOWN),
        (linear, {"before_update": hook}, "SGD", HOOKS),
        (linear, {"before_update": transpose_gradients}, "SGD", f"a gradient {UNLIKE}"),
        (
            linear,
            {"before_update": transpose_momentum, "momentum": 0.9},
            "SGD",
            f"the state 'momentum_buffer' {UNLIKE}",
        ),
        (tied, {}, "SGD", "parameters are tied to each other"),
    ],
)
def test_a_reason_is_said_once(lines, model, how, name, reason):
    for _ in range(2):
        step(model(), **how)
    said = f"the update of {name} is not fused into the restore, it takes its own step: {reason}"
    assert lines() == [said]


def test_each_reason_is_said(lines):
    step(linear(), torch.optim.Adagrad)
    step(linear(), before_update=hook)
    assert len(lines()) == 2


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_nothing_is_said_of_a_fused_update(lines, base):
    step(linear(), base)
    assert lines() == []
