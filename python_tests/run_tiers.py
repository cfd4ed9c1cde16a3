"""Runs every test tier that this machine can run, each in a process of its own, and names those that it could not.

python python_tests/run_tiers.py [TIER ...]
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def always() -> str | None:
    return None


def needs(package: str) -> Callable[[], str | None]:
    def reason() -> str | None:
        return None if importlib.util.find_spec(package) else f"{package} is not installed"

    return reason


def needs_native() -> str | None:
    import torch

    from esam_kernels.backends import unavailable

    return unavailable("native", torch.device("cpu"))


def needs_compiler() -> str | None:
    compiler = os.environ.get("CXX", "g++").split()[0]
    return None if shutil.which(compiler) else f"there is no C++ compiler ({compiler})"


def has_compiler_for_native() -> bool:
    """Whether the C++ extension should be there: a build that failed is no reason to pass over its tests."""
    return needs_compiler() is None and os.environ.get("ESAM_KERNELS_NATIVE") != "0"


def needs_distributed() -> str | None:
    import torch

    return None if torch.distributed.is_available() else "this torch is built without torch.distributed"


def needs_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "no CUDA device"


@dataclass
class Tier:
    name: str
    reason: Callable[[], str | None] = always
    environment: dict[str, str] = field(default_factory=dict)
    is_expected: Callable[[], bool] = lambda: False  # to run here: it is a failure if it does not
    folder: str = ""  # where its tests are, if not in the folder of its name
    needs_card: bool = False  # the others test what needs none, and see none: they run alike on every machine


TIERS = [
    Tier("reference", environment={"ESAM_KERNELS_BACKEND": "reference"}),
    Tier("interpret", needs("triton"), {"TRITON_INTERPRET": "1"}),
    Tier("codegen", needs("triton")),
    Tier("dry", needs("triton")),
    Tier("native", needs_native, is_expected=has_compiler_for_native),
    Tier("cuda_host", needs_compiler),
    Tier("integration"),
    Tier("distributed", needs_distributed, {"OMP_NUM_THREADS": "1"}),
    Tier("examples"),
    Tier("benchmarks"),
    Tier("packaging"),
    Tier("docs"),
    Tier("gpu_on_cpu", environment={"ESAM_GPU_TESTS_DEVICE": "cpu"}, folder="gpu"),
    Tier("gpu", needs_gpu, needs_card=True),
]


def run(tier: Tier) -> tuple[bool, dict[str, int]]:
    """Run one tier: whether it passed (a tier of which nothing ran has not), and how many tests ended in which way."""
    command = [sys.executable, "-m", "pytest", "-q", str(ROOT / "python_tests" / (tier.folder or tier.name))]
    environment = {**os.environ, **({} if tier.needs_card else {"CUDA_VISIBLE_DEVICES": ""}), **tier.environment}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line if line.strip() else last
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    return process.wait() == 0 and counts.get("passed", 0) > 0, counts


def main() -> int:
    sys.path.insert(0, str(ROOT))
    for package in ("torch", "pytest"):
        if importlib.util.find_spec(package) is None:
            print(f"{package} is not installed in {sys.executable}: `pip install {package}`", file=sys.stderr)
            return 2
    asked = sys.argv[1:]
    names = asked or [tier.name for tier in TIERS]
    unknown = set(names) - {tier.name for tier in TIERS}
    if unknown:
        print(f"unknown tiers: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    total = dict.fromkeys(("passed", "failed", "skipped"), 0)
    lines, not_run = [], []
    succeeded = True
    for tier in (tier for tier in TIERS if tier.name in names):
        reason = tier.reason()
        if reason is not None:
            not_run.append(f"  {tier.name:<12}{reason}")
            # Who asks for a tier by name wants it run.
            succeeded &= not asked and not tier.is_expected()
            continue
        print(f"\n== {tier.name} ==", flush=True)
        start = time.monotonic()
        passed, counts = run(tier)
        succeeded &= passed
        counts["failed"] = counts.get("failed", 0) + counts.pop("error", 0)
        for kind in total:
            total[kind] += counts.get(kind, 0)
        summary = ", ".join(f"{n} {kind}" for kind, n in counts.items() if n)
        lines.append(f"  {tier.name:<12}{'ok' if passed else 'FAILED'}: {summary} ({time.monotonic() - start:.0f} s)")
    print("\n== tiers ==\n" + "\n".join(lines))
    if not_run:
        print(f"not run on this machine{' (a failure: asked for by name)' if asked else ''}:\n" + "\n".join(not_run))
    print(f"\n{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped")
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
