"""docs/gpu.md: what was executed on a card, and what only without one. ``python -m benchmarks.gpu.page [--check]``.

Outcomes, commits and counts come from the stages' journals, the rows and the compilers' records. ``make gpu`` writes
the page when it ends.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

from benchmarks import tables
from benchmarks.gpu.journal import Entry, read
from benchmarks.gpu.stages import BACKEND, STAGES, journals
from benchmarks.rows import RESULTS, ROOT

PAGE = ROOT / "docs" / "gpu.md"
NOTHING = "Nothing: no stage of `make gpu` has been executed on a card, and no row was measured on one."
NOT_RUN = "compiled, not run"
OUTCOMES = ("passed", "failed", "skipped")
SHOWN_FAILURES = 20

HEAD = """# On a GPU

<!-- Written by `python -m benchmarks.gpu.page` from the results of `make gpu`. -->

What of this package has run on a GPU? This page answers part by part, from the results. To run everything on a machine
with a CUDA device:

    make gpu

"Compiled, not run" means: the compiler has made machine code of it, tests without a GPU have passed, but no GPU has
executed it.

"""
WITHOUT_A_CARD = """
These groups of tests (tiers) need no card. Each of them leaves something open:

| tier | what it runs | what it cannot show |
| --- | --- | --- |
| `dry` | the host code of the Triton backend and of `make_graphed_step`: arguments are specialised and \
kernels compiled for sm_90 by Triton itself, launches are written down \
| what a kernel computes, how long anything takes, and what memory CUDA's libraries (cuBLAS, cuDNN) allocate for \
themselves while a graph is recorded |
| `interpret` | the Triton kernels under Triton's interpreter, against the reference | what the compiler makes of them |
| `codegen` | the compiled Triton kernels: registers, spills and instructions from the disassembly | that they run |
| `cuda_host` | the CUDA kernels, compiled by the host's compiler: an emulator runs each thread of each block on the \
CPU; whole steps of every plan on them, with their launches and addresses written down \
| races between two threads at the very same time, memory ordering, speed |
"""
HOW = """
## How to run it

    make gpu                                    # all stages, going on where an earlier call stopped
    make gpu STAGE=kernels                      # one stage
    make gpu VENV=none PYTHON=python3           # in an environment that has torch and pytest: installs nothing

| stage | seconds | what it runs |
| --- | ---: | --- |
{stages}

- **Time.** A stage may take its seconds and those that earlier stages have left over; one that was named alone, eight
  minutes. A call without a name ends within nine minutes, and the next call goes on. The time in which `make` builds
  the extensions, at its first call, counts. Nothing needs the network.
- **Results** are written as they come, to `benchmarks/results/<device>/`: `stages.jsonl` (how each stage ended), one
  `.log` for each stage, `.jsonl` and JUnit `.xml` of its tests, `.jsonl` of the cases that are measured, and the rows.
  If the variable `OUT` is set, that folder also gets them as one archive, `<device>.tar.gz`. To go on with them on
  another machine, unpack it there first: `tar -xzf <device>.tar.gz -C benchmarks/results`.
- **If something breaks.** A stage that is stopped loses the test or the case that it was at. Tests run in several
  processes: one that dies, hangs or meets an error of CUDA after which nothing works is replaced, and costs one test.
- **Commits.** Where there is no `.git`, set `ESAM_COMMIT` to the commit. A later commit starts again from the first
  stage.
