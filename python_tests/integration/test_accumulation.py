"""Accumulation, m-sharpness, clipping of the second gradient, and closures that return more than losses."""

from __future__ import annotations

import pytest
import torch
from small_training import assert_different, assert_same_bits, batch, losses_of, small_net, snapshot
from torch import nn

from esam_kernels import ESAM, RandomState, cross_entropy


def build(mask: str = "tensor", **arguments):
    model = small_net()
    settings = {"lr": 0.1, "momentum": 0.9, "rho": 0.3, "mask": mask, "model": model, **arguments}
    return model, ESAM(model.parameters(), torch.optim.SGD, **settings)


def gradients(model: nn.Module) -> list:
    return [param.grad for param in model.parameters()]


def m_sharpness_by_hand(model, optimizer, losses, inputs, targets, m):
    """Each part of m samples has its own perturbation and its own B+; one update."""
    parts = list(zip(inputs.split(m), targets.split(m)))
    selected = sum(max(1, round(optimizer.gamma * len(y))) for _, y in parts)
    weights = snapshot(model)
    summed: list = [None for _ in model.parameters()]
    for number, (x, y) in enumerate(parts, start=1):
        optimizer.zero_grad()
        noise = RandomState()
        loss_before = losses(x, y)
        optimizer.backward(loss_before.mean())
        optimizer.first_step(zero_grad=True)
        with torch.no_grad(), noise.replay():
            loss_after = losses(x, y)
        x, y = optimizer.select(loss_before, loss_after, x, y)
        (losses(x, y).sum() / selected).backward()
        summed = [
            grad if kept is None else kept if grad is None else kept + grad
            for kept, grad in zip(summed, gradients(model))
        ]
        if number < len(parts):
            optimizer.restore()
            restored = snapshot(model)
            assert_same_bits(
                {name: weights[name] for name, _ in model.named_parameters()},
                {name: restored[name] for name, _ in model.named_parameters()},
            )
    for param, grad in zip(model.parameters(), summed):
        param.grad = grad
    optimizer.second_step()


@pytest.mark.parametrize("mask", ["tensor", "element"])
@pytest.mark.parametrize("m", [4, 6, 16, 64])
def test_micro_batches_are_the_loop_written_by_hand(mask, m):
    model, optimizer = build(mask)
    by_hand_model, by_hand = build(mask)
    for number in range(3):
        torch.manual_seed(number)
        optimizer.step(losses_of(model), *batch(number), micro_batch=m)
        torch.manual_seed(number)
        m_sharpness_by_hand(by_hand_model, by_hand, losses_of(by_hand_model), *batch(number), m)
        for (name, value), other in zip(snapshot(model).items(), snapshot(by_hand_model).values()):
            torch.testing.assert_close(
                value, other, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_the_mean_of_float16_losses_over_micro_batches_does_not_overflow():
    model, optimizer = build(gamma=1.0)

    def losses(inputs, targets):
        return losses_of(model)(inputs, targets).half() + 20000.0

    loss = optimizer.step(losses, *batch(0), micro_batch=4)
    assert loss.dtype == torch.float16
    assert 20000 <= loss < 20064


def test_micro_batches_of_one_perturbation_each_differ_from_one_perturbation_of_all():
    model, optimizer = build(rho=1.0, gamma=1.0)
    other_model, other = build(rho=1.0, gamma=1.0)
    optimizer.step(losses_of(model), *batch(0), micro_batch=4)
    other.step(losses_of(other_model), *batch(0))
    assert_different(snapshot(model), snapshot(other_model))


def test_accumulation_with_one_perturbation_is_the_step_on_the_whole_batch():
    """The loop of docs/training.md: the first gradients add up, then the second ones; memory of one part at a time."""
    inputs, targets = batch(0)
    parts = list(zip(inputs.split(4), targets.split(4)))

    def build_without_noise():
        model = small_net(dropout=0.0, batch_norm=False)
        return model, ESAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.3)

    model, optimizer = build_without_noise()
    losses = losses_of(model)
    before = []
    for x, y in parts:
        before.append(losses(x, y))
        optimizer.backward(before[-1].sum() / len(targets))
    optimizer.first_step(zero_grad=True)
    with torch.no_grad():
        after = torch.cat([losses(x, y) for x, y in parts])
    chosen_inputs, chosen_targets = optimizer.select(torch.cat(before), after, inputs, targets)
    for x, y in zip(chosen_inputs.split(4), chosen_targets.split(4)):
        (losses(x, y).sum() / len(chosen_targets)).backward()
    optimizer.second_step()

    whole_model, whole = build_without_noise()
    whole.step(losses_of(whole_model), inputs, targets)
    for name, value in snapshot(whole_model).items():
        torch.testing.assert_close(snapshot(model)[name], value, rtol=1e-5, atol=1e-6)


