"""compute-sanitizer's memcheck and racecheck over a small set of kernels: ``python python_tests/gpu/sanitize.py``.

Ends with 0 where nothing was found, or where the tool is not installed (and says so); with 2 without a GPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

TOOLS = ("memcheck", "racecheck")
SECONDS = 100  # each; everything runs some ten to fifty times slower under the tool
FOUND = 9


def small_set() -> None:
    """Every kernel once, in one or two dtypes, aligned and not. What it computes is checked as well."""
    import operator_checks as checks

    from esam_kernels import backends

    device = torch.device("cuda", 0)
    for name in ("cuda", "triton"):
        reason = backends.unavailable(name, device)
        if reason is not None:
            print(f"{name}: {reason}")
            continue
        backend = backends.load(name)
        for dtype, shift in ((torch.float32, 1), (torch.bfloat16, 0)):
            checks.check_norm(backend, device, dtype, True, shift)
            checks.check_perturb(backend, device, dtype, True, True, shift)
            checks.check_restore(backend, device, dtype, shift)
            checks.check_sgd(backend, device, dtype, checks.SGD_VARIANTS[4], False, None, shift)
            checks.check_adam(backend, device, dtype, True, True, False, device, None, shift)
            for classes in (10, 5000):
                checks.check_cross_entropy(backend, device, dtype, "smoothed", classes)
        checks.check_select(backend, device, torch.float32, 512)
        checks.check_gather(backend, device)
        if name == "cuda":
            checks.check_losses_select_gather(backend, device, torch.float32, 1000)
        print(f"{name}: done", flush=True)


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA device: nothing for compute-sanitizer to watch", file=sys.stderr)
        return 2
    if "--inside" in sys.argv:
        small_set()
        return 0
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer: not installed, not run")
        return 0
    # One allocation a tensor: torch's cache would make neighbours of tensors, and hide an overrun.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    failed = False
    for tool in TOOLS:
        command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), sys.executable, __file__, "--inside"]
        print(f"compute-sanitizer --tool {tool}", flush=True)
        try:
            code = subprocess.run(command, env=environment, timeout=SECONDS).returncode
        except subprocess.TimeoutExpired:
            print(f"{tool}: not finished after {SECONDS} s, nothing found until then")
            continue
        failed |= code != 0
        print(f"{tool}: {'nothing found' if code == 0 else f'FAILED (exit code {code})'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
