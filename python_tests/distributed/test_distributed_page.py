"""docs/distributed.md: its snippets train on two ranks, with DistributedDataParallel and with FSDP2."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor
from training import batches, build_model, losses_of, weights

from esam_kernels import ESAM

PAGE = Path(__file__).resolve().parents[2] / "docs" / "distributed.md"
WRAP, LOOP, SHARD, CHECKPOINT = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
TRAIN = "optimizer.step(losses, inputs, targets)"


@pytest.mark.parametrize("snippets", [[WRAP, LOOP], [SHARD, TRAIN]], ids=["ddp", "fsdp"])
def test_snippets_train_and_load_their_checkpoint(snippets: list[str], tmp_path: Path) -> None:
    first, second = run_ranks(_run, snippets, str(tmp_path))
    assert all(torch.equal(*pair) for mine, other in zip(first, second) for pair in zip(mine, other))
    start, saved, loaded = first
    assert not any(torch.equal(*pair) for pair in zip(start, saved))
    assert all(torch.equal(*pair) for pair in zip(saved, loaded))


def _run(snippets: list[str], folder: str) -> list[list[Tensor]]:
    """The weights at the start, after the page's training, and after its checkpoint."""
    # What the page takes for granted.
    model = build_model()
    model.blocks = [model[0]]
    loader = [parts[dist.get_rank()] for parts in batches(2, dist.get_world_size())]
    found: dict[str, Any] = {"torch": torch, "ESAM": ESAM, "model": model, "folder": folder, "loader": loader}
    found["inputs"], found["targets"] = loader[0]
    found["losses"] = lambda *batch: losses_of(found["model"])(*batch)
    if WRAP in snippets:
        del found["torch"], found["ESAM"]
    seen = [weights(model)]
    for code in ["\n".join(snippets), CHECKPOINT]:
        exec(compile(code, str(PAGE), "exec"), found)
        seen.append(weights(found["model"]))
    return seen
