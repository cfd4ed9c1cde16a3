"""The clocks of the benchmarks, and what they do with the caches before a run.

A GPU is never timed from idle: an event that is recorded on an idle device also times the launch. And what earlier
kernels wrote must not be written back while the timed one runs.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Twice the last-level cache between two uses of the same memory leaves nothing of it there.
CACHE_MULTIPLE = 2
# About 0.1 ms: the time to put a launch behind the first event while the device is still busy.
SLEEP_CYCLES = 200_000


def cache_bytes(device: torch.device) -> int:
    """The size of the last-level cache."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes), default=32 << 20)


def wall_clock(run: Callable[[], Any]) -> float:
    """Seconds until ``run`` returns. On the CPU that is its time; on CUDA it is the host's share of it."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def host_clock(run: Callable[[], Any]) -> float:
    """The host's share on CUDA: the device is idle at the start, and is not waited for."""
    torch.cuda.synchronize()
    return wall_clock(run)


def event_clock(run: Callable[[], Any]) -> float:
    """Seconds between two CUDA events around ``run``, from cold and clean caches, on a device that is not idle."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    read_through_cache(torch.cuda.current_device())
    torch.cuda._sleep(SLEEP_CYCLES)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def read_through_cache(index: int) -> None:
    """Read more than the GPU's cache holds: what was in it is gone, and what was changed there is written back."""
    _unchanged_memory(index).amax()


@functools.cache
def _unchanged_memory(index: int) -> torch.Tensor:
    device = torch.device("cuda", index)
    return torch.zeros(CACHE_MULTIPLE * cache_bytes(device) // 4, device=device)


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """``run`` as a CUDA graph; calling it replays the graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def clock_of(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    return event_clock if device.type == "cuda" else wall_clock
