"""Plots drawn from the rows: ``python -m benchmarks.plots`` writes PNGs beside each folder of rows."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import rows as results
from benchmarks.harness import OURS
from benchmarks.rows import Row
from benchmarks.tables import by_case, number

COLOURS = {
    OURS: "#c1440e",
    "ours, graphed": "#e8871e",
    "as released": "#4a5568",
    "as released + mask": "#9aa3b2",
    "foreach": "#6b8fb5",
    "foreach + mask": "#9fb8d1",
    "compile": "#2f6f73",
    "library": "#6b8fb5",
}
OTHER = "#b8bcc4"
BAR_INCHES = 0.22


def bars(
    rows: Sequence[Row],
    path: Path,
    title: str,
    axis: str,
    value: Callable[[Row], float | None],
    label: Callable[[float], str] = number,
    unit_line: float | None = None,
) -> None:
    """Horizontal bars: a group for each case, in it a bar for each implementation, its number behind it."""
    import matplotlib
    from matplotlib import pyplot as plt

    matplotlib.use("Agg")
    groups = [(case, found) for (_, case), found in by_case(rows).items() if any(value(row) for row in found.values())]
    if not groups:
        return
    heights, ticks, names, position = [], [], [], 0.0
    for case, found in groups:
        shown = [(name, value(row)) for name, row in found.items()]
        shown = [(name, number) for name, number in shown if number is not None]
        ticks.append(position + (len(shown) - 1) / 2)
        names.append(case)
        for name, height in shown:
            heights.append((position, name, height))
            position += 1
        position += 0.8
    figure, axes = plt.subplots(figsize=(10, 1.5 + BAR_INCHES * position), layout="constrained")
    seen: set[str] = set()
    longest = max(height for _, _, height in heights)
    for at, name, height in heights:
        axes.barh(at, height, 0.85, color=COLOURS.get(name, OTHER), label=None if name in seen else name)
        axes.text(height + longest * 0.01, at, label(height), va="center", fontsize=7)
        seen.add(name)
    if unit_line is not None:
        axes.axvline(unit_line, color="black", linewidth=0.8, linestyle="--")
    axes.set_yticks(ticks, names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlim(0, longest * 1.12)
    axes.set_xlabel(axis)
    environment = rows[0]
    where = f"{environment['device']}, {environment['threads']} threads, torch {environment['torch']}"
    figure.suptitle(title, fontsize=11)
    axes.set_title(where, fontsize=7, color="#666666")
    axes.spines[["top", "right"]].set_visible(False)
    # Below the axis: inside it would cover bars.
    figure.legend(loc="outside lower center", ncols=min(5, len(seen)), frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _median(row: Row) -> float:
    return row["p50"]


def _share(row: Row) -> float | None:
    return 100 * row["copy_share"] if "copy_share" in row else None


def _ratio(row: Row) -> float | None:
    return row.get("ratio")


def _percent(value: float) -> str:
    return f"{value:.0f} %"


def _times(value: float) -> str:
    return f"{number(value)}x"


def draw(folder: Path) -> None:
    """All plots of one folder of rows."""

    def rows(name: str) -> list[Row]:
        return results.newest(results.load(folder / f"{name}.json"))

    perturb = rows("perturb")
    whole = [row for row in perturb if "stage:" not in row["case"] and row["implementation"] != "SGD alone"]
    for dtype in ("fp32", "bf16"):
        chosen = [row for row in whole if f" {dtype} " in row["case"]]
        title = f"norm + perturb + restore + SGD, {dtype}: how much of the copy bandwidth the necessary bytes reach"
        bars(chosen, folder / f"perturb_{dtype}.png", title, "% of the copy bandwidth", _share, _percent, 100.0)
    stages = [row for row in perturb if "stage:" in row["case"]]
    title = "Stage by stage: share of the copy bandwidth"
    bars(stages, folder / "stages.png", title, "% of the copy bandwidth", _share, _percent, 100.0)
    title = "Losses, selection, gather: a peer's time over ours"
    bars(rows("loss"), folder / "loss.png", title, "time / our time", _ratio, _times, 1.0)
    title = "Optimizer step over tensors with nothing to compute: host time"
    bars(rows("overhead"), folder / "overhead.png", title, "microseconds a step", _median)
    bars(rows("step"), folder / "step.png", "Whole training steps", "milliseconds a step", _median)
    bars(by_method(rows("memory")), folder / "memory.png", "Peak memory of training", "MiB", _median)


def by_method(rows: Sequence[Row]) -> list[Row]:
    """The rows of the memory suite with the optimizer in their case: "ESAM, ours" is "ours" in the group of ESAM."""
    result = []
    for row in rows:
        method, _, who = row["implementation"].partition(", ")
        result.append(row | {"case": f"{method}: {row['case']}", "implementation": who or "SGD alone"})
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, help="folders of rows; all of them by default")
    given = parser.parse_args().folders
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: no plots are drawn (pip install matplotlib)")
        return
    folders = given or sorted(path for path in results.RESULTS.iterdir() if path.is_dir())
    for folder in folders:
        draw(folder)


if __name__ == "__main__":
    main()
