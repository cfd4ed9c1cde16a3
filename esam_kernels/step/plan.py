"""What one step on a batch runs, and what that costs.

The cost is counted in forwards over the whole batch: a backward is two of them, one for the gradients of the inputs of
each layer and one for those of the weights. The base optimizer's step costs 3.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from esam_kernels.batches import batch_size, losses_and_rest, num_ascent, samples_between
from esam_kernels.selection import num_selected
from esam_kernels.step.grad_scaler import nan_unless_finite, scaled
from esam_kernels.step.phases import Phases
from esam_kernels.tensor_lists import drop_gradients, gradients

Losses = Callable[..., Any]
Parts = list[tuple[Any, ...]]
Result = tuple[Tensor, tuple[Any, ...] | None]
"""Of a part of the batch its mean loss, detached, and what else the closure returned (None: nothing), of one pass."""
Results = list[Result]

_BASE_FORWARDS = 3.0


class Plan(Protocol):
    """A way to get from a batch to the gradients that the base optimizer's update takes."""

    def forwards(self, phases: Phases) -> float:
        """The counted cost, in forwards over the whole batch."""

    def run(self, phases: Phases, losses: Losses, parts: Parts, scaler: torch.amp.GradScaler | None) -> Results:
        """Compute the gradients of the mean over all parts. The weights may be left perturbed."""


def choose(phases: Phases) -> Plan:
    """The plan of the next step at the present settings."""
    if not phases.perturbs:
        return BaseStep()
    return TwoPasses() if phases.perturbation.ascent.two_passes else OnePass()


def relative_cost(phases: Phases) -> float:
    """The counted cost of the next step, in units of the base optimizer's."""
    return choose(phases).forwards(phases) / _BASE_FORWARDS


class BaseStep:
    """The base optimizer's step: nothing is perturbed, since no parameter that trains has a radius."""

    def forwards(self, phases: Phases) -> float:
        """One forward and one backward."""
        return _BASE_FORWARDS

    def run(self, phases: Phases, losses: Losses, parts: Parts, scaler: torch.amp.GradScaler | None) -> Results:
        """One pass over each part."""
        samples, params = sum(map(batch_size, parts)), phases.perturbation.params
        results = []
        for number, part in enumerate(parts, start=1):
            here = batch_size(part)
            alone = phases.parallelism.without_synchronization
            with contextlib.nullcontext() if number == len(parts) else alone():
                summed = gradients(params) if number > 1 else []
                drop_gradients(params)
                losses_of_part, rest = losses_and_rest(losses(*part), here)
                drop_gradients(phases.perturbation.params)  # those of an attack inside the closure
                for param, grad in zip(params, summed):
                    param.grad = grad
                loss = losses_of_part.mean()
                scaled(loss if here == samples else loss * (here / samples), scaler).backward()
            results.append((loss.detach(), rest))
        return results


class OnePass(BaseStep):
    """One perturbation along what is in memory already, then one pass over each part."""

    def run(self, phases: Phases, losses: Losses, parts: Parts, scaler: torch.amp.GradScaler | None) -> Results:
        """The weights are left at w + e."""
        phases.first_step()
        return super().run(phases, losses, parts, scaler)


@dataclass(frozen=True)
class Part:
    """A part of the batch, and what its passes have to know of the others."""

    batch: tuple[Any, ...]
    summed: list[Tensor | None]
    """The gradients of the second passes before, which its own is added to."""
    selected_in_all: int
    """The samples of all second passes together: the mean is taken over them."""
    is_last: bool
    scaler: torch.amp.GradScaler | None

    def synchronized(self, phases: Phases) -> contextlib.AbstractContextManager[Any]:
        """Around its second pass: only the last one's gradients go to the other ranks."""
        return contextlib.nullcontext() if self.is_last else phases.parallelism.without_synchronization()


