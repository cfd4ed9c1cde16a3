"""Flattened parameter storage: the weights of a model side by side in one buffer a device and dtype.

A parameter keeps its identity, shape, strides and memory format; only its memory moves. Every view starts on a 64-byte
boundary: a line of a CPU's cache, and a multiple of the 128 bits that a GPU thread reads and writes at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from esam_kernels.tensor_lists import addresses

ALIGNMENT = 64
"""Bytes."""


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory without gaps or overlaps, in whatever order."""
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride()) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def owners(params: Sequence[Tensor]) -> list[int]:
    """For each parameter the index of the first one that lives in the same memory: itself, or what it is tied to.

    Raises:
        ValueError: two parameters share a part of their memory only.
    """
    first: dict[tuple[torch.device, int], int] = {}
    result = []
    for i, param in enumerate(params):
        result.append(first.setdefault((param.device, param.data_ptr()), i) if param.numel() else i)
    spans = sorted(
        (str(params[i].device), params[i].data_ptr(), params[i].data_ptr() + params[i].nbytes, i)
        for i in set(result)
        if params[i].numel()
    )
    overlaps = [(i, j) for (a, _, end, i), (b, start, _, j) in itertools.pairwise(spans) if a == b and start < end]
    overlaps += [(owner, i) for i, owner in enumerate(result) if params[i].nbytes != params[owner].nbytes]
    if overlaps:
        i, j = overlaps[0]
        raise ValueError(
            f"parameters {i} (shape {tuple(params[i].shape)}) and {j} (shape {tuple(params[j].shape)}) share a part "
            "of their memory: tied parameters must share all of it"
        )
    return result


def why_not_flattenable(params: Sequence[Tensor]) -> str | None:
    """Why these parameters cannot be flattened; None if they can."""
    if len({param.device for param in params}) > 1:
        return "the parameters lie on several devices"
    for i, param in enumerate(params):
        if type(param) not in (Tensor, torch.nn.Parameter):
            return f"parameter {i} is a {type(param).__name__}, not a plain tensor"
        if param.layout is not torch.strided or not is_dense(param):
            return f"parameter {i} is not dense"
        if param.device.type not in ("cpu", "cuda"):
            return f"parameter {i} is on a {param.device.type} device"
    return None


def _with_its_own_storage(buffer: Tensor, offset: int, numel: int) -> Tensor:
    """A part of ``buffer``, in its memory, that shares no storage with the other parts, yet keeps the memory alive.

    What saves models takes tensors of one storage for tied weights: safetensors refuses them, Accelerate drops them.
    """
    # In bytes, as DLPack does not know every dtype.
    start, stop = offset * buffer.element_size(), (offset + numel) * buffer.element_size()
    part: Tensor = torch.from_dlpack(buffer.view(torch.uint8)[start:stop])
    return part.view(buffer.dtype)


class FlatBuffers:
    """Moves ``params`` into one contiguous buffer a dtype, and knows when somebody has moved them out again.

    ``buffers`` maps a dtype to its buffer. ``module.to(...)``, ``copy.deepcopy`` and the like give parameters new
    memory; :meth:`refresh` then flattens anew.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = list(params)
        self.buffers: dict[torch.dtype, Tensor] = {}
        self._addresses: list[int] = []
        self._flatten()

    def _flatten(self) -> None:
        owner = owners(self.params)
        offsets: dict[int, int] = {}
        sizes: dict[torch.dtype, int] = {}
        for i, param in enumerate(self.params):
            if owner[i] == i and param.numel():
                offsets[i] = sizes.get(param.dtype, 0)
                step = ALIGNMENT // param.element_size()
                sizes[param.dtype] = offsets[i] + -(-param.numel() // step) * step
        self.buffers = {dtype: torch.zeros(n, dtype=dtype, device=self.params[0].device) for dtype, n in sizes.items()}
        places: dict[int, Tensor] = {}
        with torch.no_grad():
            for i, param in enumerate(self.params):
                if param.numel():
                    if owner[i] == i:
                        places[i] = _with_its_own_storage(self.buffers[param.dtype], offsets[i], param.numel())
                    view = places[owner[i]].as_strided(param.size(), param.stride())
                    if owner[i] == i:
                        view.copy_(param)
                    param.data = view
        self._addresses = addresses(self.params)

    def __getstate__(self) -> dict[str, Any]:
        # The parameters' copies have memory of their own: copies of the buffers would only double it.
        return {"params": self.params}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.params, self.buffers, self._addresses = state["params"], {}, []

    def refresh(self) -> bool:
        """Flatten again if any parameter has left its place. Returns whether that was so."""
        if addresses(self.params) == self._addresses:
            return False
        self._flatten()
        return True
