"""Tables through which one launch walks over many tensors, and how a kernel reads and writes their blocks.

A streaming kernel sees lists of dense tensors as two int64 tables: the addresses (a row for each list), and the
layout, which says at which block each tensor begins. Both have one column a tensor, whatever its size. Addresses of
gradients change often and the layout does not, so they are cached apart. A program takes every
``tl.num_programs(0)``-th block and searches for the tensor that it lies in.

A block that lies inside its tensor, with all its pointers 16-byte aligned, is read and written in 128-bit accesses
without a mask. Everything else (tails, views such as ``t[1:]``) is masked exactly and accessed element by element, in
pieces of MASKED_BLOCK.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from esam_kernels import uploads
from esam_kernels.backends.reference import NUM_PARTIALS

NUM_WARPS = 4
MASKED_BLOCK = tl.constexpr(512)  # elements: small, so that the masked path does not cost the other one registers
BLOCK_BYTES = 8192  # four 128-bit accesses a thread and list: enough in flight at half occupancy to fill HBM3
MAX_PROGRAMS = NUM_PARTIALS  # about eight programs a multiprocessor on H100 and B200; a slot of the norm for each
TABLES_OF_A_STEP = 8  # norm, perturb, restore, update, of weights of two dtypes
TABLES_KEPT = 64  # a few KiB each; a step has some ten, and a draw of tensors (mask="tensor") hardly ever comes again

# The policy of tiles that nothing reads again before a whole forward pass: they leave the caches before others do.
ONCE = tl.constexpr("evict_first")
NO_POLICY = tl.constexpr("")  # Triton 3.6 hands a default on as it is: a plain string is no constant there

# Rows of the address table.
ALIGNMENT = tl.constexpr(0)
FIRST_LIST = tl.constexpr(1)

# Rows of the layout.
NUMEL = tl.constexpr(0)
OFFSET = tl.constexpr(1)
GROUP = tl.constexpr(2)
ADAPTIVE = tl.constexpr(3)
FIRST_BLOCK = tl.constexpr(4)
LAYOUT_ROWS = tl.constexpr(5)

# Rounding is torch's, operation by operation: products and sums are fused only where torch fuses them.
LAUNCH_OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


# -- On the host -------------------------------------------------------------------------------------------------------


logger = logging.getLogger("esam_kernels")


class Table(NamedTuple):
    """What a streaming kernel needs to find its blocks, in the order of its first four arguments."""

    addresses: Tensor
    layout: Tensor
    num_tensors: int
    num_blocks: int


Bucket = tuple[torch.device, torch.dtype, list[int]]


def buckets(params: Sequence[Tensor]) -> list[Bucket]:
    """The positions of the tensors of each device and dtype, in the order in which these first appear."""
    positions: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, param in enumerate(params):
        positions.setdefault((param.device, param.dtype), []).append(i)
    return [(device, dtype, indices) for (device, dtype), indices in positions.items()]


def are_mixed(found: Sequence[Bucket]) -> bool:
    """Whether some are on a GPU and some on the CPU, where no kernel reaches them: such lists go to the reference."""
    return len({device.type for device, _, _ in found}) > 1


def pick(values: Sequence[Any], indices: Sequence[int]) -> Sequence[Any]:
    return values if len(values) == len(indices) else [values[i] for i in indices]


def block_size(dtype: torch.dtype, block_bytes: int = BLOCK_BYTES) -> int:
    return block_bytes // dtype.itemsize


def table(
    lists: Sequence[Sequence[Tensor]],
    *,
    offsets: Sequence[int] = (),
    groups: Sequence[int] = (),
    adaptive: Sequence[bool] = (),
    scalars: Sequence[int] = (),
    block_bytes: int = BLOCK_BYTES,
) -> Table:
    """The table of parallel lists of tensors, all of one device and dtype.

    ``offsets``, ``groups`` and ``adaptive`` hold one number a tensor, or nothing where the kernel reads none.
    ``scalars`` are addresses of one number a tensor: a row after those of the lists.
    """
    params = lists[0]
    device = params[0].device
    addresses = tuple([tensor.data_ptr() for tensors in lists for tensor in tensors])
    numels = tuple([param.numel() for param in params])
    block = block_size(params[0].dtype, block_bytes)
    where = (device, _stream(device), len(params))
    address_key = (*where, addresses, tuple(scalars))
    layout_key = (*where, block, numels, tuple(offsets), tuple(groups), tuple(adaptive))
    if uploads.capturing(device):
        # A graph reads its tables at every replay: they must neither be shared with eager code nor freed before it.
        uploaded, (layout, num_blocks) = _addresses.__wrapped__(*address_key), _layout.__wrapped__(*layout_key)
        uploads.keep(uploaded, layout)
    else:
        uploaded, (layout, num_blocks) = _addresses(*address_key), _layout(*layout_key)
        uploads.reserve(TABLES_OF_A_STEP * (uploaded.nbytes + layout.nbytes), device)
    return Table(uploaded, layout, len(params), num_blocks)


@functools.lru_cache(maxsize=TABLES_KEPT)
def _addresses(
    device: torch.device, stream: int, num_tensors: int, addresses: tuple[int, ...], scalars: tuple[int, ...]
) -> Tensor:
    """Row ALIGNMENT, the bitwise or of each tensor's addresses; then a row for each list, and one of ``scalars``."""
    rows = torch.tensor(addresses + scalars, dtype=torch.int64, device="cpu").view(-1, num_tensors)
    alignment = functools.reduce(torch.bitwise_or, rows[: len(addresses) // num_tensors])
    return upload(torch.cat((alignment, rows.flatten())), device)


@functools.lru_cache(maxsize=TABLES_KEPT)
def _layout(
    device: torch.device,
    stream: int,
    num_tensors: int,
    block: int,
    numels: tuple[int, ...],
    offsets: tuple[int, ...],
    groups: tuple[int, ...],
    adaptive: tuple[bool, ...],
) -> tuple[Tensor, int]:
    """Rows NUMEL, OFFSET, GROUP, ADAPTIVE, FIRST_BLOCK, and the number of all blocks."""
    rows = torch.zeros(LAYOUT_ROWS.value, num_tensors, dtype=torch.int64, device="cpu")
    for row, values in ((NUMEL, numels), (OFFSET, offsets), (GROUP, groups), (ADAPTIVE, adaptive)):
        if values:
            rows[row.value] = torch.tensor(values, dtype=torch.int64, device="cpu")
    counts = (rows[NUMEL.value] + block - 1) // block
    ends = counts.cumsum(0)
    rows[FIRST_BLOCK.value] = ends - counts
    return upload(rows.flatten(), device), int(ends[-1])


def upload(values: Tensor, device: torch.device) -> Tensor:
    """A copy of a CPU tensor on ``device``, made without waiting for it, also inside the capture of a CUDA graph."""
    logger.debug("a table of %d numbers goes to %s: its tensors have not been met before", values.numel(), device)
    return uploads.staged(values, device).to(device, non_blocking=True)


def _stream(device: torch.device) -> int:
    """A table that one stream uploads may not have arrived where another stream reads it: one for each."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it ``device``."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def stream_over(
    kernel: Any, blocks: Table, device: torch.device, *arguments: Any, programs: int = 0, most: int | None = None
) -> None:
    """Launch a streaming kernel over the blocks of a table, on at least ``programs`` programs.

    ``most``: the most programs, in place of MAX_PROGRAMS.
    """
    grid = max(min(blocks.num_blocks, MAX_PROGRAMS if most is None else most), programs)
    if grid > 0:
        with on(device):
            kernel[(grid,)](*blocks, *arguments, **LAUNCH_OPTIONS)


# -- In a kernel -------------------------------------------------------------------------------------------------------

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def block_at(addresses_ptr, layout_ptr, num_tensors, num_blocks, block, BLOCK: tl.constexpr):
    """The tensor of a block, where the block starts in it, the tensor's length, and whether the block is vectorized."""
    first_blocks_ptr = layout_ptr + FIRST_BLOCK * num_tensors
    # the last tensor that begins at this block or before: empty tensors begin where their successor does
    tensor = tl.full((), 0, tl.int32)
    last = tensor + num_tensors - 1
    while tensor < last:
        middle = (tensor + last + 1) // 2
        begins_later = tl.load(first_blocks_ptr + middle) > block
        last = tl.where(begins_later, middle - 1, last)
        tensor = tl.where(begins_later, tensor, middle)
    start = (block - tl.load(first_blocks_ptr + tensor)) * BLOCK
    numel = tl.load(layout_ptr + NUMEL * num_tensors + tensor)
    alignment = tl.load(addresses_ptr + ALIGNMENT * num_tensors + tensor)
    return tensor, start, numel, (start + BLOCK <= numel) & (alignment % 16 == 0)


@triton.jit
def tile_pointers(
    addresses_ptr,
    num_tensors,
    LIST: tl.constexpr,
    start,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTORIZED: tl.constexpr,
):
    """Pointers to a block of one tensor in list LIST; ``addresses_ptr`` stands at that tensor's column."""
    pointer = tl.load(addresses_ptr + (FIRST_LIST + LIST) * num_tensors).to(tl.pointer_type(DTYPE))
    if VECTORIZED:
        pointer = tl.multiple_of(pointer, 16)
    # the compiler sees the alignment of a product, and loses that of an argument
    return pointer + start // BLOCK * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def load_tile(
    addresses_ptr,
    num_tensors,
    LIST: tl.constexpr,
    start,
    numel,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTORIZED: tl.constexpr,
    POLICY: tl.constexpr = NO_POLICY,
):
    """The elements of a block, 0 past the end of the tensor."""
    pointers = tile_pointers(addresses_ptr, num_tensors, LIST, start, DTYPE, BLOCK, VECTORIZED)
    if VECTORIZED:
        x = tl.load(pointers, eviction_policy=POLICY)
    else:
        x = tl.load(pointers, mask=tl.arange(0, BLOCK) < numel - start, other=0, eviction_policy=POLICY)
    return x


@triton.jit
def store_tile(
    addresses_ptr,
    num_tensors,
    LIST: tl.constexpr,
    x,
    start,
    numel,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTORIZED: tl.constexpr,
    POLICY: tl.constexpr = NO_POLICY,
):
    pointers = tile_pointers(addresses_ptr, num_tensors, LIST, start, DTYPE, BLOCK, VECTORIZED)
    if VECTORIZED:
        tl.store(pointers, x, eviction_policy=POLICY)
    else:
        tl.store(pointers, x, mask=tl.arange(0, BLOCK) < numel - start, eviction_policy=POLICY)


@triton.jit
def widen(x, COMPUTE: tl.constexpr):
    """A tile in the dtype that it is computed in. The interpreter's own conversion loses subnormal bfloat16."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True).to(COMPUTE)
    return x.to(COMPUTE)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """A tile in the dtype that it is stored in, rounded to nearest even. The interpreter would truncate to bfloat16."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """What is left of a tile after torch has stored it in DTYPE between two of its operations."""
    return widen(narrow(x, DTYPE), x.dtype)


@triton.jit
def fma(x, y, z):
    """x y + z, rounded once. The interpreter would round twice."""
    if INTERPRETED and z.dtype == tl.float32:
        return (x.to(tl.float64) * y.to(tl.float64) + z.to(tl.float64)).to(tl.float32)
    return tl.fma(x, y, z)


@triton.jit
def float64(x):
    """A float64 argument, which the interpreter hands over as a Python number."""
    return tl.full((), x, tl.float64)
