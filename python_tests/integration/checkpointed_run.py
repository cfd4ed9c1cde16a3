"""A training run in a process of its own, which saves checkpoints and goes on from the one that it finds."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from small_training import batch, losses_of, small_net

from esam_kernels import ESAM

BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2}),
}
STEPS = 30
STEPS_PER_CHECKPOINT = 4


def train(folder: Path, base: str, mask: str, pause_at: tuple[int, int] | None = None, paused: Any = None) -> None:
    """Train to the end, and leave the state in ``folder / "final.pt"``.

    ``pause_at`` (step, call): in this step's call of the closure, set ``paused`` and wait to be killed.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kind, kwargs = BASES[base]
    model = small_net()
    optimizer = ESAM(model.parameters(), kind, rho=0.3, mask=mask, seed=7, model=model, **kwargs)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    first = load(folder / "checkpoint.pt", model, optimizer, scheduler)
    for step in range(first, STEPS):
        calls = iter(range(10))

        def losses(inputs, targets, step=step, calls=calls):
            if (step, next(calls)) == pause_at:
                paused.set()
                time.sleep(600)
            return losses_of(model)(inputs, targets)

        optimizer.step(losses, *batch(step))
        scheduler.step()
        if (step + 1) % STEPS_PER_CHECKPOINT == 0:
            save(folder / "checkpoint.pt", model, optimizer, scheduler, step + 1)
    save(folder / "final.pt", model, optimizer, scheduler, STEPS)


def save(path: Path, model, optimizer, scheduler, step: int) -> None:
    """Whole or not at all: a kill while writing leaves the checkpoint before it."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    torch.save({**state, "random": torch.get_rng_state(), "step": step}, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def load(path: Path, model, optimizer, scheduler) -> int:
    if not path.exists():
        return 0
    state = torch.load(path)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    torch.set_rng_state(state["random"])
    return state["step"]
