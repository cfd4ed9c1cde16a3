"""The whole of Algorithm 1, masks and data selection included, against an independent float64 oracle."""

import math

import oracles
import pytest
import torch

from esam_kernels import ESAM, cross_entropy

STEPS = 8
RHO = 0.2


class Oracle:
    """Algorithm 1 of Du et al. in float64, with SGD and momentum."""

    def __init__(self, model, *, beta, gamma, mask, radius, seed):
        self.weights = [w.double() for w in oracles.weights_of(model)]
        self.sgd = oracles.SGD(lr=0.1, momentum=0.9, weight_decay=1e-3)
        self.beta, self.gamma, self.mask, self.radius, self.seed = beta, gamma, mask, radius, seed
        self.step_number = 0

    def losses(self, weights, inputs, target):
        return oracles.mlp_losses(weights, inputs, target)

    def gradients(self, weights, inputs, target):
        weights = [w.clone().requires_grad_() for w in weights]
        return list(torch.autograd.grad(self.losses(weights, inputs, target).mean(), weights))

    def perturbation(self, grads):
        n, step = len(self.weights), self.step_number
        masks, seen, factor = [torch.ones_like(w) for w in self.weights], [True] * n, 1.0
        if self.mask == "element":
            offsets = oracles.element_offsets([w.numel() for w in self.weights])
            masks = [
                oracles.element_mask(self.seed, step, self.beta, offset, w.numel()).reshape(w.shape).double()
                for w, offset in zip(self.weights, offsets)
            ]
        else:
            drawn = oracles.drawn_tensors(self.seed, step, self.beta, n)
            seen = [i in drawn for i in range(n)]
            masks = [m * float(s) for m, s in zip(masks, seen)]
            factor = 1 / math.sqrt(self.beta) if self.radius == "paper" else 1.0
        return oracles.perturbation(
            self.weights,
            grads,
            rho=[RHO] * n,
            beta=self.beta,
            mask=masks,
            seen=seen,
            adaptive=[False] * n,
            norm_factor=factor,
        )

    def step(self, inputs, target):
        e = self.perturbation(self.gradients(self.weights, inputs, target))
        perturbed = [w + d for w, d in zip(self.weights, e)]
        before = self.losses(self.weights, inputs, target)
        after = self.losses(perturbed, inputs, target)
        k = max(1, round(self.gamma * len(target)))
        self.chosen = oracles.ranked(before.tolist(), after.tolist(), k)
        grads = self.gradients(perturbed, inputs[self.chosen], target[self.chosen])
        self.weights = self.sgd.update(self.weights, grads)
        self.step_number += 1
        return before.mean()


SETTINGS = [
    ("element", "paper", 0.6, 0.5),
    ("element", "paper", 0.3, 1.0),
    ("tensor", "paper", 0.6, 0.5),
    ("tensor", "paper", 0.3, 0.25),
    ("tensor", "released", 0.6, 0.5),
    ("tensor", "released", 1.0, 0.5),
]


def build(model, mask, radius, beta, gamma):
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
    return ESAM(
        model.parameters(),
        torch.optim.SGD,
        rho=RHO,
        beta=beta,
        gamma=gamma,
        mask=mask,
        radius=radius,
        seed=11,
        **options,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("mask", "radius", "beta", "gamma"), SETTINGS)
