"""The stages of ``make gpu``, in order, each with its share of the time and the commands that it runs."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.session import Job
from benchmarks.rows import ROOT

TESTS = ROOT / "python_tests" / "gpu"
# A command that stops by itself needs some seconds to write down what it has.
ENDING_SECONDS = 10.0
# A context of CUDA takes some 500 MB of the device's memory, and as much of the host's.
MOST_WORKERS = 8


# The backend in the name of a test, behind the other parameters or before them.
BACKEND = re.compile(r"[\[-](triton|cuda)\b")


@dataclass(frozen=True)
class Stage:
    """``jobs(folder, seconds)`` are the commands, which run one after the other in ``seconds`` altogether."""

    name: str
    seconds: float  # its share of the time; what it leaves over, the next may use
    jobs: Callable[[Path, float], list[Job]]


def _build(folder: Path, seconds: float) -> list[Job]:
    return [Job("build", [sys.executable, "setup.py", "build_ext", "--inplace"], {"ESAM_KERNELS_CUDA": "1"})]


def test_files(stage: str) -> list[Path]:
    """Those of the stages with one file each; all others are the kernels'."""
    alone = {"steps": TESTS / "test_step.py", "graphs": TESTS / "test_graphs.py", "large": TESTS / "test_large.py"}
    if stage in alone:
        return [alone[stage]]
    return sorted(set(TESTS.glob("test_*.py")) - set(alone.values()))


def _tests(stage: str, workers: int = MOST_WORKERS) -> Callable[[Path, float], list[Job]]:
    def jobs(folder: Path, seconds: float) -> list[Job]:
        command = [sys.executable, "-m", "benchmarks.gpu.pool", *map(str, test_files(stage))]
        command += ["--journal", str(folder / f"{stage}.jsonl"), "--xml", str(folder / f"{stage}.xml")]
        command += ["--workers", str(min(workers, os.cpu_count() or 1)), "--seconds", str(seconds - ENDING_SECONDS)]
        return [Job(stage, command)]

    return jobs


def _sanitizer(folder: Path, seconds: float) -> list[Job]:
    return [Job("sanitizer", [sys.executable, str(TESTS / "sanitize.py"), "--seconds", str(seconds - ENDING_SECONDS)])]


def _bench(*suites: str, compiled: bool = False, pages: bool = False) -> Callable[[Path, float], list[Job]]:
    """The suites, then once more with Inductor's contenders alone: they take long to compile, or for ever."""

    def jobs(folder: Path, seconds: float) -> list[Job]:
        each = (seconds - ENDING_SECONDS) / (len(suites) + compiled)
        runs = [(suite, "without") for suite in suites] + [(suite, "only") for suite in suites[:1] if compiled]
        found = []
        for suite, which in runs:
            name = suite if which == "without" else f"{suite}, compiled"
            journal = folder / f"{name.replace(', ', '-')}.jsonl"
            command = [sys.executable, "-m", "benchmarks.run", "--suite", suite, "--device", "cuda"]
            command += ["--minutes", f"{each / 60:.3f}", "--inductor", which, "--journal", str(journal)]
            found.append(Job(name, command))
        if pages:
            found += [Job(page, [sys.executable, "-m", f"benchmarks.{page}"]) for page in ("plots", "readme")]
        return found

    return jobs


STAGES = [
    Stage("build", 150.0, _build),
    Stage("kernels", 240.0, _tests("kernels")),
    Stage("steps", 90.0, _tests("steps")),
    Stage("graphs", 90.0, _tests("graphs", workers=4)),
    Stage("large", 60.0, _tests("large", workers=1)),
    Stage("sanitizer", 180.0, _sanitizer),
    Stage("perturb", 300.0, _bench("perturb", "overhead", compiled=True)),
    Stage("steps-bench", 240.0, _bench("step", "modes")),
    Stage("loss", 180.0, _bench("loss", compiled=True)),
    Stage("memory", 180.0, _bench("memory", pages=True)),
]


def journals(folder: Path, stage: Stage) -> list[Path]:
    """What the jobs of ``stage`` note what they have done in."""
    commands = [job.command for job in stage.jobs(folder, stage.seconds)]
    return [Path(command[command.index("--journal") + 1]) for command in commands if "--journal" in command]
