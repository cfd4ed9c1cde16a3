"""What is still to be trained, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from benchmarks.study.modes import Mode
from benchmarks.study.rows import Rows, Unit, best_trial
from benchmarks.study.settings import FIRST_SEARCH_SEED, Setting

# SAM's cost in units of SGD's step: the time that every mode has in the comparison at equal time.
TIME = 2.0


def missing(rows: Rows, setting: Setting, mode: Mode) -> list[Unit]:
    """The trainings that this mode needs next; empty when all three stages are there."""
    search = search_units(setting, mode)
    waiting = [unit for unit in search if unit not in rows]
    return waiting or [unit for unit in report_units(rows, setting, mode) if unit not in rows]


def search_units(setting: Setting, mode: Mode) -> list[Unit]:
    """Every trial on every seed of the search."""
    seeds = range(FIRST_SEARCH_SEED, FIRST_SEARCH_SEED + setting.search_seeds)
    return [
        Unit(setting, mode.name, "search", trial, setting.epochs, seed)
        for trial in setting.trials_of(mode)
        for seed in seeds
    ]


def report_units(rows: Rows, setting: Setting, mode: Mode) -> list[Unit]:
    """The best trial on the seeds of the report: for as many epochs as SAM, and where that is more, for SAM's time."""
    trials = setting.trials_of(mode)
    searched = rows.of(setting.name, mode.name, "search")
    best = best_trial(searched, trials)
    cost = fmean(row["cost"] for row in searched)
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
            search = search_units(setting, mode)
            found = sum(unit in rows for unit in search)
            done += found
            total += len(search)
            if found < len(search):
                total += 2 * setting.seeds
                continue
            report = report_units(rows, setting, mode)
            done += sum(unit in rows for unit in report)
            total += len(report)
    return done, total
