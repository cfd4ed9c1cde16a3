"""Lists of tensors as the extension takes them, and which of them it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from esam_kernels.backends.cuda.extension import DTYPES


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a piece of memory without gaps or overlaps."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def is_served(*lists: Sequence[Tensor]) -> bool:
    """Whether all tensors are dense, on one device."""
    device = lists[0][0].device
    return all(tensor.device == device and is_dense(tensor) for tensors in lists for tensor in tensors)


def by_dtype(params: Sequence[Tensor]) -> list[tuple[torch.dtype, list[int]]]:
    """The positions of the tensors of each dtype, in the order in which these first appear."""
    positions: dict[torch.dtype, list[int]] = {}
    for i, param in enumerate(params):
        positions.setdefault(param.dtype, []).append(i)
    return list(positions.items())


def floating(params: Sequence[Tensor]) -> bool:
    return all(param.dtype in DTYPES for param in params)


def pick(values: Sequence[Any], indices: Sequence[int]) -> list[Any]:
    return [values[i] for i in indices]


def address_table(lists: Sequence[Sequence[Tensor]], indices: Sequence[int]) -> tuple[list[list[int]], list[int]]:
    """The addresses of parallel lists of tensors, and how many elements each tensor has."""
    return [[tensors[i].data_ptr() for i in indices] for tensors in lists], [lists[0][i].numel() for i in indices]


def rate_of(value: float, tensor: Tensor | None, device: torch.device) -> tuple[float, int, bool] | None:
    """A learning rate: its value, or where it is on the device and whether as float64. None where it is neither."""
    if tensor is None:
        return value, 0, False
    if tensor.device == device and tensor.dtype in (torch.float32, torch.float64):
        return 0.0, tensor.data_ptr(), tensor.dtype == torch.float64
    return (tensor.item(), 0, False) if tensor.device.type == "cpu" else None
