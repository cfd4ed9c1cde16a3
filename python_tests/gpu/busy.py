"""A device that is kept busy, to see whether a call waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# A second at 2 GHz, more at a lower clock.
BUSY_CYCLES = 2_000_000_000
# What a call may take that only queues work: a whole step is some milliseconds of Python.
AT_ONCE_SECONDS = 0.2


@dataclass
class Call:
    seconds: float
    was_busy: bool
    """Whether the device was still busy when the call returned."""


def while_busy(device: torch.device, call: Callable[[], Any]) -> Call:
    """Time ``call`` on the host while the device is busy for a second. A CPU cannot be: there it takes no time."""
    if device.type != "cuda":
        call()
        return Call(0.0, True)
    end = torch.cuda.Event()
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        torch.cuda._sleep(BUSY_CYCLES)
        end.record()
        start = time.perf_counter()
        call()
        found = Call(time.perf_counter() - start, not end.query())
        torch.cuda.synchronize()
    return found
