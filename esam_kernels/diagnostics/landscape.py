"""The loss over a plane through the weights (Figures 4 and 8), with the filter normalisation of Li et al. (2018)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esam_kernels.backends.reference import compute_dtype
from esam_kernels.diagnostics.probe import Probe, Vector

DIRECTIONS = ("random", "adversarial")
KINDS = ("contour", "surface")


@dataclass(frozen=True)
class LossLandscape:
    """What :func:`loss_landscape` measures: ``losses[i, j]`` = L_B(w + alphas[i] x + betas[j] y)."""

    alphas: Tensor
    """float64, shape (n,)."""
    betas: Tensor
    """float64, shape (n,)."""
    losses: Tensor
    """float64, shape (n, n)."""

    def plot(self, where: Any, *, kind: str = "contour", levels: int = 20) -> Any:
        """Draw it with matplotlib.

        Args:
            where: the path of an image file to write, or matplotlib Axes (3-D ones for "surface") to draw into.
            kind: "contour", or "surface".
            levels: number of contours.

        Returns:
            The Axes.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: another kind.
        """
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plotting a landscape needs matplotlib: pip install matplotlib") from error
        figure, axes = None, where
        if not hasattr(where, "contourf"):
            figure = Figure(layout="constrained")
            axes = figure.add_subplot(projection="3d" if kind == "surface" else None)
        x, y = (grid.numpy() for grid in torch.meshgrid(self.alphas, self.betas, indexing="ij"))
        if kind == "surface":
            axes.plot_surface(x, y, self.losses.numpy(), cmap="viridis")
            axes.set_zlabel("loss")
        else:
            drawn = axes.contourf(x, y, self.losses.numpy(), levels=levels)
            axes.figure.colorbar(drawn, ax=axes, label="loss")
        axes.set_xlabel("x")
        axes.set_ylabel("y")
        if figure is not None:
            figure.savefig(where)
        return axes


def loss_landscape(
    model: nn.Module,
    closure: Callable[..., Any],
    *batch: Any,
    directions: str | tuple[Sequence[Tensor], Sequence[Tensor]] = "random",
    extent: float = 1.0,
    points: int = 21,
    seed: int = 0,
    normalize: str | None = "filter",
    micro_batch: int | None = None,
) -> LossLandscape:
    r"""The mean loss on a grid around the weights, over two directions x and y.

    >>> landscape = loss_landscape(model, losses, inputs, targets, points=5)
    >>> landscape.losses.shape
    torch.Size([5, 5])

    .. math:: L_B(w + \alpha x + \beta y), \qquad \alpha, \beta \in [-\text{extent}, \text{extent}]

    Args:
        model: usually in evaluation mode; left as it was.
        closure, batch, micro_batch: as for :func:`esam_kernels.diagnostics.sharpness`. Takes points^2 forwards.
        directions: "random": Gaussian. "adversarial": the gradients at w of two random halves of the batch, as in
            Figure 8. Of both, y is made orthogonal to x (before the normalisation where that is None, else filter by
            filter). Or a pair of lists, each with one tensor for every parameter that trains.
        extent: > 0. Figure 8 is ``directions="adversarial", normalize=None, extent=lr``.
        points: along each axis; with an odd number the middle is w itself.
        seed: of the random directions and halves.
        normalize: "filter": each filter (each slice of the first dimension of a tensor with two or more) gets the norm
            of the weights' filter, and tensors with fewer dimensions, biases and BatchNorm's, stay as they are in the
            model, as in Li et al. None: directions as they are.

    Returns:
        :class:`LossLandscape`: alphas and betas, shape (points,), losses, shape (points, points), and ``plot``.

    Raises:
        TypeError, ValueError: arguments out of range, directions that do not fit the parameters, or losses that are not
            one number a sample.
    """
    if normalize not in ("filter", None):
        raise ValueError(f'normalize must be "filter" or None, got {normalize!r}')
    if not (math.isfinite(extent) and extent > 0.0):
        raise ValueError(f"extent must be finite and positive, got {extent!r}")
    if not isinstance(points, int) or isinstance(points, bool) or points < 2:
        raise ValueError(f"points must be an integer >= 2, got {points!r}")
    with Probe(model, closure, batch, micro_batch) as probe:
        x, y = _directions(probe, directions, seed, normalize)
        axis = [extent * (2 * i - (points - 1)) / (points - 1) for i in range(points)]
        losses = torch.empty(points, points, dtype=torch.float64, device="cpu")
        for i, alpha in enumerate(axis):
            for j, beta in enumerate(axis):
                probe.move((alpha, x), (beta, y))
                losses[i, j] = probe.loss()
    grid = torch.tensor(axis, dtype=torch.float64, device="cpu")
    return LossLandscape(grid, grid.clone(), losses)


@torch.no_grad()
def _directions(probe: Probe, directions: Any, seed: int, normalize: str | None) -> tuple[Vector, Vector]:
    generator = torch.Generator().manual_seed(seed)
    if not isinstance(directions, str):
        x, y = _given(probe, directions)
    elif directions == "random":
        x, y = probe.normal(generator), probe.normal(generator)
    elif directions == "adversarial":
        x, y = _adversarial(probe, generator)
    else:
        raise ValueError(f"directions must be one of {DIRECTIONS}, or a pair of lists of tensors, got {directions!r}")
    if isinstance(directions, str):
        y = _orthogonal(x, y, normalize)
    if normalize == "filter":
        x, y = _filter_normalized(probe, x), _filter_normalized(probe, y)
    return x, y


def _given(probe: Probe, directions: Any) -> tuple[Vector, Vector]:
    if len(directions) != 2:
        raise ValueError(f"directions must be a pair, one list of tensors for each axis, got {len(directions)}")
    directions = [list(direction) for direction in directions]
    shapes = [tuple(weight.shape) for weight in probe.weights]
    for number, direction in enumerate(directions):
        got = [tuple(part.shape) for part in direction]
        if got != shapes:
            raise ValueError(f"directions[{number}] has tensors of shapes {got}, the parameters that train {shapes}")
    x, y = (
        [part.detach().to(w.device, compute_dtype(w.dtype)) for part, w in zip(direction, probe.weights)]
        for direction in directions
    )
    return x, y


def _adversarial(probe: Probe, generator: torch.Generator) -> tuple[Vector, Vector]:
    if probe.samples < 2:
        raise ValueError("adversarial directions need two samples or more: one half of the batch for each")
    order = torch.randperm(probe.samples, generator=generator, device="cpu")
    with torch.enable_grad():
        x, y = (probe.gradient(probe.subset(half.sort().values))[1] for half in order.tensor_split(2))
    return x, y


def _orthogonal(x: Vector, y: Vector, normalize: str | None) -> Vector:
    """y without its part along x: over all weights, or, where each filter is scaled afterwards, in each filter."""
    if normalize is None:
        along = sum(_inner(a, b) for a, b in zip(x, y)) / max(sum(_inner(a, a) for a in x), _TINY)
        return [b - along * a for a, b in zip(x, y)]
    return [
        b - _per_filter(a, b) / _per_filter(a, a).clamp(min=_TINY) * a if _has_filters(a) else b for a, b in zip(x, y)
    ]


def _has_filters(part: Tensor) -> bool:
    """Whether it has filters of more than one number: in one there is only one direction."""
    return part.dim() > 1 and part.numel() > part.shape[0]


def _filter_normalized(probe: Probe, direction: Vector) -> Vector:
    result = []
    for weight, part in zip(probe.saved, direction):
        if part.dim() < 2:
            result.append(torch.zeros_like(part))
            continue
        weight = weight.to(part.dtype)
        result.append(part * (_per_filter(weight, weight) / _per_filter(part, part).clamp(min=_TINY)).sqrt())
    return result


_TINY = torch.finfo(torch.float32).tiny


def _inner(left: Tensor, right: Tensor) -> float:
    return float((left.double() * right.double()).sum())


def _per_filter(left: Tensor, right: Tensor) -> Tensor:
    """The scalar products of the filters, of shape (filters, 1, ...)."""
    products = (left * right).flatten(1).sum(dim=1)
    return products.reshape(-1, *[1] * (left.dim() - 1))
