"""Stochastic Weight Perturbation (section 2.2), and the base optimizer's update in one pass with the restore."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from esam_kernels.backends import reference
from esam_kernels.backends.cuda import extension
from esam_kernels.backends.cuda.extension import DTYPES
from esam_kernels.backends.cuda.lists import address_table, by_dtype, floating, is_served, pick, rate_of
from esam_kernels.backends.reference import NUM_PARTIALS

_ELEMENT_SIZES = (2, 4, 8)


def norm_partials(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    groups: Sequence[int],
    adaptive: Sequence[bool],
    eta: float,
) -> Tensor:
    if not (floating(params) and is_served(params, grads)):
        return reference.norm_partials(params, grads, groups, adaptive, eta)
    device = params[0].device
    partials = torch.empty(NUM_PARTIALS, dtype=torch.float64, device=device)
    for number, (dtype, indices) in enumerate(by_dtype(params)):
        flags = [bool(adaptive[groups[i]]) for i in indices]
        table = address_table([grads, params], indices)
        extension.kernels.norm_partials(
            extension.where(device), DTYPES[dtype], *table, flags, eta, partials.data_ptr(), number > 0
        )
    return partials


def perturb_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    backups: Sequence[Tensor],
    groups: Sequence[int],
    offsets: Sequence[int],
    partials: Tensor,
    scale: Tensor,
    adaptive: Sequence[bool],
    eta: float,
    norm_factor: float,
    eps: float,
    random_state: Tensor | None,
) -> None:
    rest = (groups, offsets, partials, scale, adaptive, eta, norm_factor, eps, random_state)
    saved = backups or grads
    if not (floating(params) and is_served(params, grads, saved) and len(adaptive) <= extension.kernels.MAX_GROUPS):
        return reference.perturb_(params, grads, backups, *rest)
    device = params[0].device
    numbers = [tensor.to(device, non_blocking=True).contiguous() for tensor in (partials, scale)]
    state = None if random_state is None else random_state.to(device, non_blocking=True).contiguous()
    for dtype, indices in by_dtype(params):
        extension.kernels.perturb(
            extension.where(device),
            DTYPES[dtype],
            *address_table([params, grads, saved], indices),
            pick(groups, indices),
            pick(offsets, indices),
            [bool(adaptive[groups[i]]) for i in indices],
            len(adaptive),
            *(tensor.data_ptr() for tensor in numbers),
            0 if state is None else state.data_ptr(),
            eta,
            norm_factor,
            eps,
        )
    return None


def restore_(params: Sequence[Tensor], backups: Sequence[Tensor]) -> None:
    if not (is_served(params, backups) and all(param.dtype.itemsize in _ELEMENT_SIZES for param in params)):
        return reference.restore_(params, backups)
    for dtype, indices in by_dtype(params):
        extension.kernels.restore(
            extension.where(params[0].device), dtype.itemsize, *address_table([params, backups], indices)
        )
    return None


def restore_sgd_(
    params: Sequence[Tensor],
    backups: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    first: bool,
    lr: float,
    lr_tensor: Tensor | None,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    device = params[0].device
    lists = [params, backups, grads, momentum_buffers] if momentum != 0 else [params, backups, grads]
    rest = (momentum, dampening, weight_decay, nesterov, maximize)
    rate = rate_of(lr, lr_tensor, device)
    if rate is None or not (floating(params) and is_served(*lists)):
        return reference.restore_sgd_(params, backups, grads, momentum_buffers, first, lr, lr_tensor, *rest)
    for dtype, indices in by_dtype(params):
        extension.kernels.restore_sgd(
            extension.where(device), DTYPES[dtype], *address_table(lists, indices), first, *rate, *rest
        )
    return None


def restore_adam_(
    params: Sequence[Tensor],
    backups: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: float,
    lr_tensor: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    amsgrad: bool,
    maximize: bool,
    decoupled_weight_decay: bool,
) -> None:
    device = params[0].device
    states = (params, backups, grads, exp_avgs, exp_avg_sqs)
    lists = [*states, *([max_exp_avg_sqs] if amsgrad else [])]
    rest = (beta1, beta2, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay)
    rate = rate_of(lr, lr_tensor, device)
    if rate is None or not (floating(params) and is_served(*lists) and all(map(_is_counter, steps))):
        return reference.restore_adam_(*states, max_exp_avg_sqs, steps, lr, lr_tensor, *rest)  # type: ignore[arg-type]
    counters, taken = _count_steps(steps, device)
    for dtype, indices in by_dtype(params):
        extension.kernels.restore_adam(
            extension.where(device),
            DTYPES[dtype],
            *address_table(lists, indices),
            pick(counters, indices) if counters else [],
            pick(taken, indices) if taken else [],
            *rate,
            *rest,
        )
    return None


def _is_counter(step: Tensor) -> bool:
    return step.dtype == torch.float32 and step.numel() == 1


def _count_steps(steps: Sequence[Tensor], device: torch.device) -> tuple[list[int], list[float]]:
    """Increment torch's step counters. Returns where they are on the device, or else the new numbers of steps."""
    if _are_on(device, steps):
        counters = [step.data_ptr() for step in steps]
        extension.kernels.increment_steps(extension.where(device), counters)
        return counters, []
    if device.type == "cuda" and extension.capturing():
        raise RuntimeError("Adam's step counters are not on the device: a CUDA graph needs capturable=True")
    torch._foreach_add_(list(steps), 1)
    return [], torch.stack([step.reshape(()) for step in steps]).tolist()


def _are_on(device: torch.device, steps: Sequence[Tensor]) -> bool:
    return all(step.device == device for step in steps)
