"""w + e -> w in one pass with the update of Adam or AdamW, in the way of :mod:`esam_kernels.backends.triton.update`."""

from __future__ import annotations

import math
from collections.abc import MutableMapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from esam_kernels import uploads
from esam_kernels.backends import reference
from esam_kernels.backends.triton.blocks import (
    BLOCK_BYTES,
    FIRST_LIST,
    MASKED_BLOCK,
    ONCE,
    TRITON_DTYPES,
    are_mixed,
    block_at,
    block_size,
    buckets,
    float64,
    fma,
    load_tile,
    narrow,
    pick,
    round_to,
    store_tile,
    stream_over,
    table,
    widen,
)
from esam_kernels.backends.triton.update import BACKUP, GRAD, PARAM, learning_rate, number_and_tensor
from esam_kernels.device_numbers import DeviceNumbers

EXP_AVG = tl.constexpr(3)
EXP_AVG_SQ = tl.constexpr(4)
MAX_EXP_AVG_SQ = tl.constexpr(5)


@triton.jit
def divide(x, y):
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    return x / y


@triton.jit
def square_root(x):
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    return tl.sqrt(x)


@triton.jit
def adam_tile(
    start,
    addresses_ptr,
    num_tensors,
    numel,
    step_size,
    bias_correction2_sqrt,
    decay,
    weight_decay,
    lerp_weight,
    beta2,
    one_minus_beta2,
    eps,
    DTYPE: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr,
    DECOUPLED: tl.constexpr,
    AMSGRAD: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTORIZED: tl.constexpr,
):
    w = load_tile(addresses_ptr, num_tensors, BACKUP, start, numel, DTYPE, BLOCK, VECTORIZED, ONCE)
    g = load_tile(addresses_ptr, num_tensors, GRAD, start, numel, DTYPE, BLOCK, VECTORIZED, ONCE)
    m = load_tile(addresses_ptr, num_tensors, EXP_AVG, start, numel, DTYPE, BLOCK, VECTORIZED, ONCE)
    v = load_tile(addresses_ptr, num_tensors, EXP_AVG_SQ, start, numel, DTYPE, BLOCK, VECTORIZED, ONCE)
    w, g, m, v = widen(w, eps.dtype), widen(g, eps.dtype), widen(m, eps.dtype), widen(v, eps.dtype)
    if MAXIMIZE:
        g *= -1.0
    if WEIGHT_DECAY:
        if DECOUPLED:
            w = round_to(w * decay, DTYPE)
        else:
            g = round_to(fma(w, weight_decay, g), DTYPE)
    # torch.lerp starts from the nearer end
    near = lerp_weight < 0.5
    m = narrow(fma(g - m, tl.where(near, lerp_weight, lerp_weight - 1), tl.where(near, m, g)), DTYPE)
    store_tile(addresses_ptr, num_tensors, EXP_AVG, m, start, numel, DTYPE, BLOCK, VECTORIZED, ONCE)
    v = narrow(fma(g * one_minus_beta2, g, round_to(v * beta2, DTYPE)), DTYPE)
    store_tile(addresses_ptr, num_tensors, EXP_AVG_SQ, v, start, numel, DTYPE, BLOCK, VECTORIZED, ONCE)
    v = widen(v, eps.dtype)
    if AMSGRAD:
        largest = load_tile(addresses_ptr, num_tensors, MAX_EXP_AVG_SQ, start, numel, DTYPE, BLOCK, VECTORIZED, ONCE)
        v = tl.maximum(widen(largest, eps.dtype), v, propagate_nan=tl.PropagateNan.ALL)
        largest = narrow(v, DTYPE)
        store_tile(addresses_ptr, num_tensors, MAX_EXP_AVG_SQ, largest, start, numel, DTYPE, BLOCK, VECTORIZED, ONCE)
    denominator = round_to(divide(round_to(square_root(v), DTYPE), bias_correction2_sqrt), DTYPE)
    denominator = round_to(denominator + eps, DTYPE)
    updated = narrow(w - divide(widen(m, eps.dtype) * step_size, denominator), DTYPE)
    store_tile(addresses_ptr, num_tensors, PARAM, updated, start, numel, DTYPE, BLOCK, VECTORIZED)


