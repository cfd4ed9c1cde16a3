"""Sharpness, linearity, and what sets B+ and B- apart, against the paper's formulas in float64."""

import math

import oracles
import pytest
import torch
from torch import nn

from esam_kernels import diagnostics

RHO, EXACT = 0.4, 1e-10


class Quadratic(nn.Module):
    """L(w) = w A w / 2 + b w, the same for each sample; without b, the loss of w = 0 has no gradient."""

    def __init__(self, curvature, slope=0.0):
        super().__init__()
        self.curvature, self.slope = curvature.double(), torch.as_tensor(slope).double()
        self.w = nn.Parameter(torch.linspace(-1.0, 1.0, len(curvature), dtype=torch.float64))

    def forward(self, inputs):
        loss = self.w @ self.curvature @ self.w / 2 + (self.slope * self.w).sum()
        return loss.expand(len(inputs))


def symmetric(eigenvalues):
    basis, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=torch.float64))
    return basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T


def mlp_and_batch(samples=12):
    return oracles.mlp(dtype=torch.float64), oracles.batch(samples, dtype=torch.float64)


def loss_at(weights, batch):
    return float(oracles.mlp_losses(weights, *batch).mean())


def gradient_at(weights, batch):
    weights = [w.clone().requires_grad_() for w in weights]
    return torch.autograd.grad(oracles.mlp_losses(weights, *batch).mean(), weights)


def perturbation_of(weights, batch, *, beta=1.0, mask=None, adaptive=False, norm_factor=1.0, seen=None):
    n = len(weights)
    return oracles.perturbation(
        weights,
        list(gradient_at(weights, batch)),
        rho=[RHO] * n,
        beta=beta,
        mask=mask or [torch.ones_like(w) for w in weights],
        seen=seen or [True] * n,
        adaptive=[adaptive] * n,
        norm_factor=norm_factor,
    )


def moved(weights, e):
    return [w + step for w, step in zip(weights, e)]


def element_masks(weights, beta, seed, step):
    sizes = [w.numel() for w in weights]
    offsets = oracles.element_offsets(sizes)
    pairs = zip(offsets, sizes, weights)
    return [oracles.element_mask(seed, step, beta, o, n).reshape(w.shape).double() for o, n, w in pairs]


# -- sharpness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("micro_batch", [None, 5])
def test_sharpness_is_the_rise_under_sams_perturbation(adaptive, micro_batch):
    model, batch = mlp_and_batch()
    weights = oracles.weights_of(model)
    expected = loss_at(moved(weights, perturbation_of(weights, batch, adaptive=adaptive)), batch)
    got = diagnostics.sharpness(
        model, oracles.losses_of(model), *batch, rho=RHO, adaptive=adaptive, micro_batch=micro_batch
    )
    assert got.loss == pytest.approx(loss_at(weights, batch), rel=EXACT)
    assert got.perturbed_loss == pytest.approx(expected, rel=EXACT)
    assert got.sharpness == got.perturbed_loss - got.loss > 0


def highest_in_ball(curvature, gradient, rho):
    """max of g e + e A e / 2 over the ball: e = (mu - A)^-1 g with mu above all eigenvalues and of length rho."""
    values, basis = torch.linalg.eigh(curvature)
    g = basis.T @ gradient
    low, high = float(values[-1]), float(values[-1]) + 1e6
    for _ in range(200):
        mu = (low + high) / 2
        low, high = (mu, high) if float((g / (mu - values)).norm()) > rho else (low, mu)
    e = g / (high - values)
    return float(g @ e + (values * e * e).sum() / 2)


@pytest.mark.parametrize("eigenvalues", [[3.0, 1.0, 0.5], [0.7, 0.2, -2.0, 0.1]])
def test_more_steps_find_the_maximum_of_a_quadratic_in_the_ball(eigenvalues):
    model = Quadratic(symmetric(eigenvalues), slope=0.3)
    gradient = (model.curvature @ model.w + model.slope).detach()
    expected = highest_in_ball(model.curvature, gradient, RHO)
    rises = [
        diagnostics.sharpness(model, model, torch.zeros(2), rho=RHO, ascent_steps=steps).sharpness
        for steps in (1, 2, 60)
    ]
    assert rises[0] < rises[1] < rises[2] == pytest.approx(expected, rel=1e-8)


def test_adaptive_ascent_stays_in_its_ball_and_leaves_zero_weights():
    model = Quadratic(torch.eye(3), slope=1.0)
    model.w.data[1] = 0.0
    seen = []

    def closure(inputs):
        seen.append(model.w.detach().clone())
        return model(inputs)

    diagnostics.sharpness(model, closure, torch.zeros(2), rho=RHO, adaptive=True, ascent_steps=4)
    w = seen[0]
    radii = [float(((at - w)[[0, 2]] / w[[0, 2]]).norm()) for at in seen[1:]]
    assert radii == pytest.approx([RHO] * len(radii), rel=1e-9)
    assert all(at[1] == 0.0 for at in seen)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_minimum_without_gradient_has_sharpness_zero(steps):
    model = Quadratic(torch.eye(3))
    model.w.data.zero_()
    assert diagnostics.sharpness(model, model, torch.zeros(2), rho=RHO, ascent_steps=steps) == (0.0, 0.0, 0.0)


