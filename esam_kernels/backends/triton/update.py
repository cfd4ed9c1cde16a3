"""w + e -> w, alone or in one pass with the base optimizer's update (SGD, Adam, AdamW).

The updates follow ``torch.optim``'s single-tensor code operation by operation, its rounding to half precision between
operations included, and read the saved w in place of w: the restore moves no bytes of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from esam_kernels.backends.triton.blocks import (
    FIRST_LIST,
    MASKED_BLOCK,
    TRITON_DTYPES,
    block_at,
    block_size,
    buckets,
    capturing,
    float64,
    fma,
    load_once,
    narrow,
    pick,
    round_to,
    store_once,
    store_tile,
    stream_over,
    table,
    widen,
)

PARAM = tl.constexpr(0)
BACKUP = tl.constexpr(1)
GRAD = tl.constexpr(2)

# A copy of bits needs no floating-point type.
BITS = {2: tl.int16, 4: tl.int32, 8: tl.int64}


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
def learning_rate(lr, lr_ptr, LR_TENSOR: tl.constexpr):
    if LR_TENSOR:
        return tl.load(lr_ptr).to(tl.float64)
    return float64(lr)


# -- Restore -----------------------------------------------------------------------------------------------------------


@triton.jit
def restore_tile(
    start, addresses_ptr, num_tensors, numel, DTYPE: tl.constexpr, BLOCK: tl.constexpr, VECTORIZED: tl.constexpr
):
    w = load_once(addresses_ptr, num_tensors, BACKUP, start, numel, DTYPE, BLOCK, VECTORIZED)
    store_tile(addresses_ptr, num_tensors, PARAM, w, start, numel, DTYPE, BLOCK, VECTORIZED)


@triton.jit(do_not_specialize=["num_tensors", "num_blocks"])
def restore_kernel(addresses_ptr, layout_ptr, num_tensors, num_blocks, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        tensor, start, numel, vectorized = block_at(addresses_ptr, layout_ptr, num_tensors, num_blocks, block, BLOCK)
        if vectorized:
            restore_tile(start, addresses_ptr + tensor, num_tensors, numel, DTYPE, BLOCK, True)
        else:
            for piece in range(start, min(start + BLOCK, numel), MASKED_BLOCK):
                restore_tile(piece, addresses_ptr + tensor, num_tensors, numel, DTYPE, MASKED_BLOCK, False)


def restore_(params: Sequence[Tensor], backups: Sequence[Tensor]) -> None:
    for device, dtype, indices in buckets(params):
        blocks = table([pick(params, indices), pick(backups, indices)])
        stream_over(restore_kernel, blocks, device, BITS[dtype.itemsize], block_size(dtype))


# -- SGD ---------------------------------------------------------------------------------------------------------------

MOMENTUM_BUFFER = tl.constexpr(3)


@triton.jit
def sgd_tile(
    start,
    addresses_ptr,
    num_tensors,
    numel,
    lr,
    momentum,
    undamped,
    weight_decay,
    DTYPE: tl.constexpr,
    FIRST: tl.constexpr,
    MOMENTUM: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTORIZED: tl.constexpr,
):
    w = widen(load_once(addresses_ptr, num_tensors, BACKUP, start, numel, DTYPE, BLOCK, VECTORIZED), lr.dtype)
    direction = widen(load_once(addresses_ptr, num_tensors, GRAD, start, numel, DTYPE, BLOCK, VECTORIZED), lr.dtype)
    if MAXIMIZE:
        direction *= -1.0  # unary minus would turn 0 into 0, not -0
    if WEIGHT_DECAY:
        direction = round_to(fma(w, weight_decay, direction), DTYPE)
    if MOMENTUM:
        buffer = direction
        if not FIRST:
            buffer = load_once(addresses_ptr, num_tensors, MOMENTUM_BUFFER, start, numel, DTYPE, BLOCK, VECTORIZED)
            buffer = round_to(widen(buffer, lr.dtype) * momentum, DTYPE)
            buffer = round_to(fma(direction, undamped, buffer), DTYPE)
        written = narrow(buffer, DTYPE)
        store_once(addresses_ptr, num_tensors, MOMENTUM_BUFFER, written, start, numel, DTYPE, BLOCK, VECTORIZED)
        direction = round_to(fma(buffer, momentum, direction), DTYPE) if NESTEROV else buffer
    updated = narrow(fma(direction, lr * -1.0, w), DTYPE)
    store_tile(addresses_ptr, num_tensors, PARAM, updated, start, numel, DTYPE, BLOCK, VECTORIZED)


@triton.jit(do_not_specialize=["num_tensors", "num_blocks", "lr_ptr"])
def restore_sgd_kernel(
    addresses_ptr,
    layout_ptr,
    num_tensors,
    num_blocks,
    lr_ptr,
    lr: tl.float64,
    momentum: tl.float64,
    dampening: tl.float64,
    weight_decay: tl.float64,
    DTYPE: tl.constexpr,
    LR_TENSOR: tl.constexpr,
    FIRST: tl.constexpr,
    MOMENTUM: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    COMPUTE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    scalars = (
        learning_rate(lr, lr_ptr, LR_TENSOR).to(COMPUTE),
        float64(momentum).to(COMPUTE),
        (1 - float64(dampening)).to(COMPUTE),
        float64(weight_decay).to(COMPUTE),
    )
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        tensor, start, numel, vectorized = block_at(addresses_ptr, layout_ptr, num_tensors, num_blocks, block, BLOCK)
        where = (addresses_ptr + tensor, num_tensors, numel)
        if vectorized:
            sgd_tile(start, *where, *scalars, DTYPE, FIRST, MOMENTUM, WEIGHT_DECAY, NESTEROV, MAXIMIZE, BLOCK, True)
        else:
            for piece in range(start, min(start + BLOCK, numel), MASKED_BLOCK):
                sgd_tile(
                    piece,
                    *where,
                    *scalars,
                    DTYPE,
                    FIRST,
                    MOMENTUM,
                    WEIGHT_DECAY,
                    NESTEROV,
                    MAXIMIZE,
                    MASKED_BLOCK,
                    False,
                )


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
    lists = [params, backups, grads, momentum_buffers] if momentum != 0 else [params, backups, grads]
    for device, dtype, indices in buckets(params):
        blocks = table([pick(tensors, indices) for tensors in lists])
        stream_over(
            restore_sgd_kernel,
            blocks,
            device,
            blocks.addresses if lr_tensor is None else lr_tensor.to(device, non_blocking=True),
            lr,
            momentum,
            dampening,
            weight_decay,
            TRITON_DTYPES[dtype],
            lr_tensor is not None,
            first,
            momentum != 0,
            weight_decay != 0,
            nesterov,
            maximize,
            block_size(dtype),
        )


# -- Adam and AdamW ----------------------------------------------------------------------------------------------------

EXP_AVG = tl.constexpr(3)
EXP_AVG_SQ = tl.constexpr(4)
MAX_EXP_AVG_SQ = tl.constexpr(5)


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
    w = widen(load_once(addresses_ptr, num_tensors, BACKUP, start, numel, DTYPE, BLOCK, VECTORIZED), eps.dtype)
    g = widen(load_once(addresses_ptr, num_tensors, GRAD, start, numel, DTYPE, BLOCK, VECTORIZED), eps.dtype)
    m = widen(load_once(addresses_ptr, num_tensors, EXP_AVG, start, numel, DTYPE, BLOCK, VECTORIZED), eps.dtype)
    v = widen(load_once(addresses_ptr, num_tensors, EXP_AVG_SQ, start, numel, DTYPE, BLOCK, VECTORIZED), eps.dtype)
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
    store_once(addresses_ptr, num_tensors, EXP_AVG, m, start, numel, DTYPE, BLOCK, VECTORIZED)
    v = narrow(fma(g * one_minus_beta2, g, round_to(v * beta2, DTYPE)), DTYPE)
    store_once(addresses_ptr, num_tensors, EXP_AVG_SQ, v, start, numel, DTYPE, BLOCK, VECTORIZED)
    v = widen(v, eps.dtype)
    if AMSGRAD:
        largest = load_once(addresses_ptr, num_tensors, MAX_EXP_AVG_SQ, start, numel, DTYPE, BLOCK, VECTORIZED)
        v = tl.maximum(widen(largest, eps.dtype), v, propagate_nan=tl.PropagateNan.ALL)
        largest = narrow(v, DTYPE)
        store_once(addresses_ptr, num_tensors, MAX_EXP_AVG_SQ, largest, start, numel, DTYPE, BLOCK, VECTORIZED)
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
    torch._foreach_add_(list(steps), 1)
    lists = [params, backups, grads, exp_avgs, exp_avg_sqs]
    if amsgrad:
        lists.append(max_exp_avg_sqs)
    for device, dtype, indices in buckets(params):
        counters = _counters_on(device, pick(steps, indices))
        blocks = table(
            [pick(tensors, indices) for tensors in lists],
            scalars=[counter.data_ptr() for counter in counters],
        )
        stream_over(
            restore_adam_kernel,
            blocks,
            device,
            blocks.addresses if lr_tensor is None else lr_tensor.to(device, non_blocking=True),
            lr,
            beta1,
            _log2(beta1),
            beta2,
            _log2(beta2),
            eps,
            weight_decay,
            TRITON_DTYPES[dtype],
            lr_tensor is not None,
            weight_decay != 0,
            decoupled_weight_decay,
            amsgrad,
            maximize,
            block_size(dtype),
        )


def _counters_on(device: torch.device, steps: Sequence[Tensor]) -> Sequence[Tensor]:
    """torch's step counters, or float32 copies where they live elsewhere (by default they live on the CPU)."""
    if all(step.device == device and step.dtype == torch.float32 for step in steps):
        return steps
    if capturing(device):
        raise RuntimeError("Adam's step counters are not on the device: a CUDA graph needs capturable=True")
    stacked = torch.stack([step.reshape(()) for step in steps]).float()
    return stacked.to(device, non_blocking=True).unbind()


def _log2(beta: float) -> float:
    return math.log2(beta) if beta > 0 else -math.inf