@triton.jit(do_not_specialize=["num_tensors", "num_blocks", "lr_ptr"])
def restore_adam_kernel(
    addresses_ptr,
    layout_ptr,
    num_tensors,
    num_blocks,
    lr_ptr,
    lr: tl.float64,
    beta1: tl.float64,
    log2_beta1: tl.float64,
    beta2: tl.float64,
    log2_beta2: tl.float64,
    eps: tl.float64,
    weight_decay: tl.float64,
    DTYPE: tl.constexpr,
    LR_TENSOR: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr,
    DECOUPLED: tl.constexpr,
    AMSGRAD: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    COMPUTE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    STEP: tl.constexpr = FIRST_LIST + MAX_EXP_AVG_SQ + (1 if AMSGRAD else 0)
    lr = learning_rate(lr, lr_ptr, LR_TENSOR)
    scalars = (
        (1 - lr * float64(weight_decay)).to(COMPUTE),
        float64(weight_decay).to(COMPUTE),
        (1 - float64(beta1)).to(COMPUTE),
        float64(beta2).to(COMPUTE),
        (1 - float64(beta2)).to(COMPUTE),
        float64(eps).to(COMPUTE),
    )
    # the tensors have mostly taken the same number of steps
    known_step = tl.full((), 0, tl.float32)
    step_size = tl.full((), 0, COMPUTE)
    bias_correction2_sqrt = tl.full((), 1, COMPUTE)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        tensor, start, numel, vectorized = block_at(addresses_ptr, layout_ptr, num_tensors, num_blocks, block, BLOCK)
        column_ptr = addresses_ptr + tensor
        step = tl.load(tl.load(column_ptr + STEP * num_tensors).to(tl.pointer_type(tl.float32)))
        if step != known_step:
            known_step = step
            steps = step.to(tl.float64)
            step_size = (lr / (1 - tl.exp2(steps * float64(log2_beta1)))).to(COMPUTE)
            bias_correction2_sqrt = tl.sqrt(1 - tl.exp2(steps * float64(log2_beta2))).to(COMPUTE)
        where = (column_ptr, num_tensors, numel, step_size, bias_correction2_sqrt)
        if vectorized:
            adam_tile(start, *where, *scalars, DTYPE, WEIGHT_DECAY, DECOUPLED, AMSGRAD, MAXIMIZE, BLOCK, True)
        else:
            for piece in range(start, min(start + BLOCK, numel), MASKED_BLOCK):
                adam_tile(
                    piece, *where, *scalars, DTYPE, WEIGHT_DECAY, DECOUPLED, AMSGRAD, MAXIMIZE, MASKED_BLOCK, False
                )


def block_bytes(dtype: torch.dtype) -> int:
    """Half of it for 16 bits: a thread would hold 32 elements, in float32, for which Triton 3.8 takes 168 registers."""
    return BLOCK_BYTES // 2 if dtype.itemsize == 2 else BLOCK_BYTES


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
    found = buckets(params)
    if are_mixed(found):
        states = (exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)
        rest = (lr, lr_tensor, beta1, beta2, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay)
        reference.restore_adam_(params, backups, grads, *states, *rest)
        return
    torch._foreach_add_(list(steps), 1)
    lists = [params, backups, grads, exp_avgs, exp_avg_sqs]
    if amsgrad:
        lists.append(max_exp_avg_sqs)
    for device, dtype, indices in found:
        counters = _counters_on(device, pick(steps, indices))
        number, rate = number_and_tensor(lr, lr_tensor, device)
        blocks = table(
            [pick(tensors, indices) for tensors in lists],
            scalars=[counter.data_ptr() for counter in counters],
            block_bytes=block_bytes(dtype),
        )
        stream_over(
            restore_adam_kernel,
            blocks,
            device,
            blocks.addresses if rate is None else rate,
            number,
            beta1,
            _log2(beta1),
            beta2,
            _log2(beta2),
            eps,
            weight_decay,
            TRITON_DTYPES[dtype],
            rate is not None,
            weight_decay != 0,
            decoupled_weight_decay,
            amsgrad,
            maximize,
            block_size(dtype, block_bytes(dtype)),
            # Its registers leave room for 792 programs on an H100: 1024 shares would take turns.
            most=blocks.num_blocks,
        )


def _counters_on(device: torch.device, steps: Sequence[Tensor]) -> Sequence[Tensor]:
    """torch's step counters; of those elsewhere (by default on the CPU) float32 copies, which stay in place."""
    if _are_on(device, steps):
        if all(step.dtype == torch.float32 for step in steps):
            return steps
        return torch.stack([step.reshape(()) for step in steps]).float().unbind()
    if uploads.capturing(device):
        raise RuntimeError("Adam's step counters are not on the device: a CUDA graph needs capturable=True")
    if steps[0] not in _copies:
        _copies[steps[0]] = DeviceNumbers(torch.float32)
    _copies[steps[0]].set(torch.stack([step.reshape(()) for step in steps]).tolist(), device)
    return _copies[steps[0]].tensor.unbind()


# By the first of the counters, with which they go.
_copies: MutableMapping[Tensor, DeviceNumbers] = WeakTensorKeyDictionary()


def _are_on(device: torch.device, steps: Sequence[Tensor]) -> bool:
    return all(step.device == device for step in steps)


def _log2(beta: float) -> float:
    return math.log2(beta) if beta > 0 else -math.inf
