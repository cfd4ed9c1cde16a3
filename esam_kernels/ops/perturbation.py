"""Operators of Stochastic Weight Perturbation (section 2.2): norm, perturb, restore, restore and update.

Lists of tensors are parallel: ``grads[i]`` belongs to ``params[i]``, has its dtype, and the same dense strides.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from esam_kernels.backends import resolve
from esam_kernels.backends.reference import NUM_PARTIALS
from esam_kernels.ops.registration import check, check_memory, register
from esam_kernels.tensor_lists import are_alike, are_parallel, increment_version


def _check_parallel(name: str, tensors: list[Tensor], params: list[Tensor]) -> None:
    if are_parallel(tensors, params):
        return
    check(len(tensors) == len(params), lambda: f"{name} has {len(tensors)} tensors, params has {len(params)}")
    for i, (tensor, param) in enumerate(zip(tensors, params)):
        check(
            are_alike([tensor], [param]),
            lambda: f"{name}[{i}] ({in_memory(tensor)}) does not match params[{i}] ({in_memory(param)})",
        )
        check_memory(**{f"{name}[{i}]": tensor, f"params[{i}]": param})


def in_memory(tensor: Tensor) -> str:
    """How a tensor lies in memory, for a message."""
    strides = f", strides {tensor.stride()}" if tensor.layout == torch.strided else f", {tensor.layout}"
    return f"{tensor.dtype} on {tensor.device}, shape {tuple(tensor.shape)}{strides}"


def _check_blocks(params: list[Tensor], grads: list[Tensor], groups: Sequence[int], num_groups: int) -> None:
    check(len(params) > 0, lambda: "params is empty")
    check(len(groups) == len(params), lambda: f"groups has {len(groups)} numbers, params has {len(params)} tensors")
    check(min(groups) >= 0 and max(groups) < num_groups, lambda: f"groups must lie in [0, {num_groups}), got {groups}")
    _check_parallel("grads", grads, params)


def _mutates_only(*args: Any, **kwargs: Any) -> None:
    return None


def _norm_partials(
    params: list[Tensor],
    grads: list[Tensor],
    groups: list[int],
    adaptive: list[bool],
    eta: float,
    backend: str = "",
) -> Tensor:
    _check_blocks(params, grads, groups, len(adaptive))
    partials: Tensor = resolve(backend, params[0].device).norm_partials(params, grads, groups, adaptive, eta)
    return partials


norm_partials = register(
    "norm_partials(Tensor[] params, Tensor[] grads, int[] groups, bool[] adaptive, float eta, *, str backend='') "
    "-> Tensor",
    _norm_partials,
    lambda params, *_, **__: params[0].new_empty(NUM_PARTIALS, dtype=torch.float64),
)
"""Partial sums of ||T(w) g||^2 over all tensors, T(w) = |w| + eta in the groups that are ``adaptive``, else 1.

Returns float64 (NUM_PARTIALS,), whose sum is the square of the norm. Two runs give the same bits.
"""


def _perturb(
    params: list[Tensor],
    grads: list[Tensor],
    backups: list[Tensor],
    groups: list[int],
    offsets: list[int],
    partials: Tensor,
    scale: Tensor,
    adaptive: list[bool],
    eta: float,
    norm_factor: float,
    eps: float,
    random_state: Tensor | None = None,
    backend: str = "",
) -> None:
    _check_blocks(params, grads, groups, len(adaptive))
    check(len(offsets) == len(params), lambda: f"offsets has {len(offsets)} numbers for {len(params)} tensors")
    check(functools.reduce(operator.or_, offsets) % 4 == 0, lambda: "offsets must be multiples of 4")
    if backups:
        _check_parallel("backups", backups, params)
    resolve(backend, params[0].device).perturb_(
        params,
        grads,
        backups,
        groups,
        offsets,
        partials,
        scale,
        adaptive,
        eta,
        norm_factor,
        eps,
        random_state,
    )
    increment_version(params)
    increment_version(backups or grads)


perturb_ = register(
    "perturb_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] backups, int[] groups, int[] offsets, "
    "Tensor partials, Tensor scale, bool[] adaptive, float eta, float norm_factor, float eps, "
    "Tensor? random_state=None, *, str backend='') -> ()",
    _perturb,
    _mutates_only,
)
"""w <- w + scale[group] m T(w)^2 g / (norm_factor ||T(w) g|| + eps), keeping the old w (Eq. 4 and 5).

