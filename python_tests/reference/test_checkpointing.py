"""Activation checkpointing, and other functions that run a backward of their own inside a backward."""

import oracles
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from esam_kernels import ESAM, SAM, cross_entropy
from esam_kernels.perturbation.draw import TensorDraw
from esam_kernels.tensor_lists import _inspect_graph, _leaves, inspect_graph, leaves


class Recomputed(torch.autograd.Function):
    """As libraries write their own checkpointing: the block's parameters are no inputs of it."""

    @staticmethod
    def forward(ctx, block, inputs):
        ctx.block = block
        ctx.save_for_backward(inputs)
        with torch.no_grad():
            return block(inputs)

    @staticmethod
    def backward(ctx, grad):
        inputs = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.block(inputs), grad)
        return None, inputs.grad


RUN = {
    "plain": lambda block, inputs: block(inputs),
    "non-reentrant": lambda block, inputs: checkpoint(block, inputs, use_reentrant=False),
    "reentrant": lambda block, inputs: checkpoint(block, inputs, use_reentrant=True),
    "a function of its own": Recomputed.apply,
}


class Net(nn.Module):
    def __init__(self, run):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(oracles.FEATURES, 8), nn.Linear(8, oracles.CLASSES)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.run = run

    def forward(self, inputs):
        return self.last(RUN[self.run](self.block, torch.tanh(self.first(inputs))))


def trained(run, steps=4, **kwargs):
    model = Net(run)
    groups = kwargs.pop("groups", lambda model: model.parameters())(model)
    optimizer = ESAM(groups, torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.5, model=model, **kwargs)
    for step in range(steps):
        optimizer.step(lambda x, y: cross_entropy(model(x), y), *oracles.batch(seed=step))
    return oracles.weights_of(model)


def only_the_norm_of_the_last(model):
    return [
        {"params": [*model.first.parameters(), *model.block[0].parameters()], "rho": 0.0},
        {"params": [*model.block[2].parameters(), *model.last.parameters()]},
    ]


SETTINGS = {
    "SAM": {"beta": 1.0, "gamma": 1.0},
    "half of B": {"beta": 1.0, "gamma": 0.5},
    "element masks": {"mask": "element", "beta": 0.5},
    "first order": {"beta": 1.0, "gamma": 0.5, "ranking": "first_order"},
    "some groups": {"beta": 1.0, "groups": only_the_norm_of_the_last},
    "micro batches": {"beta": 1.0},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("run", ["non-reentrant", "reentrant", "a function of its own"])
def test_checkpointing_changes_no_weight(run, settings):
    assert oracles.same_bits(trained("plain", **SETTINGS[settings]), trained(run, **SETTINGS[settings]))


@pytest.mark.parametrize("run", ["non-reentrant", "a function of its own"])
def test_drawn_tensors_inside_a_checkpoint_are_perturbed(run):
    assert oracles.same_bits(trained("plain", 8, beta=0.5), trained(run, 8, beta=0.5))


def test_reentrant_checkpointing_of_drawn_tensors_is_refused_before_anything_is_changed():
    model = Net("reentrant")
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, beta=0.5, model=model)
    message = r'use_reentrant=False, or build the optimizer with mask="element" or beta=1'
    loss = oracles.losses_of(model)(*oracles.batch()).mean()
    oracles.assert_refused(lambda: optimizer.backward(loss), RuntimeError, message, model, optimizer)
    call = lambda: optimizer.step(oracles.losses_of(model), *oracles.batch())  # noqa: E731
    oracles.assert_refused(call, RuntimeError, message, model, optimizer)


def test_a_step_that_happens_to_draw_everything_takes_reentrant_checkpoints(monkeypatch):
    monkeypatch.setattr(TensorDraw, "chosen", lambda self, candidates, *_: list(candidates))
    model = Net("reentrant")
    ESAM(model.parameters(), torch.optim.SGD, lr=0.1, beta=0.5).step(oracles.losses_of(model), *oracles.batch())


