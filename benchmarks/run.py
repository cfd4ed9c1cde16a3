"""The benchmark suite: ``python -m benchmarks.run --suite all --device cpu --minutes 4.5``.

Measures, writes the rows under benchmarks/results/<device>/, and prints one table a suite. Cases that the minutes do
not hold are named and left out; their earlier rows stay.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch

from benchmarks import heap, tables
from benchmarks import rows as results
from benchmarks.cases import TINY, sizes_of
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.session import UNFINISHED
from benchmarks.suites import INDUCTOR, Case, Context

# The share of the minutes that each suite may take. Those that keep the heap's memory come last: it stays kept.
SHARES = {
    "overhead": 0.03,
    "loss": 0.16,
    "memory": 0.11,
    "perturb": 0.36,
    "step": 0.18,
    "modes": 0.10,
    "packages": 0.06,
    "kept_heap": 0.06,
}
NOMINAL_MINUTES = 5.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=[*SHARES, "all"], default="all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--minutes", type=float, default=NOMINAL_MINUTES, help="time for everything that is asked for")
    parser.add_argument("--backend", help="in place of the device's default")
    parser.add_argument("--threads", type=int, help="in place of torch's default")
    parser.add_argument("--only", default="", help="only cases whose name holds this")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that everything runs; writes no rows")
    parser.add_argument("--out", type=Path, help="folder for the rows, in place of benchmarks/results/<device>")
    parser.add_argument("--inductor", choices=("with", "without", "only"), default="with", help="torch.compile's peers")
    parser.add_argument("--journal", type=Path, help="notes each case that is done; those noted before are passed over")
    parser.add_argument("--default-heap", action="store_true", help="whole steps in the C library's default heap")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: the GPU share of the benchmarks was not run", file=sys.stderr)
        return 2
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)

    device = torch.device(arguments.device)
    sizes = TINY if arguments.tiny else sizes_of(device)
    context = Context(device, sizes, arguments.backend, arguments.default_heap, arguments.inductor)
    out = arguments.out or (None if arguments.tiny else results.folder(device))
    environment = results.environment(device)
    print(
        f"{environment['device']}, {environment['threads']} threads, torch {environment['torch']}, "
        f"backend {context.backend_name()}, commit {environment['commit']}, load {environment['load']}",
        flush=True,
    )
    names = list(SHARES) if arguments.suite == "all" else [arguments.suite]
    total = sum(SHARES[name] for name in names)
    start = time.monotonic()
    deadline = start
    journal = Journal(arguments.journal, environment["commit"]) if arguments.journal else None
    failed: list[str] = []
    left_out: list[str] = []
    for name in names:
        # What one suite leaves over, the next may use.
        deadline += 60 * arguments.minutes * SHARES[name] / total
        factor = arguments.minutes / NOMINAL_MINUTES
        ended = run_suite(name, context, deadline, factor, arguments.only, out, journal)
        failed, left_out = failed + ended.failed, left_out + ended.left_out
    print(f"\n{time.monotonic() - start:.0f} s")
    if journal is not None and left_out:
        return UNFINISHED
    return 1 if failed else 0


@dataclass
class Ended:
    """What of a suite has no number: cases and, as "case: peer", peers that failed; cases that had no time left."""

    failed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def suite_named(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.suites.{name}")


def run_suite(
    name: str,
    context: Context,
    deadline: float,
    factor: float,
    only: str,
    out: Path | None,
    journal: Journal | None = None,
) -> Ended:
    """Measure the cases of one suite until ``deadline`` and print their table.

    Rows are written as soon as they are there: a run that is cut off leaves what it has measured.
    """
    suite = suite_named(name)
    if getattr(suite, "KEEPS_HEAP", False) and not context.default_heap:
        heap.keep()
    cases: list[Case] = list(suite.cases(context))
    cases = [case for case in cases if only in case.name and (context.inductor != "only" or case.has_inductor)]
    entries = journal.entries() if journal is not None else {}
    done = [name for name, entry in entries.items() if entry["outcome"] != "begun"]
    measured: list[results.Row] = []
    ended = Ended()
    print(f"\n== {name} ==", flush=True)
    for case in cases:
        if case.name in done:
            continue
        left = deadline - time.monotonic()
        if left <= 0:
            ended.left_out.append(case.name)
            continue
        if journal is not None and not journal.begin(case.name):
            ended.failed.append(case.name)
            continue
        try:
            rows = case.run(min(case.seconds * factor, left))
        except Exception as error:
            traceback.print_exc()
            print(f"{case.name}: FAILED, {type(error).__name__}", flush=True)
            ended.failed.append(case.name)
            if journal is not None:
                journal.add(case.name, "failed", text=f"{type(error).__name__}: {error}")
            continue
        finally:
            heap.give_back()
        broken = [f"{case.name}: {peer}" for row in rows for peer in row.get("failed", {})]
        ended.failed += broken
        if context.inductor == "only":
            rows = [row for row in rows if row["implementation"] == INDUCTOR]
        measured += rows
        if out is not None:
            results.save(out / f"{name}.json", rows)
        if journal is not None:
            journal.add(case.name, "failed" if broken else "passed")
    if measured:
        print(tables.as_text(tables.table(measured)))
    if ended.failed:
        print(f"FAILED, without a number: {'; '.join(ended.failed)}")
    if ended.left_out:
        print(f"not run, no time left: {'; '.join(ended.left_out)}")
    return ended


if __name__ == "__main__":
    sys.exit(main())
