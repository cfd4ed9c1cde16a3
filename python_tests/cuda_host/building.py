"""Compiles csrc/cuda for the emulator, and the device functions for the host. Kept until a source changes."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CUDA = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "cuda_host"
MODULE = "_cuda_emulated"
# No contraction: nvcc is told -fmad=false, and both leave fused sums to the source.
FLAGS = ["-std=c++17", "-fPIC", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas", "-g0"]

# Asked for once, before any thread does: sysconfig shows half-filled answers to whoever comes second.
EXTENSION_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++").split()[0])


def _pybind11_includes() -> list[str]:
    """Headers of the pybind11 package, or those that torch carries."""
    if importlib.util.find_spec("pybind11"):
        import pybind11

        return [pybind11.get_include()]
    from torch.utils.cpp_extension import include_paths

    return include_paths()


def _digest() -> str:
    sources = sorted(
        path for folder in (ROOT / "csrc" / "cuda", ROOT / "csrc" / "device", HERE) for path in folder.rglob("*")
    )
    sources = [path for path in [*sources, ROOT / "csrc" / "philox.h"] if path.suffix in (".h", ".cuh", ".cu", ".cpp")]
    text = b"".join(path.read_bytes() for path in sources)
    return hashlib.sha256(text + EXTENSION_SUFFIX.encode()).hexdigest()[:16]


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr[-4000:]}")


def emulated_module() -> ModuleType:
    """``_cuda`` with its kernels running on the CPU."""
    folder = BUILD / _digest()
    library = folder / f"{MODULE}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        headers = [HERE / "emulator", sysconfig.get_path("include"), *_pybind11_includes()]
        include = [f"-I{path}" for path in headers]
        commands, objects = [], []
        for source in [*sorted(CUDA.glob("*.cu")), CUDA / "bindings.cpp"]:
            objects.append(str(folder / f"{source.stem}.o"))
            level = "-O1" if source.suffix == ".cu" else "-O0"
            defines = [f"-DESAM_CUDA_MODULE={MODULE}", "-DESAM_CUDA_EMULATED"]
            commands.append(
                [compiler(), *FLAGS, level, *defines, *include, "-x", "c++", "-c", str(source), "-o", objects[-1]]
            )
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        partial = folder / f"{os.getpid()}.so"
        _run([compiler(), "-shared", "-o", str(partial), *objects])
        partial.rename(library)
    spec = importlib.util.spec_from_file_location(MODULE, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def device_functions() -> Path:
    """The library of device_functions.cpp."""
    library = BUILD / _digest() / "device_functions.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        partial = library.with_name(f"{os.getpid()}-functions.so")
        source = HERE / "device_functions.cpp"
        _run([compiler(), *FLAGS, "-O1", f"-I{ROOT / 'csrc'}", "-shared", str(source), "-o", str(partial)])
        partial.rename(library)
    return library
