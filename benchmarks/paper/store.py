"""The rows of an experiment in one JSON file, which is whole whenever the program is stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from data import UserError

from benchmarks.paper.experiment import Unit
from benchmarks.rows import Row

# What every row carries besides its numbers.
REQUIRED = ("experiment", "scale", "unit", "data", "seed", "settings", "device", "torch", "commit", "date")


def load(path: Path, required: Sequence[str] = REQUIRED) -> list[Row]:
    """All rows of the file, each with the values of ``required``; none where there is no file.

    Raises:
        UserError: the file is not a list of rows.
    """
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())
        missing = {name for row in rows for name in required if name not in row}
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not a file of rows ({error}); mend it, or move it away") from None
    if not isinstance(rows, list) or missing:
        what = f"rows without {', '.join(sorted(missing))}" if missing else "no list"
        raise UserError(f"{path}: not a file of rows ({what}); mend it, or move it away")
    return rows


def write(path: Path, text: str) -> None:
    """Replace the file; until the new one is complete on disk, the old one stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save(path: Path, rows: Iterable[Row]) -> None:
    lines = ",\n".join(json.dumps(row) for row in rows)
    write(path, f"[\n{lines}\n]\n")


def of_unit(rows: Iterable[Row], scale: str, unit: Unit) -> list[Row]:
    """The rows of ``unit``, whatever their settings."""
    return [row for row in rows if (row["scale"], row["unit"]) == (scale, unit.key)]


def is_done(rows: Iterable[Row], scale: str, unit: Unit) -> bool:
    """Whether ``unit`` was measured with these very settings."""
    settings = json.loads(json.dumps(unit.settings))
    found = of_unit(rows, scale, unit)
    return bool(found) and all((row["settings"], row["data"]) == (settings, unit.data) for row in found)


def add(path: Path, scale: str, unit: Unit, rows: Iterable[Row]) -> None:
    """Put the rows of a finished unit into the file, in the place of older ones."""
    old = load(path)
    save(path, [row for row in old if (row["scale"], row["unit"]) != (scale, unit.key)] + list(rows))


def remove(path: Path, scale: str, units: Iterable[Unit]) -> None:
    """Take the rows of these units out of the file."""
    keys = {unit.key for unit in units}
    old = load(path)
    kept = [row for row in old if row["scale"] != scale or row["unit"] not in keys]
    if len(kept) != len(old):
        save(path, kept)
