"""Rows as tables: for the terminal and for the README."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.harness import OURS
from benchmarks.rows import Row


def by_case(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """The rows of each (device, case), by implementation."""
    result: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        result.setdefault((row["device"], row["case"]), {})[row["implementation"]] = row
    return result


def number(value: float) -> str:
    """Three significant digits, never an exponent."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}"


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Header and lines. Ours first; each peer's time with how many times ours that is; our share of the copy bandwidth.

    Of rows that are not compared with ours (memory) one column an implementation.
    """
    cases = by_case(rows)
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    units = {row["unit"] for row in rows}
    has_share = any("copy_share" in row for row in rows)
    unit = f" ({units.pop()})" if len(units) == 1 else ""
    header = [f"case{unit}", *names] + (["of the copy bandwidth"] if has_share else [])
    lines = []
    for (_, case), found in cases.items():
        line = [case, *(_cell(found.get(name)) for name in names)]
        if has_share:
            ours = found.get(OURS, {})
            line.append(f"{100 * ours['copy_share']:.0f} %" if "copy_share" in ours else "")
        lines.append(line)
    return [header, *lines]


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    ratio = f" ({number(row['ratio'])}x)" if "ratio" in row else ""
    return number(row["p50"]) + ratio


def conditions(rows: Iterable[Row]) -> str:
    """Where and with what the rows were measured, in a line."""

    def values(name: str) -> str:
        return ", ".join(dict.fromkeys(str(row[name]) for row in rows if row.get(name) is not None))

    rows = list(rows)
    threads = values("threads")
    threads += " thread" if threads == "1" else " threads"
    return (
        f"{values('device')}; {threads}; torch {values('torch')}; backend {values('backend')}; "
        f"commit {values('commit')}; {values('date')}; load before {values('load')}"
    )


def as_text(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))
        )
        for line in lines
    )


def as_markdown(lines: Sequence[Sequence[str]]) -> str:
    header, *body = lines
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *body))
