"""Loss landscapes and the Hessian's largest eigenvalue, against what is known in float64; what is refused."""

import math
import sys

import oracles
import pytest
import torch
from test_diagnostics import Quadratic, gradient_at, mlp_and_batch, symmetric
from torch import nn

from esam_kernels import cross_entropy, diagnostics

SAMPLES = torch.zeros(4, 1)


# -- landscapes --------------------------------------------------------------------------------------------------------


def test_the_grid_is_the_loss_at_w_plus_alpha_x_plus_beta_y():
    model = Quadratic(symmetric([3.0, 1.0, -2.0]), slope=0.3)
    x, y = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    got = diagnostics.loss_landscape(model, model, SAMPLES, directions=([x], [y]), extent=0.5, points=5, normalize=None)
    assert got.alphas.tolist() == got.betas.tolist() == [-0.5, -0.25, 0.0, 0.25, 0.5]
    w, a, b = model.w.detach(), model.curvature, model.slope
    for i, alpha in enumerate(got.alphas.tolist()):
        for j, beta in enumerate(got.betas.tolist()):
            v = w + alpha * x + beta * y
            assert float(got.losses[i, j]) == pytest.approx(float(v @ a @ v / 2 + (b * v).sum()), rel=1e-12)


def convolutional():
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 1), nn.Linear(1, 4))
    return nn.Sequential(*layers).double().eval()


def directions_of(model, batch, **kwargs):
    """x and y as they were used: the moved weights in the middle of two edges of the grid, minus those at w."""
    seen = []

    def closure(inputs, target):
        if not torch.is_grad_enabled():
            seen.append(oracles.weights_of(model))
        return oracles.losses_of(model)(inputs, target)

    w = oracles.weights_of(model)
    diagnostics.loss_landscape(model, closure, *batch, points=3, **kwargs)
    assert len(seen) == 9
    assert oracles.same_bits(seen[4], w)
    return [[at - start for at, start in zip(seen[number], w)] for number in (7, 5)]


def inner(left, right):
    return sum(float((a * b).sum()) for a, b in zip(left, right))


def images():
    return torch.randn(8, 2, 4, 4, dtype=torch.float64), torch.randint(0, 4, (8,))


@pytest.mark.parametrize("directions", ["random", "adversarial"])
def test_filters_have_the_norms_of_the_weights_and_vectors_stay(directions):
    model = convolutional()
    x, y = directions_of(model, images(), directions=directions)
    for param, *steps in zip(model.parameters(), x, y):
        for step in steps:
            if param.dim() < 2:
                assert not step.any()
            else:
                torch.testing.assert_close(step.flatten(1).norm(dim=1), param.detach().flatten(1).norm(dim=1))
    # The last layer's filters are of one number: there is nothing to choose from.
    assert inner(x[:-2], y[:-2]) == pytest.approx(0.0, abs=1e-12)


def test_directions_may_be_whatever_can_be_listed():
    model, batch = mlp_and_batch()
    at_w = oracles.weights_of(model)
    given = [(at_w, at_w), (iter(at_w), (part for part in at_w))]
    first, second = (
        diagnostics.loss_landscape(model, oracles.losses_of(model), *batch, directions=pair, points=3) for pair in given
    )
    assert torch.equal(first.losses, second.losses)


def test_seeds_draw_different_directions_and_the_same_ones_again():
    model, batch = convolutional(), images()
    (x, _), (again, _), (other, _) = (directions_of(model, batch, seed=seed) for seed in (0, 0, 1))
    assert oracles.same_bits(x, again)
    assert abs(inner(x, other)) < 0.9 * inner(x, x)


def test_adversarial_directions_are_the_gradients_of_two_halves():
    model, batch = mlp_and_batch()
    weights = oracles.weights_of(model)
    x, y = directions_of(model, batch, directions="adversarial", normalize=None, seed=2)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    first, second = (gradient_at(weights, [tensor[half] for tensor in batch]) for half in (order[:6], order[6:]))
    along = inner(first, second) / inner(first, first)
    for got, expected in zip([*x, *y], [*first, *[b - along * a for a, b in zip(first, second)]]):
        torch.testing.assert_close(got, expected, rtol=0.0, atol=1e-12)


def test_a_filter_without_gradient_is_no_nan():
    model = convolutional()
    model[3].weight.data.zero_()  # the convolution's gradient is 0
    losses = diagnostics.loss_landscape(
        model, oracles.losses_of(model), *images(), directions="adversarial", points=3
    ).losses
    assert losses.isfinite().all()


def landscape():
    losses = torch.arange(12.0, dtype=torch.float64).reshape(4, 3)
    return diagnostics.LossLandscape(torch.linspace(-2.0, 2.0, 4), torch.linspace(-1.0, 1.0, 3), losses)


