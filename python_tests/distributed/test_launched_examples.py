"""The examples, launched as their docstrings say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

ROOT = Path(__file__).resolve().parents[2]


def torchrun(*arguments: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for _ in range(2):
        finished = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=100)
        # Seen once in some twenty runs, on a busy machine: a thread of gloo's ends the process while it is leaving.
        if "terminate called without an active exception" not in finished.stderr:
            break
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def accuracy(output: str) -> float:
    return float(re.findall(r"test accuracy ([\d.]+)", output)[0])


def test_ddp_example_learns_the_digits() -> None:
    assert accuracy(torchrun("examples/distributed/ddp.py")) > 0.93


def test_fsdp_example_learns_the_digits_and_saves_a_checkpoint(tmp_path: Path) -> None:
    output = torchrun("examples/distributed/fsdp.py", str(tmp_path / "checkpoint"))
    assert accuracy(output) > 0.9
    assert "after step 210" in output
    assert (tmp_path / "checkpoint" / ".metadata").exists()
