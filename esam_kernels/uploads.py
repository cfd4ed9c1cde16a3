"""Copies from the host to the device that wait for nothing: from pinned memory, which is used in turn.

A copy from ordinary (pageable) memory waits for the device, and so may the allocation of pinned memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

SEGMENTS = 4
# The tables of some ten steps of a ResNet-50 with a new draw of tensors each; four segments are 1 MiB.
SEGMENT_BYTES = 1 << 18
ALIGNMENT = 16


class PinnedRing:
    """Pinned memory in segments, filled one after the other. One is filled again when the device has read it.

    Args:
        segments: the memory, flat tensors of uint8 of one size.
        make_event: makes what has a ``record()`` and a ``query()`` as ``torch.cuda.Event`` has them.
    """

    def __init__(self, segments: Sequence[Tensor], make_event: Callable[[], Any]) -> None:
        self._segments = segments
        self._events: list[Any] = [make_event() for _ in segments]
        self._current = self._used = 0

    def place(self, nbytes: int) -> Tensor | None:
        """Memory for one copy, which has to be queued before the next call; None where all is still being read."""
        size = -(-nbytes // ALIGNMENT) * ALIGNMENT
        if size > self._segments[0].numel():
            return None
        if self._used + size > self._segments[0].numel():
            self._events[self._current].record()
            following = (self._current + 1) % len(self._segments)
            if not self._events[following].query():  # the host is that far ahead
                return None
            self._current, self._used = following, 0
        start, self._used = self._used, self._used + size
        return self._segments[self._current][start : start + nbytes]


def staged(values: Tensor, device: torch.device) -> Tensor:
    """``values``, a CPU tensor, as a copy to ``device`` takes them without waiting: that copy has to be queued next."""
    if device.type != "cuda":
        return values
    stream = torch.cuda.current_stream(device)
    key = (stream.device_index, stream.cuda_stream)
    if key not in _rings:
        memory = torch.empty(SEGMENTS, SEGMENT_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True)
        _rings[key] = PinnedRing(memory.unbind(), torch.cuda.Event)
    place = _rings[key].place(values.nbytes)
    # torch's own pinned memory: it waits nowhere either, but where it has none left it asks the driver for more
    return values.pin_memory() if place is None else place.view(values.dtype).view(values.shape).copy_(values)


# One for each stream: an event says what one stream has read.
_rings: dict[tuple[int, int], PinnedRing] = {}
