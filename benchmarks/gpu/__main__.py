"""``python -m benchmarks.gpu [STAGE ...]``: all stages, going on where an earlier call stopped, or those named.

A stage that was stopped goes on, one that was finished begins anew when it is named; a call without names passes over
the finished ones. Ends with 0 if all is well, 1 if something failed, 2 without a CUDA device, 3 if the time was up.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import rows
from benchmarks.gpu import page
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.session import UNFINISHED, Job, Mirror, Session
from benchmarks.gpu.stages import STAGES, Stage, journals

CALL_SECONDS, STAGE_SECONDS = 510.0, 460.0  # under nine minutes, and under eight
LEAST_SECONDS = 30.0  # nothing begins with less


class Run:
    """One call: ``stages`` share ``seconds``, none takes more than ``most``."""

    def __init__(self, folder: Path, commit: str, seconds: float, most: float, least: float) -> None:
        self._folder, self._most, self._least = folder, most, least
        self._deadline = time.monotonic() + seconds
        self._journal = Journal(folder / "stages.jsonl", commit)
        self._carried = 0.0

    def left(self) -> float:
        return self._deadline - time.monotonic()

    def stages(self, stages: Sequence[Stage]) -> dict[str, str]:
        """Run ``stages`` in order. Returns the outcome of each, "not begun" where no time was left."""
        outcomes = {}
        for stage in stages:
            share = self._most if stage is stages[-1] else stage.seconds + self._carried
            seconds = min(share, self._most, self.left())
            if seconds < self._least:
                outcomes[stage.name] = "not begun"
                continue
            start = time.monotonic()
            outcomes[stage.name] = self._stage(stage, seconds)
            self._carried = max(0.0, stage.seconds + self._carried - (time.monotonic() - start))
        return outcomes

    def _stage(self, stage: Stage, seconds: float) -> str:
        entry = self._journal.entries().get(stage.name)
        goes_on = entry is not None and entry["outcome"] == "unfinished"
        if not goes_on:
            for path in journals(self._folder, stage):
                path.unlink(missing_ok=True)
        # Until it ends, it is not finished: nothing else would be known of a call that is killed.
        self._journal.add(stage.name, "unfinished")
        deadline = time.monotonic() + seconds
        with (self._folder / f"{stage.name}.log").open("a" if goes_on else "w") as log:
            session = Session(log)
            session.say(f"== {stage.name}: commit {self._journal.commit}, at most {seconds:.0f} s ==")
            jobs = stage.jobs(self._folder, seconds)
            for job in jobs:
                if deadline - time.monotonic() > 1:
                    session.run(job, deadline - time.monotonic())
                session.say(f"{job.name}: {job.outcome} ({job.seconds:.0f} s)")
        outcome = _worst(jobs)
        self._journal.add(stage.name, outcome, seconds=round(sum(job.seconds for job in jobs), 1))
        return outcome


def _worst(jobs: Sequence[Job]) -> str:
    outcomes = {job.outcome for job in jobs}
    return next(name for name in ("unfinished", "failed", "ok") if name in outcomes)


def chosen(stages: Sequence[Stage], asked: Sequence[str], journal: Journal, is_built: bool) -> list[Stage]:
    """The stages to run: those asked for; else those that are not finished; else, if all are, all anew.

    The build comes first wherever its extension is missing and was not found impossible to build.
    """
    entries = journal.entries()
    outcomes = {name: entry["outcome"] for name, entry in entries.items()}
    names = set(asked) or {stage.name for stage in stages if outcomes.get(stage.name) not in ("ok", "failed")}
    names = names or {stage.name for stage in stages}
    if not is_built and outcomes.get("build") != "failed":
        names.add("build")
    return [stage for stage in stages if stage.name in names]


def seconds_before() -> float:
    """How long ago ``make`` began: what it builds first is part of the call."""
    began = os.environ.get("ESAM_GPU_BEGAN")
    return max(0.0, time.time() - float(began)) if began else 0.0


def main() -> int:
    asked, known = sys.argv[1:], [stage.name for stage in STAGES]
    unknown = [name for name in asked if name not in known]
    if unknown:
        print(f"there is no stage {', '.join(unknown)}: choose from {', '.join(known)}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("no CUDA device: the GPU tests and benchmarks were not run", file=sys.stderr)
        return 2
    device = torch.device("cuda", 0)
    folder = rows.folder(device)
    folder.mkdir(parents=True, exist_ok=True)
    print(", ".join(f"{name} {value}" for name, value in rows.environment(device).items()), flush=True)
    target = os.environ.get("OUT")
    seconds = (STAGE_SECONDS if len(asked) == 1 else CALL_SECONDS) - seconds_before()
    with Mirror(folder, Path(target) / f"{folder.name}.tar.gz" if target else None):
        journal = Journal(folder / "stages.jsonl", rows.commit())
        is_built = any((rows.ROOT / "esam_kernels").glob("_cuda*.so"))
        run = Run(folder, journal.commit, seconds, STAGE_SECONDS, LEAST_SECONDS)
        outcomes = run.stages(chosen(STAGES, asked, journal, is_built))
    page.PAGE.write_text(page.rendered())
    return report(outcomes)


def report(outcomes: dict[str, str]) -> int:
    print("\n== make gpu ==")
    for name, outcome in outcomes.items():
        print(f"  {name:<14}{outcome}")
    unfinished = [name for name, outcome in outcomes.items() if outcome in ("unfinished", "not begun")]
    if unfinished:
        print(f"time was up; the next call goes on with: {', '.join(unfinished)}")
    if "failed" in outcomes.values():
        return 1
    return UNFINISHED if unfinished else 0


if __name__ == "__main__":
    sys.exit(main())
