"""The learning rate over a training: a linear warm-up, then constant or half a cosine."""

from __future__ import annotations

import math

import torch

SCHEDULES = ("constant", "cosine")


def lr_factor(step: int, schedule: str, epochs: int, warmup: float, steps_per_epoch: int) -> float:
    """What the peak learning rate is multiplied by in step ``step``, counted from 0.

    Over the first ``warmup`` epochs it rises step by step to 1. "cosine" then falls epoch by epoch along half a cosine,
    which would reach 0 after the last one.
    """
    warmup_steps = round(warmup * steps_per_epoch)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    done = max(step // steps_per_epoch - warmup, 0.0) / (epochs - warmup)
    return (1.0 + math.cos(math.pi * min(done, 1.0))) / 2.0


def build_lr_schedule(
    optimizer: torch.optim.Optimizer, schedule: str, epochs: int, warmup: float, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LambdaLR | None:
    """To be stepped after every step of the optimizer; None where the learning rate never changes."""
    if schedule == "constant" and warmup == 0.0:
        return None
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step, schedule, epochs, warmup, steps_per_epoch)
    )
