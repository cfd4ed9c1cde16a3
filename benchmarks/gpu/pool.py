"""pytest in several processes: ``python -m benchmarks.gpu.pool --journal FILE --xml FILE --workers 4 TESTS``.

Each test is handed to a process that is free. A process that dies, hangs or meets an error of CUDA after which nothing
works is replaced, and costs the one test it was running. Results are in the journal as they come; those that are there
already are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.journal import Entry, Journal
from benchmarks.gpu.junit import write_xml
from benchmarks.gpu.session import UNFINISHED, environment
from benchmarks.gpu.stages import BACKEND
from benchmarks.rows import ROOT, commit

COLLECT_SECONDS = 120.0
TEST_SECONDS = 120.0
MOST_TAIL = 2000


class Died(Exception):
    """The process ended, or did not answer in time."""


class Process:
    """A worker, seen from the pool."""

    def __init__(self, tests: Sequence[str], threads: int) -> None:
        self._output = tempfile.TemporaryFile()  # noqa: SIM115, closed by stop()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.worker", *tests],
            cwd=ROOT,
            env={**environment(), "PYTHONFAULTHANDLER": "1", "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._output,
        )
        self._read = b""

    def answer(self, seconds: float) -> dict[str, Any]:
        """The next message.

        Raises:
            Died: none came.
        """
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._read:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise Died(f"no answer after {seconds:.0f} s: the process was stopped")
            chunk = os.read(self._process.stdout.fileno(), 1 << 16)
            if not chunk:
                raise Died(f"the process died ({_ended(self._process.wait())})\n{self._tail()}")
            self._read += chunk
        line, self._read = self._read.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message

    def run(self, test: str, seconds: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(test.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died between two tests: the answer says so
        return self.answer(seconds)

    def _tail(self) -> str:
        self._output.seek(0)
        return self._output.read().decode(errors="replace")[-MOST_TAIL:]

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._output.close()


def _ended(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


class Pool:
    """Runs ``tests`` (arguments for pytest) until they are done or the time is up."""

    def __init__(
        self, tests: Sequence[str], journal: Journal, xml: Path, workers: int, seconds: float, test_seconds: float
    ) -> None:
        self._tests, self._journal, self._xml = tests, journal, xml
        self._workers, self._test_seconds = workers, test_seconds
        self._threads = max(1, (os.cpu_count() or 1) // workers)  # the processes share the cores
        self._deadline = time.monotonic() + seconds
        self._lock = threading.Lock()
        self._queue: deque[str] = deque()
        self._cut_off: list[str] = []

    def run(self) -> int:
        """0: all passed; 1: some failed; UNFINISHED: none failed until the time was up."""
        first = Process(self._tests, self._threads)
        try:
            found = first.answer(min(COLLECT_SECONDS, self._left()))
        except Died as died:
            first.stop()
            print(f"the tests could not be collected: {died}", flush=True)
            return 1
        for error in found["errors"]:
            print(f"NOT COLLECTED {error}", flush=True)
        done = self._journal.entries()
        self._queue.extend(test for test in found["ids"] if test not in done)
        if done:
            print(f"{len(done)} tests have run before and are not run again", flush=True)
        count = max(1, min(self._workers, len(self._queue)))
        slots = [threading.Thread(target=self._serve, args=(first if i == 0 else None,)) for i in range(count)]
        for slot in slots:
            slot.start()
        for slot in slots:
            slot.join()
        return self._end(found)

    def _left(self) -> float:
        return self._deadline - time.monotonic()

    def _serve(self, process: Process | None) -> None:
        """Run one test after the other in one process, or in the one that takes its place."""
        ready = process is not None
        while self._left() > 0:
            with self._lock:
                if not self._queue:
                    break
                test = self._queue.popleft()
            limit = min(self._test_seconds, self._left())
            try:
                if process is None:
                    process = Process(self._tests, self._threads)
                if not ready:
                    process.answer(min(COLLECT_SECONDS, self._left()))
                    ready = True
                limit = min(self._test_seconds, self._left())
                result = process.run(test, limit)
            except Died as died:
                result = {"outcome": "failed", "text": str(died), "seconds": round(limit, 2), "sticky": True}
                if self._left() <= 0:
                    with self._lock:
                        self._cut_off.append(test)
                    break
            if result.pop("sticky"):
                assert process is not None
                process.stop()
                process, ready = None, False
            self._note(test, result)
        if process is not None:
            process.stop()

    def _note(self, test: str, result: dict[str, Any]) -> None:
        with self._lock:
            text = {"text": result["text"]} if result["text"] else {}
            entry = self._journal.add(test, result["outcome"], seconds=result["seconds"], **text)
            write_xml(self._xml, self._journal.entries().values())
            print(_line(entry), flush=True)

    def _end(self, found: dict[str, Any]) -> int:
        entries = self._journal.entries()
        counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
        for test in found["ids"]:
            if test in entries:
                counts[entries[test]["outcome"]] += 1
        for test in self._cut_off:
            print(f"CUT OFF {test}: time was up; it runs again in the next call")
        left = len(self._queue) + len(self._cut_off)
        print(", ".join(f"{count} {kind}" for kind, count in counts.items()) + f", {left} left", flush=True)
        if left:
            return UNFINISHED
        absent = _backends_without_a_test([entries[test] for test in found["ids"]])
        for backend, reason in absent.items():
            print(f"NOT RUN the backend {backend}: {reason}", flush=True)
        return 1 if counts["failed"] or found["errors"] or not counts["passed"] or absent else 0


def _backends_without_a_test(entries: Sequence[Entry]) -> dict[str, str]:
    """The backends of which all tests were skipped, each with the reason of the first one."""
    of_backend: dict[str, list[Entry]] = {}
    for entry in entries:
        if (named := BACKEND.search(entry["name"])) is not None:
            of_backend.setdefault(named[1], []).append(entry)
    return {
        backend: tests[0]["text"]
        for backend, tests in of_backend.items()
        if all(entry["outcome"] == "skipped" for entry in tests)
    }


def _line(entry: Entry) -> str:
    line = f"{entry['outcome'].upper()} {entry['name']} ({entry['seconds']:.1f} s)"
    if "text" in entry:
        line += "".join(f"\n    {text}" for text in entry["text"].splitlines())
    return line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--xml", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=460.0, help="for all tests")
    parser.add_argument("--test-seconds", type=float, default=TEST_SECONDS, help="for one test")
    parser.add_argument("tests", nargs="+")
    given = parser.parse_args()
    journal = Journal(given.journal, commit())
    return Pool(given.tests, journal, given.xml, given.workers, given.seconds, given.test_seconds).run()


if __name__ == "__main__":
    sys.exit(main())
