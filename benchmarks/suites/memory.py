"""Peak memory of training steps, each optimizer in a fresh process: SGD, SAM and ESAM, published and ours.

On the CPU the peak resident set of the process, in glibc's default heap, and once more where every large tensor has
pages of its own: without the holes that a heap has between tensors. On CUDA the allocator's peak.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from benchmarks.cases import TINY, Sizes, numel, resnet50, sizes_of
from benchmarks.rows import ROOT, Row, of_samples
from benchmarks.suites import Case, Context
from benchmarks.suites.step import batch, training_step
from examples.models import build_model

STEPS = 3
SECONDS = 40.0  # of a run of five minutes, for all optimizers of one network
# (the row's implementation, the step's name, the method)
OPTIMIZERS = (
    ("SGD", "SGD alone", "ESAM"),
    ("ESAM, ours", "ours", "ESAM"),
    ("ESAM, as released", "as released", "ESAM"),
    ("SAM, ours", "ours", "SAM"),
    ("SAM, as released", "as released", "SAM"),
    ("ESAM element, ours", "ours", "ESAM element"),
    ("ESAM element, as released", "as released", "ESAM element"),
)
MIB = 1 << 20


# Blocks from this size on have pages of their own, given back at once. It also keeps glibc from raising that size.
OWN_PAGES = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}

# On a GPU: (network, pixels, classes).
IMAGENET = ("resnet50", 224, 1000)


def cases(context: Context) -> Iterator[Case]:
    if context.device.type == "cuda" and context.sizes is not TINY and has_imagenet_network():
        yield from _cases(dataclasses.replace(context, sizes=imagenet_sizes(context.sizes)))
    yield from _cases(context)
    if context.device.type == "cpu":
        yield from _cases(context, ", tensors in pages of their own", OWN_PAGES)


def has_imagenet_network() -> bool:
    """Whether examples.models can build it: a network with ResNet-50's number of weights comes out."""
    name, image, classes = IMAGENET
    with contextlib.suppress(KeyError, ValueError), torch.device("meta"):
        params = build_model(name, 3, image, classes).parameters()
        return sum(param.numel() for param in params) == numel(resnet50())
    return False


def imagenet_sizes(sizes: Sizes) -> Sizes:
    network, image, classes = IMAGENET
    return dataclasses.replace(sizes, network=network, image=image, classes=classes)


def _cases(context: Context, where: str = "", variables: Mapping[str, str] = MappingProxyType({})) -> Iterator[Case]:
    """One for each optimizer, so that each has its row as soon as it is measured; SGD's peak is what all are above."""
    title = f"{context.sizes.network} b{context.sizes.batch} fp32, {STEPS} steps{where}"
    more = {"backend": context.backend_name(), "batch": context.sizes.batch}
    sgd_name, sgd_step, sgd_method = OPTIMIZERS[0]

    @functools.cache
    def sgd() -> list[dict[str, float]]:
        return [in_fresh_process(context, sgd_step, sgd_method, variables)]

    def run(seconds: float, name: str, step: str, method: str) -> list[Row]:
        start = time.monotonic()
        found = sgd() if name == sgd_name else [in_fresh_process(context, step, method, variables)]
        while (elapsed := time.monotonic() - start) + elapsed / len(found) <= seconds:
            found.append(in_fresh_process(context, step, method, variables))
        peaks = [sample["peak"] for sample in found]
        above = round(statistics.median_high(sample["above_model"] for sample in found), 1)
        row = of_samples("memory", title, name, peaks, context.device, "MiB", above_model=above, **more)
        of_sgd = statistics.median(sample["peak"] for sample in sgd())
        return [row | {"above_sgd": round(row["p50"] - of_sgd, 1)}]

    for name, step, method in OPTIMIZERS:
        run_one = functools.partial(run, name=name, step=step, method=method)
        yield Case(f"{title}: {name}", SECONDS / len(OPTIMIZERS), run_one)


def in_fresh_process(
    context: Context, step: str, method: str, variables: Mapping[str, str] = MappingProxyType({})
) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.suites.memory", "--device", context.device.type, "--step", step]
    command += ["--method", method, "--threads", str(torch.get_num_threads())]
    command += ["--backend", context.backend] if context.backend else []
    command += ["--tiny"] if context.sizes is TINY else []
    command += ["--imagenet"] if context.sizes.network == IMAGENET[0] else []
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    # Not getrusage: its ru_maxrss begins with what the parent process held.
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024 / MIB


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / MIB
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / MIB


def child(arguments: Any) -> dict[str, float]:
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    sizes = TINY if arguments.tiny else sizes_of(device)
    context = Context(device, imagenet_sizes(sizes) if arguments.imagenet else sizes, arguments.backend)
    images, target = batch(context)
    step = training_step(context, arguments.step, arguments.method, "SGD", "fp32")
    before = _now(device)
    for _ in range(STEPS):
        step(images, target)
    return {"peak": _peak(device), "above_model": _peak(device) - before}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--step", required=True)
    parser.add_argument("--method", required=True)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--backend")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--imagenet", action="store_true")
    print(json.dumps(child(parser.parse_args())))


if __name__ == "__main__":
    main()
