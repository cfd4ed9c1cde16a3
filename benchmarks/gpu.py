"""What ``make gpu`` runs on a machine with a CUDA device: build, tests, compute-sanitizer, benchmarks, plots.

``python -m benchmarks.gpu [tests] [bench]``. Everything that is printed also goes into a log beside the rows, under
benchmarks/results/<device>/. The parts share eight and a half minutes; one that takes longer is stopped and counts as
failed. Ends with 0 if all is well, 1 if something failed, 2 without a CUDA device.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import torch

from benchmarks import rows

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "python_tests" / "gpu"
PARTS = ("tests", "bench")
TOTAL_SECONDS = 510.0
BENCH_MINUTES = 2.5
# The rest of the time that a part may take at most.
BUILD_SECONDS, SANITIZER_SECONDS, PLOT_SECONDS = 150.0, 90.0, 30.0


@dataclass
class Job:
    """A command, and how it ended."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    code: int | None = None  # None: stopped at its limit


class Session:
    """Runs jobs against one clock, and writes down what they print."""

    def __init__(self, log: TextIO) -> None:
        self._start = time.monotonic()
        self._log = log
        self._lock = threading.Lock()
        self.jobs: list[Job] = []

    def say(self, line: str) -> None:
        with self._lock:
            print(line, flush=True)
            self._log.write(line + "\n")
            self._log.flush()

    def left(self) -> float:
        return TOTAL_SECONDS - (time.monotonic() - self._start)

    def together(self, jobs: list[Job], limit: float) -> None:
        """Run ``jobs`` at the same time, for at most ``limit`` seconds."""
        limit = max(1.0, min(limit, self.left()))
        threads = [threading.Thread(target=self._run, args=(job, limit)) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.jobs += jobs

    def _run(self, job: Job, limit: float) -> None:
        start = time.monotonic()
        process = subprocess.Popen(
            job.command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **job.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        # With what it has started itself: compute-sanitizer would otherwise go on, and keep the pipe open.
        timer = threading.Timer(limit, lambda: os.killpg(process.pid, signal.SIGKILL))
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            self.say(f"[{job.name}] {line.rstrip()}")
        code = process.wait()
        stopped = not timer.is_alive()
        timer.cancel()
        job.code = None if stopped else code
        job.seconds = time.monotonic() - start

    def summary(self) -> bool:
        """Print how each job ended. Returns whether all did well."""
        for job in self.jobs:
            ended = "ok" if job.code == 0 else "FAILED: stopped at its limit" if job.code is None else "FAILED"
            self.say(f"  {job.name:<20}{ended} ({job.seconds:.0f} s)")
        return all(job.code == 0 for job in self.jobs)


def build() -> Job:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return Job("build", command, {"ESAM_KERNELS_CUDA": "1"})


def tests() -> list[Job]:
    """Side by side: Triton's kernels take their time to compile, on the processor."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    kernels = str(TESTS / "test_kernels.py")
    return [
        Job("kernels, triton", [*pytest, kernels, "-k", "triton"]),
        Job("kernels, cuda", [*pytest, kernels, "-k", "cuda"]),
        Job("steps", [*pytest, str(TESTS / "test_step.py")]),
        Job("graphs", [*pytest, str(TESTS / "test_graphs.py")]),
    ]


def main() -> int:
    parts = sys.argv[1:] or list(PARTS)
    unknown = set(parts) - set(PARTS)
    if unknown:
        print(f"unknown parts: {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("no CUDA device: the GPU tests and benchmarks were not run", file=sys.stderr)
        return 2
    device = torch.device("cuda", 0)
    folder = rows.folder(device)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{'-'.join(parts)}.log").open("w") as log:
        session = Session(log)
        session.say(", ".join(f"{name} {value}" for name, value in rows.environment(device).items()))
        session.together([build()], BUILD_SECONDS)
        if "tests" in parts:
            for_bench = 60 * BENCH_MINUTES + PLOT_SECONDS if "bench" in parts else 0.0
            session.together(tests(), session.left() - for_bench - SANITIZER_SECONDS)
            alone = [
                Job("large", [sys.executable, "-m", "pytest", "-q", str(TESTS / "test_large.py")]),
                Job("sanitizer", [sys.executable, str(TESTS / "sanitize.py")]),
            ]
            for job in alone:
                session.together([job], session.left() - for_bench)
        if "bench" in parts:
            measure = ["--suite", "all", "--device", "cuda", "--minutes", str(BENCH_MINUTES)]
            bench = Job("bench", [sys.executable, "-m", "benchmarks.run", *measure])
            session.together([bench], session.left() - PLOT_SECONDS)
            after = [Job(name, [sys.executable, "-m", f"benchmarks.{name}"]) for name in ("plots", "readme")]
            session.together(after, session.left())
        session.say("\n== make gpu ==")
        return 0 if session.summary() else 1


if __name__ == "__main__":
    sys.exit(main())