# -- Clipping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [None, 8])
def test_max_grad_norm_clips_the_second_gradient_and_leaves_the_perturbation(micro_batch):
    model, optimizer = build(lr=1.0, momentum=0.0)
    free_model, free = build(lr=1.0, momentum=0.0)
    before = snapshot(model)
    seen = []

    def watched(inputs, targets):
        result = losses_of(model)(inputs, targets)
        seen.append(result.detach())
        return result

    def watched_free(inputs, targets):
        result = losses_of(free_model)(inputs, targets)
        seen.append(result.detach())
        return result

    torch.manual_seed(1)
    optimizer.step(watched, *batch(0), max_grad_norm=1e-3, micro_batch=micro_batch)
    torch.manual_seed(1)
    free.step(watched_free, *batch(0), micro_batch=micro_batch)
    half = len(seen) // 2
    assert all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:])), "the passes are those without clipping"
    moved = [snapshot(model)[name] - before[name] for name, _ in model.named_parameters()]
    assert nn.utils.get_total_norm(moved) == pytest.approx(1e-3, rel=1e-3)
    unclipped = gradients(free_model)
    scale = 1e-3 / nn.utils.get_total_norm(unclipped)
    for step, gradient in zip(moved, unclipped):
        torch.testing.assert_close(step, -scale * gradient, rtol=1e-3, atol=1e-7)


# -- Closures that return more -----------------------------------------------------------------------------------------


def test_what_a_closure_returns_besides_comes_from_the_unperturbed_pass():
    model, optimizer = build()
    inputs, targets = batch(0)
    torch.manual_seed(3)
    expected = model(inputs).detach()
    model.load_state_dict(small_net().state_dict())

    def losses(inputs, targets):
        logits = model(inputs)
        return cross_entropy(logits, targets), logits.detach(), "tag"

    torch.manual_seed(3)
    loss, (logits, tag) = optimizer.step(losses, inputs, targets)
    assert torch.equal(logits, expected)
    assert tag == "tag"
    torch.testing.assert_close(loss, cross_entropy(expected, targets).mean())


def test_one_extra_value_is_returned_bare_and_micro_batches_return_one_each():
    model, optimizer = build()

    def losses(inputs, targets):
        return losses_of(model)(inputs, targets), {"samples": len(targets)}

    _, extra = optimizer.step(losses, *batch(0))
    assert extra == {"samples": 16}
    _, extras = optimizer.step(losses, *batch(0), micro_batch=6)
    assert extras == [{"samples": 6}, {"samples": 6}, {"samples": 4}]


def test_several_losses_add_up_per_sample():
    model = small_net(dropout=0.0)
    head = nn.Linear(4, 2)
    params = [*model.parameters(), *head.parameters()]
    optimizer = ESAM(params, torch.optim.SGD, lr=0.1, rho=0.3, gamma=0.5, beta=1.0)
    inputs, targets = batch(0)
    used = []

    def losses(inputs, targets):
        logits = model(inputs)
        classification = cross_entropy(logits, targets)
        regression = (head(logits) - inputs[:, :2]).square().mean(dim=1)
        used.append(len(inputs))
        return classification + 0.1 * regression, (classification.detach().mean(), regression.detach().mean())

    loss, (classification, regression) = optimizer.step(losses, inputs, targets)
    assert used == [16, 16, 8]
    torch.testing.assert_close(loss, classification + 0.1 * regression)
    assert all(param.grad is not None for param in params)
