"""Partial sums of ||T(w) g||^2: one pass over the gradients, one slot of float64 for each program."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from esam_kernels.backends import reference
from esam_kernels.backends.reference import NUM_PARTIALS
from esam_kernels.backends.triton.blocks import (
    ADAPTIVE,
    MASKED_BLOCK,
    TRITON_DTYPES,
    are_mixed,
    block_at,
    block_size,
    buckets,
    float64,
    load_tile,
    pick,
    stream_over,
    table,
    widen,
)

GRAD = tl.constexpr(0)
PARAM = tl.constexpr(1)


@triton.jit
def squared_tile(
    addresses_ptr,
    num_tensors,
    start,
    numel,
    adaptive,
    eta,
    DTYPE: tl.constexpr,
    ANY_ADAPTIVE: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTORIZED: tl.constexpr,
):
    scaled = widen(load_tile(addresses_ptr, num_tensors, GRAD, start, numel, DTYPE, BLOCK, VECTORIZED), eta.dtype)
    if ANY_ADAPTIVE:
        if adaptive:
            w = widen(load_tile(addresses_ptr, num_tensors, PARAM, start, numel, DTYPE, BLOCK, VECTORIZED), eta.dtype)
            scaled = scaled * (tl.abs(w) + eta)
    return scaled * scaled


@triton.jit(do_not_specialize=["num_tensors", "num_blocks"])
def norm_kernel(
    addresses_ptr,
    layout_ptr,
    num_tensors,
    num_blocks,
    partials_ptr,
    eta: tl.float64,
    DTYPE: tl.constexpr,
    ANY_ADAPTIVE: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_PARTIALS: tl.constexpr,
):
    COMPUTE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    eta = float64(eta).to(COMPUTE)
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    lanes = tl.zeros((BLOCK,), COMPUTE)
    masked_lanes = tl.zeros((MASKED_BLOCK,), COMPUTE)
    for block in range(program, num_blocks, programs):
        tensor, start, numel, vectorized = block_at(addresses_ptr, layout_ptr, num_tensors, num_blocks, block, BLOCK)
        column_ptr = addresses_ptr + tensor
        adaptive = tl.load(layout_ptr + ADAPTIVE * num_tensors + tensor) != 0
        if vectorized:
            lanes += squared_tile(
                column_ptr, num_tensors, start, numel, adaptive, eta, DTYPE, ANY_ADAPTIVE, BLOCK, True
            )
        else:
            for piece in range(start, min(start + BLOCK, numel), MASKED_BLOCK):
                masked_lanes += squared_tile(
                    column_ptr, num_tensors, piece, numel, adaptive, eta, DTYPE, ANY_ADAPTIVE, MASKED_BLOCK, False
                )
    tl.store(partials_ptr + program, tl.sum(lanes.to(tl.float64)) + tl.sum(masked_lanes.to(tl.float64)))
    if program == 0:
        slots = tl.arange(0, NUM_PARTIALS)
        tl.store(partials_ptr + slots, tl.zeros((NUM_PARTIALS,), tl.float64), mask=slots >= programs)


def norm_partials(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    groups: Sequence[int],
    adaptive: Sequence[bool],
    eta: float,
) -> Tensor:
    found = buckets(grads)
    if are_mixed(found):
        return reference.norm_partials(params, grads, groups, adaptive, eta)
    total: Tensor | None = None
    for device, dtype, indices in found:
        partials = torch.empty(NUM_PARTIALS, dtype=torch.float64, device=device)
        flags = [adaptive[group] for group in pick(groups, indices)]
        lists = [pick(grads, indices), pick(params, indices)] if any(flags) else [pick(grads, indices)]
        stream_over(
            norm_kernel,
            table(lists, adaptive=flags),
            device,
            partials,
            eta,
            TRITON_DTYPES[dtype],
            any(flags),
            block_size(dtype),
            NUM_PARTIALS,
            programs=1,
        )
        total = partials if total is None else total.add_(partials.to(total.device, non_blocking=True))
    assert total is not None
    return total
