"""w <- w + e (Eq. 4 and 5), keeping the old w: one pass over the weights and gradients."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from esam_kernels.backends import reference
from esam_kernels.backends.reference import NUM_PARTIALS
from esam_kernels.backends.triton.blocks import (
    ADAPTIVE,
    GROUP,
    MASKED_BLOCK,
    OFFSET,
    ONCE,
    TRITON_DTYPES,
    are_mixed,
    block_at,
    block_size,
    buckets,
    float64,
    load_tile,
    narrow,
    pick,
    store_tile,
    stream_over,
    table,
    widen,
)
from esam_kernels.backends.triton.philox import element_mask

PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
BACKUP = tl.constexpr(2)


@triton.jit
def perturb_tile(
    start,
    addresses_ptr,
    num_tensors,
    numel,
    offset,
    random_state_ptr,
    factor,
    usable,
    adaptive,
    eta,
    DTYPE: tl.constexpr,
    ANY_ADAPTIVE: tl.constexpr,
    ELEMENT_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTORIZED: tl.constexpr,
):
    w = load_tile(addresses_ptr, num_tensors, PARAM, start, numel, DTYPE, BLOCK, VECTORIZED)
    g = load_tile(addresses_ptr, num_tensors, GRAD, start, numel, DTYPE, BLOCK, VECTORIZED, ONCE)
    x = widen(w, factor.dtype)
    direction = widen(g, factor.dtype)
    if ANY_ADAPTIVE:
        scaling = tl.abs(x) + eta
        direction = tl.where(adaptive, direction * (scaling * scaling), direction)
    perturbed = tl.where(usable, narrow(x + factor * direction, DTYPE), w)
    if ELEMENT_MASK:
        seed = tl.load(random_state_ptr)
        step = tl.load(random_state_ptr + 1)
        bound = tl.load(random_state_ptr + 2)
        perturbed = tl.where(element_mask(seed, step, bound, offset + start, BLOCK), perturbed, w)
    store_tile(addresses_ptr, num_tensors, BACKUP, w, start, numel, DTYPE, BLOCK, VECTORIZED, ONCE)
    store_tile(addresses_ptr, num_tensors, PARAM, perturbed, start, numel, DTYPE, BLOCK, VECTORIZED)


@triton.jit(do_not_specialize=["num_tensors", "num_blocks", "partials_ptr", "scale_ptr", "random_state_ptr"])
def perturb_kernel(
    addresses_ptr,
    layout_ptr,
    num_tensors,
    num_blocks,
    partials_ptr,
    scale_ptr,
    random_state_ptr,
    norm_factor: tl.float64,
    eps: tl.float64,
    eta: tl.float64,
    DTYPE: tl.constexpr,
    ANY_ADAPTIVE: tl.constexpr,
    ELEMENT_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_PARTIALS: tl.constexpr,
):
    COMPUTE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    eta = float64(eta).to(COMPUTE)
    norm = float64(norm_factor) * tl.sqrt(tl.sum(tl.load(partials_ptr + tl.arange(0, NUM_PARTIALS))))
    usable = (norm > 0) & (norm < float("inf"))
    for visited in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        block = num_blocks - 1 - visited  # backwards: what the norm has read last is still in the cache
        tensor, start, numel, vectorized = block_at(addresses_ptr, layout_ptr, num_tensors, num_blocks, block, BLOCK)
        offset = tl.load(layout_ptr + OFFSET * num_tensors + tensor)
        group = tl.load(layout_ptr + GROUP * num_tensors + tensor)
        adaptive = tl.load(layout_ptr + ADAPTIVE * num_tensors + tensor) != 0
        factor = (tl.load(scale_ptr + group) / (norm + float64(eps))).to(COMPUTE)
        arguments = (
            addresses_ptr + tensor,
            num_tensors,
            numel,
            offset,
            random_state_ptr,
            factor,
            usable,
            adaptive,
            eta,
        )
        if vectorized:
            perturb_tile(start, *arguments, DTYPE, ANY_ADAPTIVE, ELEMENT_MASK, BLOCK, True)
        else:
            for piece in range(start, min(start + BLOCK, numel), MASKED_BLOCK):
                perturb_tile(piece, *arguments, DTYPE, ANY_ADAPTIVE, ELEMENT_MASK, MASKED_BLOCK, False)


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
    found = buckets(params)
    if are_mixed(found):
        rest = (groups, offsets, partials, scale, adaptive, eta, norm_factor, eps, random_state)
        reference.perturb_(params, grads, backups, *rest)
        return
    for device, dtype, indices in found:
        flags = [adaptive[group] for group in pick(groups, indices)]
        blocks = table(
            [pick(tensors, indices) for tensors in (params, grads, backups or grads)],
            offsets=pick(offsets, indices),
            groups=pick(groups, indices),
            adaptive=flags,
        )
        local_partials = partials.to(device, non_blocking=True)
        stream_over(
            perturb_kernel,
            blocks,
            device,
            local_partials,
            scale.to(device, non_blocking=True),
            local_partials if random_state is None else random_state.to(device, non_blocking=True),
            norm_factor,
            eps,
            eta,
            TRITON_DTYPES[dtype],
            any(flags),
            random_state is not None,
            block_size(dtype),
            NUM_PARTIALS,
        )
