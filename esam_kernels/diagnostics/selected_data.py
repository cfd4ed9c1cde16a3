"""What sets B+ and B- of Sharpness-sensitive Data Selection apart (appendix A.2): Figures 5 and 6."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from esam_kernels.diagnostics.probe import Probe, Vector, dot, mean, norm
from esam_kernels.selection import num_selected, select
from esam_kernels.settings import check_share

AT = ("perturbed", "weights")


class SplitLosses(NamedTuple):
    """What :func:`split_losses` measures: the four curves of Figure 5."""

    selected: float
    """L_{B+}(w)."""
    rest: float
    """L_{B-}(w)."""
    selected_perturbed: float
    """L_{B+}(w + e)."""
    rest_perturbed: float
    """L_{B-}(w + e)."""


class GradientCosine(NamedTuple):
    """What :func:`gradient_cosine` measures: the three curves of Figure 6. NaN where a gradient is 0."""

    selected: float
    """cos(grad L_{B+}, grad L_B)."""
    rest: float
    """cos(grad L_{B-}, grad L_B)."""
    random: float
    """cos(grad L_{Brand}, grad L_B), for a random part of B of the size of B+."""


def split_losses(
    model: nn.Module,
    closure: Callable[..., Any],
    *batch: Any,
    rho: float = 0.05,
    beta: float = 0.6,
    gamma: float = 0.5,
    mask: str = "tensor",
    adaptive: bool = False,
    seed: int = 0,
    micro_batch: int | None = None,
) -> SplitLosses:
    """The mean losses of B+, the gamma share of the batch whose losses rise most, and of B-, the rest (Figure 5).

    >>> four = split_losses(model, losses, inputs, targets, gamma=0.5)
    >>> before, after = four.selected, four.selected_perturbed

    Args:
        model, closure, batch, micro_batch: as for :func:`esam_kernels.diagnostics.sharpness`.
        rho, beta, mask, adaptive: of the perturbation e, as for :class:`esam_kernels.ESAM`.
        gamma: share of the samples in B+, in (0, 1], such that B- is not empty.
        seed: of the draw of e.

    Returns:
        :class:`SplitLosses`, four floats: selected and rest, the losses of B+ and B- at w; selected_perturbed and
        rest_perturbed, those at w + e.

    Raises:
        TypeError, ValueError: arguments out of range, or losses that are not one number a sample.
    """
    with Probe(model, closure, batch, micro_batch) as probe:
        k = size_of_selection(gamma, probe.samples)
        optimizer = probe.perturber(rho=rho, beta=beta, mask=mask, adaptive=adaptive, seed=seed)
        before, gradient = probe.gradient()
        probe.perturb(optimizer, gradient)
        after = probe.losses()
    chosen, others = _split(before, after, k)
    return SplitLosses(mean(before[chosen]), mean(before[others]), mean(after[chosen]), mean(after[others]))


def gradient_cosine(
    model: nn.Module,
    closure: Callable[..., Any],
    *batch: Any,
    rho: float = 0.05,
    beta: float = 0.6,
    gamma: float = 0.5,
    mask: str = "tensor",
    adaptive: bool = False,
    at: str = "perturbed",
    seed: int = 0,
    micro_batch: int | None = None,
) -> GradientCosine:
    """How well the gradients of B+, of B- and of a random part of the batch point along that of the whole (Figure 6).

    >>> cosines = gradient_cosine(model, losses, inputs, targets, gamma=0.5)
    >>> ours, by_chance = cosines.selected, cosines.random

    Each part goes through the closure as a batch of its own, as ESAM's second pass does with B+.

    Args:
        model, closure, batch, micro_batch: as for :func:`esam_kernels.diagnostics.sharpness`.
        rho, beta, mask, adaptive: of the perturbation e, as for :class:`esam_kernels.ESAM`.
        gamma: share of the samples in B+, in (0, 1], such that B- is not empty.
        at: where the gradients are taken: "perturbed", at w + e, as in appendix A.2, or "weights", at w. B+ and B- are
            the same for both.
        seed: of the draws of e and of the random part.

    Returns:
        :class:`GradientCosine`, three floats from -1 to 1: selected, rest and random, the cosines for B+, B-, and a
        random part as large as B+.

    Raises:
        TypeError, ValueError: arguments out of range, or losses that are not one number a sample.
    """
    if at not in AT:
        raise ValueError(f"at must be one of {AT}, got {at!r}")
    with Probe(model, closure, batch, micro_batch) as probe:
        k = size_of_selection(gamma, probe.samples)
        optimizer = probe.perturber(rho=rho, beta=beta, mask=mask, adaptive=adaptive, seed=seed)
        before, whole = probe.gradient()
        probe.perturb(optimizer, whole)
        after = probe.losses()
        if at == "weights":
            probe.restore()
        else:
            _, whole = probe.gradient()
        order = torch.randperm(probe.samples, generator=torch.Generator().manual_seed(seed), device="cpu")
        parts = (*_split(before, after, k), order[:k].sort().values)
        cosines = [_cosine(probe.gradient(probe.subset(part))[1], whole) for part in parts]
    return GradientCosine(*cosines)


def size_of_selection(gamma: float, samples: int) -> int:
    """k, the size of B+.

    Raises:
        ValueError: it is the whole batch.
    """
    k = num_selected(check_share("gamma", gamma), samples)
    if k == samples:
        raise ValueError(f"gamma = {gamma} selects all {samples} samples: nothing is left for B-")
    return k


def _split(before: Tensor, after: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The indices of B+ and of B-, ascending."""
    chosen = select(before, after, k)
    is_rest = torch.ones(before.shape[0], dtype=torch.bool, device=before.device)
    is_rest[chosen] = False
    return chosen, is_rest.nonzero()[:, 0]


def _cosine(left: Vector, right: Vector) -> float:
    lengths = norm(left) * norm(right)
    return dot(left, right) / lengths if lengths > 0.0 else float("nan")
