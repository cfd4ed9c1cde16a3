"""``step(closure)``: a closure that computes loss and gradients by itself, as torch's optimizers take it.

Two kinds of users call it. Torch's way, the closure does everything: it is called before and after the perturbation.
In the common two-step SAM class the gradients of pass 1 are there before the step, and the closure is called after the
perturbation only. Which of the two is meant shows in what the closure does with the gradients that it finds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from esam_kernels.step.phases import Phases
from esam_kernels.tensor_lists import GradientMarks, gradients

logger = logging.getLogger("esam_kernels")


class ClosureStep:
    """Runs ``step(closure)``, and remembers what closures do to the gradients that they find."""

    def __init__(self) -> None:
        # Whether closures of this code set the gradients to zero themselves. Where that could not be seen, no entry.
        self._zeroes: dict[Any, bool] = {}

    def run(self, phases: Phases, closure: Callable[[], Any]) -> Any:
        """Everything but the update; the weights may be left perturbed. Returns what the closure returned first.

        Raises:
            RuntimeError: the closure computed no gradients.
        """
        has_first_gradients = self._has_first_gradients(phases, closure)
        if not any(phases.perturbation.radii):
            if has_first_gradients:
                phases.drop_gradients()
            return closure()
        if not phases.perturbation.ascent.two_passes:
            phases.first_step()
            return closure()
        if has_first_gradients:
            step = phases.perturbation.step
            loss = self._perturb_and_call(phases, closure)
            if self._zeroes.get(_kind(closure)) is not True:
                return loss
            # The closure begins with zero_grad: the gradients that were there were not meant for it.
            phases.restore()
            phases.perturbation.step = step
            phases.drop_gradients()
        return self._two_calls(phases, closure)

    def _two_calls(self, phases: Phases, closure: Callable[[], Any]) -> Any:
        params = phases.perturbation.params
        before = GradientMarks()
        before.set(params)
        with phases.parallelism.without_synchronization():
            loss = closure()
        if before.are_all(params):
            raise RuntimeError(
                "the closure computed no gradients: it has to call loss.backward(), or the batch has to be given, "
                "step(losses, *batch)"
            )
        self._perturb_and_call(phases, closure)
        return loss

    def _perturb_and_call(self, phases: Phases, closure: Callable[[], Any]) -> Any:
        """The closure at w + e. It finds one gradient of zeros, which shows whether it sets gradients to zero."""
        params = phases.perturbation.params
        had_gradients = [param for param in params if param.grad is not None]
        phases.first_step(zero_grad=True)
        observed = None if phases.perturbation.parameters.is_sharded else _smallest(had_gradients)
        if observed is None:
            return closure()
        zeros = observed.grad = torch.zeros_like(observed)
        version, zeroed = zeros._version, phases.zeroed
        loss = closure()
        added = zeros._version - version
        if phases.zeroed > zeroed or observed.grad is not zeros:
            self._zeroes[_kind(closure)] = True
        elif added == 1:
            self._zeroes[_kind(closure)] = False
        elif added == 0:
            observed.grad = None
        return loss

    def _has_first_gradients(self, phases: Phases, closure: Callable[[], Any]) -> bool:
        """Whether the gradients that are there now are those of pass 1, computed since the last step."""
        params = phases.perturbation.params
        if all(grad is None for grad in gradients(params)) or phases.marks.are_all(params):
            return False
        if self._zeroes.get(_kind(closure)) is True:
            return False
        if not phases.marks.any_nearly(params):
            return True
        logger.warning(
            "step(closure): the gradients of the last step are still there and have been changed, so that they cannot "
            "be told from new ones: they are dropped, and the closure is called before and after the perturbation. "
            "Call optimizer.zero_grad() after each step."
        )
        phases.drop_gradients()
        return False


def _kind(closure: Callable[[], Any]) -> Any:
    """What closures of one place in the program have in common: they are made anew in every step."""
    return getattr(closure, "__code__", type(closure))


def _smallest(params: list[Tensor]) -> Tensor | None:
    return min(params, key=Tensor.numel) if params else None