class TwoPasses:
    """Algorithm 1: the gradient at w, the perturbation, the choice of B+, and the gradient of B+ at w + e."""

    def forwards(self, phases: Phases) -> float:
        """Pass 1 on its share of the batch, for what is drawn; the forward at w + e that ranks; pass 2 over B+."""
        perturbation, settings = phases.perturbation, phases.perturbation.settings
        trained = sum(perturbation.params[i].numel() for i in perturbation.trained())
        candidates = sum(perturbation.params[i].numel() for i in perturbation.candidates())
        drawn = candidates / max(1, trained) * (settings.beta if settings.mask == "tensor" else 1.0)
        ranking = 1.0 if settings.gamma < 1.0 and phases.ranking.needs_loss_after else 0.0
        return settings.ascent_share * (2.0 + drawn) + ranking + _BASE_FORWARDS * settings.gamma

    def run(self, phases: Phases, losses: Losses, parts: Parts, scaler: torch.amp.GradScaler | None) -> Results:
        """Each part from the clean weights, with a perturbation and a B+ of its own; w is left at the last one's w + e.

        Only the second pass of the last part is synchronised with other ranks.
        """
        params = phases.perturbation.params
        selected = sum(num_selected(phases.perturbation.settings.gamma, batch_size(part)) for part in parts)
        results = []
        summed: list[Tensor | None] = [None] * len(params)
        for number, part in enumerate(parts, start=1):
            is_last = number == len(parts)
            results.append(self._of_part(phases, losses, Part(part, summed, selected, is_last, scaler)))
            if not is_last:
                summed = [param.grad for param in params]
                phases.drop_gradients()
                phases.restore()
        return results

    def _of_part(self, phases: Phases, losses: Losses, part: Part) -> Result:
        """Both passes over the part. Returns its mean loss, and what else the closure returned for it."""
        alone, batch, scaler = phases.parallelism.without_synchronization, part.batch, part.scaler
        samples = batch_size(batch)
        gamma, share = phases.perturbation.settings.gamma, phases.perturbation.settings.ascent_share
        noise = phases.noise() if gamma < 1.0 and phases.ranking.needs_loss_after else None
        first = num_ascent(share, samples)

        with alone():
            ascent_batch = batch if first == samples else samples_between(batch, 0, first)
            loss_before, rest = losses_and_rest(losses(*ascent_batch), first)
            drop_gradients(phases.perturbation.params)  # those of an attack inside the closure
            loss = loss_before.mean()
            phases.backward(scaled(loss, scaler))
        phases.first_step(zero_grad=True)

        k = num_selected(gamma, samples)
        if k < samples or (gamma < 1.0 and phases.parallelism.forward_communicates):
            loss_after = None
            if phases.ranking.needs_loss_after:
                with alone():
                    loss_after, _ = losses_and_rest(phases.evaluate(losses, batch, noise), samples)
            chosen = phases.select(loss_before, loss_after, *batch)
            batch = chosen if len(batch) > 1 else (chosen,)

        with part.synchronized(phases):
            loss_selected, rest_selected = losses_and_rest(losses(*batch), k)
            _hand_over(part.summed, phases.perturbation.params)
            loss_selected = loss_selected.mean()
            if share < 1.0:  # also where pass 1 took all samples: what is returned does not depend on the batch's size
                loss, rest = loss_selected, rest_selected
            if k != part.selected_in_all:
                loss_selected = loss_selected * (k / part.selected_in_all)
            if scaler is not None and scaler.is_enabled():
                loss_selected = nan_unless_finite(loss_selected, phases.perturbation.sum_of_squares)
            scaled(loss_selected, scaler).backward()
        return loss.detach(), rest


def _hand_over(grads: list[Tensor | None], params: list[Tensor]) -> None:
    """Make them the parameters' gradients, and hold them no longer: the backup of the weights may take their memory."""
    for number, param in enumerate(params):
        param.grad, grads[number] = grads[number], None
