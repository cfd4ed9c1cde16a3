"""Per-row cross-entropy losses, what softmax is rebuilt from, and the gradient with respect to the logits.

Rows of up to MAX_TILE_CLASSES classes are read once, as (ROWS, BLOCK) tiles. Longer rows are walked in blocks, with a
maximum and a sum for each lane that are combined at the end. A class index outside the row, other than
``ignore_index``, gives NaN: the host cannot look without waiting for the device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from esam_kernels.backends.reference import compute_dtype
from esam_kernels.backends.triton.blocks import INTERPRETED, float64, narrow, on, widen

MAX_TILE_CLASSES = 16384  # 32 elements a thread at 16 warps
TILE_ELEMENTS = 2048  # 16 elements a thread at 4 warps: 32 take more than 128 registers
BLOCK_CLASSES = 4096  # of a longer row: 16 elements a thread at 8 warps
ALIGNED_ROWS = 4  # float32 numbers in 16 bytes

SCALAR_ARGUMENTS = ["rows", "classes", "logits_stride", "target_stride", "grad_stride", "ignore_index"]


@triton.jit
def exp(x):
    """e^x. Without the care for subnormal results that makes Triton's own three instructions longer."""
    if INTERPRETED or x.dtype == tl.float64:
        return tl.exp(x)
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * 1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def row_index(target_ptr, row, target_stride, in_rows, classes, ignore_index, INDICES: tl.constexpr):
    """The class index of each row, whether it is counted, and whether it names a class. Probabilities count always."""
    if INDICES:
        index = tl.load(target_ptr + row * target_stride, mask=in_rows, other=0)
        named = (index >= 0) & (index < classes)
        return tl.where(named, index, -1).to(tl.int32), index != ignore_index, named
    return row.to(tl.int32), row >= 0, row >= 0


@triton.jit
def smoothed_target(
    target_ptr,
    row,
    target_stride,
    column,
    mask,
    index,
    classes,
    label_smoothing,
    INDICES: tl.constexpr,
):
    """q: the target distribution, mixed with the uniform one by label smoothing."""
    if INDICES:
        q = tl.where(column == index, 1 - label_smoothing, 0.0)
    else:
        q = tl.load(target_ptr + row * target_stride + column, mask=mask, other=0)
        q = widen(q, label_smoothing.dtype) * (1 - label_smoothing)
    return tl.where(mask, q + label_smoothing / classes, 0.0)


@triton.jit
def moved_sum(q_logits, q_sums, old, new):
    """sum q (x - new) out of sum q (x - old). An ``old`` of -inf: nothing that counts has been seen."""
    return tl.where(old == -float("inf"), q_logits, q_logits + q_sums * (old - new))


