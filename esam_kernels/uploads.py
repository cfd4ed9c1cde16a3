"""Copies from the host to the device that wait for nothing, and memory that stays for the CUDA graphs that read it.

A copy from ordinary (pageable) memory waits for the device, and so may the allocation of pinned memory. Eager code
therefore copies from pinned memory that is used in turn. A graph copies again at every replay: its pinned memory is
used by nobody else as long as the graph lives.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

SEGMENTS = 4
# The tables of some ten steps of a ResNet-50 with a new draw of tensors each; four segments are 1 MiB.
SEGMENT_BYTES = 1 << 18
ALIGNMENT = 16


def capturing(device: torch.device) -> bool:
    """Whether what is launched on ``device`` now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def staged(values: Tensor, device: torch.device) -> Tensor:
    """``values``, a CPU tensor, as a copy to ``device`` takes them without waiting: that copy has to be queued next."""
    if capturing(device):
        return _staged_for_a_graph(values)
    if device.type != "cuda":
        return values
    stream = torch.cuda.current_stream(device)
    key = (stream.device_index, stream.cuda_stream)
    rings = _rings.of_stream
    if key not in rings:
        rings[key] = PinnedRing(_pinned(SEGMENTS * SEGMENT_BYTES).chunk(SEGMENTS), torch.cuda.Event, stream)
    place = rings[key].place(values.nbytes)
    # torch's own pinned memory: it waits nowhere either, but where it has none left it asks the driver for more
    return values.pin_memory() if place is None else place.view(values.dtype).view(values.shape).copy_(values)


def _pinned(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)


# -- Eager code --------------------------------------------------------------------------------------------------------


class PinnedRing:
    """Pinned memory in segments, filled one after the other. One is filled again when the device has read it.

    Args:
        segments: the memory, flat tensors of uint8 of one size.
        make_event: makes what has a ``record(stream)`` and a ``query()`` as ``torch.cuda.Event`` has them.
        stream: on which the copies are queued.
    """

    def __init__(self, segments: Sequence[Tensor], make_event: Callable[[], Any], stream: Any) -> None:
        self._segments, self._stream = segments, stream
        self._events: list[Any] = [make_event() for _ in segments]
        self._current = self._used = 0

    def place(self, nbytes: int) -> Tensor | None:
        """Memory for one copy, which has to be queued before the next call; None where all is still being read."""
        size = _aligned(nbytes)
        if size > self._segments[0].numel():
            return None
        if self._used + size > self._segments[0].numel():
            self._events[self._current].record(self._stream)
            following = (self._current + 1) % len(self._segments)
            if not self._events[following].query():  # the host is that far ahead
                return None
            self._current, self._used = following, 0
        start, self._used = self._used, self._used + size
        return self._segments[self._current][start : start + nbytes]


class _Rings(threading.local):
    """One for each stream, since an event says what one stream has read; and for each thread, since threads share the
    default stream, and none may be given memory between another's :meth:`PinnedRing.place` and its copy.
    """

    def __init__(self) -> None:
        self.of_stream: dict[tuple[int, int], PinnedRing] = {}


_rings = _Rings()


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


# -- CUDA graphs -------------------------------------------------------------------------------------------------------

STAGING_BYTES = 1 << 20  # the tables of several captured steps of a large model
_staging: list[Tensor] = []
# The most bytes that a captured step may take of it, as the eager steps before have said.
_needed = [0]
# Where a capture keeps what its graph reads, the innermost last. The first is never emptied: it is for graphs that
# others capture, of which nothing says when they go.
_keepers: list[list[Any]] = [[]]
# What graphs that are gone have read, each with the event after which the device no longer does.
_retired: list[tuple[Any, list[Any]]] = []


def reserve(nbytes: int, device: torch.device) -> None:
    """A step on ``device`` takes at most so many bytes of the pinned memory for captures, which is allocated now."""
    if device.type == "cuda":
        _needed[0] = max(_needed[0], nbytes)
        refill()


def refill() -> None:
    """Have pinned memory for the next capture: allocating it inside one is not allowed by every version of torch.

    Every capture takes some of it, and several may follow each other with no eager step between them.
    """
    if _needed[0] > (_staging[0].numel() if _staging else 0):
        _staging[:] = [_pinned(max(STAGING_BYTES, _needed[0]))]


def _staged_for_a_graph(values: Tensor) -> Tensor:
    size = _aligned(values.nbytes)
    if _staging and size <= _staging[0].numel():
        taken, _staging[0] = _staging[0][: values.nbytes], _staging[0][size:]
    else:
        taken = _pinned(values.nbytes)
    keep(taken)
    return taken.view(values.dtype).view(values.shape).copy_(values)


def keep(*memory: Tensor) -> None:
    """Keep what the graph that is being captured reads at its replays."""
    _keepers[-1].extend(memory)


@contextlib.contextmanager
def keeping() -> Iterator[list[Any]]:
    """Inside, captures keep what they read in the list. Hand it to :func:`release_with`, with the graph's owner."""
    kept: list[Any] = []
    _keepers.append(kept)
    try:
        yield kept
    finally:
        _keepers[:] = [keeper for keeper in _keepers if keeper is not kept]


def release_with(owner: object, kept: list[Any], device: torch.device) -> None:
    """Let ``kept`` go when ``owner`` is gone and ``device`` has done what was queued by then."""
    weakref.finalize(owner, _retire, kept, device).atexit = False


def _retire(kept: list[Any], device: torch.device) -> None:
    if torch.cuda.is_current_stream_capturing():  # a collection of garbage: an event would break the capture
        _retired.append((None, kept))
        return
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    waiting = [(event if after is None else after, memory) for after, memory in _retired]
    _retired[:] = [(after, memory) for after, memory in [*waiting, (event, kept)] if not after.query()]
