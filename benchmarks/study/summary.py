"""What the rows say: means, differences with their errors, and which modes lose nowhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from benchmarks.rows import Row
from benchmarks.study.modes import MODES
from benchmarks.study.plan import search
from benchmarks.study.rows import Rows
from benchmarks.study.settings import SETTINGS, Setting
from benchmarks.study.training import Trial

# A difference counts where it is more than so many standard errors.
ERRORS = 2.0


@dataclass(frozen=True)
class Difference:
    """The mean difference of two modes over the seeds that both have, and the standard error of that mean."""

    mean: float
    error: float

    @property
    def is_below(self) -> bool:
        """Whether the first mode is below the second by more than the error of the difference."""
        return self.mean < -ERRORS * self.error

    @property
    def is_above(self) -> bool:
        """Whether it is above by more than that."""
        return self.mean > ERRORS * self.error

    def __str__(self) -> str:
        text = f"{self.mean:+.1f} ± {self.error:.1f}"
        return f"**{text}**" if self.is_above or self.is_below else text


@dataclass(frozen=True)
class Result:
    """A mode in a setting, at equal epochs or at equal time."""

    rows: Sequence[Row]

    @property
    def accuracies(self) -> dict[int, float]:
        """Test accuracy in percent, by seed."""
        return {row["seed"]: row["test_accuracy"] for row in self.rows}

    @property
    def mean(self) -> float:
        return fmean(self.accuracies.values())

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        values = list(self.accuracies.values())
        return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan

    @property
    def cost(self) -> float:
        """The counted cost of a step, in units of SGD's."""
        return fmean(row["cost"] for row in self.rows)

    @property
    def trial(self) -> str:
        """What the search chose."""
        return str(Trial(**self.rows[0]["trial"]))

    def minus(self, other: Result) -> Difference:
        """The paired difference over common seeds."""
        mine, theirs = self.accuracies, other.accuracies
        values = [mine[seed] - theirs[seed] for seed in mine.keys() & theirs.keys()]
        if len(values) < 2:
            return Difference(fmean(values) if values else math.nan, math.nan)
        return Difference(fmean(values), stdev(values) / math.sqrt(len(values)))


class Summary:
    """The results of all complete cells."""

    def __init__(self, rows: Rows) -> None:
        self._results: dict[tuple[str, str, str], Result] = {}
        for setting in SETTINGS:
            for mode in MODES:
                _, best = search(rows, setting, mode)  # the rows may hold what a smaller search had chosen
                for purpose in ("epochs", "time"):
                    found = rows.of(setting.name, mode.name, purpose)
                    found = [row for row in found if best is None or Trial(**row["trial"]) == best]
                    if len({row["seed"] for row in found}) >= setting.seeds:
                        self._results[setting.name, mode.name, purpose] = Result(found)

    def result(self, setting: str, mode: str, purpose: str = "epochs") -> Result | None:
        """None where it is not measured. A mode that costs as much as SAM has the same result at equal time."""
        found = self._results.get((setting, mode, purpose))
        if found is None and purpose == "time":
            equal = self._results.get((setting, mode, "epochs"))
            found = equal if equal is not None and round(equal.cost, 1) >= 2.0 else None
        return found

    @property
    def settings(self) -> list[Setting]:
        """Those in which SGD and SAM are there to be compared with."""
        return [
            s for s in SETTINGS if self.result(s.name, "sgd") is not None and self.result(s.name, "sam") is not None
        ]

    def losses(self, mode: str) -> list[str]:
        """The settings in which the mode loses: below SGD, or below SAM where SAM is above SGD."""
        lost = []
        for setting in self.settings:
            result = self.result(setting.name, mode)
            sgd, sam = self.result(setting.name, "sgd"), self.result(setting.name, "sam")
            if result is None or sgd is None or sam is None:
                continue
            if result.minus(sgd).is_below or (sam.minus(sgd).is_above and result.minus(sam).is_below):
                lost.append(setting.title)
        return lost
