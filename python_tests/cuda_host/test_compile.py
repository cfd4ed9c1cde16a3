"""nvcc compiles every .cu for sm_80 and sm_90: registers, spills, and 128-bit accesses in what comes out."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import building
import pytest

ARCHITECTURES = ("80", "90")
# 65,536 registers a multiprocessor: with up to 128 of them two blocks of 256 threads are resident.
MAX_REGISTERS = 128
# The streaming kernels promise more: half of the threads that a multiprocessor can hold, to keep memory busy.
MAX_STREAMING_REGISTERS = 64
SOURCES = sorted(building.CUDA.glob("*.cu"))
# Loads and stores, one for each list that a kernel reads or writes, times the packs in flight; and how many of them are
# evict-first: of what nothing reads again before a whole forward pass.
WIDE_ACCESSES = {
    "Norm<float, false>": (2, 0, 0, 0),
    "Norm<device::BFloat16, true>": (4, 0, 0, 0),
    "Perturb<float, false>": (4, 4, 2, 2),
    "Perturb<float, true>": (4, 4, 2, 2),
    "Perturb<device::BFloat16, true>": (4, 4, 2, 2),
    "Restore<unsigned int>": (2, 2, 2, 0),
    "Restore<unsigned short>": (2, 2, 2, 0),
    "RestoreSgd<float, true, false>": (6, 4, 6, 2),
    "RestoreSgd<device::BFloat16, true, false>": (6, 4, 6, 2),
    "RestoreAdam<float, false>": (8, 6, 8, 4),
    "RestoreAdam<device::Float16, true>": (10, 8, 10, 6),
}

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit, or Triton's copy of it."""
    if shutil.which(name):
        return name
    spec = importlib.util.find_spec("triton")
    candidate = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name if spec and spec.origin else None
    return str(candidate) if candidate and candidate.exists() else None


def compile_with_nvcc(source: Path, architecture: str) -> tuple[Path, str]:
    folder = building.BUILD / building._digest()
    folder.mkdir(parents=True, exist_ok=True)
    cubin, log = (folder / f"{source.stem}.sm_{architecture}.{suffix}" for suffix in ("cubin", "log"))
    if not log.exists():
        command = ["nvcc", "-cubin", f"-arch=sm_{architecture}", "-std=c++17", "-O3", "-fmad=false", "-Xptxas", "-v"]
        result = subprocess.run([*command, "-o", str(cubin), str(source)], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        log.write_text(result.stderr)
    return cubin, log.read_text()


@functools.cache
def compiled() -> dict[tuple[str, str], tuple[Path, str]]:
    keys = [(source.stem, architecture) for source in SOURCES for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda key: compile_with_nvcc(building.CUDA / f"{key[0]}.cu", key[1]), keys)
        return dict(zip(keys, results))


def readable(names: list[str]) -> list[str]:
    """Demangled: ``stream<Norm<float, false>>`` and the like."""
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    text = (
        text.replace("(anonymous namespace)::", "").replace("esam::cuda::", "").replace("esam::", "").replace(" >", ">")
    )
    return [line.removeprefix("void ").split("(")[0] for line in text.splitlines()]


def resources(log: str) -> dict[str, tuple[int, int, int]]:
    """Of each kernel: registers, bytes of stack frame, bytes spilled."""
    entry = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers"
    )
    found = re.findall(entry, log, flags=re.DOTALL)
    names = readable([name for name, *_ in found])
    return {name: (int(used), int(stack), int(spilled)) for name, (_, stack, spilled, used) in zip(names, found)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", [source.stem for source in SOURCES])
def test_registers_and_no_spills(source, architecture):
    kernels = resources(compiled()[source, architecture][1])
    assert kernels
    for name, (registers, stack, spilled) in kernels.items():
        allowed = MAX_STREAMING_REGISTERS if name.startswith("stream<") else MAX_REGISTERS
        if "RestoreAdam" in name:
            allowed = 80  # three blocks of threads, with five or six lists in flight each
        assert registers <= allowed, f"{name}: {registers} registers"
        assert stack == spilled == 0, f"{name}: {stack} bytes of stack, {spilled} spilled"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", ["norm", "perturb", "update"])
def test_streaming_kernels_move_128_bits_at_a_time(source, architecture):
    disassembler = tool("cuobjdump")
    if disassembler is None or not shutil.which("c++filt"):
        pytest.skip("cuobjdump or c++filt is not installed")
    cubin = compiled()[source, architecture][0]
    text = subprocess.run([disassembler, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    functions = re.split(r"Function : (\w+)", text)[1:]
    names = readable(functions[::2])
    checked = 0
    for name, code in zip(names, functions[1::2]):
        expected = next((value for key, value in WIDE_ACCESSES.items() if key in name), None)
        if expected is None:
            continue
        wide = [re.findall(rf"{access}\.E(\.EF)?\.128", code) for access in ("LDG", "STG")]
        found = (*map(len, wide), *(sum(map(bool, policies)) for policies in wide))
        assert found == expected, f"{name}: 128-bit loads and stores, and those that are evict-first: {found}"
        assert not re.search(r"\b(LD|ST)\.E", code), f"{name}: accesses that are not known to be global memory"
        checked += 1
    assert checked > 0
