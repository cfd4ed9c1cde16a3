"""``step(closure)``: a closure that computes loss and gradients by itself, as torch's optimizers take it.

Two kinds of users call it. Torch's way, the closure does everything: it is called before and after the perturbation.
In the common two-step SAM class the gradients of pass 1 are there before the step, and the closure is called after the
perturbation only. Which of the two is meant shows in two things that are observed: whether the gradients that are there
are new since the last step, and whether the closure sets the gradients to zero before it computes its own.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from esam_kernels import distributed
from esam_kernels.step.phases import Phases
from esam_kernels.tensor_lists import gradients

logger = logging.getLogger("esam_kernels")


class ClosureStep:
    """Runs ``step(closure)``, and remembers which closures set the gradients to zero themselves."""

    def __init__(self) -> None:
        self._zeroing: set[Any] = set()
        self._has_warned = False

    def run(self, phases: Phases, closure: Callable[[], Any], first_gradients: bool | None = None) -> Any:
        """Everything but the update; the weights may be left perturbed. Returns what the closure returned first.

        Args:
            phases: of the step.
            closure: computes a loss and adds its gradients to ``.grad``.
            first_gradients: whether the gradients that are there are those of pass 1; None: found out.

        Raises:
            RuntimeError: the closure computed no gradients, or there are none and ``first_gradients`` is True, or the
                closure would compute pass 1 and ``ascent_share`` is below 1.
        """
        if first_gradients and all(grad is None for grad in gradients(phases.perturbation.params)):
            raise RuntimeError(
                "first_gradients=True, but no parameter has a gradient: call loss.backward() before step"
            )
        is_sure = first_gradients is not None
        if first_gradients is None:
            first_gradients = self._are_new(phases) and _kind(closure) not in self._zeroing
        if not phases.perturbs:
            if first_gradients:
                phases.drop_gradients()
            return closure()
        if not phases.perturbation.ascent.two_passes:
            phases.first_step()
            return closure()
        if not first_gradients:
            return self._two_calls(phases, closure, is_sure or not phases.marks.any_written(phases.perturbation.params))
        if is_sure:
            phases.first_step(zero_grad=True)
            return closure()
        step = phases.perturbation.step
        loss, zeroes = self._perturb_and_call(phases, closure)
        if not zeroes:
            return loss
        # The closure begins with zero_grad: the gradients that were there were not meant for it.
        phases.restore()
        phases.perturbation.step = step
        return self._two_calls(phases, closure, is_sure=True)

    def _are_new(self, phases: Phases) -> bool:
        """Whether there are gradients that a backward computed since the last step.

        Those that the last step left behind, or that only changed in place since, are not taken for new: a gradient
        that is clipped after the step and one that is added to gradients of zeros look the same.
        """
        params = phases.perturbation.params
        if phases.zeroed_in_place:
            return not phases.marks.are_all(params)
        return phases.marks.any_other(params)

    def _two_calls(self, phases: Phases, closure: Callable[[], Any], is_sure: bool) -> Any:
        """The closure at w and at w + e. What is there before is dropped."""
        params, share = phases.perturbation.params, phases.perturbation.settings.ascent_share
        if share < 1.0:
            raise RuntimeError(
                f"step(closure) needs ascent_share = 1, got {share:g}: the closure computes the whole batch, also in "
                "pass 1. Give step the function of the losses and the batch, step(losses, *batch). Where a framework "
                "calls step(closure), call backward with the loss of a part of the batch, first_step and second_step "
                "in your training step, or set optimizer.ascent_share = 1.0"
            )
        had_gradients = [] if is_sure else [param for param in params if param.grad is not None]
        phases.drop_gradients()
        with phases.parallelism.without_synchronization(), phases.unreduced(takes_all=True):
            loss, zeroes = self._observed(phases, closure, had_gradients)
        if all(grad is None for grad in gradients(params)):
            raise RuntimeError(
                "the closure computed no gradients: it has to call loss.backward(), or the batch has to be given, "
                "step(losses, *batch)"
            )
        if not (is_sure or zeroes or self._has_warned):
            logger.warning(
                "step(closure): the gradients of the last step are still there and have been changed, so that they "
                "cannot be told from new ones: they are dropped, and the closure is called before and after the "
                "perturbation. Call optimizer.zero_grad() after each step, or say what they are: "
                "step(closure, first_gradients=True) or False"
            )
            self._has_warned = True
        phases.first_step(zero_grad=True)
        closure()
        return loss

    def _perturb_and_call(self, phases: Phases, closure: Callable[[], Any]) -> tuple[Any, bool]:
        """The closure at w + e, and whether it set the gradients to zero."""
        had_gradients = [param for param in phases.perturbation.params if param.grad is not None]
        phases.first_step(zero_grad=True)
        return self._observed(phases, closure, had_gradients)

    def _observed(self, phases: Phases, closure: Callable[[], Any], had_gradients: list[Tensor]) -> tuple[Any, bool]:
        """What the closure returns, and whether it sets gradients to zero, which a gradient of zeros shows."""
        zeroed = phases.zeroed
        marker = _Marker(min(had_gradients, key=Tensor.numel)) if had_gradients else None
        with contextlib.nullcontext() if marker is None else marker:
            loss = closure()
        zeroes = phases.zeroed != zeroed or (marker is not None and marker.was_overwritten)
        if zeroes:
            self._zeroing.add(_kind(closure))
        return loss, zeroes


class _Marker:
    """A gradient of zeros at one parameter, which shows whether a closure sets the gradients to zero."""

    def __init__(self, param: Tensor) -> None:
        self._param = param
        self._zeros = torch.zeros_like(param)
        # FSDP2 adds the gradients of its shards without telling a hook.
        self._has_hook = not distributed.is_sharded(param)
        self._first = self._version = self._version_now()
        #: Whether anything but a backward wrote to it before the last backward did, or put another in its place.
        self.was_overwritten = False

    def __enter__(self) -> _Marker:
        self._param.grad = self._zeros
        if self._has_hook:
            self._hook = self._param.register_post_accumulate_grad_hook(self._added)
        return self

    def __exit__(self, *_: object) -> None:
        if self._has_hook:
            self._hook.remove()
        if self._param.grad is not self._zeros or (not self._has_hook and self._version_now() > self._first + 1):
            self.was_overwritten = True
        elif self._version_now() == self._first:
            self._param.grad = None  # nothing was computed here

    def _added(self, _: Tensor) -> None:
        version = self._version_now()
        self.was_overwritten |= self._param.grad is not self._zeros or version != self._version + 1
        self._version = version

    def _version_now(self) -> int:
        if self._has_hook:
            return self._zeros._version
        # FSDP2 writes to the part that a rank holds, everybody else to the whole.
        return self._zeros._version + distributed.local_part(self._zeros)._version


def _kind(closure: Callable[[], Any]) -> Any:
    """What closures of one place in the program have in common: they are made anew in every step."""
    while True:
        inner = inspect.unwrap(closure)
        inner = inner.func if isinstance(inner, functools.partial) else inner
        if inner is closure:
            return getattr(closure, "__code__", type(closure))
        closure = inner
