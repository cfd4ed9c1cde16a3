"""What an experiment is: its settings, units and claims, and the register of all of them."""

from __future__ import annotations

import importlib
import pkgutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from data import UserError

from benchmarks.paper import experiments
from benchmarks.paper.data_sets import Data
from benchmarks.rows import Row

SCALES = ("smoke", "small", "paper")
T = TypeVar("T")


class OutOfTime(Exception):
    """The time given by --minutes is over; what was saved stays."""


@dataclass(frozen=True)
class Settings:
    """How an experiment is to be run."""

    scale: str
    seeds: tuple[int, ...]
    device: torch.device
    data: Data
    scratch: Path
    deadline: float = float("inf")

    def choose(self, *, smoke: T, small: T, paper: T) -> T:
        """The value for this scale."""
        return {"smoke": smoke, "small": small, "paper": paper}[self.scale]

    def scratch_of(self, key: str) -> Path:
        """The folder for the checkpoints of the unit ``key``; it is removed when the unit is finished."""
        return self.scratch / key.replace("/", "_").replace(" ", "_")

    def check_time(self) -> None:
        """Raise OutOfTime where the time is over (``deadline`` is one of ``time.monotonic``)."""
        if time.monotonic() >= self.deadline:
            raise OutOfTime


@dataclass(frozen=True)
class Unit:
    """What is measured at one go, and saved when it is finished."""

    key: str
    run: Callable[[], list[Row]]
    data: str = "none"
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """A sentence or a number of the paper beside what was measured; ``holds`` is None where nothing can be said."""

    text: str
    paper: str
    measured: str | None = None
    holds: bool | None = None
    rows: Sequence[Row] = ()


@dataclass(frozen=True)
class Experiment:
    """One of the paper's tables or figures; the package's docstring says what each part has to do."""

    name: str
    title: str
    paper: str
    units: Callable[[Settings], list[Unit]]
    claims: Callable[[Sequence[Row]], list[Claim]]
    figure: Callable[[Sequence[Row], Path], None]
    seeds: dict[str, int] = field(default_factory=lambda: {"smoke": 1, "small": 3, "paper": 3})


def registry() -> dict[str, Experiment]:
    """All experiments by name, in the order of their names."""
    found: dict[str, Experiment] = {}
    for module in pkgutil.iter_modules(experiments.__path__):
        if not module.name.startswith("_"):
            experiment = importlib.import_module(f"{experiments.__name__}.{module.name}").EXPERIMENT
            if experiment.name in found:
                raise ValueError(f"two experiments are called {experiment.name}")
            found[experiment.name] = experiment
    return dict(sorted(found.items()))


def find(name: str) -> Experiment:
    found = registry()
    if name not in found:
        raise UserError(f"no experiment {name!r}: choose from {', '.join(found)}")
    return found[name]
