"""The pages that show the study, and its charts, from the rows: what stands between the marks is written anew."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean

from benchmarks.paper.store import write
from benchmarks.study import chart
from benchmarks.study.modes import MODES, Mode
from benchmarks.study.plan import counts
from benchmarks.study.rows import Rows
from benchmarks.study.settings import BY_NAME, SETTINGS, Setting
from benchmarks.study.summary import Result, Summary

PAGE = Path("docs") / "study.md"
PAGES = (PAGE, Path("docs") / "which_mode.md", Path("README.md"))
# The mode that README and site name first.
RECOMMENDED = "sam-quarter"
RECOMMENDED_CODE = "SAM(..., ascent_share=0.25)"
# What README's table and chart show, and what the table calls it.
SHORT = {
    "sgd": "SGD",
    "sam": "SAM",
    "sam-quarter": "`ascent_share=0.25`",
    "momentum-warm": '`ascent="momentum"`',
    "esam": "ESAM",
    "first-order": '`ranking="first_order"`',
    "random": '`ranking="random"`',
}
FOLDER = Path("benchmarks") / "results" / "study"
CHARTS: dict[Path, list[Mode]] = {
    FOLDER / "cost_and_accuracy.png": [mode for mode in MODES if mode.name in SHORT],
    FOLDER / "all_modes.png": chart.SHOWN,
}
BLOCK = re.compile(r"(<!-- modes:(?P<what>[a-z]+) -->\n).*?(<!-- /modes -->)", re.DOTALL)


def update(rows: Rows, root: Path, check: bool = False) -> int:
    """Write the pages and the charts, or with ``check`` only compare them. 1 where they differ."""
    summary = Summary(rows)
    texts = {root / page: rendered((root / page).read_text(), summary, rows) for page in PAGES}
    if check:
        differ = [page for page, text in texts.items() if page.read_text() != text]
        for path, modes in CHARTS.items():
            if summary.settings and chart.digest(summary, modes).encode() not in (root / path).read_bytes():
                differ.append(root / path)
        for path in differ:
            print(f"{path} differs from the rows: python -m benchmarks.study report", file=sys.stderr)
        return 1 if differ else 0
    for page, text in texts.items():
        write(page, text)
    for path, modes in CHARTS.items():
        chart.draw(summary, root / path, modes)
    return 0


def rendered(text: str, summary: Summary, rows: Rows) -> str:
    """``text`` with every block made from the rows."""
    return BLOCK.sub(lambda match: f"{match[1]}{BLOCKS[match['what']](summary, rows)}\n{match[3]}", text)


def accuracies(summary: Summary, rows: Rows) -> str:
    """A table for each setting."""
    parts = [_setting_table(summary, setting) for setting in summary.settings]
    return "\n\n".join(parts) or "Nothing is measured yet."


def _setting_table(summary: Summary, setting: Setting) -> str:
    lines = [
        f"### {setting.title}",
        "",
        f"{setting.epochs} epochs, {setting.seeds} seeds.",
        "",
        "| mode | price | test accuracy, % | over SGD | over SAM | in SAM's time, % | the search chose |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    sgd, sam = summary.result(setting.name, "sgd"), summary.result(setting.name, "sam")
    assert sgd is not None
    assert sam is not None
    for mode in MODES:
        result = summary.result(setting.name, mode.name)
        if result is None:
            continue
        longer = summary.result(setting.name, mode.name, "time")
        cells = [mode.text, f"{result.cost:.2f}", _accuracy(result)]
        cells += [
            "" if mode.name == "sgd" else str(result.minus(sgd)),
            "" if mode.name == "sam" else str(result.minus(sam)),
        ]
        cells += ["" if longer is None else _accuracy(longer), result.trial]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _accuracy(result: Result) -> str:
    return f"{result.mean:.1f} ± {result.error:.1f}"


def verdicts(summary: Summary, rows: Rows) -> str:
    """For each mode its price, and the settings in which it loses."""
    lines = ["| mode | price | loses in | measured in |", "|---|---:|---|---:|"]
    for mode in MODES:
        found = [r for s in summary.settings if (r := summary.result(s.name, mode.name)) is not None]
        if not found or mode.name in ("sgd", "sam"):
            continue
        lost = "; ".join(summary.losses(mode.name)) or "none"
        lines.append(f"| {mode.text} | {_range(found)} | {lost} | {len(found)} of {len(summary.settings)} |")
    return "\n".join(lines) if len(lines) > 2 else "So far only SGD and SAM are measured."


def recommendation(summary: Summary, rows: Rows) -> str:
    """Three lines: what to take, how it stands to SAM, how it stands to SGD."""
    found = {s.title: r for s in summary.settings if (r := summary.result(s.name, RECOMMENDED)) is not None}
    if not found:
        return "Nothing is measured yet."
    lines = [
        f"- **Take `{RECOMMENDED_CODE}`**: a step costs {_range(found.values())} steps of SGD; one of SAM costs 2."
    ]
    for other, text in (("sam", "SAM"), ("sgd", "SGD")):
        differences = {
            s.title: found[s.title].minus(summary.result(s.name, other)) for s in summary.settings if s.title in found
        }
        above = sum(d.is_above for d in differences.values())
        below = [f"{title} ({d.mean:+.1f})" for title, d in differences.items() if d.is_below]
        equal = len(differences) - above - len(below)
        lines.append(
            f"- Against {text}, in {len(differences)} settings: more accurate in {above}, no clear difference in "
            f"{equal}, less accurate in {len(below)}{': ' if below else ''}{'; '.join(below)}."
        )
    return "\n".join(lines)


def short(summary: Summary, rows: Rows) -> str:
    """README's table: the test accuracy of a few modes, a line for each setting."""
    shown = [name for name in SHORT if any(summary.result(s.name, name) for s in summary.settings)]
    if not shown:
        return "Nothing is measured yet."
    lines = [f"| test accuracy, % | {' | '.join(SHORT[name] for name in shown)} |", "|---|" + "---:|" * len(shown)]
    for setting in summary.settings:
        results = [summary.result(setting.name, name) for name in shown]
        cells = ["-" if result is None else _accuracy(result) for result in results]
        lines.append(f"| {setting.title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def selections(summary: Summary, rows: Rows) -> str:
    """For each mode that chooses data: how many labels in B+ are wrong, and what that is worth."""
    lines = [
        "| setting | wrong labels | mode | wrong labels in B+ | over SGD | over SAM |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for setting in summary.settings:
        sgd, sam = summary.result(setting.name, "sgd"), summary.result(setting.name, "sam")
        for mode in MODES:
            result = summary.result(setting.name, mode.name)
            if result is None or not mode.chooses_data or setting.label_noise == 0.0:
                continue
            wrong = fmean(row["wrong_in_selection"] for row in result.rows)
            cells = [
                setting.title.rpartition(",")[0],
                f"{100 * setting.label_noise:.0f} %",
                mode.text,
                f"{wrong:.0f} %",
            ]
            lines.append(f"| {' | '.join([*cells, str(result.minus(sgd)), str(result.minus(sam))])} |")
    return "\n".join(lines) if len(lines) > 2 else "Nothing is measured yet."


def _range(results: Iterable[Result]) -> str:
    costs = sorted({f"{result.cost:.2f}" for result in results})
    return costs[0] if len(costs) == 1 else f"{costs[0]} to {costs[-1]}"


def sensitivity(summary: Summary, rows: Rows) -> str:
    """The best validation accuracy of the search at each batch size."""
    parts = []
    for setting in summary.settings:
        sizes = setting.search.batch_sizes
        header = " | ".join(f"batch {size}" for size in sizes)
        lines = [f"{setting.title}:", "", f"| mode | {header} |", "|---|" + "---:|" * len(sizes)]
        for mode in MODES:
            by_size: dict[int, dict[str, list[float]]] = {size: {} for size in sizes}
            for row in rows.of(setting.name, mode.name, "search"):
                trials = by_size[row["trial"]["batch_size"]]
                trials.setdefault(str(row["trial"]), []).append(row["validation_accuracy"])
            if summary.result(setting.name, mode.name) is None:
                continue
            best = [max((sum(v) / len(v) for v in trials.values()), default=None) for trials in by_size.values()]
            cells = ["not drawn" if value is None else f"{value:.1f}" for value in best]
            lines.append(f"| {mode.text} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or "Nothing is measured yet."


def conditions(summary: Summary, rows: Rows) -> str:
    """Where and with what the rows were measured."""
    shown = [row for row in rows if row["setting"] in BY_NAME]
    if not shown:
        return "Nothing is measured yet."

    def all_of(name: str) -> str:
        return ", ".join(dict.fromkeys(str(row[name]) for row in shown))

    where = f"{all_of('device')}; torch {all_of('torch')}; commit {all_of('commit')}; {all_of('date')}"
    done, total = counts(rows, SETTINGS, MODES)
    rest = "" if done == total else f" Of {total} trainings {done} are there: `python -m benchmarks.study` goes on."
    return f"{len(shown)} trainings; {where}.{rest}"


BLOCKS: dict[str, Callable[[Summary, Rows], str]] = {
    "recommendation": recommendation,
    "short": short,
    "selections": selections,
    "accuracies": accuracies,
    "verdicts": verdicts,
    "sensitivity": sensitivity,
    "conditions": conditions,
}
