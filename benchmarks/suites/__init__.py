"""The suites: each module has ``cases(context)``, what it measures, the most important first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.cases import Sizes
from benchmarks.harness import Contender, Measurement, measure
from benchmarks.rows import Row

INDUCTOR = "compile"  # the peer that torch.compile makes
RHO, BETA, GAMMA = 0.05, 0.6, 0.5
SGD = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-3}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Context:
    device: torch.device
    sizes: Sizes
    backend: str | None = None
    default_heap: bool = False  # also for the suites that keep the heap's memory otherwise
    inductor: str = "with"  # peers of torch.compile: "with", "without", or "only" them (and ours, to pair them with)

    def measure(self, contenders: list[Contender], seconds: float, **options: object) -> Measurement:
        defaults = {"min_rounds": self.sizes.min_rounds, "copy_bytes": self.sizes.copy_bytes}
        return measure(contenders, self.device, seconds=seconds, **(defaults | options))  # type: ignore[arg-type]

    def backend_name(self) -> str:
        """The backend that serves this device."""
        from esam_kernels.backends import resolve

        return resolve(self.backend, self.device).__name__.removeprefix("esam_kernels.backends.")

    def other_backends(self) -> list[str]:
        """On a GPU, what else could serve it: measured beside ours, so that each operator gets the faster."""
        from esam_kernels.backends import unavailable

        names = ("triton", "cuda") if self.device.type == "cuda" else ()
        return [name for name in names if name != self.backend_name() and unavailable(name, self.device) is None]


@dataclass(frozen=True)
class Case:
    """``run(seconds)`` measures for about that long (a compilation or a minimum of rounds may take longer)."""

    name: str
    seconds: float  # of a run of five minutes
    run: Callable[[float], list[Row]]
    has_inductor: bool = False  # whether a peer of torch.compile is in it
