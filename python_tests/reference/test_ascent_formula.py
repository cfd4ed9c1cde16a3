"""One pass a step with every setting of e, against the formulas in float64: e, the gradient there, and the update."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from torch import Tensor, nn

from esam_kernels import ESAM, backends, cross_entropy
from esam_kernels.perturbation.ascent import PreviousGradient
from esam_kernels.schedules import CosineSchedule, LinearSchedule

INPUTS = torch.randn(24, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TARGETS = torch.arange(24) % 5
STEPS = 6
SEED = 3
LR, MOMENTUM = 0.05, 0.9
ADAM_LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.99), 1e-8, 0.1  # eps is torch's default: ESAM has one of its own
BASES = {
    "SGD": (torch.optim.SGD, {"lr": LR, "momentum": MOMENTUM}),
    "AdamW": (torch.optim.AdamW, {"lr": ADAM_LR, "betas": BETAS, "weight_decay": DECAY}),
}

# Weight and bias of the first layer are one group, those of the second the other: what each has of its own, the rest of
# the arguments, and rho of the two groups at step t.
CASES = {
    "adaptive": (({}, {}), {"adaptive": True, "eta": 0.01, "rho": 0.5}, lambda t: (0.5, 0.5)),
    "released": (({}, {}), {"radius": "released", "beta": 0.5, "rho": 0.3}, lambda t: (0.3, 0.3)),
    "paper": (({}, {}), {"radius": "paper", "beta": 0.5, "rho": 0.3}, lambda t: (0.3, 0.3)),
    "two groups": (({"rho": 0.2}, {"rho": 0.7}), {}, lambda t: (0.2, 0.7)),
    "two groups, one adaptive": (({"rho": 0.2}, {"rho": 0.7, "adaptive": True}), {"eta": 0.1}, lambda t: (0.2, 0.7)),
    "linear": (({}, {}), {}, lambda t: (0.4 - 0.3 * min(t / 4, 1.0),) * 2),
    "cosine": (({}, {}), {"beta": 0.5}, lambda t: (0.1 + 0.3 * (1 + math.cos(math.pi * min(t / 4, 1.0))) / 2,) * 2),
}
SCHEDULES = {
    "linear": lambda optimizer: LinearSchedule(optimizer, "rho", 0.4, 0.1, total_iters=4),
    "cosine": lambda optimizer: CosineSchedule(optimizer, "rho", 0.4, 0.1, total_iters=4),
}


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 5)).double()


def weights_by_step(ascent: str, base: str, case: str, backend: str) -> list[list[Tensor]]:
    """What the package makes of it."""
    groups, options, _ = CASES[case]
    model = build()
    params = [
        {"params": list(layer.parameters()), **own} for layer, own in zip((model[0], model[2]), groups, strict=True)
    ]
    kind, arguments = BASES[base]
    options = {"beta": 1.0, "gamma": 1.0, "seed": SEED, **options}
    optimizer = ESAM(params, kind, ascent=ascent, backend=backend, **options, **arguments)
    schedule = SCHEDULES[case](optimizer) if case in SCHEDULES else None
    seen = []
    for _ in range(STEPS):
        optimizer.step(lambda inputs, targets: cross_entropy(model(inputs), targets), INPUTS, TARGETS)
        if schedule is not None:
            schedule.step()
        seen.append([param.detach().clone() for param in model.parameters()])
    return seen


def gradients_at(weights: list[Tensor]) -> list[Tensor]:
    leaves = [weight.clone().requires_grad_() for weight in weights]
    first, bias, second, other_bias = leaves
    logits = torch.tanh(INPUTS @ first.T + bias) @ second.T + other_bias
    loss = -(logits - logits.exp().sum(1, keepdim=True).log())[torch.arange(len(TARGETS)), TARGETS].mean()
    return list(torch.autograd.grad(loss, leaves))


def perturbation_at(case: str, step: int, weights: list[Tensor], along: list[Tensor], sign: float) -> list[Tensor]:
    groups, options, rho = CASES[case]
    beta = options.get("beta", 1.0)
    drawn = oracles.drawn_tensors(SEED, step, beta, 4) if beta < 1.0 else range(4)
    seen = [i in drawn for i in range(4)]
    adaptive = [group.get("adaptive", options.get("adaptive", False)) for group in groups]
    e = oracles.perturbation(
        weights,
        along,
        rho=[rho(step)[i // 2] for i in range(4)],
        beta=beta,
        mask=[torch.full_like(weight, float(is_seen)) for weight, is_seen in zip(weights, seen)],
        seen=seen,
        adaptive=[adaptive[i // 2] for i in range(4)],
        eta=options.get("eta", 0.0),
        norm_factor=1.0 if options.get("radius") == "released" else 1.0 / math.sqrt(beta),
    )
    return [sign * each for each in e]


def expected_by_step(ascent: str, base: str, case: str) -> list[list[Tensor]]:
    """w + e along the gradient of the step before or against the momentum; the gradient there; the update from w."""
    weights = [param.detach().clone() for param in build().parameters()]
    first = [torch.zeros_like(weight) for weight in weights]
    second, last = first, first
    seen = []
    for t in range(STEPS):
        along, sign = (last, 1.0) if ascent == "previous" else (first, -1.0)
        e = perturbation_at(case, t, weights, along, sign)
        last = gradients_at([w + each for w, each in zip(weights, e)])
        if base == "SGD":
            first = [MOMENTUM * v + g for v, g in zip(first, last)]
            weights = [w - LR * v for w, v in zip(weights, first)]
        else:
            first = [BETAS[0] * m + (1 - BETAS[0]) * g for m, g in zip(first, last)]
            second = [BETAS[1] * v + (1 - BETAS[1]) * g**2 for v, g in zip(second, last)]
            c1, c2 = (1 - beta ** (t + 1) for beta in BETAS)
            weights = [
                w - ADAM_LR * DECAY * w - ADAM_LR * (m / c1) / ((v / c2).sqrt() + EPS)
                for w, m, v in zip(weights, first, second)
            ]
        seen.append(weights)
    return seen


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("ascent", ["previous", "momentum"])
def test_every_step_is_the_formulas(ascent, base, case, backend):
    if backends.unavailable(backend, torch.device("cpu")) is not None:
        pytest.skip(f"{backend} is not available")
    found, expected = weights_by_step(ascent, base, case, backend), expected_by_step(ascent, base, case)
    assert len(found) == STEPS
    for weights, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(weights, wanted, rtol=1e-10, atol=1e-12)


def test_the_draws_of_these_steps_differ_and_leave_tensors_out():
    draws = [tuple(oracles.drawn_tensors(SEED, t, 0.5, 4)) for t in range(1, STEPS)]
    assert len(set(draws)) > 2
    assert all(len(draw) < 4 for draw in draws)


def test_a_captured_steps_history_stays_in_its_place_whether_it_is_drawn_or_not():
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    ascent = PreviousGradient()
    ascent.in_place = True
    places = []
    for step in range(4):
        for number, param in enumerate(params):
            param.grad = torch.full_like(param, 10.0 * number + step)
        ascent.directions(params, [0], torch.optim.SGD(params))
        ascent.remember(params)
        history = ascent.state()
        assert [history[number].tolist() for number in range(2)] == [[step] * 3, [10.0 + step] * 3]
        places.append([history[number].data_ptr() for number in range(2)])
    assert places == [places[0]] * 4
