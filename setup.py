"""Builds the extensions; all else is pyproject.toml.

``esam_kernels._cuda`` is built by csrc/cuda/build_cuda.py, which says how. ``esam_kernels._native``, the C++ extension
for the CPU, is built here, where a compiler and torch are at hand.

``ESAM_KERNELS_NATIVE=auto|0|1``: ``auto`` (the default) builds it if it can and otherwise says in one line why not,
``0`` leaves it out, ``1`` fails where it cannot be built. torch is at hand under ``--no-build-isolation``: pip's
isolated build has none, and fetching a second torch, perhaps of another version, would be no help.
"""

from __future__ import annotations

import glob
import os
import shutil
import sys
from typing import Any

from setuptools import setup

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "csrc", "cuda"))
import build_cuda

NATIVE_SOURCES = [
    "csrc/autograd.cpp",
    "csrc/bindings.cpp",
    "csrc/cpu/cross_entropy.cpp",
    "csrc/cpu/isa.cpp",
    "csrc/cpu/kernels_avx2.cpp",
    "csrc/cpu/kernels_avx512.cpp",
    "csrc/cpu/kernels_portable.cpp",
    "csrc/cpu/parallel.cpp",
    "csrc/cpu/perturbation.cpp",
    "csrc/cpu/selection.cpp",
    "csrc/direct.cpp",
    "csrc/host.cpp",
]

# -ffp-contract=off: products are fused into sums only where the source says so, else two instruction sets would differ.
# The next two let loops with square roots and comparisons be vectorised; no value depends on them.
# -fopenmp only when compiling: csrc/cpu/parallel.cpp says why.
COMPILE_FLAGS = [
    "-O3",
    "-std=c++20",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-g0",
    # gcc 12 warns about its own AVX-512 header.
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
]


class CannotBuild(Exception):
    """Why there is no extension."""


def native_mode() -> str:
    """``ESAM_KERNELS_NATIVE``, checked."""
    mode = os.environ.get("ESAM_KERNELS_NATIVE", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"ESAM_KERNELS_NATIVE must be auto, 0 or 1, got {mode!r}")
    return mode


def native_extension() -> tuple[Any, type]:
    """The extension, and the command that compiles it (with ninja where it is installed)."""
    compiler = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(compiler) is None:
        raise CannotBuild(f"there is no C++ compiler ({compiler})")
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        raise CannotBuild(f"torch cannot be imported ({error}): use pip install --no-build-isolation") from None

    extension = CppExtension(
        "esam_kernels._native",
        NATIVE_SOURCES,
        depends=sorted(glob.glob("csrc/**/*.[hi]*", recursive=True)),
        define_macros=[("ESAM_TORCH_VERSION", f'"{torch.__version__}"')],
        extra_compile_args=COMPILE_FLAGS,
    )
    return extension, optional(BuildExtension) if native_mode() == "auto" else BuildExtension


def optional(build_extension: type) -> type:
    """``build_extension``, for which a failed compilation costs the extension, not the installation."""

    class OptionalBuildExtension(build_extension):  # type: ignore[misc]
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                report(f"compilation failed ({str(error).splitlines()[0]})")
                self.extensions = []

    return OptionalBuildExtension


def report(reason: str) -> None:
    """One line on why the package goes without its extension."""
    print(f"esam_kernels: built without the C++ extension, the reference backend will serve the CPU: {reason}")
    sys.stdout.flush()


def extension_arguments() -> dict[str, Any]:
    """What setup() is told about extensions."""
    mode = native_mode()
    if mode == "0":
        return {}
    try:
        extension, build_extension = native_extension()
    except CannotBuild as error:
        if mode == "1":
            raise SystemExit(f"ESAM_KERNELS_NATIVE=1, but {error}") from None
        report(str(error))
        return {}
    return {"ext_modules": [extension], "cmdclass": {"build_ext": build_extension}}


setup(**build_cuda.added_to(extension_arguments()))
