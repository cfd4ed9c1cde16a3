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


def test_outputs_of_the_closure_are_returned_detached():
    model, optimizer = build()

    def losses(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(inputs)
        return cross_entropy(logits, targets), logits

    expected = model(INPUTS)
    loss, logits = make_graphed_step(optimizer, losses, INPUTS, TARGETS)(INPUTS, TARGETS)
    assert torch.equal(logits, expected)
    assert (loss.requires_grad, logits.requires_grad) == (False, False)


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
    with pytest.raises(ValueError, match=r"closure is another '.*Trainer\.losses', and this step was made for '"):
        step(other.losses, INPUTS, TARGETS)


def test_another_closure_is_refused_and_nothing_is_changed():
    model, optimizer = build()
    step = make_graphed_step(optimizer, losses_of(model), INPUTS, TARGETS)
    before = weights(model)
    message = r"closure is another 'losses_of.*', and .*: a graph holds one closure. .* leave it out of the call, step"
    with pytest.raises(ValueError, match=message):
        step(losses_of(model), INPUTS, TARGETS)
    assert torch.equal(weights(model), before)


CALL = r"make_graphed_step\(optimizer, losses, inputs, targets\)"
NOT_A_STEP = {
    "a plain optimizer": (
        lambda model, _: (torch.optim.SGD(model.parameters(), lr=0.1), losses_of(model), INPUTS, TARGETS),
        TypeError,
        f"optimizer must be an ESAM or SAM, got a SGD. Call {CALL} with an ESAM or SAM as the first argument, such as "
        r"ESAM\(model.parameters\(\), torch.optim.SGD, ...\), which holds the SGD",
    ),
    "the closure first": (
        lambda model, optimizer: (losses_of(model), optimizer, INPUTS, TARGETS),
        TypeError,
        f"optimizer must be an ESAM or SAM, got a function. Call {CALL} with an ESAM or SAM as the first argument$",
    ),
    "no closure": (
        lambda _, optimizer: (optimizer, INPUTS, TARGETS),
        TypeError,
        f"closure must be a function of the batch that returns one loss per sample, got a Tensor. Call {CALL}, where",
    ),
    "no batch": (
        lambda model, optimizer: (optimizer, losses_of(model)),
        TypeError,
        f"sample_batch is missing: .* Give a batch of the usual shape, {CALL}",
    ),
    "an empty batch": (
        lambda model, optimizer: (optimizer, losses_of(model), INPUTS[:0], TARGETS[:0]),
        ValueError,
        f"sample_batch cannot be used: the batch is empty. Give a batch of the usual shape, {CALL}",
    ),
    "two sizes": (
        lambda model, optimizer: (optimizer, losses_of(model), INPUTS, TARGETS[:5]),
        ValueError,
        r"sample_batch cannot be used: the tensors of the batch have different numbers of samples: \[8, 5\]. Give",
    ),
    "no tensors": (
        lambda model, optimizer: (optimizer, losses_of(model), range(8)),
        TypeError,
        "sample_batch cannot be used: the batch holds a range: give tensors, .* Give a batch of the usual shape",
    ),
}


@pytest.mark.parametrize("case", NOT_A_STEP)
def test_what_cannot_be_a_step_is_refused(case):
    arguments, kind, message = NOT_A_STEP[case]
    model, optimizer = build()
    before = weights(model)
    with pytest.raises(kind, match=message):
        make_graphed_step(*arguments(model, optimizer))
    assert torch.equal(weights(model), before)


def test_options_of_step_are_refused_and_nothing_is_changed():
    model, optimizer = build()
    step = make_graphed_step(optimizer, losses_of(model), INPUTS, TARGETS)
    before = weights(model)
    message = (
        "takes a batch, by position, and no named arguments, got max_grad_norm, micro_batch. .* call "
        r"optimizer.step\(closure, \*batch, max_grad_norm=..., micro_batch=...\)"
    )
    with pytest.raises(TypeError, match=message):
        step(INPUTS, TARGETS, micro_batch=2, max_grad_norm=1.0)
    with pytest.raises(TypeError, match=r"no named arguments, got targets. Call it as step\(inputs, targets\)"):
        step(INPUTS, targets=TARGETS)
    assert torch.equal(weights(model), before)
