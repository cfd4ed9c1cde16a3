"""What is still to be trained, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from benchmarks.study.modes import Mode
from benchmarks.study.rows import Rows, Unit
from benchmarks.study.settings import Setting
from benchmarks.study.training import Trial

# SAM's cost in units of SGD's step: the time that every mode has in the comparison at equal time.
TIME = 2.0


def missing(rows: Rows, setting: Setting, mode: Mode) -> list[Unit]:
    """The trainings that this mode needs next; empty when all is there."""
    waiting, best = search(rows, setting, mode)
    if best is None:
        return waiting
    return [unit for unit in report_units(rows, setting, mode, best) if unit not in rows]


def search(rows: Rows, setting: Setting, mode: Mode) -> tuple[list[Unit], Trial | None]:
    """The next trainings of the search; where it has ended, the trial that it chose."""
    found = rows.of(setting.name, mode.name, "search")
    accuracies = {(str(Trial(**row["trial"])), row["seed"]): row["validation_accuracy"] for row in found}
    runs, best = setting.search.next_runs(mode, lambda run: accuracies.get((str(run[0]), run[1])))
    return [Unit(setting, mode.name, "search", trial, setting.epochs, seed) for trial, seed in runs], best


def report_units(rows: Rows, setting: Setting, mode: Mode, best: Trial) -> list[Unit]:
    """The best trial on the seeds of the report: for as many epochs as SAM, and where that is more, for SAM's time."""
    cost = fmean(row["cost"] for row in rows.of(setting.name, mode.name, "search"))
    longer = max(1, round(setting.epochs * TIME / cost))
    lengths = {"epochs": setting.epochs}
    if longer > setting.epochs:
        lengths["time"] = longer
    return [
        Unit(setting, mode.name, purpose, best, epochs, seed)
        for purpose, epochs in lengths.items()
        for seed in range(setting.seeds)
    ]


def next_units(rows: Rows, settings: Sequence[Setting], modes: Sequence[Mode]) -> list[Unit]:
    """One stage of the first mode that misses something, for all settings: partial results can be compared.

    What compares at equal time comes after all the rest.
    """
    for is_last_round in (False, True):
        for mode in modes:
            units = [
                unit
                for setting in settings
                if setting.has(mode)
                for unit in missing(rows, setting, mode)
                if is_last_round or unit.purpose != "time"
            ]
            if units:
                return units
    return []


def counts(rows: Rows, settings: Sequence[Setting], modes: Sequence[Mode]) -> tuple[int, int]:
    """How many trainings are there, and how many there will be."""
    done = total = 0
    for setting in settings:
        for mode in filter(setting.has, modes):
            _, best = search(rows, setting, mode)
            if best is None:
                done += len(rows.of(setting.name, mode.name, "search"))
                total += setting.search.size(mode) + 2 * setting.seeds
                continue
            report = report_units(rows, setting, mode, best)
            done += setting.search.size(mode) + sum(unit in rows for unit in report)
            total += setting.search.size(mode) + len(report)
    return done, total
