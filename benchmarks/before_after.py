"""Whether a change made a step slower: two checkouts, each in a process of its own, measured in turn.

    git worktree add ../old v0.1.0 && (cd ../old && python setup.py build_ext --inplace)
    python -m benchmarks.before_after ../old

writes the rows ``before_after.json`` under benchmarks/results: first_step + second_step of many small tensors (the
host's own time, one thread) and of ResNet-18's weights (all threads). "ours" is this checkout. The processes take turns
of some steps; a turn counts with its fastest quarter, since what else the machine does can only add to a time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import cases, rows, tables
from benchmarks.harness import OURS, Measurement

SUITE = "before_after"
BEFORE = "before"
ROUNDS = 40


@dataclass(frozen=True)
class Case:
    """Weights, and how a step over them is measured; ``threads`` is 0 for as many as there are."""

    title: str
    shapes: Sequence[cases.Shape]
    dtype: str
    mask: str
    steps: int
    threads: int = 0


class Checkout:
    """A process that has imported the package from one folder, and times steps on request."""

    def __init__(self, folder: Path, threads: int) -> None:
        environment = {**os.environ, "PYTHONPATH": str(folder.resolve())}
        command = [sys.executable, "-c", WORKER, str(threads)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=folder)
        imported = Path(self._answer())
        if not imported.is_relative_to(folder.resolve()):
            raise SystemExit(f"{folder} holds no package esam_kernels: {imported} was imported")

    def prepare(self, case: Case) -> None:
        """Build an optimizer over the weights of the case."""
        self._ask(asdict(case))

    def turn(self) -> float:
        """The time of a step in seconds."""
        return float(self._ask(None))

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _ask(self, question: object) -> str:
        assert self._process.stdin is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a process of a checkout has ended; its error stands above")
        return line.strip()


# Uses nothing but what both checkouts have: the constructor and the phases of a step.
WORKER = """
import json, sys, time
import torch
import esam_kernels

torch.set_num_threads(int(sys.argv[1]))
print(esam_kernels.__file__, flush=True)

def step():
    for param, grad in zip(params, grads):
        param.grad = grad.clone()
    start = time.perf_counter()
    optimizer.first_step(zero_grad=True)
    seconds = time.perf_counter() - start
    for param, grad in zip(params, grads):
        param.grad = grad
    start = time.perf_counter()
    optimizer.second_step(zero_grad=True)
    return seconds + time.perf_counter() - start

for line in sys.stdin:
    wanted = json.loads(line)
    if wanted is None:
        times = sorted(step() for _ in range(steps))
        print(times[len(times) // 4], flush=True)
        continue
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, wanted["dtype"])
    tensors = [[torch.randn(shape, generator=generator).to(dtype) for shape in wanted["shapes"]] for _ in range(2)]
    params, grads, steps = list(map(torch.nn.Parameter, tensors[0])), tensors[1], wanted["steps"]
    options = {"rho": 0.05, "beta": 0.6, "mask": wanted["mask"], "lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-3}
    optimizer = esam_kernels.ESAM(params, torch.optim.SGD, fused=True, **options)
    for _ in range(3 * steps):
        step()
    print("ready", flush=True)
"""

CASES = [
    *(
        Case(f"{count} tensors of 100, {mask}", [(100,)] * count, "float32", mask, steps=60, threads=1)
        for count in (10, 161)
        for mask in ("tensor", "element")
    ),
    *(
        Case(f"ResNet-18 {name} {mask}", cases.resnet18(), dtype, mask, steps=8)
        for name, dtype in (("fp32", "float32"), ("bf16", "bfloat16"))
        for mask in ("tensor", "element")
    ),
]


def measure(before: Checkout, after: Checkout, rounds: int) -> Measurement:
    """Turns of both, in alternating order."""
    measurement = Measurement(pairs={BEFORE: []})
    for number in range(rounds):
        order = (before, after) if number % 2 else (after, before)
        times = {checkout: checkout.turn() for checkout in order}
        measurement.ours.append(times[after])
        measurement.pairs[BEFORE].append((times[after], times[before]))
    return measurement


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.before_after",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("before", type=Path, help="the other checkout, with its extension built")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the cases of ResNet-18")
    parser.add_argument("--out", type=Path, default=rows.folder(torch.device("cpu")) / f"{SUITE}.json")
    arguments = parser.parse_args(argv)
    old = _commit(arguments.before)
    found = []
    for threads, chosen in itertools.groupby(CASES, key=lambda case: case.threads):
        used = threads or arguments.threads
        torch.set_num_threads(used)
        rows.environment.cache_clear()
        before, after = Checkout(arguments.before, used), Checkout(rows.ROOT, used)
        for case in chosen:
            for checkout in (before, after):
                checkout.prepare(case)
            measurement = measure(before, after, arguments.rounds)
            measurement.timing = dict.fromkeys((OURS, BEFORE), "wall clock, fastest quarter of a turn")
            more = {"backend": "native", "before": old}
            cpu = torch.device("cpu")
            found += rows.of_measurement(SUITE, case.title, measurement, cpu, "us" if threads == 1 else "ms", **more)
            print(f"{case.title}: before / after {statistics.median(measurement.ratios(BEFORE)):.3f}", flush=True)
        before.close()
        after.close()
    rows.save(arguments.out, found)
    print(tables.as_text(tables.table(found)))
    return 0


def _commit(folder: Path) -> str:
    command = ["git", "-C", str(folder), "rev-parse", "--short=10", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    raise SystemExit(main())
