"""What a CUDA graph cannot hold of an optimizer's step, refused before anything is changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer
from torch.utils import _pytree as pytree

from esam_kernels.batches import batch_size
from esam_kernels.optimizer import ESAM
from esam_kernels.perturbation.fused_update import has_hooks, state_unlike_its_parameter

_CALL = "make_graphed_step(optimizer, losses, inputs, targets)"


def check_arguments(optimizer: Any, closure: Callable[..., Any], sample_batch: tuple[Any, ...]) -> None:
    """Refuse arguments of ``make_graphed_step`` that are of the wrong type.

    Raises:
        TypeError: ``optimizer`` is no ESAM or SAM, ``closure`` cannot be called, or there is no ``sample_batch``.
        ValueError: ``sample_batch`` is empty, or its tensors have different numbers of samples.
    """
    if not isinstance(optimizer, ESAM):
        wrap = ""
        if isinstance(optimizer, Optimizer):
            kind = type(optimizer).__name__
            wrap = f", such as ESAM(model.parameters(), torch.optim.{kind}, ...), which holds the {kind}"
        raise TypeError(
            f"optimizer must be an ESAM or SAM, got a {type(optimizer).__name__}. Call {_CALL} with an ESAM or SAM as "
            f"the first argument{wrap}"
        )
    if isinstance(closure, Tensor) or not callable(closure):
        raise TypeError(
            f"closure must be a function of the batch that returns one loss per sample, got a {type(closure).__name__}."
            f" Call {_CALL}, where losses(inputs, targets) returns a tensor of shape (b,)"
        )
    if not sample_batch:
        raise TypeError(
            "sample_batch is missing: a graph is captured for batches of one shape. Give a batch of the usual shape, "
            f"{_CALL}"
        )
    try:
        batch_size(sample_batch)
    except (TypeError, ValueError) as error:
        raise type(error)(f"sample_batch cannot be used: {error}. Give a batch of the usual shape, {_CALL}") from error


def name_of(closure: Callable[..., Any]) -> str:
    """What a user calls it."""
    return f"{getattr(closure, '__qualname__', type(closure).__name__)!r}"


def check_batch(sample_batch: tuple[Any, ...], device: torch.device) -> None:
    """Refuse a batch that a graph cannot read.

    Raises:
        ValueError: a tensor on another device than the parameters.
    """
    for number, leaf in enumerate(pytree.tree_leaves(sample_batch)):
        if isinstance(leaf, Tensor) and leaf.device != device:
            raise ValueError(
                f"tensor {number} of the sample batch is on {leaf.device}, the parameters are on {device}: a graph "
                f"reads its batch where the parameters are. Move it there, batch.to('{device}'), here and at each step"
            )


def check_capturable(optimizer: ESAM) -> None:
    """Refuse an optimizer whose step a CUDA graph cannot hold.

    Raises:
        ValueError: with what was found, what can be captured, and what to do.
    """
    base, perturbation = optimizer.base_optimizer, optimizer._perturbation
    kind = type(base).__name__
    if spread := _how_it_is_spread(optimizer):
        raise ValueError(
            f"{spread}: a CUDA graph holds the step of one process, and none of its communication. Call "
            "optimizer.step in place of the graphed step, or train in one process"
        )
    devices = sorted(map(str, perturbation.parameters.devices))
    if len(devices) > 1:
        raise ValueError(
            f"the parameters are on {' and '.join(devices)}: a CUDA graph holds the step of one device. Move the model "
            "to one device and build the optimizer again, or call optimizer.step"
        )
    if has_hooks(base):
        raise ValueError(
            f"there are step hooks on the base optimizer ({kind}) or on all optimizers: a replay runs no Python, so "
            "that they would not be called. Remove them, or register them on the ESAM optimizer, whose hooks are "
            "called around each replay"
        )
    reason = perturbation.why_not_fused()
    for number, group in enumerate(optimizer.param_groups):
        if isinstance(base, Adam) and reason is None and not (group["capturable"] or group["fused"]):
            raise ValueError(_counts_on_the_host(kind, number, "capturable=True or fused=True"))
        if reason is not None:
            _check_unfused(base, group, number, reason)
        elif odd := state_unlike_its_parameter(group["params"], [base.state.get(p, {}) for p in group["params"]]):
            raise ValueError(
                f"{odd!r} in the state of parameter group {number} does not lie in memory as its parameter does, so "
                f"that the update of {kind} cannot be captured: give it the parameter's dtype, shape and strides, or "
                "call optimizer.step"
            )


def _how_it_is_spread(optimizer: ESAM) -> str | None:
    """In words, what spreads the step over processes; None if nothing does."""
    by = optimizer._parallelism.spread_by or ("fully_shard" if optimizer._perturbation.parameters.is_sharded else None)
    if by is not None:
        return f"the model is in {by}"
    return "the optimizer was built with sync_perturbation=True" if optimizer.sync_perturbation else None


def _counts_on_the_host(kind: str, group: int, options: str) -> str:
    return (
        f"{kind} counts its steps on the host (parameter group {group}), where a CUDA graph cannot count. Build it "
        f"with {options}, or call optimizer.step"
    )


def _check_unfused(base: Optimizer, group: dict[str, Any], number: int, reason: str) -> None:
    """Refuse a base optimizer whose own step would be captured and cannot be."""
    kind = type(base).__name__
    if "capturable" not in group:
        raise ValueError(
            f"{kind} cannot be captured in a CUDA graph: {reason}. A graph can hold torch.optim's SGD, Adam and AdamW, "
            "where the backend fuses their update into the restore (triton and cuda do), and optimizers that take "
            "capturable=True. Use one of these, or call optimizer.step"
        )
    if not group["capturable"]:
        if group.get("fused"):
            raise ValueError(
                f"{kind} has fused=True without capturable=True (parameter group {number}), and torch captures its own "
                f"step with capturable=True only: {reason}. Build it with both, or call optimizer.step"
            )
        raise ValueError(_counts_on_the_host(kind, number, "capturable=True"))
    if not (isinstance(group["lr"], Tensor) and group["lr"].is_cuda):
        raise ValueError(
            f"the learning rate of parameter group {number} is {group['lr']!r}, and would be frozen in the graph: "
            f"{reason}. Give lr as a tensor on the device, {kind}(..., lr=torch.tensor({float(group['lr'])}, "
            "device='cuda')), or call optimizer.step"
        )
