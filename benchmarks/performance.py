"""What docs/performance.md and docs/kernels.md show beside their counts: the rows, and how far they are from the floor.

``<!-- floor:weights -->``, ``<!-- floor:samples -->``, ``<!-- floor:steps -->`` and ``<!-- floor:modes -->``, each up
to ``<!-- /floor -->``, hold one table for each device and number of threads, and say what no GPU has measured;
``<!-- floor:modes b32 fp32 -->`` takes the cases that hold that text. The floor of a stage is its counted bytes over
the bandwidth of a plain copy in the same run; that of a whole step is its counted arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from benchmarks import rows as results
from benchmarks import tables
from benchmarks.harness import OURS
from benchmarks.rows import Row
from benchmarks.suites import BETA, GAMMA

BLOCK = re.compile(r"(<!-- floor:(?P<kind>\w+)(?: (?P<only>[^\n]+?))? -->\n)(?P<body>.*?)(<!-- /floor -->)", re.DOTALL)
ANY_BLOCK = re.compile(r"<!-- floor:")
NOT_MEASURED = "CUDA: compiled, not run; not measured."

# Floating-point operations for each weight, as the page counts them.
OPERATIONS = {"norm": 2, "perturb": 2, "perturb element": 2, "restore": 0, "restore + SGD": 6}
# Of one step, in forward passes over the batch; the base optimizer's step is 3.
PASSES = {"ESAM": 3 + BETA + 3 * GAMMA, "SAM": 6.0, "ESAM element": 3 + 1 + 3 * GAMMA}
BASE_PASSES = 3.0
SECONDS_OF = {"ms": 1e-3, "us": 1e-6}

Lines = list[list[str]]


def rendered(text: str, folder: Path = results.RESULTS) -> str:
    """``text`` with every block filled from the rows under ``folder``.

    Raises:
        ValueError: a block that is not closed, or of an unknown kind.
    """
    if len(BLOCK.findall(text)) != len(ANY_BLOCK.findall(text)):
        raise ValueError("a <!-- floor:... --> block is not closed by <!-- /floor -->")

    def block(match: re.Match[str]) -> str:
        if match["kind"] not in _KINDS:
            raise ValueError(f"unknown block <!-- floor:{match['kind']} -->: choose one of {', '.join(_KINDS)}")
        suite, lines_of = _KINDS[match["kind"]]
        found = [results.load(path / f"{suite}.json") for path in _folders(folder)]
        found = [[row for row in every if (match["only"] or "") in row["case"]] for every in found]
        groups = [group for every in found for group in results.by_machine(every)]
        parts = [_part(lines_of(group), group) for group in groups if len(lines_of(group)) > 1]
        if not any(path.name != "cpu" and (path / f"{suite}.json").exists() for path in _folders(folder)):
            parts.append(NOT_MEASURED)
        return match[1] + "".join(f"{part}\n" for part in parts) + match[5]

    return BLOCK.sub(block, text)


def _folders(folder: Path) -> list[Path]:
    """The CPU's first."""
    return sorted(
        (path for path in folder.iterdir() if path.is_dir()), key=lambda path: (path.name != "cpu", path.name)
    )


def _part(lines: Lines, rows: list[Row]) -> str:
    return f"{tables.as_markdown(lines)}\n\n{tables.conditions(rows)}.\n"


def _against_copy(row: Row) -> list[str]:
    """Bytes, the floor in time, what was measured, the bandwidth, and its share of the copy's."""
    floor = row["bytes"] / row["copy_gb_s"] / 1e9 / SECONDS_OF[row["unit"]]
    unit = row["unit"]
    return [
        f"{tables.number(row['bytes'] / 1e6)} MB",
        f"{tables.number(floor)} {unit}",
        f"{tables.number(row['p50'])} {unit}",
        tables.number(row["gb_s"]),
        f"{100 * row['copy_share']:.0f} %",
    ]


def _name(row: Row) -> str:
    """The case, and which of ours it is where a second backend was measured."""
    return row["case"] + row["implementation"].removeprefix(OURS)


_FLOOR_COLUMNS = ["bytes", "floor: bytes / copy", "measured", "GB/s", "of the copy bandwidth"]


def _weights(rows: list[Row]) -> Lines:
    """The stages alone, then the whole chain of each network."""
    lines = [["ours", "operations", *_FLOOR_COLUMNS]]
    for row in sorted(rows, key=lambda row: "stage: " not in row["case"]):
        if row["implementation"].startswith(OURS) and "copy_gb_s" in row:
            stage = row["case"].partition("stage: ")[2]
            each = (
                OPERATIONS[stage] if stage else OPERATIONS["norm"] + OPERATIONS["perturb"] + OPERATIONS["restore + SGD"]
            )
            lines.append([_name(row), f"{tables.number(each * row['parameters'] / 1e6)} M", *_against_copy(row)])
    return lines


def _samples(rows: list[Row]) -> Lines:
    ours = [row for row in rows if row["implementation"].startswith(OURS) and "copy_gb_s" in row]
    return [["ours", *_FLOOR_COLUMNS], *([_name(row), *_against_copy(row)] for row in ours)]


def _steps(rows: list[Row]) -> Lines:
    """Counted and measured multiples of the base optimizer's own step, from the same alternating run."""
    lines = [["step", "implementation", "counted", "measured", "measured / counted"]]
    by_name = {(row["case"], row["implementation"]): row for row in rows}
    for (case, name), row in by_name.items():
        method, _, base = case.rpartition(" ")[2].partition("(")
        method = f"ESAM {method}" if method == "element" else method
        base = base.rstrip(")")
        alone = by_name.get((case, f"{base} alone"))
        if name.startswith(OURS) and alone is not None and method in PASSES:
            counted, measured = PASSES[method] / BASE_PASSES, row["p50"] / alone["p50"]
            lines.append([case, name, f"{counted:.2f}", f"{measured:.2f}", f"{measured / counted:.2f}"])
    return lines


def lines_of_modes(rows: list[Row]) -> Lines:
    """Each mode's counted and measured cost in units of SGD's step, and its speed against SAM's, from pairs."""
    lines = [["mode", "counted price", "measured price", "measured / counted", "times SAM's speed"]]
    by_name = {(row["case"], row["implementation"]): row for row in rows}
    for (case, name), row in by_name.items():
        if name != OURS:
            continue
        cost = 1.0 / by_name[case, "SGD alone"]["ratio"]
        sam = by_name.get((case, "SAM, ours"))
        speed = "" if sam is None else f"{sam['ratio']:.2f}"
        lines.append([case, f"{row['counted']:.2f}", f"{cost:.2f}", f"{cost / row['counted']:.2f}", speed])
    return lines


_KINDS: dict[str, tuple[str, Callable[[list[Row]], Lines]]] = {
    "weights": ("perturb", _weights),
    "samples": ("loss", _samples),
    "steps": ("step", _steps),
    "modes": ("modes", lines_of_modes),
}
