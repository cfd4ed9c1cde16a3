"""How things are timed: paired alternation, medians with p20 and p80, cold caches, the copy bandwidth of the same run.

Machines are noisy, and noise lasts: two implementations measured one after the other are not comparable. So they
alternate, and a ratio is the median over pairs of neighbours. Who comes first in a pair alternates too, as what ran
before leaves the caches and the allocator to who comes next.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.clocks import CACHE_MULTIPLE, cache_bytes, captured, clock_of

OURS = "ours"

MAX_BUFFER_SETS = 64
# Large against every cache, small against the time of a case.
COPY_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
LEAST_COPY = 1 << 12
MAX_ROUNDS = 1000
# The first calls may compile, allocate or load: they are not part of anything.
WARM_UP_ROUNDS = 2
# Seconds: code that the caches have lost costs some tens of microseconds.
SHORT_ROUND = 5e-3
# A case that has taken this many times its seconds stops, with at least so many rounds.
OVERTIME, FEWEST_ROUNDS = 3, 3


def nothing() -> None:
    """No preparation."""


@dataclass
class Contender:
    """One implementation of a case.

    Args:
        name: "ours", or the peer's name.
        runs: what is timed, one callable for each set of buffers; they take turns.
        prepare: runs before each of them, outside the time.
        bytes_moved: what has to move through memory in one run, where that can be said.
        capturable: on CUDA, replay it as a graph: device time without the host's.
    """

    name: str
    runs: Sequence[Callable[[], Any]]
    prepare: Callable[[], Any] = nothing
    bytes_moved: int | None = None
    capturable: bool = False


@dataclass
class Measurement:
    """Times of a case in seconds. ``pairs[peer]`` holds (ours, peer), measured next to each other."""

    ours: list[float] = field(default_factory=list)
    pairs: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    copies: list[float] = field(default_factory=list)
    copy_bytes: int = 0
    bytes_moved: dict[str, int | None] = field(default_factory=dict)
    timing: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # peers that have no number, and why

    def times(self, name: str) -> list[float]:
        return self.ours if name == OURS else [peer for _, peer in self.pairs[name]]

    def ratios(self, name: str) -> list[float]:
        """How many times longer than ours the peer took, pair by pair."""
        return [peer / ours for ours, peer in self.pairs[name]]

    def copy_bandwidth(self) -> float | None:
        """Bytes per second of a plain copy, read and written counted, in the same rounds."""
        return self.copy_bytes / statistics.median(self.copies) if self.copies else None


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """p20, the median and p80, linear between the samples."""
    ordered = sorted(samples)
    if not ordered:
        raise ValueError("no samples")

    def at(share: float) -> float:
        position = share * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (position - low)

    return at(0.2), at(0.5), at(0.8)


def buffer_sets(bytes_per_set: int, device: torch.device) -> int:
    """How many sets of buffers have to take turns so that each is cold again when its turn comes."""
    return min(MAX_BUFFER_SETS, 1 + -(-CACHE_MULTIPLE * cache_bytes(device) // max(1, bytes_per_set)))


# -- a case ------------------------------------------------------------------------------------------------------------


def copy_contender(device: torch.device, nbytes: int | None = None) -> Contender:
    """A plain copy of ``nbytes``: the bandwidth that everything is held against."""
    size = nbytes or COPY_BYTES[device.type]
    source, target = (torch.full((size // 4,), 1.0, device=device) for _ in range(2))
    return Contender("copy", [lambda: target.copy_(source)], bytes_moved=2 * source.nbytes)


def measure(
    contenders: Sequence[Contender],
    device: torch.device,
    *,
    seconds: float,
    min_rounds: int = 5,
    max_rounds: int = MAX_ROUNDS,
    with_copy: bool = True,
    clock: Callable[[Callable[[], Any]], float] | None = None,
    copy_bytes: int | None = None,
) -> Measurement:
    """Time ``contenders``, of which the first is ours, in alternation.

    A round is ours, a peer, ours, the next peer, and so on, in every second round the peer, ours, the next peer, ours,
    the peers in random order; then a plain copy, and in a case of microseconds an untimed run of each: the copy has
    emptied the caches of code as well. There are at least ``min_rounds`` (fewer in a case that takes far longer than
    ``seconds``), and as many as ``seconds`` hold. A peer that raises leaves the case, and is named in ``failed``; what
    ours raises goes on.
    """
    ours, *peers = contenders
    if ours.name != OURS:
        raise ValueError(f"the first contender must be {OURS!r}, got {ours.name!r}")
    clock = clock or clock_of(device)
    result = Measurement(bytes_moved={contender.name: contender.bytes_moved for contender in contenders})
    samplers: dict[str, Callable[[], float]] = {}
    for contender in contenders:
        with _guarded(contender.name, result):
            samplers[contender.name] = _warm_sampler(contender, device, clock, result)
    copy = copy_contender(device, copy_bytes or _same_bytes(ours, device)) if with_copy else None
    copy_sampler = _sampler(copy.runs, copy.prepare, clock) if copy else None
    result.copy_bytes = copy.bytes_moved or 0 if copy else 0
    if copy_sampler:
        copy_sampler()
    result.pairs = {peer.name: [] for peer in peers if peer.name in samplers}
    shuffled = random.Random(0)
    start = time.perf_counter()
    for number in itertools.count(1):
        for peer in shuffled.sample(list(result.pairs), len(result.pairs)):
            times = {}
            for name in (OURS, peer) if number % 2 else (peer, OURS):
                with _guarded(name, result):
                    times[name] = samplers[name]()
            result.ours.append(times[OURS])
            if peer in times:
                result.pairs[peer].append((times[OURS], times[peer]))
            else:
                del result.pairs[peer], samplers[peer]
        if not result.pairs:
            result.ours.append(samplers[OURS]())
        if copy_sampler:
            result.copies.append(copy_sampler())
            if sum(result.times(name)[-1] for name in samplers) < SHORT_ROUND:
                for sample in samplers.values():
                    sample()
        elapsed = time.perf_counter() - start
        enough = min(min_rounds, FEWEST_ROUNDS) if elapsed > OVERTIME * seconds else min_rounds
        if number >= max_rounds or (number >= enough and elapsed >= seconds):
            return result
    raise AssertionError("unreachable")


@contextlib.contextmanager
def _guarded(name: str, result: Measurement) -> Iterator[None]:
    """A peer that fails costs its own number only."""
    try:
        yield
    except Exception as error:
        if name == OURS:
            raise
        traceback.print_exc()
        print(f"{name}: FAILED, left out of this case", flush=True)
        result.failed[name] = f"{type(error).__name__}: {error}"


def _warm_sampler(
    contender: Contender, device: torch.device, clock: Callable[[Callable[[], Any]], float], result: Measurement
) -> Callable[[], float]:
    """What times a contender, after the runs that compile, allocate or load."""
    graphed = device.type == "cuda" and contender.capturable
    runs = [captured(run) for run in contender.runs] if graphed else contender.runs
    sample = _sampler(runs, contender.prepare, clock)
    for _ in range(WARM_UP_ROUNDS):
        sample()
    result.timing[contender.name] = "graph replay" if graphed else clock.__name__.replace("_", " ")
    return sample


def _same_bytes(contender: Contender, device: torch.device) -> int | None:
    """On a GPU, the size of a copy that moves as many bytes: a small one is not at the bandwidth of a large one."""
    if device.type != "cuda" or contender.bytes_moved is None:
        return None
    return min(COPY_BYTES["cuda"], max(LEAST_COPY, contender.bytes_moved // 2))


def _sampler(
    runs: Sequence[Callable[[], Any]], prepare: Callable[[], Any], clock: Callable[[Callable[[], Any]], float]
) -> Callable[[], float]:
    turns = itertools.cycle(runs)

    def sample() -> float:
        prepare()
        return clock(next(turns))

    return sample
