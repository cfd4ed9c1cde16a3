"""Autocast, GradScaler, fused base optimizers and bf16 parameters with fp32 masters."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from small_training import assert_different, assert_same_bits, batch, losses_of, small_net, snapshot, three_phases
from torch import nn
from torch.optim.lr_scheduler import StepLR

from esam_kernels import ESAM, SAM, cross_entropy

BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2}),
    "fused sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "fused": True}),
    "fused adamw": (torch.optim.AdamW, {"lr": 1e-2, "fused": True}),
}
# A power of two: scaling by it and back is exact, so that the scaled steps have the bits of the plain ones.
SCALE = 1024.0


def build(base: str = "sgd", mask: str = "tensor", batch_norm: bool = True, **arguments):
    kind, kwargs = BASES[base]
    model = small_net(batch_norm=batch_norm)
    kwargs = {"rho": 0.3, **kwargs, **arguments}
    return model, ESAM(model.parameters(), kind, mask=mask, model=model, **kwargs)


def step_with_scaler(optimizer, scaler, losses, inputs, targets, way):
    if way == "step":
        optimizer.step(losses, inputs, targets, scaler=scaler)
    else:
        optimizer.zero_grad()
        three_phases(optimizer, losses, inputs, targets, scaler.scale)
        if way == "scaler.step(optimizer)":
            scaler.step(optimizer)
        elif way == "unscale, then scaler.step(optimizer)":
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
        else:
            optimizer.restore()
            scaler.step(optimizer.base_optimizer)
    scaler.update()


WAYS = ["step", "scaler.step(optimizer)", "unscale, then scaler.step(optimizer)", "restore, scaler.step(base)"]


# -- Autocast ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["tensor", "element"])
def test_autocast_around_the_whole_step_is_autocast_around_each_forward(mask):
    def train(around_all: bool):
        model, optimizer = build(mask=mask)

        def autocast(enabled: bool):
            # A disabled autocast would not do: it keeps the weights that a forward inside it has cached.
            return torch.autocast("cpu", torch.bfloat16) if enabled else contextlib.nullcontext()

        def losses(inputs, targets):
            with autocast(not around_all):
                return cross_entropy(model(inputs), targets)

        for number in range(5):
            with autocast(around_all):
                optimizer.step(losses, *batch(number))
        return snapshot(model)

    assert_same_bits(train(True), train(False))


def test_three_phases_in_one_autocast_see_the_perturbed_weights():
    model = small_net(batch_norm=False, dropout=0.0)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=2.0)
    inputs, targets = batch(0)
    with torch.autocast("cpu", torch.bfloat16):
        loss_before = losses_of(model)(inputs, targets).mean()
        loss_before.backward()
        optimizer.first_step(zero_grad=True)
        perturbed = losses_of(model)(inputs, targets).mean()
        optimizer.restore()
        restored = losses_of(model)(inputs, targets).mean()
    assert perturbed > loss_before
    assert torch.equal(restored, loss_before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_follows_float32_training(dtype):
    def train(enabled: bool):
        model, optimizer = build()

        def losses(inputs, targets):
            with torch.autocast("cpu", dtype, enabled=enabled):
                return cross_entropy(model(inputs), targets)

        return [optimizer.step(losses, *batch(number)).item() for number in range(20)]

    for low, full in zip(train(True), train(False)):
        assert low == pytest.approx(full, abs=0.1)


# -- GradScaler --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_a_scaled_step_is_counted_with_and_without_a_radius(rho):
    model, optimizer = build(rho=rho)
    for number in range(3):
        optimizer.step(losses_of(model), *batch(number), scaler=torch.amp.GradScaler("cpu", init_scale=SCALE))
        assert optimizer.state_dict()["esam"]["step"] == number + 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("mask", ["tensor", "element"])
def test_grad_scaler_changes_nothing_while_gradients_are_finite(base, way, mask):
    # A bias before BatchNorm has a gradient of rounding errors, which Adam makes a step of.
    plain_model, plain = build(base, mask, batch_norm=False)
    scaled_model, scaled = build(base, mask, batch_norm=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    for number in range(4):
        torch.manual_seed(number)
        plain.step(losses_of(plain_model), *batch(number))
        torch.manual_seed(number)
        step_with_scaler(scaled, scaler, losses_of(scaled_model), *batch(number), way)
    if base != "sgd":  # an update that is fused, by torch or by a backend, rounds in another order
        for name, value in snapshot(plain_model).items():
            torch.testing.assert_close(snapshot(scaled_model)[name], value, rtol=1e-5, atol=1e-6)
    else:
        assert_same_bits(snapshot(plain_model), snapshot(scaled_model))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("base", BASES)
def test_a_nan_batch_is_skipped_and_the_scale_backs_off(base, way):
    model, optimizer = build(base, gamma=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    losses = losses_of(model)
    step_with_scaler(optimizer, scaler, losses, *batch(0), way)
    weights = [param.detach().clone() for param in model.parameters()]
    state = {
        i: value.clone()
        for i, param in enumerate(model.parameters())
        for value in [optimizer.state[param].get("momentum_buffer", optimizer.state[param].get("exp_avg"))]
    }
    inputs, targets = batch(1)
    step_with_scaler(optimizer, scaler, losses, torch.full_like(inputs, math.nan), targets, way)
    for i, param in enumerate(model.parameters()):
        assert torch.equal(param, weights[i])
        held = optimizer.state[param].get("momentum_buffer", optimizer.state[param].get("exp_avg"))
        assert torch.equal(held, state[i])
    assert scaler.get_scale() == SCALE / 2

    model[1].reset_running_stats()  # the NaN batch was seen by BatchNorm, as it is without ESAM
    step_with_scaler(optimizer, scaler, losses, *batch(2), way)
    assert all(param.isfinite().all() for param in model.parameters())
    assert_different(dict(enumerate(weights)), dict(enumerate(model.parameters())))


def poison(losses, calls: set[int]):
    """``losses``, whose gradients (but not whose values) are infinite in the calls with these numbers."""
    count = iter(range(1_000_000))

    def poisoned(inputs, targets):
        result = losses(inputs, targets)
        if next(count) in calls and result.requires_grad:
            result.register_hook(lambda grad: torch.full_like(grad, math.inf))
        return result

    return poisoned


# A step calls the closure three times: for the first gradient, for the losses at w + e, for the second gradient.
@pytest.mark.parametrize("call", [0, 2], ids=["first gradient", "second gradient"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("micro_batch", [None, 16, 8])
def test_step_skips_the_update_if_either_gradient_is_not_finite(base, call, micro_batch):
    model, optimizer = build(base)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    weights = dict(enumerate(param.detach().clone() for param in model.parameters()))
    optimizer.step(
        poison(losses_of(model), {call}), *batch(0), scaler=scaler, micro_batch=micro_batch, max_grad_norm=1.0
    )
    scaler.update()
    assert_same_bits(weights, dict(enumerate(model.parameters())))
    assert scaler.get_scale() == SCALE / 2
    optimizer.step(losses_of(model), *batch(0), scaler=scaler)
    assert_different(weights, dict(enumerate(model.parameters())))


def test_without_a_scaler_a_first_gradient_that_is_not_finite_leaves_a_plain_step():
    model, optimizer = build(gamma=1.0)
    optimizer.step(poison(losses_of(model), {0}), *batch(0))
    plain = small_net()
    base = torch.optim.SGD(plain.parameters(), **BASES["sgd"][1])
    torch.manual_seed(0)
    small_net()  # draws as build() did
    losses_of(plain)(*batch(0)).mean()
    losses_of(plain)(*batch(0)).mean().backward()
    base.step()
    weights = {name: value for name, value in snapshot(plain).items() if "running" not in name and "num" not in name}
    assert_same_bits(weights, {name: value for name, value in snapshot(model).items() if name in weights})


@pytest.mark.parametrize("way", ["scaler.step(optimizer)", "restore, scaler.step(base)"])
def test_a_second_gradient_that_overflows_leaves_the_weights_restored(way):
    model, optimizer = build()
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    weights = dict(enumerate(param.detach().clone() for param in model.parameters()))
    step_with_scaler(optimizer, scaler, poison(losses_of(model), {2}), *batch(0), way)
    assert_same_bits(weights, dict(enumerate(model.parameters())))
    optimizer.state_dict()  # refuses while the weights are perturbed


def test_a_disabled_scaler_is_no_scaler():
    plain_model, plain = build()
    model, optimizer = build()
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    for number, way in enumerate(WAYS[:2]):
        torch.manual_seed(number)
        plain.step(losses_of(plain_model), *batch(number))
        torch.manual_seed(number)
        step_with_scaler(optimizer, disabled, losses_of(model), *batch(number), way)
    torch.manual_seed(9)
    plain.step(poison(losses_of(plain_model), {0}), *batch(9))
    torch.manual_seed(9)
    optimizer.step(poison(losses_of(model), {0}), *batch(9), scaler=disabled)
    assert_same_bits(snapshot(plain_model), snapshot(model))


def test_scaled_gradients_are_clipped_after_unscaling():
    plain_model, plain = build()
    model, optimizer = build()
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    torch.manual_seed(0)
    plain.step(losses_of(plain_model), *batch(0), max_grad_norm=0.1)
    torch.manual_seed(0)
    optimizer.step(losses_of(model), *batch(0), max_grad_norm=0.1, scaler=scaler)
    assert_same_bits(snapshot(plain_model), snapshot(model))


@pytest.mark.parametrize("base", BASES)
def test_scaler_step_copies_a_gradient_that_somebody_else_holds_once(base, monkeypatch):
    model, optimizer = build(base, ascent="previous", beta=1.0, gamma=1.0)
    scaler, held, calls = torch.amp.GradScaler("cpu"), [], []
    ascent = optimizer._perturbation.ascent
    remember = ascent.remember
    monkeypatch.setattr(ascent, "remember", lambda params: calls.append(1) or remember(params))
    for number in range(2):
        optimizer.first_step()
        optimizer.zero_grad()
        scaler.scale(losses_of(model)(*batch(number)).mean()).backward()
        held += [param.grad for param in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
    assert len(calls) == 2
    assert all(param.grad is grad for param, grad in zip(model.parameters(), held[len(held) // 2 :]))


@pytest.mark.filterwarnings("error")
def test_scaler_step_counts_as_a_step_for_lr_schedulers():
    model, optimizer = build()
    scheduler = StepLR(optimizer, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    step_with_scaler(optimizer, scaler, losses_of(model), *batch(0), "scaler.step(optimizer)")
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


# -- bf16 parameters, fp32 masters -------------------------------------------------------------------------------------


class MasterSGD(torch.optim.Optimizer):
    """SGD with momentum on fp32 copies of low-precision parameters."""

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["master"] = param.float().clone()
                    state["momentum"] = torch.zeros_like(state["master"])
                state["momentum"].mul_(0.9).add_(param.grad.float())
                state["master"].sub_(group["lr"] * state["momentum"])
                param.copy_(state["master"])


@pytest.mark.parametrize("mask", ["tensor", "element"])
def test_bfloat16_parameters_stay_the_rounded_masters(mask):
    model = small_net(batch_norm=False).to(torch.bfloat16)
    optimizer = ESAM(model.parameters(), MasterSGD, lr=1e-3, rho=0.3, mask=mask)
    for number in range(20):
        inputs, targets = batch(number)
        optimizer.step(losses_of(model), inputs.to(torch.bfloat16), targets)
        for param in model.parameters():
            assert torch.equal(param, optimizer.state[param]["master"].to(torch.bfloat16))
    moved = [state["master"].sub(param.float()).abs().max() for param, state in optimizer.state.items()]
    assert max(moved) > 0, "the masters hold more than bf16 can"


def test_masters_are_updated_as_by_hand():
    def by_hand():
        model = small_net(batch_norm=False, dropout=0.0).to(torch.bfloat16)
        base = MasterSGD(model.parameters(), lr=1e-2)
        for number in range(5):
            inputs, targets = batch(number)
            inputs = inputs.to(torch.bfloat16)
            nn.functional.cross_entropy(model(inputs).float(), targets).backward()
            old = [param.detach().clone() for param in model.parameters()]
            norm = math.sqrt(sum(param.grad.double().square().sum().item() for param in model.parameters()))
            with torch.no_grad():
                for param in model.parameters():
                    param.copy_((param.double() + 0.3 * param.grad.double() / norm).float())
            base.zero_grad()
            nn.functional.cross_entropy(model(inputs).float(), targets).backward()
            with torch.no_grad():
                for param, value in zip(model.parameters(), old):
                    param.copy_(value)
            base.step()
            base.zero_grad()
        return snapshot(model)

    model = small_net(batch_norm=False, dropout=0.0).to(torch.bfloat16)
    optimizer = SAM(model.parameters(), MasterSGD, lr=1e-2, rho=0.3)
    for number in range(5):
        inputs, targets = batch(number)
        optimizer.step(losses_of(model), inputs.to(torch.bfloat16), targets)
    for name, value in by_hand().items():
        torch.testing.assert_close(snapshot(model)[name], value, rtol=2**-7, atol=1e-3)


# -- What a GradScaler cannot be asked for -----------------------------------------------------------------------------


@pytest.mark.parametrize("perturbed", [False, True])
def test_a_scaler_that_calls_a_closure_is_refused_and_changes_no_weight(perturbed):
    """The closure would scale its gradients after the scaler has looked at them."""
    model, optimizer = build(batch_norm=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    before = snapshot(model)

    def closure():
        loss = losses_of(model)(*batch(0)).mean()
        scaler.scale(loss).backward()
        return loss

    closure()
    if perturbed:
        optimizer.first_step(zero_grad=True)
        closure()
    with pytest.raises(RuntimeError, match=r"would scale the gradients twice.*scaler=scaler"):
        scaler.step(optimizer, closure)
    optimizer.restore()
    assert_same_bits(before, snapshot(model))


def test_a_disabled_scaler_takes_a_closure():
    model, optimizer = build(batch_norm=False)
    other, expected = build(batch_norm=False)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for which, its, step in (
        (model, optimizer, lambda closure: scaler.step(optimizer, closure)),
        (other, expected, expected.step),
    ):

        def closure():
            its.zero_grad()
            loss = losses_of(which)(*batch(0)).mean()
            loss.backward()
            return loss

        torch.manual_seed(0)
        step(closure)
    assert_same_bits(snapshot(model), snapshot(other))


def test_a_step_without_a_closure_at_rate_zero_is_the_base_optimizers_and_says_so_once(caplog):
    """torch.distributed.checkpoint makes an optimizer create its state in this way."""
    model, optimizer = build("adamw")
    optimizer.param_groups[0]["lr"] = 0.0
    before = snapshot(model)
    losses_of(model)(*batch(0)).mean().backward()
    with caplog.at_level("WARNING", logger="esam_kernels"):
        for _ in range(2):
            optimizer.step()
    assert [record.message.count("base optimizer's step alone") for record in caplog.records] == [1]
    assert len(optimizer.state) == len(list(model.parameters()))
    after = snapshot(model)
    assert_same_bits(*({name: state[name] for name, _ in model.named_parameters()} for state in (before, after)))
    optimizer.param_groups[0]["lr"] = 0.1
    with pytest.raises(RuntimeError, match="step needs a closure"):
        optimizer.step()