def test_where_everything_is_drawn_the_backward_is_a_plain_one(monkeypatch):
    seen = []
    backward = torch.Tensor.backward
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda self, **kwargs: seen.append(kwargs) or backward(self, **kwargs)
    )
    model = oracles.mlp()
    SAM(model.parameters(), torch.optim.SGD, lr=0.1).step(oracles.losses_of(model), *oracles.batch())
    assert seen == [{}, {}]


def test_gradients_of_parameters_that_are_not_drawn_stay_as_they_were():
    """Also where a plain backward has to compute them."""
    model = Net("a function of its own")
    optimizer = ESAM(only_the_norm_of_the_last(model), torch.optim.SGD, lr=0.1, beta=1.0)
    kept = torch.full_like(model.first.weight, 3.0)
    model.first.weight.grad = kept
    optimizer.backward(oracles.losses_of(model)(*oracles.batch()).mean())
    assert model.first.weight.grad is kept
    assert torch.equal(kept, torch.full_like(kept, 3.0))
    assert model.first.bias.grad is None
    assert model.block[0].weight.grad is None
    assert model.block[2].weight.grad is not None


@pytest.mark.parametrize("beta", [1.0, 0.6])
@pytest.mark.parametrize("run", ["plain", "non-reentrant", "reentrant", "a function of its own"])
def test_what_another_optimizer_holds_gets_the_gradients_of_pass_2_alone(run, beta):
    """In a step and in a loop of one's own: pass 1 leaves no gradient in it, and takes none away."""
    net = Net(run)
    mask = "element" if run == "reentrant" else "tensor"
    settings = {"lr": 0.1, "rho": 0.5, "beta": beta, "gamma": 1.0, "mask": mask, "backend": "reference"}
    own = [*net.block.parameters(), *net.last.parameters()]
    optimizer = ESAM(own, torch.optim.SGD, **settings)
    inputs, target = oracles.batch()
    losses = oracles.losses_of(net)

    optimizer.backward(losses(inputs, target).mean())
    assert net.first.weight.grad is None
    net.first.weight.grad = kept = torch.full_like(net.first.weight, 3.0)
    optimizer.zero_grad()
    optimizer.backward(losses(inputs, target).mean())
    assert net.first.weight.grad is kept
    assert torch.equal(kept, torch.full_like(kept, 3.0))
    optimizer.first_step(zero_grad=True)
    net.first.weight.grad = None
    losses(inputs, target).mean().backward()
    expected = net.first.weight.grad.clone()
    optimizer.restore()

    net.first.weight.grad = None
    optimizer._perturbation.step = 0  # draws the same once more
    optimizer.step(losses, inputs, target)
    assert torch.equal(net.first.weight.grad, expected)


@pytest.mark.parametrize("inspect", [inspect_graph, _inspect_graph])
def test_what_a_graph_hides(inspect):
    """Of parameters that take no part at all it cannot be said where a function in the graph is somebody's own."""
    unused = nn.Parameter(torch.ones(2))
    for run, expected in {
        "plain": (False, False, False),
        "non-reentrant": (False, False, False),
        "reentrant": (True, True, True),
        "a function of its own": (False, True, True),
    }.items():
        model = Net(run)
        loss = cross_entropy(model(oracles.batch()[0]), oracles.batch()[1]).mean()
        outside = [*model.first.parameters(), *model.last.parameters()]
        name = "CheckpointFunctionBackward"
        assert inspect(loss, outside, name) == (expected[0], False)
        assert inspect(loss, list(model.parameters()), name) == expected[:2]
        assert inspect(loss, [*outside, unused], name) == (expected[0], expected[2])


@pytest.mark.parametrize("find", [leaves, _leaves])
def test_the_leaves_of_a_graph(find):
    """Each once, however often it is used; without those that are known and those that are frozen."""
    used, twice, frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2)), torch.ones(2)
    output = ((used + frozen) * twice + twice).sum()
    assert [id(leaf) for leaf in find(output, [used, nn.Parameter(torch.ones(2))])] == [id(twice)]
    assert {id(leaf) for leaf in find(output, [])} == {id(used), id(twice)}
    assert find(output.detach(), []) == []
    assert find(used, []) == []