"""
STAGE_TEXT = {
    "build": "the CUDA extension is compiled",
    "kernels": "each kernel of both backends against float64 or the reference",
    "steps": "whole steps against the reference",
    "graphs": "steps as CUDA graphs against eager steps",
    "large": "more than 2^31 elements",
    "sanitizer": "compute-sanitizer: memcheck and racecheck",
    "perturb": "rows: norm, perturb, restore, update; the host's share",
    "steps-bench": "rows: whole steps, and the price of each mode",
    "loss": "rows: losses, selection, gathering",
    "memory": "rows: peak memory, one process for each optimizer; then plots and pages",
}


def rendered(results: Path = RESULTS, benchmarks: Path = ROOT / "benchmarks") -> str:
    """The page, from the folders of devices under ``results`` and the records of compilers in ``benchmarks``."""
    devices = sorted(path.parent for path in results.glob("*/stages.jsonl"))
    text = HEAD + "## Executed on a card\n\n"
    text += "\n".join(_device(folder) for folder in devices) if devices else NOTHING + "\n"
    text += "\n## Without a card\n\n" + _parts(devices, benchmarks) + WITHOUT_A_CARD + _compilations(results)
    lines = [f"| `{stage.name}` | {stage.seconds:.0f} | {STAGE_TEXT[stage.name]} |" for stage in STAGES]
    return text + HOW.format(stages="\n".join(lines))


def newest(path: Path) -> dict[str, Entry]:
    """The last entry of each name, of the commit that the file ends with."""
    entries = list(read(path))
    return {entry["name"]: entry for entry in entries if entry["commit"] == entries[-1]["commit"]}


def _device(folder: Path) -> str:
    """How each stage ended on one device, and which tests failed."""
    lines = [["stage", "ended", *OUTCOMES, "commit", "date"]]
    failures: list[str] = []
    known = {stage.name: stage for stage in STAGES}
    for name, stage in newest(folder / "stages.jsonl").items():
        found = [entry for path in journals(folder, known[name]) for entry in newest(path).values()]
        entries = [entry for entry in found if entry["commit"] == stage["commit"]]
        counts = Counter(entry["outcome"] for entry in entries)
        numbers = [str(counts[outcome]) if entries else "" for outcome in OUTCOMES]
        lines.append([f"`{name}`", stage["outcome"], *numbers, stage["commit"], stage["date"]])
        failures += [entry["name"] for entry in entries if entry["outcome"] == "failed"]
    text = f"### {folder.name}\n\n{tables.as_markdown(lines)}\n"
    if failures:
        shown = "".join(f"- `{name}`\n" for name in failures[:SHOWN_FAILURES])
        more = f"- and {len(failures) - SHOWN_FAILURES} more\n" if len(failures) > SHOWN_FAILURES else ""
        text += f"\nFailed:\n\n{shown}{more}"
    return text


def _parts(devices: list[Path], benchmarks: Path) -> str:
    """What of the GPU's code has passed a test on a card, and what compiled it."""
    passed: Counter[str] = Counter()
    for folder in devices:
        for name in ("kernels", "steps", "graphs", "large"):
            for entry in newest(folder / f"{name}.jsonl").values():
                found = BACKEND.search(entry["name"])
                if entry["outcome"] == "passed" and found:
                    passed[found[1]] += 1
                    passed["graphs"] += name == "graphs"
    triton = json.loads((benchmarks / "codegen_summary.json").read_text())
    cuda = json.loads((benchmarks / "cuda_registers.json").read_text())
    release = re.search(r"release ([\d.]+)", cuda["nvcc"])

    def state(part: str) -> str:
        return f"{passed[part]} tests passed" if passed[part] else NOT_RUN

    def architectures(kernels: dict[str, dict[str, object]]) -> str:
        return ", ".join(dict.fromkeys(name for kernel in kernels.values() for name in kernel))

    lines = [
        ["part", "on a card", "compiled"],
        [
            "Triton kernels",
            state("triton"),
            f"{len(triton['kernels'])} variants for {architectures(triton['kernels'])}, Triton {triton['triton']}",
        ],
        [
            "CUDA kernels",
            state("cuda"),
            f"{len(cuda['registers'])} variants for {architectures(cuda['registers'])}, nvcc {release and release[1]}",
        ],
        ["`make_graphed_step`", state("graphs") if passed["graphs"] else "not run", ""],
    ]
    return tables.as_markdown(lines) + "\n"


def _compilations(results: Path) -> str:
    rows = json.loads((results / "compilations.json").read_text())
    lines = [["kernel", *(f"`{row['stage']}`" for row in rows)]]
    kernels = sorted(set().union(*(row["kernels"] for row in rows)))
    lines += [[f"`{name}`", *(str(row["kernels"].get(name, 0)) for row in rows)] for name in kernels]
    lines.append(["all", *(str(row["compilations"]) for row in rows)])
    counted = "; ".join(dict.fromkeys(f"Triton {row['triton']}, commit {row['commit']}, {row['date']}" for row in rows))
    return f"""
## What the stages compile

Triton compiles a kernel once for each combination of dtypes, constants and alignments. The table counts the
compilations that the tests of each stage ask for, by `python python_tests/dry/compilations.py` in the dry tier
({counted}). They are spread over the processes that run the tests. Tests
that cannot run without a card are not counted.

{tables.as_markdown(lines)}
"""


def main() -> int:
    text = rendered()
    if "--check" in sys.argv[1:]:
        if PAGE.read_text() != text:
            print("docs/gpu.md differs from the results: run python -m benchmarks.gpu.page", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
