"""docs/reproduction.md, written from the rows under benchmarks/results/paper and from nothing else."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import rows as results
from benchmarks.paper import ROOT, runner, store
from benchmarks.paper.experiment import SCALES, Claim, Experiment, registry
from benchmarks.readme import differences
from benchmarks.rows import Row

PAGE = ROOT / "docs" / "reproduction.md"
RESULTS = results.RESULTS / "paper"
# A smoke run shows that a command works, and nothing about the paper.
SHOWN = tuple(scale for scale in reversed(SCALES) if scale != "smoke")
HEAD = """# The paper's claims, measured again

Written by `python -m benchmarks.paper report` from the rows under `benchmarks/results/paper`; not to be edited.
`python -m benchmarks.paper NAME --scale small|paper` measures a table or figure again. The scale "paper" is that of
Du et al. (ICLR 2022); "small" is a smaller network, less data or fewer epochs, on which numbers cannot equal the
paper's, and only the relations between them are compared. What no row shows is "not measured".
"""
COLUMNS = ("claim", "paper", "measured", "holds", "scale", "data", "seeds", "device", "commit")


def rendered(folder: Path = RESULTS, page: Path = PAGE) -> str:
    """The whole page."""
    return "\n".join([HEAD, *(section(experiment, folder, page) for experiment in registry().values())])


def section(experiment: Experiment, folder: Path, page: Path) -> str:
    """One experiment: what the paper says, a table of claims, and the figures."""
    lines = [f"## {experiment.name}: {experiment.title}", "", experiment.paper, "", header()]
    groups = measured(experiment, folder)
    for _, _, rows in groups:
        lines += [line(claim) for claim in experiment.claims(rows)]
    if not groups:
        lines += [line(claim) for claim in experiment.claims([])]
    elif all(scale != "paper" for _, scale, _ in groups):
        lines += ["", "At the scale of the paper: not measured."]
    for directory, scale, _ in groups:
        drawn = runner.figure_path(experiment, scale, directory)
        if drawn.exists():
            link = Path(os.path.relpath(drawn, page.parent)).as_posix()
            lines += ["", f"![{experiment.name}, scale {scale}, {directory.name}]({link})"]
    return "\n".join(lines) + "\n"


def measured(experiment: Experiment, folder: Path) -> list[tuple[Path, str, list[Row]]]:
    """The rows of each device's folder and scale that is shown; the larger scale first."""
    found = []
    for scale in SHOWN:
        for path in sorted(folder.glob(f"*/{experiment.name}.json")):
            rows = [row for row in store.load(path) if row["scale"] == scale]
            if rows:
                found.append((path.parent, scale, rows))
    return found


def header() -> str:
    return f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def line(claim: Claim) -> str:
    """A claim as a line of the table."""
    holds = "" if claim.measured is None else {True: "yes", False: "**no**", None: ""}[claim.holds]
    conditions = [values(claim.rows, name) for name in ("scale", "data", "seed", "device", "commit")]
    cells = [claim.text, claim.paper, claim.measured or "not measured", holds, *conditions]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def values(rows: Sequence[Row], name: str) -> str:
    """The values of a field; of seeds, how many."""
    found = list(dict.fromkeys(row[name] for row in rows))
    if name == "seed":
        return str(len(found)) if found else ""
    return ", ".join(str(value) for value in found)


def update(check: bool = False, folder: Path = RESULTS, page: Path = PAGE) -> int:
    """Write the page, or say whether it is as the rows have it (exit code 1 where it is not)."""
    new = rendered(folder, page)
    old = page.read_text() if page.exists() else ""
    if not check:
        store.write(page, new)
        return 0
    for difference in differences(old, new) if old != new else []:
        print(difference, file=sys.stderr)
    if old != new:
        print(f"{page} differs from the rows: python -m benchmarks.paper report", file=sys.stderr)
    return 0 if old == new else 1