@pytest.mark.parametrize("kind", ["contour", "surface"])
def test_plot_writes_a_file_or_draws_into_axes(kind, tmp_path):
    figure = pytest.importorskip("matplotlib.figure")
    path = tmp_path / "landscape.png"
    drawn = landscape()
    drawn.plot(path, kind=kind)
    assert path.read_bytes()[:4] == b"\x89PNG"
    axes = figure.Figure().add_subplot(projection="3d" if kind == "surface" else None)
    assert drawn.plot(axes, kind=kind) is axes
    # x runs along the first dimension of the losses.
    assert axes.get_xlim() == pytest.approx((-2.0, 2.0), abs=0.3)
    assert axes.get_ylim() == pytest.approx((-1.0, 1.0), abs=0.3)
    assert len(axes.collections) >= 1


def test_plot_says_what_it_lacks(monkeypatch, tmp_path):
    drawn = landscape()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        drawn.plot(tmp_path / "landscape.png")
    with pytest.raises(ValueError, match="kind must be one of"):
        drawn.plot(tmp_path / "landscape.png", kind="pie")


# -- the largest eigenvalue --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eigenvalues", [[5.0, 2.0, -1.0, 0.1], [-5.0, 2.0, 1.0, 0.1]])
def test_the_eigenvalue_of_largest_magnitude_has_its_sign(eigenvalues):
    model = Quadratic(symmetric(eigenvalues))
    got = diagnostics.top_hessian_eigenvalue(model, model, SAMPLES, tolerance=1e-10)
    assert got.converged
    assert got.eigenvalue == pytest.approx(eigenvalues[0], rel=1e-8)
    (vector,) = got.eigenvector
    assert float(vector.norm()) == pytest.approx(1.0)
    torch.testing.assert_close(model.curvature @ vector, eigenvalues[0] * vector, rtol=0.0, atol=1e-3)
    residual = float((model.curvature @ vector - got.eigenvalue * vector).norm())
    assert got.residual == pytest.approx(residual, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("micro_batch", [None, 5])
def test_the_hessian_of_a_network_is_that_of_functorch(micro_batch):
    """Through the package's own cross-entropy."""
    model, batch = mlp_and_batch()
    shapes = [param.shape for param in model.parameters()]
    sizes = [param.numel() for param in model.parameters()]

    def loss(flat):
        weights = [part.reshape(shape) for part, shape in zip(flat.split(sizes), shapes)]
        return oracles.mlp_losses(weights, *batch).mean()

    flat = torch.cat([param.detach().flatten() for param in model.parameters()])
    values, vectors = torch.linalg.eigh(torch.func.hessian(loss)(flat))
    top = int(values.abs().argmax())
    got = diagnostics.top_hessian_eigenvalue(
        model,
        lambda inputs, target: cross_entropy(model(inputs), target),
        *batch,
        iterations=500,
        tolerance=1e-12,
        micro_batch=micro_batch,
    )
    assert got.converged
    assert got.eigenvalue == pytest.approx(float(values[top]), rel=1e-8)
    along = torch.cat([part.flatten() for part in got.eigenvector]) @ vectors[:, top]
    assert abs(float(along)) == pytest.approx(1.0, abs=1e-6)


def test_opposite_eigenvalues_show_in_the_residual():
    model = Quadratic(torch.diag(torch.tensor([2.0, -2.0])))
    got = diagnostics.top_hessian_eigenvalue(model, model, SAMPLES, iterations=20)
    assert got.residual > 0.1


def test_iterations_end_where_they_are_told():
    model = Quadratic(symmetric([2.0, 1.999, 1.998, 1.0]))
    got = diagnostics.top_hessian_eigenvalue(model, model, SAMPLES, iterations=3, tolerance=0.0)
    assert (got.iterations, got.converged) == (3, False)


def test_a_linear_loss_has_no_curvature():
    model = nn.Linear(3, 1)
    got = diagnostics.top_hessian_eigenvalue(model, lambda x: model(x)[:, 0], torch.randn(4, 3))
    assert (got.eigenvalue, got.iterations, got.converged, got.residual) == (0.0, 1, True, 0.0)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


def attention(x):
    return nn.functional.scaled_dot_product_attention(x[:, None, None], x[:, None, None], x[:, None, None]).sum(
        (1, 2, 3)
    )


@pytest.mark.parametrize("function", [lambda x: _Once.apply(x)[:, 0], attention], ids=["once", "attention"])
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_what_is_differentiable_once_is_named_and_not_left_out(function, micro_batch):
    model, inputs = nn.Linear(3, 8), torch.randn(4, 3)

    def call():
        diagnostics.top_hessian_eigenvalue(model, lambda x: function(model(x)), inputs, micro_batch=micro_batch)

    oracles.assert_refused(call, RuntimeError, "cannot be differentiated twice", model)


def test_attention_that_is_not_fused_has_a_hessian():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model = nn.Linear(3, 8)
    with sdpa_kernel(SDPBackend.MATH):
        got = diagnostics.top_hessian_eigenvalue(model, lambda x: attention(model(x)), torch.randn(4, 3))
    # One key: the weights are 1, and the output is the value, which is linear.
    assert got.eigenvalue == pytest.approx(0.0, abs=1e-6)


# -- what is refused ---------------------------------------------------------------------------------------------------

MODEL, BATCH = oracles.mlp(), oracles.batch()
CLOSURE = oracles.losses_of(MODEL)
OTHER = oracles.losses_of(oracles.mlp())
REFUSED = [
    (lambda: diagnostics.sharpness(CLOSURE, CLOSURE, *BATCH), TypeError, "model must be a torch.nn.Module"),
    (lambda: diagnostics.sharpness(MODEL, None, *BATCH), TypeError, "closure must be callable"),
    (lambda: diagnostics.sharpness(MODEL, CLOSURE), ValueError, "the batch holds no tensors"),
    (lambda: diagnostics.sharpness(MODEL, CLOSURE, BATCH[0], BATCH[1][:3]), ValueError, "different numbers"),
    (lambda: diagnostics.sharpness(MODEL, CLOSURE, *BATCH, micro_batch=0), ValueError, "micro_batch must be"),
    (lambda: diagnostics.sharpness(MODEL, CLOSURE, *BATCH, rho=-1.0), ValueError, "rho must be finite"),
    (lambda: diagnostics.sharpness(MODEL, CLOSURE, *BATCH, eps=math.nan), ValueError, "eps must be finite"),
    (lambda: diagnostics.sharpness(MODEL, CLOSURE, *BATCH, ascent_steps=0), ValueError, "ascent_steps must be"),
    (
        lambda: diagnostics.sharpness(MODEL, lambda x, y: x[:, 0], *BATCH),
        ValueError,
        "depend on no parameter that trains",
    ),
    (lambda: diagnostics.sharpness(MODEL, OTHER, *BATCH), ValueError, "call another model"),
    (
        lambda: diagnostics.top_hessian_eigenvalue(MODEL, OTHER, *BATCH),
        ValueError,
        "does it call another model than the one that is measured",
    ),
    (
        lambda: diagnostics.linearity(MODEL, CLOSURE, *BATCH, betas=0.5),
        TypeError,
        "betas must be a sequence .* got 0.5",
    ),
    (lambda: diagnostics.linearity(MODEL, CLOSURE, *BATCH, betas=(0.5, 0.0)), ValueError, "betas must lie in"),
    (lambda: diagnostics.linearity(MODEL, CLOSURE, *BATCH, draws=0), ValueError, "draws must be"),
    (lambda: diagnostics.linearity(MODEL, CLOSURE, *BATCH, mask="row"), ValueError, "mask must be one of"),
    (lambda: diagnostics.split_losses(MODEL, CLOSURE, *BATCH, gamma=1.0), ValueError, "nothing is left for B-"),
    (lambda: diagnostics.gradient_cosine(MODEL, CLOSURE, *BATCH, gamma=2.0), ValueError, "gamma must lie in"),
    (lambda: diagnostics.gradient_cosine(MODEL, CLOSURE, *BATCH, at="w"), ValueError, "at must be one of"),
    (lambda: diagnostics.loss_landscape(MODEL, CLOSURE, *BATCH, points=1), ValueError, "points must be"),
    (lambda: diagnostics.loss_landscape(MODEL, CLOSURE, *BATCH, extent=0.0), ValueError, "extent must be"),
    (lambda: diagnostics.loss_landscape(MODEL, CLOSURE, *BATCH, normalize="l2"), ValueError, "normalize must be"),
    (lambda: diagnostics.loss_landscape(MODEL, CLOSURE, *BATCH, directions="x"), ValueError, "directions must be"),
    (
        lambda: diagnostics.loss_landscape(MODEL, CLOSURE, *BATCH, directions=(oracles.weights_of(MODEL), [])),
        ValueError,
        r"directions\[1\] has tensors of shapes",
    ),
    (
        lambda: diagnostics.loss_landscape(MODEL, CLOSURE, *[t[:1] for t in BATCH], directions="adversarial"),
        ValueError,
        "two samples or more",
    ),
    (lambda: diagnostics.top_hessian_eigenvalue(MODEL, CLOSURE, *BATCH, iterations=0), ValueError, "iterations must"),
    (lambda: diagnostics.top_hessian_eigenvalue(MODEL, CLOSURE, *BATCH, tolerance=-1.0), ValueError, "tolerance must"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_bad_input_is_refused(call, error, message):
    oracles.assert_refused(call, error, message, MODEL)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.LazyLinear(oracles.CLASSES), "trained parameter 0 is lazy .* run the model on a batch first"),
        (oracles.mlp().to("meta"), "trained parameter 0 is on the meta device"),
    ],
)
def test_a_model_without_values_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        diagnostics.sharpness(model, oracles.losses_of(model), *BATCH)


def test_a_model_of_which_nothing_trains_is_refused():
    model = oracles.mlp().requires_grad_(False)
    oracles.assert_refused(
        lambda: diagnostics.sharpness(model, oracles.losses_of(model), *BATCH), ValueError, "no parameter", model
    )
