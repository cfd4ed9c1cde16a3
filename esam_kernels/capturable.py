"""What a CUDA graph cannot hold of an optimizer's step, refused before anything is changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer
from torch.utils import _pytree as pytree

from esam_kernels.optimizer import ESAM
from esam_kernels.perturbation.fused_update import has_hooks, state_unlike_its_parameter


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
    if optimizer._parallelism.is_spread or optimizer.sync_perturbation or perturbation.parameters.is_sharded:
        raise ValueError(
            "a model in DistributedDataParallel or fully_shard cannot be captured in a CUDA graph: call optimizer.step"
        )
    devices = sorted(map(str, perturbation.parameters.devices))
    if len(devices) > 1:
        raise ValueError(
            f"the parameters are on {' and '.join(devices)}: a CUDA graph holds the step of one device. Move the model "
            "to one, or call optimizer.step"
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
            raise ValueError(
                f"{kind} counts its steps on the host (parameter group {number}), which a CUDA graph cannot: build it "
                "with capturable=True or fused=True"
            )
        if reason is not None:
            _check_unfused(base, group, number, reason)
        elif odd := state_unlike_its_parameter(group["params"], [base.state.get(p, {}) for p in group["params"]]):
            raise ValueError(
                f"{odd!r} in the state of parameter group {number} does not lie in memory as its parameter does, so "
                f"that the update of {kind} cannot be captured: give it the parameter's dtype, shape and strides, or "
                "call optimizer.step"
            )


def _check_unfused(base: Optimizer, group: dict[str, Any], number: int, reason: str) -> None:
    """Refuse a base optimizer whose own step would be captured and cannot be."""
    kind = type(base).__name__
    fused = "SGD, Adam and AdamW can be captured where the backend fuses their update into the restore. Here it cannot"
    if "capturable" not in group:
        raise ValueError(f"{kind} cannot be captured in a CUDA graph: {fused}: {reason}. Call optimizer.step")
    if not (group["capturable"] or group.get("fused")):
        raise ValueError(
            f"{kind} counts its steps on the host (parameter group {number}), which a CUDA graph cannot: build it with "
            "capturable=True"
        )
    if not (isinstance(group["lr"], Tensor) and group["lr"].is_cuda):
        raise ValueError(
            f"the learning rate of parameter group {number} would be frozen in the graph, since {reason}: give lr as a "
            f"tensor on the device, {kind}(..., lr=torch.tensor({group['lr']}, device='cuda'))"
        )
