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


def _bench(compiled: float = 0.0, pages: bool = False, **suites: float) -> Callable[[Path, float], list[Job]]:
    """The suites, each with its share of the time, then the first once more with Inductor's contenders alone.

    These take long to compile, or for ever: ``compiled`` is their share, 0 if there are none.
    """

    def jobs(folder: Path, seconds: float) -> list[Job]:
        runs = [(suite, "without", share) for suite, share in suites.items()]
        runs += [(next(iter(suites)), "only", compiled)] if compiled else []
        found = []
        for suite, which, share in runs:
            name = suite if which == "without" else f"{suite}, compiled"
            journal = folder / f"{name.replace(', ', '-')}.jsonl"
            command = [sys.executable, "-m", "benchmarks.run", "--suite", suite, "--device", "cuda"]
            minutes = (seconds - ENDING_SECONDS) * share / 60
            command += ["--minutes", f"{minutes:.3f}", "--inductor", which, "--journal", str(journal)]
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
    Stage("perturb", 300.0, _bench(perturb=0.6, overhead=0.1, compiled=0.3)),
    Stage("steps-bench", 240.0, _bench(step=0.35, modes=0.65)),
    Stage("loss", 180.0, _bench(loss=0.7, compiled=0.3)),
    Stage("memory", 180.0, _bench(memory=1.0, pages=True)),
]


def journals(folder: Path, stage: Stage) -> list[Path]:
    """What the jobs of ``stage`` note what they have done in."""
    commands = [job.command for job in stage.jobs(folder, stage.seconds)]
    return [Path(command[command.index("--journal") + 1]) for command in commands if "--journal" in command]
