"""The rows of the study, one for a training, in one JSON file that is whole whenever the program is stopped."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.paper.store import load, save
from benchmarks.rows import Row, environment
from benchmarks.study.settings import Setting
from benchmarks.study.training import Outcome, Trial

REQUIRED = ("setting", "mode", "purpose", "trial", "epochs", "seed", "device", "torch", "commit", "date")
# What a row says of the machine and the code.
ENVIRONMENT = ("device", "python", "torch", "esam_kernels", "commit", "date")


@dataclass(frozen=True)
class Unit:
    """One training; ``purpose`` is the stage that asks for it: search, epochs or time."""

    setting: Setting
    mode: str
    purpose: str
    trial: Trial
    epochs: int
    seed: int

    @property
    def key(self) -> tuple[object, ...]:
        """What tells the trainings apart."""
        return (self.setting.name, self.mode, self.purpose, str(self.trial), self.epochs, self.seed)

    def row(self, outcome: Outcome) -> Row:
        """What is saved of it."""
        where = environment(torch.device("cpu"))
        return {
            "setting": self.setting.name,
            "mode": self.mode,
            "purpose": self.purpose,
            "trial": asdict(self.trial),
            "epochs": self.epochs,
            "seed": self.seed,
            **{name: round(value, 4) for name, value in asdict(outcome).items() if value is not None},
            **{name: where[name] for name in ENVIRONMENT},
        }


def key(row: Row) -> tuple[object, ...]:
    """What tells the trainings apart."""
    trial = str(Trial(**row["trial"]))
    return (row["setting"], row["mode"], row["purpose"], trial, row["epochs"], row["seed"])


class Rows:
    """The rows of a file, each training once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows = {key(row): row for row in load(path, REQUIRED)}

    def __iter__(self):
        return iter(self._rows.values())

    def __contains__(self, unit: Unit) -> bool:
        return unit.key in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: Row) -> None:
        """Put it into the file, in the place of an older one of the same training."""
        self._rows[key(row)] = row
        save(self.path, self._rows.values())

    def of(self, setting: str, mode: str, purpose: str) -> list[Row]:
        """The rows of a stage."""
        wanted = (setting, mode, purpose)
        return [row for row in self if (row["setting"], row["mode"], row["purpose"]) == wanted]
