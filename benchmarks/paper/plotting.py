"""Figures in one style: open one, draw, and it is saved with the conditions below the title."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data import UserError
from report import COLORS, digest

from benchmarks.rows import Row

__all__ = ["COLORS", "band", "conditions", "digest", "figure"]


@contextmanager
def figure(path: Path, title: str, rows: Sequence[Row], panels: int = 1, **subplots: Any) -> Iterator[Any]:
    """``panels`` axes beside each other, a list; saved at the end, whole or not at all, with the digest of ``rows``."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("figures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (1.0 + 4.6 * panels, 4.2)
    drawn, axes = pyplot.subplots(1, panels, squeeze=False, figsize=size, layout="constrained", **subplots)
    try:
        yield list(axes[0])
        for axis in axes[0]:
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        drawn.suptitle(f"{title}\n", fontsize=11)
        drawn.text(0.5, 0.94, conditions(rows), ha="center", va="top", fontsize=7, color="#666666")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}")
        drawn.savefig(temporary, dpi=120, format="png", metadata={"Description": digest(list(rows))})
        temporary.replace(path)
    finally:
        pyplot.close(drawn)


def band(axis: Any, position: Sequence[float], values: Sequence[Sequence[float]], **line: Any) -> None:
    """A line through the means of ``values[i]`` at ``position[i]``, and a band from lowest to highest."""
    means = [sum(v) / len(v) for v in values]
    drawn = axis.plot(position, means, **line)[0]
    axis.fill_between(position, list(map(min, values)), list(map(max, values)), color=drawn.get_color(), alpha=0.15)


def conditions(rows: Sequence[Row]) -> str:
    """Data, seeds, device, versions and commits of the rows, in one line."""

    def all_of(name: str) -> str:
        return ", ".join(str(value) for value in dict.fromkeys(row[name] for row in rows))

    seeds = len({row["seed"] for row in rows})
    parts = [f"scale {all_of('scale')}", f"data: {all_of('data')}", f"{seeds} seed{'s' if seeds > 1 else ''}"]
    return "; ".join([*parts, all_of("device"), f"torch {all_of('torch')}", f"commit {all_of('commit')}"])
