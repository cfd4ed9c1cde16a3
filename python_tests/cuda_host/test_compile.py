"""nvcc compiles every .cu for sm_80 and sm_90: registers, spills, and 128-bit accesses in what comes out."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import building
import pytest

from benchmarks import cuda_registers
from benchmarks.cuda_registers import ARCHITECTURES, SOURCES

# 65,536 registers a multiprocessor: with up to 128 of them two blocks of 256 threads are resident.
MAX_REGISTERS = 128
# The streaming kernels promise more: half of the threads that a multiprocessor can hold, to keep memory busy.
MAX_STREAMING_REGISTERS = 64
# Of tables for 64, 192 and 448 tensors. ResNet-18 has 62: 3 KB travel with a launch of its SGD, not 20.
CAPACITIES = (64, 192, 448)
ARGUMENT_BYTES = {
    "stream<Norm<float, false>, *>": (1432, 4248, 9880),
    "stream<Norm<float, true>, *>": (1944, 5784, 13464),
    "stream<Perturb<float, true>, *>": (3264, 9664, 22464),
    "stream<Restore<unsigned int>, *>": (1865, 5577, 13001),
    "stream<RestoreSgd<float, true, false>, *>": (2944, 8704, 20224),
    "stream<RestoreAdam<float, false>, *>": (3984, 11792, 27408),
    "stream<RestoreAdam<float, true>, *>": (4496, 13328, 30992),
    "increment<*>": (520, 1544, 3592),
}
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

pytestmark = pytest.mark.skipif(cuda_registers.missing() is not None, reason=str(cuda_registers.missing()))


@functools.cache
def compiled() -> dict[tuple[str, str], Path]:
    return cuda_registers.compile_all(building.BUILD / building._digest())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", [source.stem for source in SOURCES])
def test_registers_and_no_spills(source, architecture):
    kernels = cuda_registers.kernels(compiled()[source, architecture])
    assert kernels
    for name, (registers, stack, spilled) in kernels.items():
        allowed = MAX_STREAMING_REGISTERS if name.startswith("stream<") else MAX_REGISTERS
        if "RestoreAdam" in name:
            allowed = 80  # three blocks of threads, with five or six lists in flight each
        assert registers <= allowed, f"{name}: {registers} registers"
        assert stack == spilled == 0, f"{name}: {stack} bytes of stack, {spilled} spilled"


def test_a_launch_copies_as_much_as_its_number_of_tensors_needs():
    found = {}
    for source in ("norm", "perturb", "update"):
        found |= cuda_registers.argument_bytes(compiled()[source, "90"])
    for kernel, expected in ARGUMENT_BYTES.items():
        variants = [found[kernel.replace("*", str(capacity))] for capacity in CAPACITIES]
        assert tuple(variants) == expected, kernel


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", ["norm", "perturb", "update"])
def test_streaming_kernels_move_128_bits_at_a_time(source, architecture):
    text = cuda_registers.output(cuda_registers.cuobjdump(), "-sass", str(compiled()[source, architecture]))
    functions = re.split(r"Function : (\w+)", text)[1:]
    names = cuda_registers.readable(functions[::2])
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


def test_nvcc_compiles_the_bindings_as_setup_does(tmp_path):
    """Alone, without optimisation: the kernels behind them are compiled by the tests above. pybind11 takes 7 s."""
    code = f"""
import sys
sys.path[:0] = ["csrc", "csrc/cuda"]
import build_cuda
extension = build_cuda.CudaExtension(required=True)
extension.objects_of = []
build_cuda.NVCC_FLAGS[build_cuda.NVCC_FLAGS.index("-O3")] = "-O0"
extension.compile_into({str(tmp_path)!r}, {str(tmp_path / "_cuda.so")!r})
"""
    told = {**os.environ, "TORCH_CUDA_ARCH_LIST": "9.0"}
    result = subprocess.run([sys.executable, "-c", code], cwd=building.ROOT, env=told, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert b"PyInit__cuda" in (tmp_path / "_cuda.so").read_bytes()
