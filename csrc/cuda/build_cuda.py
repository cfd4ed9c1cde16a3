"""Builds ``esam_kernels._cuda``, for setup.py: nvcc compiles the kernels and the binding, and links them.

``ESAM_KERNELS_CUDA=auto|0|1``: ``auto`` (the default) builds it where nvcc and a CUDA build of torch are found, and
otherwise says in one line why not; ``0`` leaves it out; ``1`` builds it wherever nvcc is, and fails where it cannot.

``TORCH_CUDA_ARCH_LIST`` names the architectures, as for torch's own extensions ("8.0;9.0+PTX"). Without it: those of
the devices that are present, or else 8.0 and 9.0, with PTX for later ones.

torch's CUDAExtension is not used: the kernels know nothing of torch, and it refuses to be made where torch is a CPU
build. The CUDA runtime is linked statically, so that it does not matter which one torch brings along.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import build_record
from setuptools import Extension
from setuptools.command.build_ext import build_ext

FOLDER = "csrc/cuda"
MINIMAL_NVCC = (12, 1)  # kernel arguments of up to 32,764 bytes
FALLBACK_ARCHITECTURES = "8.0;9.0+PTX"
# Products and sums are fused where the source says so, and nowhere else: torch's rounding is part of the contract.
NVCC_FLAGS = ["-O3", "-std=c++17", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


class CannotBuild(Exception):
    """Why there is no CUDA extension."""


def added_to(arguments: dict[str, Any]) -> dict[str, Any]:
    """``arguments`` of setup(), and the CUDA extension where it is to be built."""
    mode = os.environ.get("ESAM_KERNELS_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"ESAM_KERNELS_CUDA must be auto, 0 or 1, got {mode!r}")
    if mode == "0":
        build_record.missing("cuda", "ESAM_KERNELS_CUDA was 0 when the package was built")
        return arguments
    try:
        extension = CudaExtension(required=mode == "1")
    except CannotBuild as error:
        if mode == "1":
            raise SystemExit(f"ESAM_KERNELS_CUDA=1, but {error}") from None
        report(str(error))
        return arguments
    commands = arguments.get("cmdclass", {})
    return {
        **arguments,
        "ext_modules": [*arguments.get("ext_modules", []), extension],
        "cmdclass": {**commands, "build_ext": building_cuda(commands.get("build_ext", build_ext))},
    }


def report(reason: str) -> None:
    """One line on why the package goes without this extension; ``doctor`` repeats it."""
    build_record.missing("cuda", reason)
    print(f"esam_kernels: built without the CUDA C++ extension (Triton serves CUDA devices): {reason}")
    sys.stdout.flush()


class CudaExtension(Extension):
    """What is compiled, by what, for which architectures.

    Raises:
        CannotBuild: something that it takes is missing.
    """

    def __init__(self, required: bool) -> None:
        self.nvcc = find_nvcc()
        if not required and cuda_of_torch() is None:
            raise CannotBuild("torch is not a CUDA build")
        self.includes = [sysconfig.get_path("include"), pybind11_include(), build_record.digest_folder("cuda")]
        self.architectures = architecture_flags(os.environ.get("TORCH_CUDA_ARCH_LIST") or present_architectures())
        self.objects_of = sorted(glob.glob(f"{FOLDER}/*.cu"))
        build_record.built("cuda", compiler=" ".join(self.nvcc), architectures=" ".join(self.architectures))
        super().__init__(
            "esam_kernels._cuda",
            [f"{FOLDER}/bindings.cpp"],
            depends=[*build_record.sources("cuda"), f"{FOLDER}/build_cuda.py"],
            optional=not required,
        )

    def compile_into(self, folder: str, library: str, again: bool = False) -> None:
        """Compile every source, as many at a time as there are processors, and link them.

        Nothing is done where ``folder`` says that it was, with these commands and sources: it takes a minute or more.
        ``again``: it is done all the same.
        """
        os.makedirs(folder, exist_ok=True)
        includes = [f"-I{path}" for path in self.includes]
        commands, objects = [], []
        for source in [*self.objects_of, *self.sources]:
            objects.append(os.path.join(folder, f"{os.path.basename(source)}.o"))
            commands.append([*self.nvcc, *NVCC_FLAGS, *self.architectures, *includes, "-c", source, "-o", objects[-1]])
        link = [*self.nvcc, *self.architectures, "-shared", "-cudart", "static", "-o", library, *objects]
        done = Path(folder, "done")
        # A newer toolkit may come under the old name, a link.
        made_by = [os.path.realpath(self.nvcc[0]), build_record.source_digest.digest("cuda", Path("csrc"))]
        text = "\n".join(map(str, [*commands, link, *made_by]))
        if not again and os.path.exists(library) and done.exists() and done.read_text() == text:
            return
        done.unlink(missing_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, commands))
        os.makedirs(os.path.dirname(library), exist_ok=True)
        run(link)
        done.write_text(text)


def building_cuda(command: type) -> type:
    """``command``, a build_ext, that knows how a CudaExtension is built."""

    class BuildWithCuda(command):  # type: ignore[misc]
        def build_extension(self, extension: Any) -> None:
            if not isinstance(extension, CudaExtension):
                super().build_extension(extension)
                return
            try:
                folder, library = os.path.join(self.build_temp, "cuda"), self.get_ext_fullpath(extension.name)
                extension.compile_into(folder, library, again=bool(self.force))
            except CannotBuild as error:
                if not extension.optional:
                    raise SystemExit(f"ESAM_KERNELS_CUDA=1, but {error}") from None
                report(str(error).splitlines()[0])

    return BuildWithCuda


def run(command: list[str]) -> None:
    """Run nvcc.

    Raises:
        CannotBuild: it failed.
    """
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise CannotBuild(f"nvcc failed ({' '.join(command)}):\n{result.stdout}{result.stderr}")


def find_nvcc() -> list[str]:
    """nvcc, and the host compiler that it is to use if one is named."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [os.path.join(home, "bin", "nvcc") for home in homes if home] + ["nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next((path for path in map(shutil.which, candidates) if path), None)
    if nvcc is None:
        raise CannotBuild("nvcc is not found (set CUDA_HOME, or put it on PATH)")
    compiler = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(compiler) is None:
        raise CannotBuild(f"there is no C++ compiler ({compiler})")
    version = re.search(
        r"release (\d+)\.(\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    )
    if version is None or tuple(map(int, version.groups())) < MINIMAL_NVCC:
        found = version.group(0) if version else "of an unknown version"
        raise CannotBuild(f"{nvcc} is {found}, and {'.'.join(map(str, MINIMAL_NVCC))} is needed")
    return [nvcc, "-ccbin", compiler] if "CXX" in os.environ else [nvcc]


def cuda_of_torch() -> str | None:
    """The CUDA version of the torch at hand, None without one."""
    try:
        import torch
    except ImportError:
        return None
    return torch.version.cuda


def pybind11_include() -> str:
    """The headers of the pybind11 package, or those that torch carries."""
    if importlib.util.find_spec("pybind11") is not None:
        import pybind11

        return str(pybind11.get_include())
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        include = os.path.join(spec.submodule_search_locations[0], "include")
        if os.path.exists(os.path.join(include, "pybind11", "pybind11.h")):
            return include
    raise CannotBuild("there are no pybind11 headers (pip install pybind11)")


def present_architectures() -> str:
    """Those of the devices that are present, as TORCH_CUDA_ARCH_LIST would name them."""
    try:
        import torch

        if torch.cuda.is_available():
            found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
            return ";".join(f"{major}.{minor}" for major, minor in sorted(found))
    except ImportError:
        pass
    return FALLBACK_ARCHITECTURES


def architecture_flags(names: str) -> list[str]:
    """nvcc's flags for a list such as "8.0;9.0+PTX"."""
    flags = []
    for name in re.split(r"[;\s,]+", names.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+[a-z]?)(\+PTX)?", name)
        if match is None:
            raise CannotBuild(f"TORCH_CUDA_ARCH_LIST holds {name!r}: write numbers, such as 8.0;9.0+PTX")
        number = match.group(1) + match.group(2)
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match.group(3):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags
