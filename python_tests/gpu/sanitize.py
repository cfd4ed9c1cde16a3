"""compute-sanitizer's memcheck and racecheck over a small set of kernels: ``python python_tests/gpu/sanitize.py``.

``--seconds`` is the time for both; what the first leaves over, the second may use. Ends with 0
where nothing was found, or where the tool is not installed (and says so); with 2 without a GPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

TOOLS = ("memcheck", "racecheck")
SECONDS = 200.0  # everything runs some ten to fifty times slower under the tool
FOUND = 9
NOT_ALL_RAN = 8
BACKENDS = ["cuda", "triton"]


def small_set(device: torch.device) -> list[str]:
    """Every kernel once, in one or two dtypes, aligned and not. What it computes is checked as well.

    Returns the backends whose kernels ran: those that serve ``device``.
    """
    import loss_checks
    import operator_checks as checks

    from esam_kernels import backends

    ran = []
    for name in BACKENDS:
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
                loss_checks.check_cross_entropy(backend, device, dtype, "smoothed", classes)
        loss_checks.check_select(backend, device, torch.float32, 512)
        loss_checks.check_gather(backend, device)
        if name == "cuda":
            loss_checks.check_losses_select_gather(backend, device, torch.float32, 1000)
        print(f"{name}: done", flush=True)
        ran.append(name)
    return ran


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA device: nothing for compute-sanitizer to watch", file=sys.stderr)
        return 2
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inside", action="store_true", help="run the kernels themselves")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    given = parser.parse_args()
    if given.inside:
        return 0 if small_set(torch.device("cuda", 0)) == BACKENDS else NOT_ALL_RAN
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer: not installed, not run")
        return 0
    deadline = time.monotonic() + given.seconds
    failed = False
    for number, tool in enumerate(TOOLS):
        seconds = (deadline - time.monotonic()) / (len(TOOLS) - number)
        # torch and Triton ask the driver for functions that it may lack; what matters of CUDA's errors is raised.
        command = [sanitizer, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", str(FOUND)]
        # The tool otherwise waits some seconds for CUDA to start, which may be fewer than torch takes to load.
        command += ["--launch-timeout", "0", sys.executable, __file__, "--inside"]
        print(f"compute-sanitizer --tool {tool}, at most {seconds:.0f} s", flush=True)
        code = watched(command, seconds)
        if code is None:
            print(f"{tool}: not finished after {seconds:.0f} s, nothing found until then", flush=True)
            continue
        failed |= code != 0
        print(f"{tool}: {'nothing found' if code == 0 else f'FAILED (exit code {code})'}", flush=True)
    return 1 if failed else 0


def watched(command: list[str], seconds: float) -> int | None:
    """The exit code of ``command``, or None: killed after ``seconds``, with the processes that the tool has started."""
    # One allocation a tensor: torch's cache would make neighbours of tensors, and hide an overrun.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        return process.wait(timeout=max(0.1, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


if __name__ == "__main__":
    sys.exit(main())
