"""Runs commands within their limits, and writes down what they print as it comes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tarfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from benchmarks.rows import ROOT

UNFINISHED = 3  # the exit code of a command that has stopped in time, with something left to do
PIPE_SECONDS = 5.0  # how long the output of a process that has ended may still come
MIRROR_SECONDS = 2.0


def environment() -> dict[str, str]:
    """This process's, with the project before whatever else Python finds modules in."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}


@dataclass
class Job:
    """A command, and how it ended."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    code: int | None = None  # None: not run, or stopped at its limit

    @property
    def outcome(self) -> str:
        """ "ok", "failed", or "unfinished" where time was up: what it has done until then is kept."""
        return "unfinished" if self.code in (None, UNFINISHED) else "failed" if self.code else "ok"


class Session:
    """Says what jobs say, on the terminal and in the log."""

    def __init__(self, log: TextIO) -> None:
        self._log = log
        self._lock = threading.Lock()

    def say(self, line: str) -> None:
        with self._lock:
            print(line, flush=True)
            self._log.write(line + "\n")
            self._log.flush()

    def run(self, job: Job, limit: float) -> None:
        """Run ``job``; after ``limit`` seconds it is killed with all that it has started."""
        start = time.monotonic()
        process = subprocess.Popen(
            job.command,
            cwd=ROOT,
            env={**environment(), **job.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        assert process.stdout is not None
        reader = threading.Thread(target=self._relay, args=(job.name, process.stdout), daemon=True)
        reader.start()
        # One thread alone decides whether the time was up, before the process is reaped: its group is still its own.
        try:
            job.code = process.wait(timeout=max(0.1, limit))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            job.code = None
        reader.join(PIPE_SECONDS)
        if reader.is_alive():  # what it has started holds the pipe open
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            reader.join(PIPE_SECONDS)
        job.seconds = time.monotonic() - start

    def _relay(self, name: str, output: TextIO) -> None:
        for line in output:
            self.say(f"[{name}] {line.rstrip()}")


class Mirror:
    """Packs ``folder`` into the archive ``target`` while the block runs: what is cut off there has been brought away.

    One file, since whoever fetches it may be given few. It holds the folder under its own name.
    """

    def __init__(self, folder: Path, target: Path | None) -> None:
        self._folder, self._target = folder, target
        self._packed: dict[Path, tuple[int, int]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True)

    def __enter__(self) -> Mirror:
        if self._target is not None:
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        if self._target is not None:
            self._thread.join()
            self._pack(self._target)

    def _repeat(self) -> None:
        assert self._target is not None
        while not self._stop.wait(MIRROR_SECONDS):
            with contextlib.suppress(OSError):  # a file has gone or become shorter meanwhile: the next round takes it
                self._pack(self._target)

    def _pack(self, target: Path) -> None:
        files = sorted(path for path in self._folder.rglob("*") if path.is_file())
        found = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in files}
        if found == self._packed:
            return
        part = target.with_name(f"{target.name}.part")
        with tarfile.open(part, "w:gz", compresslevel=1) as archive:
            for path in files:
                archive.add(path, path.relative_to(self._folder.parent))
        os.replace(part, target)  # in one step: the archive is whole at any moment
        self._packed = found
