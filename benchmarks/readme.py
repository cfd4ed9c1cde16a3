"""The numbers of the README and of the site come from the rows.

``python -m benchmarks.readme`` writes the table of a suite between ``<!-- rows:cpu/perturb -->`` and ``<!-- /rows -->``
(``rows:cpu/perturb ResNet-18`` takes the cases that hold that text): the rows of one device and number of threads,
those that were measured last. A number elsewhere carries its row behind it,
``5.2<!-- row: cpu/perturb.json#ResNet-18 fp32 tensor|as released|ratio -->``, and is rewritten with as many decimals as
it has. ``<!-- study:cpu/digits_study -->`` to ``<!-- /study -->`` takes the accuracies of a training study, and
``<!-- study:cpu/ascent_study esam-previous -->`` the gains over SGD of one optimizer, radius by radius. The ``floor``
blocks are those of :mod:`benchmarks.performance`, that of docs/ranking.md is the table of :mod:`benchmarks.agreement`,
and ``<!-- counts:kernel_counts -->`` that of :mod:`benchmarks.kernel_counts`.
``--check`` changes nothing, and fails where a page differs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks import agreement, kernel_counts, performance, tables
from benchmarks import rows as results

README = results.ROOT / "README.md"
PAGES = (README, *sorted((results.ROOT / "docs").rglob("*.md")))
BLOCK = re.compile(r"(<!-- rows:(?P<source>\S+)(?: (?P<only>[^\n]+?))? -->\n)(?P<body>.*?)(<!-- /rows -->)", re.DOTALL)
MARK = re.compile(r"(?P<number>-?\d[\d,]*(?:\.\d+)?)(?P<mark><!-- row: (?P<file>\S+?\.json)#(?P<key>.+?) -->)")
STUDY = re.compile(r"(<!-- study:(?P<source>\S+)(?: (?P<only>\S+))? -->\n)(?P<body>.*?)(<!-- /study -->)", re.DOTALL)
AGREEMENT = re.compile(r"(<!-- agreement:(?P<source>\S+) -->\n).*?(<!-- /agreement -->)", re.DOTALL)
COUNTS = re.compile(r"(<!-- counts:(?P<source>\S+) -->\n).*?(<!-- /counts -->)", re.DOTALL)
ANY_BLOCK = re.compile(r"<!-- rows:")
ANY_MARK = re.compile(r"<!-- row: ")


def rendered(text: str, folder: Path = results.RESULTS) -> str:
    """``text`` with every block and every marked number taken from the rows under ``folder``.

    Raises:
        ValueError: a mark without a number, an unclosed block, or rows that are not there.
    """
    if len(BLOCK.findall(text)) != len(ANY_BLOCK.findall(text)):
        raise ValueError("a <!-- rows:... --> block is not closed by <!-- /rows -->")
    if len(MARK.findall(text)) != len(ANY_MARK.findall(text)):
        raise ValueError("a <!-- row: ... --> mark does not follow a number, or does not read file.json#key")

    def block(match: re.Match[str]) -> str:
        found = _load(folder / f"{match['source']}.json")
        found = results.newest(row for row in found if (match["only"] or "") in row["case"])
        if not found:
            raise ValueError(f"no rows for <!-- rows:{match['source']} {match['only'] or ''} -->")
        body = tables.as_markdown(tables.table(found))
        return f"{match[1]}{body}\n\n{tables.conditions(found)}.\n{match[5]}"

    def mark(match: re.Match[str]) -> str:
        value = _value(folder / match["file"], match["key"])
        decimals = len(match["number"].partition(".")[2])
        comma = "," if "," in match["number"] else ""
        return f"{value:{comma}.{decimals}f}{match['mark']}"

    def study(match: re.Match[str]) -> str:
        path = folder / (match["source"] + ".json")
        table = _radii_table(path, match["only"]) if match["only"] else _study_table(path)
        return f"{match[1]}{table}\n{match[5]}"

    def agreed(match: re.Match[str]) -> str:
        return f"{match[1]}{agreement.table(folder / (match['source'] + '.json'))}\n{match[3]}"

    def counted(match: re.Match[str]) -> str:
        counts = json.loads((folder / (match["source"] + ".json")).read_text())
        return f"{match[1]}{kernel_counts.table(counts)}\n{match[3]}"

    text = COUNTS.sub(counted, AGREEMENT.sub(agreed, BLOCK.sub(block, text)))
    return performance.rendered(MARK.sub(mark, STUDY.sub(study, text)), folder)


def _study_table(path: Path) -> str:
    """Test accuracies by optimizer and label noise: mean and standard deviation over the seeds."""
    study = _load_study(path)
    cells = {(row["optimizer"], row["label_noise"]): row["test_accuracy"] for row in study["rows"]}
    noises = sorted({noise for _, noise in cells}, reverse=True)
    optimizers = dict.fromkeys(optimizer for optimizer, _ in cells)
    lines = [
        "| test accuracy, % | " + " | ".join(_wrong_labels(noise) for noise in noises) + " |",
        "|---" * (1 + len(noises)) + "|",
    ]
    for optimizer in optimizers:
        found = [cells.get((optimizer, noise)) for noise in noises]
        texts = ["" if cell is None else f"{cell['mean']:.1f} ± {cell['std']:.1f}" for cell in found]
        lines.append(f"| {_shown(optimizer)} | " + " | ".join(texts) + " |")
    environment, seeds = study["environment"], study["rows"][0]["seeds"]
    conditions = f"torch {environment['torch']}, commit {environment['commit'][:10]}"
    lines.append(f"\n{seeds} seeds, ± their standard deviation; {conditions}.")
    return "\n".join(lines)


def _wrong_labels(share: float) -> str:
    return f"{share:.0%} wrong labels".replace("%", " %") if share else "no wrong labels"


def _shown(optimizer: str) -> str:
    """The rows say "esam, momentum" for ``ESAM(..., ascent="momentum")``."""
    name, _, kind = optimizer.partition(", ")
    ascent = f'ascent="{kind}"' if kind in ("previous", "momentum") else kind
    return ", ".join(filter(None, (name.upper(), ascent)))


def _radii_table(path: Path, optimizer: str) -> str:
    """Points of test accuracy over SGD of the same seeds, by task and radius, on the tuning seeds, beside SAM's."""
    study = _load_study(path)
    rows = [row for row in study["rows"] if row["stage"] == "tune"]
    own = [row for row in rows if row["optimizer"] == optimizer]
    if not own:
        raise ValueError(f"{path} has no rows of {optimizer!r}")
    radii = sorted({row["rho"] for row in own})
    cells = {(row["task"], row["rho_warmup"], row["rho"]): row for row in own}
    sam = {row["task"]: row for row in rows if row["optimizer"] == "sam"}
    lines = ["| points over SGD | " + " | ".join(f"{rho:g}" for rho in radii) + " | SAM |"]
    lines.append("|---" + "|---:" * (len(radii) + 1) + "|")
    for task, warmup in dict.fromkeys((task, warmup) for task, warmup, _ in cells):
        found = [cells.get((task, warmup, rho)) for rho in radii] + [None if warmup else sam.get(task)]
        texts = ["" if cell is None else f"{cell['over_sgd']:+.1f} ({cell['seeds']})" for cell in found]
        name = task.replace("flipped", "wrong labels") + (", warm-up of rho" if warmup else "")
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    commits = ", ".join(commit[:10] for commit in study["environment"]["commit"])
    torch = ", ".join(study["environment"]["torch"])
    lines.append(f"\nIn brackets the number of seeds. torch {torch}, commit {commits}.")
    return "\n".join(lines)


