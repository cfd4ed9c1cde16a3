"""docs/reproduction.md, written from the rows under benchmarks/results/paper and from nothing else."""

from __future__ import annotations

import os
import re
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

<!-- Written by `python -m benchmarks.paper report` from the rows under benchmarks/results/paper; not to be edited. -->

Can you reproduce the paper (Du et al., ICLR 2022) with this package? Here is each of its tables and figures, as a list
of claims, with what was measured here. To measure one again, for example Figure 5:

    make paper NAME=figure5 ARGS='--data FOLDER'

**Two scales.** "paper" is the scale of the paper. "small" is a smaller network, less data or fewer epochs: its numbers
cannot equal the paper's, and only the relations between them are compared. `ARGS='--scale paper'` chooses.

**Words.** SWP perturbs a share beta of the weights. SDS chooses a share gamma of the batch, which is called B+; B- is
the rest. ESAM does both. w are the weights and e is the perturbation ([all words](how_it_works.md#words)). "±" is the
standard deviation over the seeds. "Measured with" ends with the commit. Long tables are folded on the site: click to
open them.

## In short

How many claims hold, over all scales, data and devices that have rows. "No verdict" is a number without a claim to
compare it with.

"""
COLUMNS = ("claim", "in the paper", "measured here", "holds", "measured with")


def rendered(folder: Path = RESULTS, page: Path = PAGE) -> str:
    """The whole page."""
    experiments = list(registry().values())
    return "\n".join([HEAD + summary(experiments, folder), *(section(one, folder, page) for one in experiments)])


def summary(experiments: Sequence[Experiment], folder: Path) -> str:
    """A line for each experiment: how many of its claims hold."""
    lines = ["| table or figure | holds | does not hold | no verdict | not measured |", "|---|---:|---:|---:|---:|"]
    for experiment in experiments:
        claims = all_claims(experiment, folder)
        counts = [sum(verdict(claim) == name for claim in claims) for name in ("yes", "**no**", "", "not measured")]
        lines.append(f"| {name_of(experiment)}: {experiment.title} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines) + "\n"


def name_of(experiment: Experiment) -> str:
    """figure3 is Figure 3."""
    kind, number = re.fullmatch(r"([a-z-]+?)([\d-]*)", experiment.name).groups()  # type: ignore[union-attr]
    return f"{kind.replace('-', ' ').capitalize()}{'s' * ('-' in number)} {number.replace('-', ' and ')}".rstrip()


def all_claims(experiment: Experiment, folder: Path) -> list[Claim]:
    """Of each device and scale that has rows; without rows, what would be measured."""
    groups = measured(experiment, folder)
    return [claim for _, _, rows in groups for claim in experiment.claims(rows)] or list(experiment.claims([]))


def verdict(claim: Claim) -> str:
    if claim.measured is None:
        return "not measured"
    return {True: "yes", False: "**no**", None: ""}[claim.holds]


def section(experiment: Experiment, folder: Path, page: Path) -> str:
    """One experiment: what the paper says, a table of claims, and the figures."""
    in_the_paper, _, here = experiment.paper.partition(" Here: ")
    lines = [f"## {name_of(experiment)}: {experiment.title}", "", in_the_paper, ""]
    if here:
        lines += [f"**Here:** {here}", ""]
    lines += [header(), *map(line, all_claims(experiment, folder))]
    groups = measured(experiment, folder)
    if groups and all(scale != "paper" for _, scale, _ in groups):
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
    holds = "" if claim.measured is None else verdict(claim)
    conditions = [values(claim.rows, name) for name in ("scale", "data", "seed", "device", "commit")]
    cells = [claim.text, claim.paper, claim.measured or "not measured", holds, "; ".join(filter(None, conditions))]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def values(rows: Sequence[Row], name: str) -> str:
    """The values of a field; of seeds, how many."""
    found = list(dict.fromkeys(row[name] for row in rows))
    if name == "seed":
        return f"{len(found)} seed{'s' * (len(found) > 1)}" if found else ""
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
