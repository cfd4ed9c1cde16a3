"""Builds the extensions; all else but the name of the licence is pyproject.toml.

``esam_kernels._cuda`` is built by csrc/cuda/build_cuda.py, which says how. ``esam_kernels._native``, the C++ extension
for the CPU, is built here, where a compiler and torch are at hand.

``ESAM_KERNELS_NATIVE=auto|0|1``: ``auto`` (the default) builds it if it can and otherwise records why not, for ``python
-m esam_kernels doctor``; ``0`` leaves it out, ``1`` fails where it cannot be built. The torch that it is compiled
against is the one of the environment that the package is installed into, also in pip's isolated build: fetching a
second torch, perhaps of another version, would be no help.

``ESAM_KERNELS_CXXFLAGS`` is added behind the flags below, where it wins, and to the linker's: tools/sanitize.py builds
with sanitizers by it.
"""

from __future__ import annotations

import os
import shlex
import sys
from typing import Any

from setuptools import setup

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "csrc"))
sys.path.insert(0, os.path.join(sys.path[0], "cuda"))
import build_cuda
import build_record

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
COMPILE_FLAGS = [
    "-O3",
    "-std=c++20",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    # Options that one of the two compilers lacks.
    "-Wno-unknown-warning-option",
    # clang says so of a loop that it leaves as it is.
    "-Wno-pass-failed",
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
    compiler = build_record.find_compiler()
    if compiler is None:
        raise CannotBuild(f"there was no C++ compiler ({os.environ.get('CXX') or 'g++ or clang++'})")
    os.environ.setdefault("CXX", compiler)
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        raise CannotBuild(f"torch could not be imported when the package was built ({error})") from None
    build_record.built("native", torch=torch.__version__, compiler=build_record.version_of(compiler))

    added_flags = shlex.split(os.environ.get("ESAM_KERNELS_CXXFLAGS", ""))
    extension = CppExtension(
        "esam_kernels._native",
        NATIVE_SOURCES,
        depends=build_record.sources("native"),
        include_dirs=[build_record.digest_folder("native")],
        define_macros=[("ESAM_TORCH_VERSION", f'"{torch.__version__}"')],
        extra_compile_args=COMPILE_FLAGS + added_flags,
        extra_link_args=added_flags,
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
                self.extensions = [one for one in self.extensions if isinstance(one, build_cuda.CudaExtension)]
                for extension in self.extensions:
                    self.build_extension(extension)

    return OptionalBuildExtension


def report(reason: str) -> None:
    """One line on why the package goes without its extension; ``doctor`` repeats it."""
    build_record.missing("native", reason)
    print(f"esam_kernels: built without the C++ extension, the reference backend will serve the CPU: {reason}")
    sys.stdout.flush()


def extension_arguments() -> dict[str, Any]:
    """What setup() is told about extensions."""
    mode = native_mode()
    if mode == "0":
        build_record.missing("native", "ESAM_KERNELS_NATIVE was 0 when the package was built")
        return {}
    try:
        extension, build_extension = native_extension()
    except CannotBuild as error:
        if mode == "1":
            raise SystemExit(f"ESAM_KERNELS_NATIVE=1, but {error}") from None
        report(str(error))
        return {}
    return {"ext_modules": [extension], "cmdclass": {"build_ext": build_extension}}


build_record.find_torch()
setup(license="Apache-2.0", **build_record.added_to(build_cuda.added_to(extension_arguments())))
