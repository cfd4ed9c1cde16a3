"""What nvcc makes of csrc/cuda, without a GPU: ``python -m benchmarks.cuda_registers`` writes cuda_registers.json.

Of each kernel the registers, the bytes of stack and of spills (python_tests/cuda_host/test_compile.py wants none), and
the bytes of its arguments, all of which each of its launches copies.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SUMMARY = ROOT / "benchmarks" / "cuda_registers.json"
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90")
# Constant memory of sm_90 before a kernel's own arguments. On sm_80 those above 4 KiB begin further on.
RESERVED_BYTES = 528


class Kernel(NamedTuple):
    registers: int
    stack: int
    spilled: int


def missing() -> str | None:
    """What of the tools is not installed."""
    lacking = [name for name in ("nvcc", "c++filt") if not shutil.which(name)] + ["cuobjdump"] * (not cuobjdump())
    return f"{', '.join(lacking)} not installed" if lacking else None


def cuobjdump() -> str | None:
    """That of the CUDA toolkit, or Triton's copy of it."""
    if shutil.which("cuobjdump"):
        return "cuobjdump"
    spec = importlib.util.find_spec("triton")
    found = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if spec and spec.origin else None
    return str(found) if found and found.exists() else None


def output(*command: str, given: str | None = None) -> str:
    return subprocess.run(command, input=given, capture_output=True, text=True, check=True).stdout


def compile_source(source: Path, architecture: str, folder: Path) -> Path:
    """The cubin of a source in ``folder``, beside a log of what ptxas says; of an earlier call where that was made."""
    folder.mkdir(parents=True, exist_ok=True)
    cubin, log = (folder / f"{source.stem}.sm_{architecture}.{suffix}" for suffix in ("cubin", "log"))
    if not log.exists():
        command = ["nvcc", "-cubin", f"-arch=sm_{architecture}", "-std=c++17", "-O3", "-fmad=false", "-Xptxas", "-v"]
        result = subprocess.run([*command, "-o", str(cubin), str(source)], capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(result.stderr)
        log.write_text(result.stderr)
    return cubin


def compile_all(folder: Path) -> dict[tuple[str, str], Path]:
    """The cubins by the name of the source and the architecture."""
    pairs = [(source, architecture) for source in SOURCES for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        cubins = pool.map(lambda pair: compile_source(*pair, folder), pairs)
        return {(source.stem, architecture): cubin for (source, architecture), cubin in zip(pairs, cubins)}


def readable(names: list[str]) -> list[str]:
    """Demangled: ``stream<Norm<float, false>, 64>`` and the like."""
    text = output("c++filt", given="\n".join(names))
    for noise in ("(anonymous namespace)::", "esam::cuda::", "esam::"):
        text = text.replace(noise, "")
    return [line.removeprefix("void ").split("(")[0] for line in text.replace(" >", ">").splitlines()]


def kernels(cubin: Path) -> dict[str, Kernel]:
    """What ptxas says of the kernels in a cubin."""
    entry = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers"
    )
    said = re.findall(entry, cubin.with_suffix(".log").read_text(), flags=re.DOTALL)
    names = readable([name for name, *_ in said])
    return {name: Kernel(int(used), int(stack), int(spilled)) for name, (_, stack, spilled, used) in zip(names, said)}


def argument_bytes(cubin: Path) -> dict[str, int]:
    """The bytes of the kernels' arguments, from a cubin for sm_90."""
    usage = output(cuobjdump() or "cuobjdump", "-res-usage", str(cubin))
    found = re.findall(r"Function (\w+):.*?CONSTANT\[0\]:(\d+)", usage, flags=re.DOTALL)
    return dict(zip(readable([name for name, _ in found]), (int(total) - RESERVED_BYTES for _, total in found)))


def summarize(folder: Path) -> Mapping[str, object]:
    registers: dict[str, dict[str, int]] = {}
    arguments: dict[str, int] = {}
    for (source, architecture), cubin in compile_all(folder).items():
        for name, kernel in kernels(cubin).items():
            registers.setdefault(f"{source}: {name}", {})[f"sm_{architecture}"] = kernel.registers
        if architecture == "90":
            arguments |= {f"{source}: {name}": size for name, size in argument_bytes(cubin).items()}
    nvcc = output("nvcc", "--version").splitlines()[-2:]
    return {
        "nvcc": " ".join(nvcc),
        "registers": dict(sorted(registers.items())),
        "argument_bytes": dict(sorted(arguments.items())),
    }


def main() -> int:
    if (reason := missing()) is not None:
        print(f"benchmarks.cuda_registers: {reason}", file=sys.stderr)
        return 1
    folder = ROOT / "build" / "cuda_registers"
    shutil.rmtree(folder, ignore_errors=True)
    SUMMARY.write_text(json.dumps(summarize(folder), indent=1) + "\n")
    print(f"wrote {SUMMARY.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
