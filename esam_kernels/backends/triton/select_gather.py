"""B+ of Eq. 6: the k samples whose loss rises most, without sorting, and the rows of the batch that they name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from esam_kernels.backends import reference
from esam_kernels.backends.reference import compute_dtype
from esam_kernels.backends.triton.blocks import TRITON_DTYPES, on, widen

MAX_SELECT_BYTES = 32768  # of keys that one program holds in registers; twice as many spill
MAX_SELECT_WARPS = 16
SELECT_SAMPLES_PER_WARP = 512  # 16 samples a thread
GATHER_WARPS = 4
GATHER_LANES = 1024  # of a program: 8 lanes a thread, four 128-bit accesses where rows allow them


# -- Select ------------------------------------------------------------------------------------------------------------


@triton.jit
def ordered_key(x):
    """Unsigned integers in the order of the floats; -0.0 equals 0.0, and NaN comes before everything."""
    BITS: tl.constexpr = x.dtype.primitive_bitwidth
    INTEGER: tl.constexpr = tl.uint32 if BITS == 32 else tl.uint64
    bits = (x + 0.0).to(INTEGER, bitcast=True)
    SIGN: tl.constexpr = 1 << (BITS - 1)
    ALL: tl.constexpr = (1 << BITS) - 1
    # a negative number has all its bits inverted, another its sign bit set
    key = tl.where(bits >= SIGN, bits ^ ALL, bits ^ SIGN)
    return tl.where(x == x, key, 0)


@triton.jit(do_not_specialize=["samples", "k"])
def select_kernel(
    indices_ptr,
    before_ptr,
    after_ptr,
    samples,
    k,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.arange(0, BLOCK)
    present = sample < samples
    before = widen(tl.load(before_ptr + sample, mask=present, other=0), COMPUTE)
    after = widen(tl.load(after_ptr + sample, mask=present, other=0), COMPUTE)
    key = ordered_key(after - before)
    # the largest threshold that at least k keys reach is the k-th largest key
    threshold = tl.zeros((), key.dtype)
    bit = tl.full((), 1, key.dtype) << (key.dtype.primitive_bitwidth - 1)
    for _ in range(key.dtype.primitive_bitwidth):
        reached = tl.sum((present & (key >= (threshold | bit))).to(tl.int32))
        threshold = tl.where(reached >= k, threshold | bit, threshold)
        bit = bit >> 1
    above = present & (key > threshold)
    tied = present & (key == threshold)
    places = k - tl.sum(above.to(tl.int32))
    # one scan counts both: the samples above in the high half, the tied ones, of which only `places` get in, in the low
    counts = tl.cumsum(above.to(tl.int32) * 65536 + tied.to(tl.int32))
    tied_rank = counts & 65535
    chosen = above | (tied & (tied_rank <= places))
    position = (counts >> 16) + tl.minimum(tied_rank, places) - 1
    tl.store(indices_ptr + position, sample.to(tl.int64), mask=chosen)


def select(loss_before: Tensor, loss_after: Tensor, k: int) -> Tensor:
    samples = loss_before.shape[0]
    compute = torch.promote_types(compute_dtype(loss_before.dtype), compute_dtype(loss_after.dtype))
    if samples * compute.itemsize > MAX_SELECT_BYTES or loss_after.device != loss_before.device:
        return reference.select(loss_before, loss_after, k)
    block = triton.next_power_of_2(samples)
    indices = torch.empty(k, dtype=torch.int64, device=loss_before.device)
    with on(loss_before.device):
        select_kernel[(1,)](
            indices,
            loss_before.contiguous(),
            loss_after.contiguous(),
            samples,
            k,
            COMPUTE=TRITON_DTYPES[compute],
            BLOCK=block,
            num_warps=select_warps(block),
        )
    return indices


def select_warps(block: int) -> int:
    return min(MAX_SELECT_WARPS, max(4, block // SELECT_SAMPLES_PER_WARP))


# -- Gather ------------------------------------------------------------------------------------------------------------

_LANES = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}


@triton.jit(do_not_specialize=["source", "destination", "batch", "rows", "lanes", "row_stride"])
def gather_kernel(
    source: tl.int64,
    destination: tl.int64,
    indices_ptr,
    batch: tl.int64,
    rows: tl.int64,
    lanes: tl.int64,
    row_stride: tl.int64,
    LANE: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy rows of ``lanes`` lanes, each of them LANE, of which VECTOR at a time are aligned."""
    lanes = lanes // VECTOR * VECTOR
    tiles = tl.cdiv(lanes, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    row = (program // tiles * ROWS + tl.arange(0, ROWS))[:, None]
    lane = (program % tiles * BLOCK + tl.arange(0, BLOCK))[None, :]
    index = tl.load(indices_ptr + row, mask=row < rows, other=-1)
    # an address below 2^31 comes as a 32-bit argument
    source_ptr = source.to(tl.int64).to(tl.pointer_type(LANE))
    source_ptr = tl.multiple_of(source_ptr, VECTOR * LANE.primitive_bitwidth // 8)
    destination_ptr = destination.to(tl.int64).to(tl.pointer_type(LANE))
    destination_ptr = tl.multiple_of(destination_ptr, VECTOR * LANE.primitive_bitwidth // 8)
    # an index outside the batch names no row: it gives zeros, not somebody else's memory
    mask = (index >= 0) & (index < batch) & (lane < lanes)
    x = tl.load(source_ptr + index * (row_stride // VECTOR * VECTOR) + lane, mask=mask, other=0)
    tl.store(destination_ptr + row * lanes + lane, x, mask=(row < rows) & (lane < lanes))


class RowShape(NamedTuple):
    """How rows of bytes are cut into lanes, and lanes into programs."""

    lane: tl.dtype
    lanes: int
    vector: int
    tile_rows: int
    tile_lanes: int


def row_shape(row_bytes: int, width: int) -> RowShape:
    """``width``: how many bytes, at most 16, divide every row, stride and address."""
    lane_bytes = min(width, 8)
    lanes = row_bytes // lane_bytes
    tile_lanes = min(triton.next_power_of_2(lanes), GATHER_LANES)
    return RowShape(_LANES[lane_bytes], lanes, width // lane_bytes, GATHER_LANES // tile_lanes, tile_lanes)


def gather(tensors: Sequence[Tensor], indices: Tensor) -> list[Tensor]:
    return [_gather(tensor, indices) for tensor in tensors]


def _gather(tensor: Tensor, indices: Tensor) -> Tensor:
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    rows_in_front = tensor.permute(order)
    if (
        tensor.numel() == 0
        or indices.numel() == 0
        or indices.device != tensor.device
        or order[0] != 0
        or not rows_in_front[0].is_contiguous()
        or tensor.is_quantized
        or tensor.is_conj()
        or tensor.is_neg()
    ):
        return reference.gather([tensor], indices)[0]
    gathered = tensor.new_empty((len(indices), *rows_in_front.shape[1:]))
    _copy_rows(rows_in_front, gathered, indices.contiguous())
    return gathered.permute([order.index(dim) for dim in range(tensor.dim())])


def _copy_rows(source: Tensor, destination: Tensor, indices: Tensor) -> None:
    row_bytes = source[0].numel() * source.itemsize
    stride_bytes = source.stride(0) * source.itemsize
    rows = row_shape(row_bytes, width=math.gcd(row_bytes, stride_bytes, source.data_ptr(), destination.data_ptr(), 16))
    with on(source.device):
        gather_kernel[(triton.cdiv(len(indices), rows.tile_rows) * triton.cdiv(rows.lanes, rows.tile_lanes),)](
            source.data_ptr(),
            destination.data_ptr(),
            indices,
            source.shape[0],
            len(indices),
            rows.lanes,
            stride_bytes // (row_bytes // rows.lanes),
            LANE=rows.lane,
            VECTOR=rows.vector,
            ROWS=rows.tile_rows,
            BLOCK=rows.tile_lanes,
            num_warps=GATHER_WARPS,
        )
