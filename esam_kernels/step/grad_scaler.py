"""``torch.amp.GradScaler``: an update that it may skip, without leaving the weights perturbed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer


def restore_and_scaled_step(
    base: Optimizer,
    grad_scale: Tensor | None,
    found_inf: Tensor,
    restore: Callable[[], None],
    restore_and_update: Callable[[], None],
) -> None:
    """Restore the weights; then the update with the gradients divided by ``grad_scale``.

    Args:
        base: a fused one (``fused=True``) takes both numbers on the device, and skips its update by itself.
        grad_scale: None where the gradients are divided already.
        found_inf: not 0 where a gradient is not finite; for a fused base optimizer.
        restore: puts the weights back.
        restore_and_update: puts them back and takes the base optimizer's step.
    """
    if getattr(base, "_step_supports_amp_scaling", False):
        restore()
        base.grad_scale, base.found_inf = grad_scale, found_inf  # type: ignore[attr-defined]
        try:
            base.step()
        finally:
            del base.grad_scale, base.found_inf  # type: ignore[attr-defined]
    else:
        if grad_scale is not None:
            inverse = grad_scale.double().reciprocal().float()  # in this order, as GradScaler does it
            for group in base.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        param.grad.mul_(inverse.to(param.device, non_blocking=True))
        restore_and_update()


def nan_unless_finite(loss: Tensor, sum_of_squares: Tensor | None) -> Tensor:
    """``loss``, or NaN where the gradient whose partial sums these are is not finite. Nothing waits for the device.

    GradScaler sees the second gradients only: this is how it hears of the first ones.
    """
    if sum_of_squares is None:
        return loss
    return loss * (1.0 + 0.0 * sum_of_squares.sum()).to(loss)


def scaled(loss: Tensor, scaler: torch.amp.GradScaler | None) -> Tensor:
    """The loss times the scaler's factor; as it is without a scaler."""
    return loss if scaler is None else scaler.scale(loss)