The old weights go to ``backups``, or, where that list is empty, over the gradients. ``partials`` is what
``norm_partials`` returned, ``scale`` float64 (groups,) holds rho / beta. ``random_state``: None for m = 1, or int64
(seed, step, bound): element i of tensor t takes word i % 4 of the Philox4x32-10 counter (offsets[t] + i) // 4 and is
perturbed where that word is at most ``bound`` = round(beta 2^32) - 1. Where the norm is 0 or not finite, e = 0.
"""


def _restore(params: list[Tensor], backups: list[Tensor], backend: str = "") -> None:
    check(len(params) > 0, lambda: "params is empty")
    _check_parallel("backups", backups, params)
    resolve(backend, params[0].device).restore_(params, backups)
    increment_version(params)


restore_ = register("restore_(Tensor(a!)[] params, Tensor[] backups, *, str backend='') -> ()", _restore, _mutates_only)
"""w <- backup, bit for bit, in the same storage."""


def _restore_sgd(
    params: list[Tensor],
    backups: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    first: bool,
    lr: float,
    lr_tensor: Tensor | None,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    backend: str = "",
) -> None:
    check(len(params) > 0, lambda: "params is empty")
    _check_parallel("backups", backups, params)
    _check_parallel("grads", grads, params)
    if momentum != 0:
        _check_parallel("momentum_buffers", momentum_buffers, params)
    resolve(backend, params[0].device).restore_sgd_(
        params,
        backups,
        grads,
        momentum_buffers,
        first,
        lr,
        lr_tensor,
        momentum,
        dampening,
        weight_decay,
        nesterov,
        maximize,
    )
    increment_version(params)
    increment_version(momentum_buffers)


restore_sgd_ = register(
    "restore_sgd_(Tensor(a!)[] params, Tensor[] backups, Tensor[] grads, Tensor(b!)[] momentum_buffers, bool first, "
    "float lr, Tensor? lr_tensor, float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, "
    "*, str backend='') -> ()",
    _restore_sgd,
    _mutates_only,
)
"""w <- backup - lr d, with d of ``torch.optim.SGD``: restore and update in one pass over memory.

``first``: the buffers have not been written yet (torch starts them at the gradient, without dampening).
``lr_tensor``, where given, is read on the device in place of ``lr``. ``momentum_buffers`` is empty at momentum 0.
"""


def _restore_adam(
    params: list[Tensor],
    backups: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    lr: float,
    lr_tensor: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    amsgrad: bool,
    maximize: bool,
    decoupled_weight_decay: bool,
    backend: str = "",
) -> None:
    check(len(params) > 0, lambda: "params is empty")
    lists = {"backups": backups, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if amsgrad:
        lists["max_exp_avg_sqs"] = max_exp_avg_sqs
    for name, tensors in lists.items():
        _check_parallel(name, tensors, params)
    check(len(steps) == len(params), lambda: f"steps has {len(steps)} tensors, params has {len(params)}")
    resolve(backend, params[0].device).restore_adam_(
        params,
        backups,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        steps,
        lr,
        lr_tensor,
        beta1,
        beta2,
        eps,
        weight_decay,
        amsgrad,
        maximize,
        decoupled_weight_decay,
    )
    for tensors in (params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs):
        increment_version(tensors)


restore_adam_ = register(
    "restore_adam_(Tensor(a!)[] params, Tensor[] backups, Tensor[] grads, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, float lr, Tensor? lr_tensor, "
    "float beta1, float beta2, float eps, float weight_decay, bool amsgrad, bool maximize, "
    "bool decoupled_weight_decay, *, str backend='') -> ()",
    _restore_adam,
    _mutates_only,
)
"""w <- backup, then the update of ``torch.optim.Adam`` (AdamW with ``decoupled_weight_decay``), in one pass.

``steps`` are torch's own one-element float32 counters, incremented here; ``max_exp_avg_sqs`` is empty without
``amsgrad``.
"""
