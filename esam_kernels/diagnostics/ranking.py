"""How well a ranking from pass 1 alone agrees with the rise of the losses that the paper measures (section 2.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esam_kernels.diagnostics.probe import Probe
from esam_kernels.diagnostics.selected_data import size_of_selection
from esam_kernels.optimizer import ESAM
from esam_kernels.ranking import RankingContext
from esam_kernels.selection import select
from esam_kernels.tensor_lists import drop_gradients, gradients

_OF_GROUP = ("params", "rho", "adaptive", "maximize")
_OF_SETTINGS = ("beta", "gamma", "eta", "mask", "radius", "eps", "seed")


class RankingAgreement(NamedTuple):
    """What :func:`ranking_agreement` measures."""

    shared: float
    """The share of B+, as the measured rise names it, that the ranking names too. It is 1 where both name the same."""
    correlation: float
    """Spearman's rank correlation of scores and rises over the batch, -1 to 1. NaN if all of either are equal."""
    chance: float
    """What ``shared`` is on average for a ranking that draws at random."""


def ranking_agreement(
    optimizer: ESAM,
    closure: Callable[..., Any],
    *batch: Any,
    ranking: str | Callable[[RankingContext], Tensor] = "first_order",
) -> RankingAgreement:
    """Compare a ranking with the rise of the losses under the perturbation that the optimizer's next step would take.

    >>> agreement = ranking_agreement(optimizer, losses, inputs, targets)
    >>> share = agreement.shared  # of B+ that the ranking names too; agreement.chance is that of a random ranking

    Takes two forwards and one backward. Neither the model nor the optimizer is changed.

    Args:
        optimizer: built with ``model=``, and with gamma below 1; its groups, beta, gamma, mask, seed and step count.
        closure: ``closure(*batch)`` returns one loss per sample, shape (b,).
        batch: tensors or pytrees of tensors with the samples in front.
        ranking: what is compared, as for :class:`esam_kernels.ESAM`, but not "rise". "first_order" reads the head that
            the optimizer was built with.

    Returns:
        :class:`RankingAgreement`, three floats: shared, the share of the measured B+ that the ranking names too;
        correlation, Spearman's, of scores and rises; chance, what shared is on average for a random ranking.

    Raises:
        TypeError: ``optimizer`` is no ESAM.
        ValueError: an optimizer without a model, without a radius, or with gamma = 1; a ranking that cannot be.
        RuntimeError: the weights are perturbed, or the head was not used exactly once.
    """
    if not isinstance(optimizer, ESAM):
        raise TypeError(f"optimizer must be an ESAM, got {type(optimizer).__name__}")
    if optimizer._model is None:
        raise ValueError("the optimizer knows no model: build it with model=...")
    if ranking == "rise":
        raise ValueError('ranking="rise" is what the others are compared with: name another one')
    optimizer._phases.require(perturbed=False, call="ranking_agreement")
    if not optimizer._phases.perturbs:
        raise ValueError("no group that trains has a radius (rho) above 0: nothing is perturbed, and no loss rises")
    with Probe(optimizer._model, closure, batch) as probe:
        k = size_of_selection(optimizer.gamma, probe.samples)
        twin = _twin(optimizer, ranking)
        params = twin._perturbation.params  # also those of a loss, which are not the model's
        grads = gradients(params)
        drop_gradients(params)
        try:
            before = torch.cat(probe.each_part(lambda losses: _differentiated(twin, losses)))
            twin.first_step(zero_grad=True)
            rises = probe.losses() - before
            scores = twin._phases.scores(before, batch).to(rises.dtype)
        finally:
            twin.restore()
            twin._phases.close()
            for param, grad in zip(params, grads):
                param.grad = grad
        if twin._phases._maximizes():
            rises = -rises  # the perturbation goes down, and B+ are the samples that fall most
    nothing = torch.zeros_like(rises)
    measured, named = (select(nothing, values, k).tolist() for values in (rises, scores))
    shared = len(set(measured) & set(named)) / k
    return RankingAgreement(shared, _rank_correlation(scores, rises), k / probe.samples)


def _twin(optimizer: ESAM, ranking: Any) -> ESAM:
    """An optimizer over the same groups that perturbs as the next step would, and moves no memory."""
    groups = [{name: group[name] for name in _OF_GROUP if name in group} for group in optimizer.param_groups]
    settings = {name: getattr(optimizer._perturbation.settings, name) for name in _OF_SETTINGS}
    twin = ESAM(
        groups,
        torch.optim.SGD,
        lr=0.0,
        ranking=ranking,
        head=optimizer._head,
        model=optimizer._model,
        backend=optimizer._perturbation.backend or None,
        flatten=False,
        **settings,
    )
    twin._perturbation.step = optimizer._perturbation.step
    return twin


def _differentiated(twin: ESAM, losses: Tensor) -> Tensor:
    twin.zero_grad()
    twin.backward(losses.mean())
    return losses.detach()


def _rank_correlation(left: Tensor, right: Tensor) -> float:
    """Spearman's: the correlation of the ranks, equal values sharing theirs."""
    ranks = torch.stack([_ranks(left), _ranks(right)])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    _, places, counts = torch.unique(values.double(), return_inverse=True, return_counts=True)
    last = counts.cumsum(dim=0)
    return (last - (counts - 1) / 2).double()[places]
