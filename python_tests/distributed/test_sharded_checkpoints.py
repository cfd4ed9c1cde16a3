"""State through torch.distributed.checkpoint: saved on so many processes, gone on with on others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from training import (
    ADAMW,
    ELEMENT,
    SGD,
    TENSOR,
    assert_same,
    batches,
    build_model,
    joined,
    losses_of,
    shard,
    train_alone,
    train_on_joined_batches,
    train_on_ranks,
    weights,
    wrap,
)

from esam_kernels import ESAM

STEPS = 6
# Selection goes by rank: with it, one process and two would train on different samples.
EVERY_SAMPLE = {"gamma": 1.0}
PREVIOUS = {"ascent": "previous", "beta": 1.0, **EVERY_SAMPLE}
KINDS = {"ddp": wrap, "fsdp": shard, "plain": lambda model: model}


def _train(model: nn.Module, optimizer: ESAM, first: int, last: int) -> None:
    """Steps ``first`` to ``last`` of the data of two ranks, which one rank alone gets together."""
    for parts in list(batches(last))[first:]:
        batch = parts[dist.get_rank()] if dist.get_world_size() > 1 else joined(parts)
        optimizer.step(losses_of(model), *batch)


def _save(kind: str, options: dict[str, Any], flatten: bool, folder: str) -> None:
    model = KINDS[kind](build_model())
    optimizer = ESAM(model.parameters(), model=model, **options)
    _train(model, optimizer, 0, STEPS // 2)
    state = get_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=flatten))
    dcp.save({"model": state[0], "optimizer": state[1]}, checkpoint_id=folder)


def _go_on(kind: str, options: dict[str, Any], flatten: bool, folder: str) -> list[Tensor]:
    model = build_model()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1.0)
    model = KINDS[kind](model)
    # All that the checkpoint holds is different here.
    optimizer = ESAM(model.parameters(), model=model, **{**options, "seed": 9, "beta": 0.9, "rho": 0.01, "lr": 1.0})
    settings = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=settings)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=settings
    )
    assert optimizer.state_dict()["esam"]["step"] == STEPS // 2
    _train(model, optimizer, STEPS // 2, STEPS)
    return weights(model)


@pytest.mark.parametrize(
    ("saved", "loaded", "options", "flatten"),
    [
        pytest.param(("fsdp", 2), ("fsdp", 1), {**ADAMW, **ELEMENT}, False, id="fsdp-2-to-1-element"),
        pytest.param(("fsdp", 1), ("fsdp", 2), {**ADAMW, **ELEMENT}, False, id="fsdp-1-to-2-element"),
        pytest.param(("fsdp", 2), ("fsdp", 1), {**SGD, **TENSOR}, True, id="fsdp-2-to-1-tensor-flattened"),
        pytest.param(("fsdp", 1), ("fsdp", 2), {**SGD, **TENSOR}, True, id="fsdp-1-to-2-tensor-flattened"),
        pytest.param(("fsdp", 2), ("plain", 1), {**ADAMW, **TENSOR}, False, id="fsdp-2-to-plain"),
        pytest.param(("fsdp", 2), ("fsdp", 1), {**SGD, **PREVIOUS}, False, id="fsdp-2-to-1-previous"),
        pytest.param(("plain", 1), ("fsdp", 2), {**ADAMW, **PREVIOUS}, False, id="plain-to-fsdp-previous"),
        pytest.param(("plain", 1), ("ddp", 2), {**SGD, **ELEMENT, "sync_perturbation": True}, False, id="plain-to-ddp"),
    ],
)
def test_resharded_state_goes_on_with_the_same_numbers(
    tmp_path: Path, saved: tuple[str, int], loaded: tuple[str, int], options: dict[str, Any], flatten: bool
) -> None:
    options = {**options, **EVERY_SAMPLE}
    run_ranks(_save, saved[0], options, flatten, str(tmp_path), ranks=saved[1])
    got = run_ranks(_go_on, loaded[0], options, flatten, str(tmp_path), ranks=loaded[1])
    options.pop("sync_perturbation", None)
    alone = train_on_joined_batches if "ascent" in options else train_alone
    assert_same(got, alone(options, STEPS), atol=1e-6)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("options", [{**SGD, **TENSOR}, {**ADAMW, **ELEMENT}], ids=["sgd-tensor", "adamw-element"])
def test_resumed_run_has_the_bits_of_an_undisturbed_one(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    run_ranks(_save, kind, options, False, str(tmp_path))
    got = run_ranks(_go_on, kind, options, False, str(tmp_path))
    for weights_, expected in zip(got, run_ranks(train_on_ranks, kind, options, STEPS, {})):
        assert all(map(torch.equal, weights_, expected))
