"""A device that is kept busy, to see whether a call waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

BUSY_SECONDS = 1.0
# What a call may take that only queues work: a whole step is some milliseconds of Python.
AT_ONCE_SECONDS = 0.2
_TRIAL_CYCLES = 20_000_000


@dataclass
class Call:
    seconds: float
    was_busy: bool
    """Whether the device was still busy when the call returned."""


def while_busy(device: torch.device, call: Callable[[], Any]) -> Call:
    """Time ``call`` on the host while the device is busy for BUSY_SECONDS. A CPU cannot be: there it takes no time."""
    if device.type != "cuda":
        call()
        return Call(0.0, True)
    end = torch.cuda.Event()
    with torch.cuda.device(device):
        cycles = int(BUSY_SECONDS * _cycles_per_second())
        torch.cuda.synchronize()
        torch.cuda._sleep(cycles)
        end.record()
        start = time.perf_counter()
        call()
        found = Call(time.perf_counter() - start, not end.query())
        torch.cuda.synchronize()
    return found


def _cycles_per_second() -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_TRIAL_CYCLES)  # the clock goes up under load
    start.record()
    torch.cuda._sleep(_TRIAL_CYCLES)
    end.record()
    torch.cuda.synchronize()
    return _TRIAL_CYCLES / (start.elapsed_time(end) / 1000)
