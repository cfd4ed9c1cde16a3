"""``make_graphed_step`` where there is no CUDA device: the same script runs, eagerly."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from esam_kernels import ESAM, cross_entropy, make_graphed_step

INPUTS = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(8) % 3


def build() -> tuple[nn.Module, ESAM]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    return model, ESAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)


def losses_of(model: nn.Module):
    def losses(inputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(model(inputs), targets)

    return losses


def weights(model: nn.Module) -> Tensor:
    return torch.cat([param.detach().flatten() for param in model.parameters()])


def test_on_the_cpu_it_runs_the_eager_step_and_says_so_in_one_line(caplog):
    (model, optimizer), (plain_model, plain) = build(), build()
    losses, plain_losses = losses_of(model), losses_of(plain_model)
    with caplog.at_level(logging.WARNING, logger="esam_kernels"):
        step = make_graphed_step(optimizer, losses, INPUTS, TARGETS)
    assert [record.getMessage() for record in caplog.records] == [
        "make_graphed_step: the parameters are not on a CUDA device, so that every step runs eagerly"
    ]
    for size in (8, 8, 5):  # the last batch is a smaller one
        found = step(losses, INPUTS[:size], TARGETS[:size])
        expected = plain.step(plain_losses, INPUTS[:size], TARGETS[:size])
        assert torch.equal(found, expected)
    assert torch.equal(weights(model), weights(plain_model))


def test_the_closure_may_be_left_out_of_the_call():
    (model, optimizer), (other_model, other) = build(), build()
    losses, other_losses = losses_of(model), losses_of(other_model)
    make_graphed_step(optimizer, losses, INPUTS, TARGETS)(INPUTS, TARGETS)
    make_graphed_step(other, other_losses, INPUTS, TARGETS)(other_losses, INPUTS, TARGETS)
    assert torch.equal(weights(model), weights(other_model))


def test_the_closure_may_be_a_method():
    class Trainer:
        def __init__(self):
            self.model, self.optimizer = build()

        def losses(self, inputs, targets):
            return cross_entropy(self.model(inputs), targets)

    trainer, other = Trainer(), Trainer()
    step = make_graphed_step(trainer.optimizer, trainer.losses, INPUTS, TARGETS)
    expected = other.optimizer.step(other.losses, INPUTS, TARGETS)
    assert torch.equal(step(trainer.losses, INPUTS, TARGETS), expected)
    assert torch.equal(weights(trainer.model), weights(other.model))
    with pytest.raises(ValueError, match="made for another closure"):
        step(other.losses, INPUTS, TARGETS)


def test_another_closure_is_refused_and_nothing_is_changed():
    model, optimizer = build()
    step = make_graphed_step(optimizer, losses_of(model), INPUTS, TARGETS)
    before = weights(model)
    with pytest.raises(ValueError, match="made for another closure"):
        step(losses_of(model), INPUTS, TARGETS)
    assert torch.equal(weights(model), before)


def test_what_cannot_be_a_step_is_refused():
    model, optimizer = build()
    with pytest.raises(TypeError, match="must be an ESAM or SAM"):
        make_graphed_step(torch.optim.SGD(model.parameters(), lr=0.1), losses_of(model), INPUTS, TARGETS)
    with pytest.raises(TypeError, match="closure must be a function"):
        make_graphed_step(optimizer, INPUTS, TARGETS)
    with pytest.raises(ValueError, match="the batch is empty"):
        make_graphed_step(optimizer, losses_of(model), INPUTS[:0], TARGETS[:0])


def test_options_of_step_are_refused_and_nothing_is_changed():
    model, optimizer = build()
    step = make_graphed_step(optimizer, losses_of(model), INPUTS, TARGETS)
    before = weights(model)
    with pytest.raises(TypeError, match=r"no options, got max_grad_norm, micro_batch: call optimizer\.step"):
        step(INPUTS, TARGETS, micro_batch=2, max_grad_norm=1.0)
    assert torch.equal(weights(model), before)
