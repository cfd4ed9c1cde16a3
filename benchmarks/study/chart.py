"""The charts of the study: test accuracy against the counted cost of a step, a panel for each setting.

They show modes that the package has: one chart all of them, the other a few.
"""

from __future__ import annotations

import hashlib
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper import ROOT  # noqa: F401  (puts examples/ on the path)
from benchmarks.study.modes import MODES, Mode
from benchmarks.study.settings import Setting
from benchmarks.study.summary import Summary

# isort: split
from data import UserError

COLUMNS = 3
# In points of accuracy: smaller differences than this do not fill a panel.
LEAST_HEIGHT = 2.0
# By what is perturbed.
MARKERS = {"sgd": "*", "whole": "o", "drawn": "D", "normalization": "s", "momentum": "^"}
# The modes that the eye should find first: to compare with, what README names first, the paper's, the cheapest.
STRONG = {
    "sgd": "black",
    "sam": "black",
    "sam-quarter": "crimson",
    "esam": "royalblue",
    "momentum-warm": "darkorange",
}
SHOWN = [mode for mode in MODES if mode.is_in_package]


def kind(mode: Mode) -> str:
    """What the mode perturbs."""
    if not mode.radii:
        return "sgd"
    if mode.settings.get("ascent") == "momentum":
        return "momentum"
    if mode.only_normalization:
        return "normalization"
    return "drawn" if mode.settings.get("beta", 1.0) < 1.0 else "whole"


def digest(summary: Summary, modes: Sequence[Mode]) -> str:
    """What tells the charts of different rows apart; the chart carries it."""
    points = [
        (setting.title, mode.text, f"{result.cost:.3f} {result.mean:.3f} {result.error:.3f}")
        for setting in summary.settings
        for mode in modes
        if (result := summary.result(setting.name, mode.name)) is not None
    ]
    return hashlib.sha256(repr(points).encode()).hexdigest()[:16]


def draw(summary: Summary, path: Path, modes: Sequence[Mode] = SHOWN) -> None:
    """Write the chart of these modes; nothing where no setting is complete.

    Raises:
        UserError: matplotlib is not installed.
    """
    settings = summary.settings
    if not settings:
        return
    try:
        import matplotlib
    except ImportError:
        raise UserError("the chart needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(COLUMNS, len(settings))
    lines = math.ceil(len(settings) / columns)
    figure, axes = pyplot.subplots(
        lines, columns, squeeze=False, figsize=(3.3 * columns, 2.4 * lines), layout="constrained"
    )
    try:
        colors = pyplot.get_cmap("tab20").colors
        handles: dict[str, Any] = {}
        for setting, axis in zip(settings, axes.flat):
            _panel(summary, setting, modes, axis, colors, handles)
        for axis in axes.flat[len(settings) :]:
            axis.set_axis_off()
        figure.supxlabel("price of a step, in steps of SGD")
        figure.supylabel("test accuracy, %")
        names = sorted(handles, key=[mode.text for mode in SHOWN].index)
        figure.legend(
            [handles[name] for name in names], names, loc="outside upper center", ncols=columns, frameon=False
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}")
        figure.savefig(temporary, dpi=150, format="png", metadata={"Description": digest(summary, modes)})
        temporary.replace(path)
    finally:
        pyplot.close(figure)


def _panel(
    summary: Summary, setting: Setting, modes: Sequence[Mode], axis: Any, colors: Any, handles: dict[str, Any]
) -> None:
    for mode in modes:
        result = summary.result(setting.name, mode.name)
        if result is None:
            continue
        drawn = axis.errorbar(
            result.cost,
            result.mean,
            yerr=result.error,
            fmt=MARKERS[kind(mode)],
            color=STRONG.get(mode.name, colors[SHOWN.index(mode) % len(colors)]),
            markersize=9 if mode.name in STRONG else 6,
            capsize=2,
        )
        handles.setdefault(mode.text, drawn)
    sgd = summary.result(setting.name, "sgd")
    if sgd is not None:
        axis.axhline(sgd.mean, color="#999999", linewidth=0.8, linestyle="--")
    axis.set_title(textwrap.fill(setting.title, 34), fontsize=10.5)
    axis.set_xlim(0.9, 2.1)
    low, high = axis.get_ylim()
    margin = max(0.0, LEAST_HEIGHT - (high - low)) / 2.0
    axis.set_ylim(low - margin, high + margin)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
