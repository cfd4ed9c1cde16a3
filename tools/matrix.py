"""Runs test tiers on a pair of Python and torch in a fresh environment: ``make matrix PYTHON=python3.12 TORCH=2.13.0``.

The result is a row of benchmarks/results/versions.json, with commit and date, and docs/versions.md shows the rows.
``--page`` writes the page alone, ``--check`` compares it.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from fresh import ROOT, environment, run

ROWS = ROOT / "benchmarks" / "results" / "versions.json"
PAGE = ROOT / "docs" / "versions.md"
TIERS = ("reference", "native", "interpret", "packaging")
# What these tiers import beside torch.
PACKAGES = ("numpy", "pytest", "pytest-timeout", "hypothesis", "safetensors", "setuptools", "wheel", "ninja")
BLOCK = re.compile(r"(<!-- versions -->\n).*?(<!-- /versions -->)", re.DOTALL)


def main() -> int:
    """Run the tiers and write the row, or only the page. Returns 0 if every tier passed, or the page is right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=sys.executable, help="the Python to try")
    parser.add_argument("--torch", help="the version of torch to try")
    parser.add_argument("--environment", help="the Python of an environment that has torch and the tests' packages")
    parser.add_argument("--tiers", nargs="*", default=TIERS)
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    page = PAGE.read_text()
    if arguments.check:
        return 0 if page == with_rows(page, rows()) else 1
    passed = True
    if not arguments.page:
        if not arguments.torch and not arguments.environment:
            parser.error("which torch? make matrix PYTHON=python3.12 TORCH=2.13.0")
        row = tried(arguments.python, arguments.torch, arguments.environment, arguments.tiers)
        passed = all(result.startswith("ok") for result in row["tiers"].values())
        kept = [other for other in rows() if (other["python"], other["torch"]) != (row["python"], row["torch"])]
        ROWS.write_text(json.dumps(sorted([*kept, row], key=order), indent=1) + "\n")
    PAGE.write_text(with_rows(page, rows()))
    return 0 if passed else 1


def rows() -> list[dict[str, Any]]:
    """The rows that are there."""
    found: list[dict[str, Any]] = json.loads(ROWS.read_text()) if ROWS.exists() else []
    return found


def order(row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Older versions first."""
    return [list(map(int, re.findall(r"\d+", row[name])))[:3] for name in ("python", "torch")]  # type: ignore[return-value]


def tried(python: str, torch: str | None, ready: str | None, tiers: list[str]) -> dict[str, Any]:
    """The row of one pair: its tiers run on a copy of the sources, with an extension that is built for it."""
    folder = ROOT / "build" / "matrix"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if ready:
        found = Path(ready)
    else:
        found = environment(folder / "environment", python)
        print(f"installing torch {torch}", flush=True)
        run(found, "-m", "pip", "install", "-q", f"torch=={torch}", *PACKAGES)
    source = folder / "source"
    commit = run("git", "rev-parse", "--short=10", "HEAD").strip()  # of what is copied: the branch may move meanwhile
    for name in run("git", "ls-files").splitlines():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    run(found, "setup.py", "-q", "build_ext", "--inplace", cwd=source)
    said = run(found, "python_tests/run_tiers.py", *tiers, cwd=source, check=False)
    print(said)
    about = "import platform, torch; print(platform.python_version(), torch.__version__)"
    versions = run(found, "-c", about, cwd=source).split()
    return {
        "python": versions[0],
        "torch": versions[1],
        "tiers": results(said, tiers),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


def results(said: str, tiers: list[str]) -> dict[str, str]:
    """What the runner of the tiers has said of each: "ok: 12 passed", "FAILED: ...", or why it did not run."""
    summary = said.partition("== tiers ==")[2]
    found = {}
    for tier in tiers:
        line = re.search(rf"^  {tier} +(.*?)(?: \(\d+ s\))?$", summary, re.MULTILINE)
        found[tier] = line[1] if line else "not run"
    return found


def with_rows(page: str, rows: list[dict[str, Any]]) -> str:
    """``page`` with its table made of the rows."""
    tiers = sorted({tier for row in rows for tier in row["tiers"]}, key=lambda tier: TIERS.index(tier))
    lines = ["| Python | torch | " + " | ".join(tiers) + " | commit | date |", "|---" * (4 + len(tiers)) + "|"]
    for row in rows:
        cells = [row["tiers"].get(tier, "") for tier in tiers]
        lines.append("| " + " | ".join([row["python"], row["torch"], *cells, row["commit"], row["date"]]) + " |")
    table = "\n".join(lines) if rows else "Nothing was tried yet."
    return BLOCK.sub(lambda match: f"{match[1]}{table}\n{match[2]}", page)


if __name__ == "__main__":
    sys.exit(main())