def _load_study(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    study: dict[str, Any] = json.loads(path.read_text())
    return study


def _load(path: Path) -> list[results.Row]:
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    return results.load(path)


def _value(path: Path, key: str) -> float:
    case, _, rest = key.partition("|")
    implementation, _, field = rest.partition("|")
    for row in results.newest(row for row in _load(path) if row["case"] == case):
        if row["implementation"] == implementation:
            value = row.get(field)
            if isinstance(value, (int, float)):
                return value
    raise ValueError(f"{path.name} has no number {field!r} for case {case!r}, implementation {implementation!r}")


def differences(old: str, new: str) -> list[str]:
    return [f"- {a}\n+ {b}" for a, b in zip(old.splitlines(), new.splitlines()) if a != b] or (
        [] if old == new else ["the number of lines differs"]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--readme", type=Path, help="one page, in place of all")
    parser.add_argument("--results", type=Path, default=results.RESULTS)
    arguments = parser.parse_args()
    pages = PAGES if arguments.readme is None else (arguments.readme,)
    return max(_page(page, arguments.results, arguments.check) for page in pages)


def _page(page: Path, folder: Path, check: bool) -> int:
    """Write one page anew, or only compare it. Returns 1 if it differs, or cannot be made."""
    old = page.read_text()
    try:
        new = rendered(old, folder)
    except ValueError as error:
        print(f"{page}: {error}", file=sys.stderr)
        return 1
    if not check:
        page.write_text(new)
        return 0
    for difference in differences(old, new):
        print(difference, file=sys.stderr)
    if old != new:
        print(f"{page} differs from the rows: python -m benchmarks.readme", file=sys.stderr)
    return 0 if old == new else 1


if __name__ == "__main__":
    sys.exit(main())
