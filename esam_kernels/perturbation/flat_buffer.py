"""Flattened parameter storage: the weights of a model side by side in one buffer a device and dtype.

A parameter keeps its identity, shape, strides and memory format; only its memory moves. Every view starts on a 64-byte
boundary: a line of a CPU's cache, and a multiple of the 128 bits that a GPU thread reads and writes at a time.

Memory that somebody else may use stays where it is: see :func:`why_they_stay`.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef, shared_cache
from torch.utils.dlpack import to_dlpack

from esam_kernels.tensor_lists import addresses, holders_of_memory

ALIGNMENT = 64
"""Bytes."""


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements, if any, fill one stretch of memory without gaps or overlaps, in any order."""
    if tensor.numel() == 0:
        return True
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


def why_they_stay(params: Sequence[Tensor]) -> dict[int, str]:
    """The parameters, by number, whose memory somebody else may use, and why: these are not moved.

    * Shared memory (``share_memory_``), and CUDA memory that was sent to or received from another process.
    * A storage that other tensors hold as well: a twin's ``.data``, a view, a snapshot of ``state_dict()``.
    * A storage in which several of ``params`` lie, as cuDNN packs the weights of an LSTM.
    * Memory that torch did not allocate: numpy's, a file's, another library's.

    Parameters that are tied to each other (see :func:`owners`), and held by nobody else, move together.
    """
    owner, counts = owners(params), holders_of_memory(params)
    storages = [param.untyped_storage() for param in params]
    together: dict[int, list[int]] = {}
    for i, storage in enumerate(storages):
        if params[i].numel():
            together.setdefault(storage._cdata, []).append(i)
    sent = {reference.cdata for reference in shared_cache.values() if isinstance(reference, StorageWeakRef)}
    reasons: dict[int, str] = {}
    for key, members in together.items():
        first = members[0]
        if (not params[first].is_cuda and params[first].is_shared()) or key in sent:
            reason = "lies in memory that is shared with other processes"
        elif _is_part(key):
            continue
        elif len({owner[i] for i in members}) > 1:
            reason = "lies in one storage with other parameters, as the packed weights of an LSTM or GRU do"
        elif counts[first] > len(members):
            reason = "shares its memory with another tensor (a twin's .data, a view or a snapshot of state_dict())"
        elif not storages[first].resizable():
            reason = "lies in memory that torch did not allocate (of numpy, a file or another library)"
        else:
            continue
        reasons.update(dict.fromkeys(members, reason))
    return dict(sorted(reasons.items()))


def why_not_all_flattenable(params: Sequence[Tensor]) -> str | None:
    """Why some of these parameters cannot be flattened, which ``flatten=True`` asks for; None if all can."""
    reason = why_not_flattenable(params)
    if reason is None:
        for i, why in why_they_stay(params).items():
            return f"parameter {i} {why}. With flatten=None it stays where it is, and the others are flattened"
    return reason


# The storages of all parts of flat buffers, by their address: a parameter that lies in one is in its place.
_PARTS: dict[int, StorageWeakRef] = {}
# Held while they are noted: two threads may build optimizers at once.
_NOTES_PARTS = threading.Lock()


def _is_part(storage: int) -> bool:
    reference = _PARTS.get(storage)
    return reference is not None and not reference.expired()


def _note_parts(parts: Sequence[Tensor]) -> None:
    with _NOTES_PARTS:
        for key in [key for key, reference in _PARTS.items() if reference.expired()]:
            del _PARTS[key]
        for part in parts:
            storage = part.untyped_storage()
            _PARTS[storage._cdata] = StorageWeakRef(storage)


def _with_its_own_storage(buffer: Tensor, offset: int, numel: int) -> Tensor:
    """A part of ``buffer``, in its memory, that shares no storage with the other parts, yet keeps the memory alive.

    What saves models takes tensors of one storage for tied weights: safetensors refuses them, Accelerate drops them.
    """
    # In bytes, as DLPack does not know every dtype.
    start, stop = offset * buffer.element_size(), (offset + numel) * buffer.element_size()
    # A capsule: a tensor itself is refused where its device is not the current one (cuda:1, for one).
    part: Tensor = torch.from_dlpack(to_dlpack(buffer.view(torch.uint8)[start:stop]))
    return part.view(buffer.dtype)


class FlatBuffers:
    """Moves ``params`` into one contiguous buffer a dtype, and knows when somebody has moved them out again.

    ``buffers`` maps a dtype to its buffer. ``module.to(...)``, ``copy.deepcopy`` and the like give parameters new
    memory; :meth:`refresh` then moves those back. Parameters that lie in a flat buffer already, and those of
    :func:`why_they_stay`, are left where they are.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = list(params)
        self.buffers: dict[torch.dtype, Tensor] = {}
        self._addresses: list[int] = []
        self._flatten()

    def _flatten(self) -> None:
        owner, moving = owners(self.params), self._moving()
        offsets: dict[int, int] = {}
        sizes: dict[torch.dtype, int] = {}
        for i in moving:
            param = self.params[i]
            if owner[i] == i:
                offsets[i] = sizes.get(param.dtype, 0)
                step = ALIGNMENT // param.element_size()
                sizes[param.dtype] = offsets[i] + -(-param.numel() // step) * step
        device = self.params[0].device
        places: dict[int, Tensor] = {}
        with torch.inference_mode(False), torch.no_grad():  # autograd refuses memory that inference mode allocated
            self.buffers |= {dtype: torch.zeros(n, dtype=dtype, device=device) for dtype, n in sizes.items()}
            for i in moving:
                param = self.params[i]
                if owner[i] == i:
                    places[i] = _with_its_own_storage(self.buffers[param.dtype], offsets[i], param.numel())
                view = places[owner[i]].as_strided(param.size(), param.stride())
                if owner[i] == i:
                    view.copy_(param)
                param.data = view
        _note_parts(list(places.values()))
        self._addresses = addresses(self.params)

    def _moving(self) -> list[int]:
        """The parameters to be moved, by number."""
        staying, device = why_they_stay(self.params), self.params[0].device
        return [
            i
            for i, param in enumerate(self.params)
            if param.numel()
            and i not in staying
            and param.device == device
            and not _is_part(param.untyped_storage()._cdata)
        ]

    def __getstate__(self) -> dict[str, Any]:
        # The parameters' copies have memory of their own: copies of the buffers would only double it.
        return {"params": self.params}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.params, self.buffers, self._addresses = state["params"], {}, []

    def refresh(self) -> bool:
        """Move back what has left its place. Returns whether anything had."""
        if addresses(self.params) == self._addresses:
            return False
        self._flatten()
        return True
