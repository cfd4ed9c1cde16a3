"""Sharpness-sensitive Data Selection (section 2.3): losses, the choice of B+, and its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from esam_kernels.backends import reference
from esam_kernels.backends.cuda import extension
from esam_kernels.backends.cuda.extension import DTYPES
from esam_kernels.backends.cuda.lists import is_dense


def _logit_rows(
    logits: Tensor, target: Tensor, label_smoothing: float, ignore_index: int
) -> tuple[tuple[Any, ...], Tensor]:
    """Logits and targets as the extension takes them, and the target that has to stay alive until it has returned."""
    rows, classes = logits.shape
    is_index = target.dtype == torch.int64
    target = target.contiguous() if is_index else target.to(torch.float32).contiguous()
    index, probability = (target.data_ptr(), 0) if is_index else (0, target.data_ptr())
    inputs = (logits.data_ptr(), rows, classes, logits.stride(0), index, probability, label_smoothing, ignore_index)
    return inputs, target


def _are_rows(logits: Tensor, target: Tensor) -> bool:
    """Whether the kernels take these logits: a row of them has to lie without gaps."""
    return (
        logits.dtype in DTYPES
        and logits.device == target.device
        and logits.shape[1] > 0
        and (logits.stride(1) == 1 or logits.shape[1] == 1)
    )


def cross_entropy_forward(
    logits: Tensor, target: Tensor, label_smoothing: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    if not _are_rows(logits, target):
        return reference.cross_entropy_forward(logits, target, label_smoothing, ignore_index)
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    normalizer = torch.empty(2, logits.shape[0], dtype=torch.float32, device=logits.device)
    inputs, _kept = _logit_rows(logits, target, label_smoothing, ignore_index)
    where = extension.where(logits.device)
    extension.kernels.cross_entropy_forward(
        where, DTYPES[logits.dtype], inputs, losses.data_ptr(), normalizer.data_ptr()
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
    if not _are_rows(logits, target):
        return reference.cross_entropy_backward(grad_losses, logits, target, normalizer, label_smoothing, ignore_index)
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    inputs, _kept = _logit_rows(logits, target, label_smoothing, ignore_index)
    numbers = [tensor.to(torch.float32).contiguous() for tensor in (grad_losses, normalizer)]
    addresses = (*(tensor.data_ptr() for tensor in numbers), gradient.data_ptr())
    extension.kernels.cross_entropy_backward(extension.where(logits.device), DTYPES[logits.dtype], inputs, *addresses)
    return gradient


def select(loss_before: Tensor, loss_after: Tensor, k: int) -> Tensor:
    if not (loss_before.dtype in DTYPES and loss_after.dtype in DTYPES and loss_before.device == loss_after.device):
        return reference.select(loss_before, loss_after, k)
    losses = [loss.to(torch.float32).contiguous() for loss in (loss_before, loss_after)]
    indices = torch.empty(k, dtype=torch.int64, device=loss_before.device)
    addresses = [loss.data_ptr() for loss in losses]
    extension.kernels.select(extension.where(loss_before.device), *addresses, len(loss_before), k, indices.data_ptr())
    return indices


def gather(tensors: Sequence[Tensor], indices: Tensor) -> list[Tensor]:
    indices = indices.contiguous()
    k, address = len(indices), indices.data_ptr()
    return _gather(
        tensors, indices, k, lambda rows: extension.kernels.gather(extension.where(indices.device), rows, address, k)
    )


def _gather(
    tensors: Sequence[Tensor], indices: Tensor, k: int, launch: Callable[[list[tuple[int, int, int, int]]], None]
) -> list[Tensor]:
    """The rows of each tensor: of those whose rows lie one after the other by ``launch``, of others as always."""
    gathered: list[Tensor | None] = [None] * len(tensors)
    rows = []
    for i, tensor in enumerate(tensors):
        if tensor.device == indices.device and not tensor.is_quantized and _rows_are_dense(tensor):
            taken = torch.empty_strided(
                (k, *tensor.shape[1:]), tensor.stride(), dtype=tensor.dtype, device=tensor.device
            )
            row_bytes = tensor.stride(0) * tensor.element_size()
            rows.append((tensor.data_ptr(), taken.data_ptr(), row_bytes, len(tensor)))
            gathered[i] = taken
    launch(rows)
    return [reference.gather([tensor], indices)[0] if row is None else row for tensor, row in zip(tensors, gathered)]


def _rows_are_dense(tensor: Tensor) -> bool:
    """Whether the samples lie one after the other, each without gaps."""
    samples = tensor.shape[0]
    return samples > 0 and tensor.stride(0) * samples == tensor.numel() > 0 and is_dense(tensor[0])


def losses_select_gather(
    before: Tensor,
    after: Tensor,
    k: int,
    tensors: Sequence[Tensor],
    target: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The losses, the k samples whose loss rises most, and their rows, in one cooperative launch.

    Args:
        before: losses (b,), or logits (b, C) where ``target`` is given.
        after: losses (b,), or with ``target`` logits (b, C), of the dtype of the logits in ``before``.
        k: the size of B+.
        tensors: what is gathered, samples in front.
        target: as :func:`cross_entropy_forward` takes it.

    Returns:
        Losses before and after, float32 (b,), indices (k,) and the rows of each tensor.
    """
    device = after.device
    given = [values for values in (before, after) if values.dim() == 2]
    fits = before.device == device and all(losses.dtype in DTYPES for losses in (before, after))
    fits = fits and all(target is not None and _are_rows(logits, target) for logits in given)
    if not fits or len({logits.dtype for logits in given}) > 1:
        one, other = (_reference_losses(values, target, label_smoothing, ignore_index) for values in (before, after))
        indices = reference.select(one, other, k)
        return one, other, indices, reference.gather(tensors, indices)
    inputs: list[tuple[Any, ...] | None] = []
    losses, kept = [], []
    for values in (before, after):
        if values.dim() == 2 and target is not None:
            rows, alive = _logit_rows(values, target, label_smoothing, ignore_index)
            inputs.append(rows)
            kept.append(alive)
            losses.append(torch.empty(len(values), dtype=torch.float32, device=device))
        else:
            inputs.append(None)
            losses.append(values.to(torch.float32).contiguous())
    indices = torch.empty(k, dtype=torch.int64, device=device)
    dtype = DTYPES[given[0].dtype] if given else 0
    addresses = (losses[0].data_ptr(), losses[1].data_ptr(), len(after), k, indices.data_ptr())
    where = extension.where(device)
    gathered = _gather(
        tensors,
        indices,
        k,
        lambda rows: extension.kernels.losses_select_gather(where, dtype, *inputs, *addresses, rows),
    )
    return losses[0], losses[1], indices, gathered


def _reference_losses(values: Tensor, target: Tensor | None, label_smoothing: float, ignore_index: int) -> Tensor:
    if values.dim() == 1:
        return values
    if target is None:
        raise ValueError("logits need a target")
    return reference.cross_entropy_forward(values, target, label_smoothing, ignore_index)[0]
