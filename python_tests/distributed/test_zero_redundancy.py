"""ZeroRedundancyOptimizer, which keeps on each rank only a part of the base optimizer's state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor
from training import ELEMENT, TENSOR, assert_same, batches, build_model, losses_of, train_replicas, weights, wrap

from esam_kernels import ESAM

BASE = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}


def built(options: dict[str, Any]) -> tuple[torch.nn.Module, ESAM]:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # torch warns at this import: in the ranks only

    model = wrap(build_model())
    base = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.SGD, **BASE)
    return model, ESAM(model.parameters(), base, model=model, **options)


def train_sharded(options: dict[str, Any], steps: int) -> list[Tensor]:
    model, optimizer = built(options)
    for parts in batches(steps):
        optimizer.step(losses_of(model), *parts[dist.get_rank()])
    return weights(model)


def train_sharded_and_resume(options: dict[str, Any], steps: int) -> list[Tensor]:
    model, optimizer = built(options)
    for number, parts in enumerate(batches(steps)):
        if number == steps // 2:
            optimizer.base_optimizer.consolidate_state_dict(to=0)
            saved = [optimizer.state_dict() if dist.get_rank() == 0 else None, copy.deepcopy(model.module.state_dict())]
            dist.broadcast_object_list(saved, src=0)
            model, optimizer = built(options)
            model.module.load_state_dict(saved[1])
            optimizer.load_state_dict(saved[0])
        optimizer.step(losses_of(model), *parts[dist.get_rank()])
    return weights(model)


@pytest.mark.parametrize("swp", [TENSOR, ELEMENT], ids=["tensor", "element"])
@pytest.mark.parametrize("train", [train_sharded, train_sharded_and_resume])
def test_steps_equal_those_of_the_optimizer_that_is_sharded(train: Any, swp: dict[str, Any]) -> None:
    got = run_ranks(train, swp, 10)
    assert_same(got, train_replicas({"base_optimizer": torch.optim.SGD, **BASE, **swp}, 10))


def refusal(options: dict[str, Any]) -> str:
    with pytest.raises(ValueError, match="ZeroRedundancyOptimizer") as error:
        built(options)
    return str(error.value)


def test_the_momentum_of_a_part_is_no_direction() -> None:
    messages = run_ranks(refusal, {"ascent": "momentum", "beta": 1.0, "gamma": 1.0})
    assert len(messages) == 2
    assert all("ZeroRedundancyOptimizer each rank keeps that of its own part" in message for message in messages)
