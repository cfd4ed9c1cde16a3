"""w + e -> w, alone or in one pass with the base optimizer's update (SGD, Adam, AdamW).

The updates follow ``torch.optim``'s single-tensor code operation by operation, its rounding to half precision between
operations included, and read the saved w in place of w: the restore moves no bytes of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from esam_kernels.backends import reference
from esam_kernels.backends.triton.blocks import (
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

PARAM = tl.constexpr(0)
BACKUP = tl.constexpr(1)
GRAD = tl.constexpr(2)

# A copy of bits needs no floating-point type.
BITS = {2: tl.int16, 4: tl.int32, 8: tl.int64}


@triton.jit
def learning_rate(lr, lr_ptr, LR_TENSOR: tl.constexpr):
    if LR_TENSOR:
        return tl.load(lr_ptr).to(tl.float64)
    return float64(lr)


def number_and_tensor(lr: float, lr_tensor: Tensor | None, device: torch.device) -> tuple[float, Tensor | None]:
    """The learning rate as a number where the host has it, or else where it is on the device."""
    if lr_tensor is None or lr_tensor.device == device:
        return lr, lr_tensor
    if lr_tensor.device.type == "cpu":
        return lr_tensor.item(), None
    return lr, lr_tensor.to(device, non_blocking=True)


# -- Restore -----------------------------------------------------------------------------------------------------------


@triton.jit
def restore_tile(
    start, addresses_ptr, num_tensors, numel, DTYPE: tl.constexpr, BLOCK: tl.constexpr, VECTORIZED: tl.constexpr
):
    w = load_tile(addresses_ptr, num_tensors, BACKUP, start, numel, DTYPE, BLOCK, VECTORIZED, ONCE)
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
    found = buckets(params)
    if are_mixed(found):
        reference.restore_(params, backups)
        return
    for device, dtype, indices in found:
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
    w = load_tile(addresses_ptr, num_tensors, BACKUP, start, numel, DTYPE, BLOCK, VECTORIZED, ONCE)
    g = load_tile(addresses_ptr, num_tensors, GRAD, start, numel, DTYPE, BLOCK, VECTORIZED, ONCE)
    w, direction = widen(w, lr.dtype), widen(g, lr.dtype)
    if MAXIMIZE:
        direction *= -1.0  # unary minus would turn 0 into 0, not -0
    if WEIGHT_DECAY:
        direction = round_to(fma(w, weight_decay, direction), DTYPE)
    if MOMENTUM:
        buffer = direction
        if not FIRST:
            buffer = load_tile(
                addresses_ptr, num_tensors, MOMENTUM_BUFFER, start, numel, DTYPE, BLOCK, VECTORIZED, ONCE
            )
            buffer = round_to(widen(buffer, lr.dtype) * momentum, DTYPE)
            buffer = round_to(fma(direction, undamped, buffer), DTYPE)
        written = narrow(buffer, DTYPE)
        store_tile(addresses_ptr, num_tensors, MOMENTUM_BUFFER, written, start, numel, DTYPE, BLOCK, VECTORIZED, ONCE)
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
    found = buckets(params)
    if are_mixed(found):
        rest = (lr, lr_tensor, momentum, dampening, weight_decay, nesterov, maximize)
        reference.restore_sgd_(params, backups, grads, momentum_buffers, first, *rest)
        return
    lists = [params, backups, grads, momentum_buffers] if momentum != 0 else [params, backups, grads]
    for device, dtype, indices in found:
        blocks = table([pick(tensors, indices) for tensors in lists])
        number, rate = number_and_tensor(lr, lr_tensor, device)
        stream_over(
            restore_sgd_kernel,
            blocks,
            device,
            blocks.addresses if rate is None else rate,
            number,
            momentum,
            dampening,
            weight_decay,
            TRITON_DTYPES[dtype],
            rate is not None,
            first,
            momentum != 0,
            weight_decay != 0,
            nesterov,
            maximize,
            block_size(dtype),
        )
