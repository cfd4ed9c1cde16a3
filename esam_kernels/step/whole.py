"""The whole of a step in one call: ``step(losses, *batch)``, ``step(closure)``, and ``step()`` where one ends."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from esam_kernels.batches import batch_size, check_parts, split
from esam_kernels.step.closure import ClosureStep
from esam_kernels.step.grad_scaler import restore_and_scaled_step
from esam_kernels.step.phases import Phases
from esam_kernels.step.plan import choose

logger = logging.getLogger("esam_kernels")

Scaling = tuple[Tensor | None, Tensor]
"""``grad_scale`` and ``found_inf``, as a GradScaler sets them on the optimizer while it calls its ``step``."""


class WholeStep:
    """Runs the phases one after the other; :meth:`esam_kernels.ESAM.step` says how."""

    def __init__(self, phases: Phases) -> None:
        self._phases = phases
        self._closures = ClosureStep()
        self._said_rate_zero = False

    def run(
        self,
        closure: Callable[..., Any] | None,
        batch: tuple[Any, ...],
        scaling: Scaling | None,
        micro_batch: int | None,
        max_grad_norm: float | None,
        scaler: torch.amp.GradScaler | None,
        first_gradients: bool | None,
    ) -> Any:
        """What ``step`` returns. If anything raises, the weights are restored, and the step has not been counted."""
        phases = self._phases
        if scaling is not None and closure is not None:
            raise RuntimeError(
                "scaler.step(optimizer, closure) would scale the gradients twice: call scaler.step(optimizer) after "
                "the second backward, or optimizer.step(losses, *batch, scaler=scaler)"
            )
        if not batch and not (micro_batch is None and max_grad_norm is None and scaler is None):
            raise ValueError("micro_batch, max_grad_norm and scaler need the batch: step(losses, *batch, ...)")
        _check_max_grad_norm(max_grad_norm)
        if phases.weights.is_open and not batch:
            return self._finish(closure, scaling)
        # torch.distributed.checkpoint takes such a step to make the base optimizer create its state.
        if closure is None and all(group.get("lr") == 0.0 for group in phases.perturbation.base.param_groups):
            return self._base_step_at_rate_zero()
        if not callable(closure):
            raise RuntimeError("step needs a closure: step(losses, *batch), or first_step and second_step in its place")
        phases.require(perturbed=False, call="step")
        if batch and first_gradients is not None:
            raise ValueError(
                "first_gradients belongs to step(closure): with a batch, step computes all gradients itself"
            )
        with torch.enable_grad(), self._undone_if_it_raises():
            if batch:
                return self._on_batch(closure, batch, micro_batch, max_grad_norm, scaler)
            loss = self._closures.run(phases, closure, first_gradients)
            phases.update()
            return loss

    @contextlib.contextmanager
    def _undone_if_it_raises(self) -> Iterator[None]:
        """Around a step: if it raises, the weights are restored, and the step has not been counted."""
        phases = self._phases
        step = phases.perturbation.step
        try:
            yield
        except BaseException:
            phases.give_up()
            phases.perturbation.step = step
            raise

    def is_skipped(self, found_inf: Tensor) -> bool:
        """Whether a GradScaler skips the update that ends this step, which is then given up.

        A base optimizer that looks at ``found_inf`` itself, on the device, is left to do so.
        """
        phases = self._phases
        if getattr(phases.perturbation.base, "_step_supports_amp_scaling", False):
            return False
        if not (phases.weights.is_open and bool(found_inf)):
            return False
        phases.restore()
        phases.end()
        return True

    def _on_batch(
        self,
        losses: Callable[..., Any],
        batch: tuple[Any, ...],
        micro_batch: int | None,
        max_grad_norm: float | None,
        scaler: torch.amp.GradScaler | None,
    ) -> Any:
        parts = split(batch, micro_batch)
        sizes = [batch_size(part) for part in parts]
        if any(self._phases.num_selected(size) < size for size in sizes):
            check_parts(batch)
        self._phases.drop_gradients()
        results = choose(self._phases).run(self._phases, losses, parts, scaler)
        self._update(max_grad_norm, scaler)
        loss = results[0][0]
        if len(parts) > 1:
            samples = sum(sizes)  # as shares: float16 has no room for the sum of many losses
            loss = torch.stack([loss * (size / samples) for (loss, _), size in zip(results, sizes)]).sum()
        rest = [extra[0] if len(extra) == 1 else extra for _, extra in results if extra is not None]
        if not rest:
            return loss
        return loss, rest if micro_batch is not None else rest[0]

    def _update(self, max_grad_norm: float | None, scaler: torch.amp.GradScaler | None) -> None:
        """Back to w, and the base optimizer's update, or what the scaler makes of it."""
        phases, params = self._phases, self._phases.perturbation.params
        if scaler is None:
            if max_grad_norm is not None:
                nn.utils.clip_grad_norm_(params, max_grad_norm)
            phases.update()
            return
        if phases.weights.is_open:
            phases.restore()
        else:
            phases.perturbation.step += 1
        base = phases.perturbation.base
        if max_grad_norm is not None:
            scaler.unscale_(base)
            nn.utils.clip_grad_norm_(params, max_grad_norm)
        scaler.step(base)
        phases.end()

    def _finish(self, closure: Callable[[], Any] | None, scaling: Scaling | None) -> Any:
        """``second_step``, or what a GradScaler makes of it."""
        phases = self._phases
        with self._undone_if_it_raises():
            with torch.enable_grad():
                loss = closure() if closure is not None else None
            if scaling is None:
                phases.second_step()
                return loss
            with torch.no_grad():
                base = phases.perturbation.base
                restore_and_scaled_step(base, *scaling, phases.restore, phases.restore_and_update)
            phases.end()
        return loss

    def _base_step_at_rate_zero(self) -> None:
        perturbation = self._phases.perturbation
        if not self._said_rate_zero:
            logger.warning("step() without a closure, with lr = 0: it took the base optimizer's step alone")
            self._said_rate_zero = True
        perturbation.base.step()
        perturbation.ascent.prepare(perturbation.params)


def _check_max_grad_norm(value: Any) -> None:
    """Refuse what torch would take: 0 stops the training, a negative one turns its direction, NaN ends it."""
    if not (value is None or isinstance(value, Tensor) or (isinstance(value, Real) and float(value) > 0.0)):
        raise ValueError(f"max_grad_norm must be a number above 0, or None to clip nothing, got {value!r}")
