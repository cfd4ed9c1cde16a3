"""A model that is sharded after its optimizer was built, and closures over sharded parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn
from training import (
    ADAMW,
    ELEMENT,
    SGD,
    TENSOR,
    assert_same,
    batches,
    build_model,
    losses_of,
    shard,
    train_alone,
    weights,
)

from esam_kernels import ESAM, SAM

STEPS = 5


def _by_new_lists(optimizer: Any, new: dict[int, Tensor]) -> None:
    for group in optimizer.param_groups:
        group["params"] = [new[id(param)] for param in group["params"]]


def _one_by_one(optimizer: Any, new: dict[int, Tensor]) -> None:
    for group in optimizer.param_groups:
        for i, param in enumerate(group["params"]):
            group["params"][i] = new[id(param)]


SWAPS = {"new lists": _by_new_lists, "one by one": _one_by_one}


@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("options", [{**SGD, **TENSOR}, {**ADAMW, **ELEMENT}], ids=["sgd", "adamw"])
def test_sharded_parameters_put_into_the_groups_are_followed(options: dict[str, Any], swap: str) -> None:
    """As Accelerate does it."""
    assert_same(run_ranks(_sharded_later, options, swap), train_alone(options, STEPS))


def _sharded_later(options: dict[str, Any], swap: str) -> list[Tensor]:
    model = build_model()
    optimizer = ESAM(model.parameters(), model=model, **options)
    names = {id(param): name for name, param in model.named_parameters()}
    shard(model)
    sharded = dict(model.named_parameters())
    SWAPS[swap](optimizer, {key: sharded[name] for key, name in names.items()})
    for parts in batches(STEPS, dist.get_world_size()):
        optimizer.step(losses_of(model), *parts[dist.get_rank()])
    return weights(model)


@pytest.mark.parametrize("zeroing", ["optimizer", "model", "model, in place"])
def test_gradients_of_an_attack_are_not_those_of_pass_1(zeroing: str) -> None:
    with_attack, without = (run_ranks(_with_closures, zeroing, attacked) for attacked in (True, False))
    assert_same(with_attack, without[0])


def _with_closures(zeroing: str, attacked: bool) -> list[Tensor]:
    model = shard(build_model())
    optimizer = SAM(model.parameters(), model=model, rho=0.2, **SGD)
    for inputs, targets in (parts[dist.get_rank()] for parts in batches(STEPS, dist.get_world_size())):

        def closure() -> Tensor:
            if zeroing == "optimizer":
                optimizer.zero_grad()
            else:
                model.zero_grad(set_to_none=zeroing == "model")
            loss: Tensor = losses_of(model)(inputs, targets).mean()
            loss.backward()
            return loss

        optimizer.zero_grad()
        if attacked:
            losses_of(model)(-inputs, targets).mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
        optimizer.step(closure)
    return weights(model)