def test_step_is_algorithm_1(mask, radius, beta, gamma, dtype):
    model = oracles.mlp(dtype=dtype)
    oracle = Oracle(model, beta=beta, gamma=gamma, mask=mask, radius=radius, seed=11)
    optimizer = build(model, mask, radius, beta, gamma)
    seen = []

    def losses(inputs, target):
        seen.append(inputs)
        return cross_entropy(model(inputs), target)

    exact = dtype == torch.float64
    for step in range(STEPS):
        inputs, target = oracles.batch(20, seed=step, dtype=dtype)
        loss = optimizer.step(losses, inputs, target)
        expected = oracle.step(inputs.double(), target)
        assert torch.equal(seen[-1], inputs[oracle.chosen])
        torch.testing.assert_close(loss.double(), expected, rtol=1e-10 if exact else 1e-5, atol=0.0)
    assert len(seen) == STEPS * (3 if gamma < 1.0 else 2)
    for weight, expected in zip(model.parameters(), oracle.weights):
        tolerance = {"rtol": 1e-9, "atol": 1e-12} if exact else {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(weight.detach().double(), expected, **tolerance)


@pytest.mark.parametrize(("mask", "radius", "beta", "gamma"), SETTINGS)
@pytest.mark.parametrize("zero_grad", [False, True])
def test_the_loop_written_by_hand_is_step_bit_for_bit(mask, radius, beta, gamma, zero_grad):
    models = [oracles.mlp(), oracles.mlp()]
    whole, by_hand = (build(model, mask, radius, beta, gamma) for model in models)
    losses = oracles.losses_of(models[1])
    for step in range(STEPS):
        inputs, target = oracles.batch(20, seed=step)
        whole.step(oracles.losses_of(models[0]), inputs, target)

        loss_before = losses(inputs, target)
        by_hand.backward(loss_before.mean())
        by_hand.first_step(zero_grad=zero_grad)
        by_hand.zero_grad()
        with torch.no_grad():
            loss_after = losses(inputs, target)
        inputs, target = by_hand.select(loss_before, loss_after, inputs, target)
        losses(inputs, target).mean().backward()
        by_hand.second_step(zero_grad=True)
    assert oracles.same_bits(*map(oracles.weights_of, models))


def test_gamma_may_change_between_steps_and_k_follows():
    model = oracles.mlp()
    optimizer = build(model, "tensor", "paper", 0.6, 1.0)
    sizes = []

    def losses(inputs, target):
        sizes.append(len(target))
        return cross_entropy(model(inputs), target)

    for gamma in (1.0, 0.5, 0.21, 0.01):
        optimizer.gamma = gamma
        optimizer.step(losses, *oracles.batch(20))
    assert sizes == [20, 20, 20, 20, 10, 20, 20, 4, 20, 20, 1]


def test_micro_batches_are_algorithm_1_on_each_part_with_the_gradients_of_all_selected_samples():
    """With e as good as zero and gamma = 1 the parts add up to the gradient of the whole batch."""
    model = oracles.mlp(dtype=torch.float64)
    plain = oracles.mlp(dtype=torch.float64)
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.0, gamma=1.0)
    data = oracles.batch(20, dtype=torch.float64)
    loss = optimizer.step(oracles.losses_of(model), *data, micro_batch=7)
    expected = oracles.losses_of(plain)(*data).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0.0)
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    for left, right in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-14)


def test_gradient_clipping_limits_the_second_gradient():
    model = oracles.mlp()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=1.0, rho=0.1)
    before = torch.cat([w.flatten() for w in oracles.weights_of(model)])
    optimizer.step(oracles.losses_of(model), *oracles.batch(), max_grad_norm=0.01)
    after = torch.cat([w.flatten() for w in oracles.weights_of(model)])
    assert (after - before).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_what_else_the_closure_returns_comes_back_from_the_first_pass():
    model = oracles.mlp()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=5.0)
    inputs, target = oracles.batch()
    expected = model(inputs).detach()

    def losses(inputs, target):
        logits = model(inputs)
        return cross_entropy(logits, target), logits.detach()

    loss, logits = optimizer.step(losses, inputs, target)
    assert torch.equal(logits, expected)
    assert loss.item() == cross_entropy(expected, target).mean().item()


@pytest.mark.parametrize("settings", [{}, {"gamma": 1.0, "ascent_share": 0.5}, {"rho": 0.0}], ids=str)
def test_none_beside_the_losses_comes_back_as_none(settings):
    model = oracles.mlp()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, **settings)
    inputs, target = oracles.batch()

    def losses(inputs, target):
        return oracles.losses_of(model)(inputs, target), None if len(inputs) > 2 else "few"

    _, rest = optimizer.step(losses, inputs, target)
    assert rest is None
    _, rests = optimizer.step(losses, inputs, target, micro_batch=10)
    assert rests == [None, "few"]