@triton.jit(do_not_specialize=SCALAR_ARGUMENTS)
def forward_tile_kernel(
    losses_ptr,
    normalizer_ptr,
    logits_ptr,
    target_ptr,
    rows,
    classes,
    logits_stride,
    target_stride,
    ignore_index,
    label_smoothing: tl.float64,
    INDICES: tl.constexpr,
    SMOOTHED: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    COMPUTE: tl.constexpr = normalizer_ptr.dtype.element_ty
    label_smoothing = float64(label_smoothing).to(COMPUTE)
    classes = classes // VECTOR * VECTOR
    logits_stride = logits_stride // VECTOR * VECTOR
    target_stride = target_stride if INDICES else target_stride // VECTOR * VECTOR
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    in_rows = row < rows
    mask = in_rows & (column < classes)
    row_ptr = logits_ptr + row * logits_stride
    x = widen(tl.load(row_ptr + column, mask=mask, other=-float("inf")), COMPUTE)
    largest = tl.max(x, axis=1, keep_dims=True)
    # a row of -inf: its exponentials are 0, not NaN
    largest = tl.where(largest == -float("inf"), 0.0, largest)
    log_sum = tl.log(tl.sum(exp(x - largest), axis=1, keep_dims=True))
    surprise = tl.where(mask, largest - x + log_sum, 0.0)
    index, counted, named = row_index(target_ptr, row, target_stride, in_rows, classes, ignore_index, INDICES)
    if INDICES:
        chosen = widen(tl.load(row_ptr + index, mask=in_rows & named, other=0), COMPUTE)
        loss = largest - chosen + log_sum
        if SMOOTHED:
            uniform = tl.sum(surprise, axis=1, keep_dims=True) / classes
            loss = (1 - label_smoothing) * loss + label_smoothing * uniform
        loss = tl.where(counted, tl.where(named, loss, float("nan")), 0.0)
    else:
        q = smoothed_target(target_ptr, row, target_stride, column, mask, index, classes, label_smoothing, INDICES)
        loss = tl.sum(q * surprise, axis=1, keep_dims=True)
    tl.store(losses_ptr + row, loss, mask=in_rows)
    tl.store(normalizer_ptr + row, largest, mask=in_rows)
    tl.store(normalizer_ptr + rows + row, log_sum, mask=in_rows)


@triton.jit(do_not_specialize=SCALAR_ARGUMENTS)
def backward_tile_kernel(
    gradient_ptr,
    grad_losses_ptr,
    normalizer_ptr,
    logits_ptr,
    target_ptr,
    rows,
    classes,
    logits_stride,
    target_stride,
    grad_stride,
    ignore_index,
    label_smoothing: tl.float64,
    INDICES: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    COMPUTE: tl.constexpr = normalizer_ptr.dtype.element_ty
    label_smoothing = float64(label_smoothing).to(COMPUTE)
    classes = classes // VECTOR * VECTOR
    logits_stride = logits_stride // VECTOR * VECTOR
    target_stride = target_stride if INDICES else target_stride // VECTOR * VECTOR
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    in_rows = row < rows
    mask = in_rows & (column < classes)
    x = widen(tl.load(logits_ptr + row * logits_stride + column, mask=mask, other=-float("inf")), COMPUTE)
    largest = tl.load(normalizer_ptr + row, mask=in_rows, other=0)
    log_sum = tl.load(normalizer_ptr + rows + row, mask=in_rows, other=0)
    grad_loss = widen(tl.load(grad_losses_ptr + row * grad_stride, mask=in_rows, other=0), COMPUTE)
    index, counted, named = row_index(target_ptr, row, target_stride, in_rows, classes, ignore_index, INDICES)
    q = smoothed_target(target_ptr, row, target_stride, column, mask, index, classes, label_smoothing, INDICES)
    total = tl.sum(q, axis=1, keep_dims=True)
    gradient = (exp(x - largest - log_sum) * total - q) * tl.where(named, grad_loss, float("nan"))
    gradient = tl.where(counted, gradient, 0.0)
    tl.store(gradient_ptr + row * classes + column, narrow(gradient, gradient_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SCALAR_ARGUMENTS)
def forward_row_kernel(
    losses_ptr,
    normalizer_ptr,
    logits_ptr,
    target_ptr,
    rows,
    classes,
    logits_stride,
    target_stride,
    ignore_index,
    label_smoothing: tl.float64,
    INDICES: tl.constexpr,
    SMOOTHED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    COMPUTE: tl.constexpr = normalizer_ptr.dtype.element_ty
    label_smoothing = float64(label_smoothing).to(COMPUTE)
    classes = classes // VECTOR * VECTOR
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * (logits_stride // VECTOR * VECTOR)
    target_stride = target_stride if INDICES else target_stride // VECTOR * VECTOR
    index, counted, named = row_index(target_ptr, row, target_stride, row < rows, classes, ignore_index, INDICES)
    # one maximum and sum for each group of elements that a thread loads at once: one exponential an element
    GROUPS: tl.constexpr = BLOCK // VECTOR
    lane = tl.arange(0, GROUPS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    largest = tl.full((GROUPS,), -float("inf"), COMPUTE)
    sums = tl.zeros((GROUPS,), COMPUTE)
    q_sums = tl.zeros((GROUPS,), COMPUTE)
    q_logits = tl.zeros((GROUPS,), COMPUTE)
    for start in range(0, classes, BLOCK):
        column = start + lane
        mask = column < classes
        x = widen(tl.load(row_ptr + column, mask=mask, other=-float("inf")), COMPUTE)
        larger = tl.maximum(largest, tl.max(x, axis=1))
        base = tl.where(larger == -float("inf"), 0.0, larger)
        sums = sums * exp(largest - base) + tl.sum(exp(x - base[:, None]), axis=1)
        if SMOOTHED or not INDICES:
            q = smoothed_target(target_ptr, row, target_stride, column, mask, index, classes, label_smoothing, INDICES)
            q_logits = moved_sum(q_logits, q_sums, largest, base)
            q_sums += tl.sum(q, axis=1)
            q_logits += tl.sum(tl.where(mask, q * (x - base[:, None]), 0.0), axis=1)
        largest = larger
    top = tl.max(largest, axis=0)
    top = tl.where(top == -float("inf"), 0.0, top)
    log_sum = tl.log(tl.sum(sums * exp(largest - top), axis=0))
    if SMOOTHED or not INDICES:
        loss = log_sum * tl.sum(q_sums, axis=0) - tl.sum(moved_sum(q_logits, q_sums, largest, top), axis=0)
    else:
        loss = top - widen(tl.load(row_ptr + index, mask=named, other=0), COMPUTE) + log_sum
    tl.store(losses_ptr + row, tl.where(counted, tl.where(named, loss, float("nan")), 0.0))
    tl.store(normalizer_ptr + row, top)
    tl.store(normalizer_ptr + rows + row, log_sum)


@triton.jit(do_not_specialize=SCALAR_ARGUMENTS)
def backward_row_kernel(
    gradient_ptr,
    grad_losses_ptr,
    normalizer_ptr,
    logits_ptr,
    target_ptr,
    rows,
    classes,
    logits_stride,
    target_stride,
    grad_stride,
    ignore_index,
    label_smoothing: tl.float64,
    INDICES: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    COMPUTE: tl.constexpr = normalizer_ptr.dtype.element_ty
    label_smoothing = float64(label_smoothing).to(COMPUTE)
    classes = classes // VECTOR * VECTOR
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * (logits_stride // VECTOR * VECTOR)
    target_stride = target_stride if INDICES else target_stride // VECTOR * VECTOR
    index, counted, named = row_index(target_ptr, row, target_stride, row < rows, classes, ignore_index, INDICES)
    lane = tl.arange(0, BLOCK)
    total = tl.full((), 1, COMPUTE)
    if not INDICES:
        q_sums = tl.zeros((BLOCK,), COMPUTE)
        for start in range(0, classes, BLOCK):
            column = start + lane
            mask = column < classes
            q_sums += smoothed_target(
                target_ptr, row, target_stride, column, mask, index, classes, label_smoothing, INDICES
            )
        total = tl.sum(q_sums, axis=0)
    largest, log_sum = tl.load(normalizer_ptr + row), tl.load(normalizer_ptr + rows + row)
    grad_loss = tl.where(named, widen(tl.load(grad_losses_ptr + row * grad_stride), COMPUTE), float("nan"))
    for start in range(0, classes, BLOCK):
        column = start + lane
        mask = column < classes
        x = widen(tl.load(row_ptr + column, mask=mask, other=-float("inf")), COMPUTE)
        q = smoothed_target(target_ptr, row, target_stride, column, mask, index, classes, label_smoothing, INDICES)
        gradient = tl.where(counted, (exp(x - largest - log_sum) * total - q) * grad_loss, 0.0)
        tl.store(gradient_ptr + row * classes + column, narrow(gradient, gradient_ptr.dtype.element_ty), mask=mask)


# -- On the host -------------------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """How the rows are cut into programs."""

    tiled: bool
    grid: tuple[int]
    shape: dict[str, int]
    num_warps: int


def launch_of(rows: int, classes: int) -> Launch:
    block = triton.next_power_of_2(classes)
    if block > MAX_TILE_CLASSES:
        return Launch(False, (rows,), {"BLOCK": BLOCK_CLASSES}, 8)
    tile_rows = max(1, TILE_ELEMENTS // block)
    shape = {"ROWS": tile_rows, "BLOCK": block}
    return Launch(True, (triton.cdiv(rows, tile_rows),), shape, max(4, block // 1024))


def common_vector(classes: int, *matrices: Tensor) -> int:
    """How many elements of a row can be accessed at once: what divides every row and stride, up to 16 bytes."""
    return math.gcd(classes, *(gcd for matrix in matrices for gcd in (matrix.stride(0), 16 // matrix.itemsize)))


def unit_stride(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def cross_entropy_forward(
    logits: Tensor, target: Tensor, label_smoothing: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    rows, classes = logits.shape
    # Both begin at multiples of 16 bytes whatever the number of rows: Triton compiles for each alignment it meets.
    padded = triton.cdiv(rows, ALIGNED_ROWS) * ALIGNED_ROWS
    memory = torch.empty(padded + 2 * rows, dtype=compute_dtype(logits.dtype), device=logits.device)
    losses, normalizer = memory[:rows], memory[padded:].view(2, rows)
    if rows == 0:
        return losses, normalizer
    indices = not target.is_floating_point()
    logits = unit_stride(logits)
    target = target if indices else unit_stride(target)
    launch = launch_of(rows, classes)
    kernel = forward_tile_kernel if launch.tiled else forward_row_kernel
    with on(logits.device):
        kernel[launch.grid](
            losses,
            normalizer,
            logits,
            target,
            rows,
            classes,
            logits.stride(0),
            target.stride(0),
            ignore_index,
            label_smoothing,
            INDICES=indices,
            SMOOTHED=label_smoothing != 0,
            VECTOR=common_vector(classes, logits) if indices else common_vector(classes, logits, target),
            num_warps=launch.num_warps,
            **launch.shape,
        )
    return losses, normalizer


def cross_entropy_backward(
    grad_losses: Tensor,
    logits: Tensor,
    target: Tensor,
    normalizer: Tensor,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    rows, classes = logits.shape
    gradient = torch.empty(rows, classes, dtype=logits.dtype, device=logits.device)
    if rows == 0:
        return gradient
    indices = not target.is_floating_point()
    logits = unit_stride(logits)
    target = target if indices else unit_stride(target)
    launch = launch_of(rows, classes)
    kernel = backward_tile_kernel if launch.tiled else backward_row_kernel
    with on(logits.device):
        kernel[launch.grid](
            gradient,
            grad_losses,
            normalizer.contiguous(),
            logits,
            target,
            rows,
            classes,
            logits.stride(0),
            target.stride(0),
            grad_losses.stride(0),
            ignore_index,
            label_smoothing,
            INDICES=indices,
            VECTOR=common_vector(classes, logits) if indices else common_vector(classes, logits, target),
            num_warps=launch.num_warps,
            **launch.shape,
        )
    return gradient
