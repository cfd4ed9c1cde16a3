"""Runs the units of an experiment that are still to be measured, and shows what came out."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from data import UserError

from benchmarks.paper import store
from benchmarks.paper.experiment import Claim, Experiment, OutOfTime, Settings, Unit
from benchmarks.rows import Row, environment


def run(experiment: Experiment, settings: Settings, out: Path, fresh: bool = False) -> bool:
    """Measure what is missing; False where the time was over before all was there.

    Raises:
        UserError: a unit gave no rows, two units share a key, or the file of rows is damaged.
    """
    path = out / f"{experiment.name}.json"
    units = experiment.units(settings)
    if len({unit.key for unit in units}) != len(units):
        raise UserError(f"{experiment.name}: two units have the same key")
    rows = store.load(path)
    if fresh:
        store.remove(path, settings.scale, units)
        rows = store.load(path)
        for unit in units:
            shutil.rmtree(settings.scratch_of(unit.key), ignore_errors=True)
    waiting = [unit for unit in units if not store.is_done(rows, settings.scale, unit)]
    print(f"{experiment.name}, {settings.scale}: {len(waiting)} of {len(units)} units to be measured", flush=True)
    try:
        for unit in waiting:
            settings.check_time()
            measure(experiment, settings, unit, path)
    except OutOfTime:
        print(f"{experiment.name}: the time is over; the same command goes on from here", flush=True)
        return False
    finally:
        show(experiment, settings.scale, out)
    return True


def measure(experiment: Experiment, settings: Settings, unit: Unit, path: Path) -> None:
    """Run one unit and save its rows; all that is random in it follows from its seed, whatever ran before."""
    start = time.perf_counter()
    torch.manual_seed(unit.seed)
    found = unit.run()
    if not found:
        raise UserError(f"{experiment.name}: the unit {unit.key} gave no rows")
    common = {"experiment": experiment.name, "scale": settings.scale, "unit": unit.key}
    common |= {"data": unit.data, "seed": unit.seed}
    more = {"settings": unit.settings, **environment(settings.device)}
    store.add(path, settings.scale, unit, [{**common, **row, **more} for row in found])
    shutil.rmtree(settings.scratch_of(unit.key), ignore_errors=True)
    print(f"{experiment.name}: {unit.key}: {time.perf_counter() - start:.1f} s", flush=True)


def show(experiment: Experiment, scale: str, out: Path) -> None:
    """Print the claims, and draw the figure, from the rows that are there."""
    rows = [row for row in store.load(out / f"{experiment.name}.json") if row["scale"] == scale]
    if not rows:
        return
    print(as_text(experiment, rows))
    experiment.figure(rows, figure_path(experiment, scale, out))


def figure_path(experiment: Experiment, scale: str, out: Path) -> Path:
    return out / f"{experiment.name}_{scale}.png"


def as_text(experiment: Experiment, rows: Sequence[Row]) -> str:
    lines = [f"{experiment.name}: {experiment.title}"]
    for claim in experiment.claims(rows):
        lines.append(f"  {verdict(claim):14} {claim.text}")
        lines.append(f"  {'':14}   paper: {claim.paper}")
        lines.append(f"  {'':14}   here:  {claim.measured or 'not measured'}")
    return "\n".join(lines)


def verdict(claim: Claim) -> str:
    if claim.measured is None:
        return "not measured"
    return {True: "holds", False: "does not hold", None: ""}[claim.holds]
