"""clang++ compiles the kernels of every instruction set; g++ does so whenever the extension is built."""

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cpu"


@pytest.mark.skipif(shutil.which("clang++") is None, reason="clang++ is not installed")
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_clang_compiles_the_kernels(isa):
    command = ["clang++", "-O0", "-std=c++20", "-fPIC", "-c", str(SOURCES / f"kernels_{isa}.cpp"), "-o", "/dev/null"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (process.returncode, [line for line in process.stderr.splitlines() if "error" in line]) == (0, [])
