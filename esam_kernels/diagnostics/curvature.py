"""The curvature of the loss: the Hessian's largest eigenvalue (Keskar et al., 2017), by power iteration."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from esam_kernels.diagnostics.probe import Derivative, Probe, Vector, dot, norm

_NOT_TWICE = ("once_differentiable", "not implemented", "double backward")
_ERROR_NODE = "torch::autograd::Error"
_ADVICE = (
    "the loss cannot be differentiated twice, which a Hessian takes: use operators that can be in place of fused ones "
    "(esam_kernels.cross_entropy can; for attention, torch.nn.attention.sdpa_kernel(SDPBackend.MATH); no torch.compile)"
)


class TopEigenvalue(NamedTuple):
    """What :func:`top_hessian_eigenvalue` finds."""

    eigenvalue: float
    """Of the largest magnitude, with its sign."""
    eigenvector: list[Tensor]
    """Of norm 1: a tensor for each parameter that trains, in the order of ``model.parameters()``, float32 or wider."""
    iterations: int
    """Hessian-vector products taken."""
    converged: bool
    """Whether the last iteration changed the eigenvalue by no more than the tolerance."""
    residual: float
    """||H v - lambda v||: some eigenvalue of H is no farther than this from ``eigenvalue``."""


def top_hessian_eigenvalue(
    model: nn.Module,
    closure: Callable[..., Any],
    *batch: Any,
    iterations: int = 100,
    tolerance: float = 1e-3,
    seed: int = 0,
    micro_batch: int | None = None,
) -> TopEigenvalue:
    r"""The eigenvalue of largest magnitude of the Hessian of the mean loss, by power iteration.

    >>> top = top_hessian_eigenvalue(model, losses, inputs, targets)
    >>> curvature = top.eigenvalue if top.converged else None

    .. math:: v \leftarrow \frac{H v}{\lVert H v \rVert}, \qquad \lambda = v^\top H v, \qquad H = \nabla^2 L_B(w)

    The sign is kept: away from a minimum it may be negative. Two eigenvalues of nearly the same magnitude and opposite
    sign do not converge; ``residual`` shows it. H v is a second backward, so that whatever the closure runs has to be
    differentiable twice. :func:`esam_kernels.cross_entropy` is; fused attention is not (run it inside
    ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``), nor is what torch.compile made.

    Args:
        model, closure, batch, micro_batch: as for :func:`esam_kernels.diagnostics.sharpness`. Without micro-batches the
            graph of the gradient is kept in memory for all iterations; with them it is built anew in each.
        iterations: at most so many products.
        tolerance: stop where \|lambda changes\| <= tolerance * \|lambda\|.
        seed: of the vector that it starts from.

    Returns:
        :class:`TopEigenvalue`: eigenvalue; eigenvector, of norm 1, a tensor for each parameter that trains; iterations;
        converged; residual, \|\|H v - lambda v\|\|, which bounds the distance to an eigenvalue.

    Raises:
        RuntimeError: the loss cannot be differentiated twice.
        TypeError, ValueError: arguments out of range, or losses that are not one number a sample.
    """
    if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 1:
        raise ValueError(f"iterations must be a positive integer, got {iterations!r}")
    if not (math.isfinite(tolerance) and tolerance >= 0.0):
        raise ValueError(f"tolerance must be finite and not negative, got {tolerance!r}")
    with Probe(model, closure, batch, micro_batch) as probe:
        product = _HessianProduct(probe)
        generator = torch.Generator().manual_seed(seed)
        v = _unit(probe.normal(generator))
        eigenvalue, converged = math.nan, False
        for iteration in range(1, iterations + 1):
            hv = product(v)
            last, eigenvalue = eigenvalue, dot(v, hv)
            residual = norm([h - eigenvalue * part for h, part in zip(hv, v)])
            converged = abs(eigenvalue - last) <= tolerance * abs(eigenvalue) or norm(hv) == 0.0
            if converged or iteration == iterations or not math.isfinite(eigenvalue):
                break
            v = _unit(hv)
    return TopEigenvalue(eigenvalue, v, iteration, converged, residual)


class _HessianProduct:
    """v -> H v, by differentiating g . v. The graph of g is kept where the batch is one part."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._is_checked = False
        self._kept = probe.each_part(self._gradient) if probe.is_one_part else None

    def _gradient(self, losses: Tensor) -> Derivative:
        gradient = _twice(lambda: self._probe.differentiate_loss(losses.mean(), create_graph=True))
        if not self._is_checked:
            _check_graph(gradient)
            self._is_checked = True
        return gradient

    def __call__(self, v: Vector) -> Vector:
        total = self._probe.zeros()
        if self._kept is None:
            self._probe.each_part(
                lambda losses: self._add(total, self._gradient(losses), v, len(losses) / self._probe.samples)
            )
        else:
            for gradient in self._kept:
                self._add(total, gradient, v)
        return total

    def _add(self, total: Vector, gradient: Derivative, v: Vector, weight: float = 1.0) -> None:
        tangent = self._probe.tangent(v)
        terms = [
            (grad * part).sum() for grad, part in zip(gradient, tangent) if grad is not None and grad.requires_grad
        ]
        if terms:  # else the loss is linear in the weights
            value = torch.stack([term.to(terms[0]) for term in terms]).sum()
            kept = self._kept is not None
            self._probe.add(total, _twice(lambda: self._probe.differentiate(value, retain_graph=kept)), weight)


def _twice(compute: Callable[[], Derivative]) -> Derivative:
    try:
        return compute()
    except RuntimeError as error:
        if any(text in str(error) for text in _NOT_TWICE):
            raise RuntimeError(f"{_ADVICE} (torch says: {error})") from error
        raise


def _check_graph(gradient: Derivative) -> None:
    """Refuse a graph with the node of a function that is differentiable once.

    autograd would leave that node out, as no way from it leads to the parameters, and H v would silently be too small.
    """
    seen: set[Any] = set()
    ahead = [grad.grad_fn for grad in gradient if grad is not None]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        if node.name() == _ERROR_NODE:
            raise RuntimeError(_ADVICE)
        seen.add(node)
        ahead.extend(following for following, _ in node.next_functions)


def _unit(vector: Vector) -> Vector:
    length = norm(vector)
    return [part / length for part in vector]
