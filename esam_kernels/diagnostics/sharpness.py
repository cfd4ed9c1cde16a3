"""How far the loss rises around the weights (section 2.1), and how far it is from a plane (appendix A.3, Figure 7)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from esam_kernels.diagnostics.probe import Probe, Vector, dot, mean, norm
from esam_kernels.settings import check_share


class Sharpness(NamedTuple):
    """What :func:`sharpness` measures, as Python floats."""

    loss: float
    """L_B(w)."""
    perturbed_loss: float
    """L_B(w + e)."""
    sharpness: float
    """R_B(w) = L_B(w + e) - L_B(w)."""


class Linearity(NamedTuple):
    """What :func:`linearity` measures for one beta, as Python floats: means over the draws."""

    beta: float
    """The share of the weights that was perturbed."""
    linearity: float
    """``zeta = |L_B(w + e) - L_B(w) - e . g|``. The smaller, the more linear."""
    loss: float
    """L_B(w)."""
    perturbed_loss: float
    """L_B(w + e)."""
    first_order: float
    """e . g, what a linear loss would rise by."""
    radius: float
    """||e||."""


def sharpness(
    model: nn.Module,
    closure: Callable[..., Any],
    *batch: Any,
    rho: float = 0.05,
    adaptive: bool = False,
    ascent_steps: int = 1,
    eps: float = 1e-12,
    micro_batch: int | None = None,
) -> Sharpness:
    r"""The rise of the loss under SAM's perturbation, a lower bound of the sharpness R_B(w).

    >>> measured = sharpness(model, losses, inputs, targets, rho=0.05)
    >>> rise = measured.sharpness  # measured.perturbed_loss - measured.loss

    .. math:: R_B(w) = \max_{\lVert e / T \rVert \le \rho} L_B(w + e) - L_B(w), \qquad
              e_1 = \rho\, \frac{T^2 g}{\lVert T g \rVert + \epsilon}

    with T = 1, or \|w\| where ``adaptive``. Each further step goes rho along the gradient at w + e, and is projected
    back into the ball; the largest loss of all steps is reported.

    Args:
        model: in the mode (training or evaluation) in which it is to be measured; left as it was.
        closure: ``closure(*batch)`` returns one loss for each sample, shape (b,).
        batch: tensors whose first dimension counts the samples, or dicts, lists and tuples of such.
        rho: radius, >= 0.
        adaptive: the radius is relative to each weight's size (ASAM).
        ascent_steps: 1 is the paper's (Eq. 4); more take one forward and backward each.
        eps: keeps the division finite.
        micro_batch: at most so many samples at a time, for batches that do not fit.

    Returns:
        :class:`Sharpness`, three floats: loss, at w; perturbed_loss, the largest of all; sharpness, the difference.

    Raises:
        TypeError, ValueError: arguments out of range, or losses that are not one number a sample.
    """
    if not isinstance(ascent_steps, int) or isinstance(ascent_steps, bool) or ascent_steps < 1:
        raise ValueError(f"ascent_steps must be a positive integer, got {ascent_steps!r}")
    with Probe(model, closure, batch, micro_batch) as probe:
        optimizer = probe.perturber(rho=rho, beta=1.0, adaptive=adaptive, eps=eps)
        losses, gradient = probe.gradient()
        probe.perturb(optimizer, gradient)
        perturbed = [probe.loss()]
        scaling = [saved.abs() if adaptive else torch.ones_like(saved) for saved in probe.saved]
        z = _climb(probe.zeros(), gradient, scaling, rho, eps)
        for _ in range(ascent_steps - 1):
            z = _climb(z, probe.gradient()[1], scaling, rho, eps)
            probe.move((1.0, [t * part for t, part in zip(scaling, z)]))
            perturbed.append(probe.loss())
    loss, highest = mean(losses), float(torch.tensor(perturbed, dtype=torch.float64, device="cpu").max())
    return Sharpness(loss, highest, highest - loss)


def _climb(z: Vector, gradient: Vector, scaling: Vector, rho: float, eps: float) -> Vector:
    """z + rho T g / (||T g|| + eps), projected onto the ball of radius rho: e = T z."""
    ascent = [t * grad for t, grad in zip(scaling, gradient)]
    length = norm(ascent)
    if length == 0.0 or not math.isfinite(length):
        return z
    z = [part + (rho / (length + eps)) * direction for part, direction in zip(z, ascent)]
    reached = norm(z)
    return [part * (rho / reached) for part in z] if reached > rho else z


def linearity(
    model: nn.Module,
    closure: Callable[..., Any],
    *batch: Any,
    rho: float = 0.05,
    betas: Sequence[float] = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2),
    draws: int = 1,
    rescale: bool = True,
    mask: str = "element",
    radius: str = "paper",
    adaptive: bool = False,
    eps: float = 1e-12,
    seed: int = 0,
    micro_batch: int | None = None,
) -> list[Linearity]:
    r"""How far the loss is from its first-order approximation under Stochastic Weight Perturbation (Figure 7).

    >>> for row in linearity(model, losses, inputs, targets, betas=(1.0, 0.5)):
    ...     zeta = row.linearity

    .. math:: \zeta(e, B) = \lvert L_B(w + e) - L_B(w) - e^\top \nabla L_B(w) \rvert

    for the e that ESAM takes with each of ``betas`` (beta = 1 is SAM's). By Eq. 5 e is scaled by 1/beta, which makes it
    longer the smaller beta is, whereas appendix A.3 speaks of a magnitude that falls with beta. ``rescale`` chooses.

    Args:
        model, closure, batch, micro_batch: as for :func:`sharpness`.
        rho: radius, >= 0.
        betas: shares of the weights that are perturbed, in (0, 1].
        draws: over how many draws of the mask to take the mean.
        rescale: True: e = m * e_SAM / beta (Eq. 5). False: e = m * e_SAM. With mask="tensor" the norm in e_SAM is the
            one that ESAM knows, that of the drawn tensors (see ``radius``).
        mask, radius, adaptive, eps: as for :class:`esam_kernels.ESAM`.
        seed: of the draws.

    Returns:
        One :class:`Linearity` a beta, in their order.

    Raises:
        TypeError, ValueError: arguments out of range, or losses that are not one number a sample.
    """
    if isinstance(betas, Real):
        raise TypeError(f"betas must be a sequence of shares, such as (1.0, 0.5), got {betas!r}")
    betas = [check_share("betas", beta) for beta in betas]
    if not isinstance(draws, int) or isinstance(draws, bool) or draws < 1:
        raise ValueError(f"draws must be a positive integer, got {draws!r}")
    results = []
    with Probe(model, closure, batch, micro_batch) as probe:
        settings = {"mask": mask, "radius": radius, "adaptive": adaptive, "eps": eps, "seed": seed}
        optimizers = [
            probe.perturber(rho=rho if rescale else rho * beta, beta=beta, **settings)  # type: ignore[arg-type]
            for beta in betas
        ]
        losses, gradient = probe.gradient()
        loss = mean(losses)
        for beta, optimizer in zip(betas, optimizers):
            rows = []
            for _ in range(draws if beta < 1.0 else 1):
                probe.perturb(optimizer, gradient)
                e, perturbed = probe.displacement(), probe.loss()
                first_order = dot(e, gradient)
                rows.append([abs(perturbed - loss - first_order), loss, perturbed, first_order, norm(e)])
                optimizer.restore()
            results.append(Linearity(beta, *_mean_rows(rows)))
    return results


def _mean_rows(rows: list[list[float]]) -> list[float]:
    means: Tensor = torch.tensor(rows, dtype=torch.float64, device="cpu").mean(dim=0)
    return means.tolist()