def test_small_gradients_of_many_samples_in_half_precision_are_not_lost():
    """The mean over all samples of each loss is smaller than float16 holds; that of each micro-batch is not."""
    model, samples = nn.Linear(2, 1, bias=False).half(), 2**15
    inputs = torch.randn(samples, 2).half()

    def losses(inputs):
        return model(inputs)[:, 0] * 2.0**-11

    slope = inputs.double().mean(dim=0) * 2.0**-11
    (row,) = diagnostics.linearity(model, losses, inputs, betas=(1.0,), micro_batch=64)
    assert row.first_order == pytest.approx(row.radius * float(slope.norm()), rel=0.01)
    assert row.radius == pytest.approx(0.05, rel=0.01)


# -- linearity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("mask", ["element", "tensor"])
def test_linearity_is_the_distance_from_the_first_order(mask, rescale):
    model, batch = mlp_and_batch()
    weights, seed, draws = oracles.weights_of(model), 7, 3
    gradient, loss = gradient_at(weights, batch), loss_at(weights, batch)
    got = diagnostics.linearity(
        model,
        oracles.losses_of(model),
        *batch,
        rho=RHO,
        betas=(1.0, 0.5),
        draws=draws,
        mask=mask,
        rescale=rescale,
        seed=seed,
    )
    assert [row.beta for row in got] == [1.0, 0.5]
    for row in got:
        beta, rows = row.beta, []
        for step in range(draws):
            masks, seen = None, None
            if mask == "element" and beta < 1.0:
                masks = element_masks(weights, beta, seed, step)
            elif beta < 1.0:
                drawn = oracles.drawn_tensors(seed, step, beta, len(weights))
                seen = [i in drawn for i in range(len(weights))]
                masks = [torch.full_like(w, float(s)) for w, s in zip(weights, seen)]
            factor = 1.0 / math.sqrt(beta) if mask == "tensor" else 1.0
            e = perturbation_of(
                weights, batch, beta=beta if rescale else 1.0, mask=masks, seen=seen, norm_factor=factor
            )
            perturbed = loss_at(moved(weights, e), batch)
            first = sum(float((a * g).sum()) for a, g in zip(e, gradient))
            length = math.sqrt(sum(float((a * a).sum()) for a in e))
            rows.append([abs(perturbed - loss - first), loss, perturbed, first, length])
        means = torch.tensor(rows, dtype=torch.float64).mean(dim=0).tolist()
        assert list(row[1:]) == pytest.approx(means, rel=1e-8)


def test_a_linear_loss_is_linear():
    model = Quadratic(torch.zeros(5, 5), slope=[1.0, 2.0, -1.0, 0.5, 3.0])
    rows = diagnostics.linearity(model, model, torch.zeros(2), rho=RHO, betas=(1.0, 0.6))
    assert [row.linearity for row in rows] == pytest.approx([0.0, 0.0], abs=1e-12)
    assert rows[0].first_order == pytest.approx(RHO * float(model.slope.norm()))


# -- B+ and B- ---------------------------------------------------------------------------------------------------------


def sets_of(weights, batch, k):
    at = moved(weights, perturbation_of(weights, batch))
    before, after = oracles.mlp_losses(weights, *batch), oracles.mlp_losses(at, *batch)
    chosen = oracles.ranked(before.tolist(), after.tolist(), k)
    return at, before, after, chosen, [i for i in range(len(before)) if i not in chosen]


def test_split_losses_are_the_four_of_figure_5():
    model, batch = mlp_and_batch()
    _, before, after, chosen, rest = sets_of(oracles.weights_of(model), batch, 4)
    got = diagnostics.split_losses(model, oracles.losses_of(model), *batch, rho=RHO, beta=1.0, gamma=1 / 3)
    expected = [float(losses[part].mean()) for losses in (before, after) for part in (chosen, rest)]
    assert list(got) == pytest.approx(expected, rel=EXACT)


@pytest.mark.parametrize("at", ["perturbed", "weights"])
@pytest.mark.parametrize("micro_batch", [None, 5])
def test_cosines_are_those_of_figure_6(at, micro_batch):
    model, batch = mlp_and_batch()
    weights = oracles.weights_of(model)
    perturbed, _, _, chosen, rest = sets_of(weights, batch, 4)
    random = torch.randperm(12, generator=torch.Generator().manual_seed(3))[:4].tolist()
    place = perturbed if at == "perturbed" else weights

    def flat(part):
        return torch.cat([g.flatten() for g in gradient_at(place, [tensor[part] for tensor in batch])])

    whole = flat(list(range(12)))
    expected = [float(torch.cosine_similarity(flat(part), whole, dim=0)) for part in (chosen, rest, random)]
    got = diagnostics.gradient_cosine(
        model,
        oracles.losses_of(model),
        *batch,
        rho=RHO,
        beta=1.0,
        gamma=1 / 3,
        at=at,
        seed=3,
        micro_batch=micro_batch,
    )
    assert list(got) == pytest.approx(expected, rel=EXACT)


def test_the_cosine_with_a_gradient_of_zero_is_nan():
    model = Quadratic(torch.zeros(3, 3))
    assert all(math.isnan(cosine) for cosine in diagnostics.gradient_cosine(model, model, torch.zeros(4)))
