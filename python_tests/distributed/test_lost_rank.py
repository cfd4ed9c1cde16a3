"""A rank dies in the middle of a step: the others end with an error, and a restart goes on from the checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import COLLECTIVE_SECONDS, run_ranks
from torch import Tensor
from training import ELEMENT, SGD, batches, build_model, losses_of, train_on_ranks, weights, wrap

from esam_kernels import ESAM

STEPS, LOST_AT = 5, 3
OPTIONS = {**SGD, **ELEMENT}
LOST = 7


def _train(folder: str, call_of_death: int | None) -> list[Tensor]:
    """Save after every step. Rank 1 dies within step ``LOST_AT``, in its so-many-th forward."""
    model = wrap(build_model())
    optimizer = ESAM(model.parameters(), model=model, **OPTIONS)
    path = Path(folder, "checkpoint.pt")
    start = 0
    if path.exists():
        saved = torch.load(path)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    for number, parts in enumerate(batches(STEPS)):
        calls = 0

        def losses(inputs: Tensor, targets: Tensor, number: int = number) -> Tensor:
            nonlocal calls
            calls += 1
            if (number, calls, dist.get_rank()) == (LOST_AT, call_of_death, 1):
                os._exit(LOST)
            return losses_of(model)(inputs, targets)

        if number >= start:
            optimizer.step(losses, *parts[dist.get_rank()])
            if dist.get_rank() == 0:
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": number + 1}, path)
    return weights(model)


@pytest.mark.parametrize("call", [1, 2, 3], ids=["first pass", "forward that ranks", "second pass"])
def test_the_others_end_with_an_error_and_a_restart_goes_on(tmp_path: Path, call: int) -> None:
    survivor, lost = run_ranks(_train, str(tmp_path), call, seconds=2 * COLLECTIVE_SECONDS, may_die=True)
    assert lost == LOST
    assert "Error" in survivor
    assert torch.load(tmp_path / "checkpoint.pt")["step"] == LOST_AT
    resumed = run_ranks(_train, str(tmp_path), None)
    for got, expected in zip(resumed, run_ranks(train_on_ranks, "ddp", OPTIONS, STEPS, {})):
        assert all(map(torch.equal, got, expected))
