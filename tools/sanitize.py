"""The C++ extension under gcc's sanitizers: ``make sanitize``, or ``make sanitize ARGS=thread`` for one build of them.

* ``address``: AddressSanitizer and UndefinedBehaviorSanitizer together, over the native tier and the reference tier,
  whose tests run on the native backend here.
* ``thread``: ThreadSanitizer, over every kernel on several threads (tools/sanitize_probes.py). It looks at the
  extension's own frames only: torch and Python are not compiled for it.

Each builds the extension in a copy of the sources, build/sanitize/NAME, and first shows that it is that one which is
imported, and that each sanitizer ends a process which does wrong by its loops. Ends with a line for each sanitizer, and
0 if all are clean. Leaks are not looked for: Python and torch keep memory until the process ends.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("csrc", "esam_kernels", "python_tests", "benchmarks", "docs", "examples", "tools")
FILES = ("setup.py", "pyproject.toml", "README.md", "CHANGELOG.md", "Makefile")
# Python may be built with -fwrapv, which setuptools hands on: an overflow is then no fault. The type information of
# torch's classes, which "vptr" compares, is not exported.
FLAGS = "-O1 -g1 -fno-omit-frame-pointer -fno-wrapv"
TESTS = ("python_tests/native", "python_tests/reference")


@dataclass(frozen=True)
class Sanitizer:
    """A sanitizer, a probe that it has to stop, and what it says then."""

    name: str
    probe: str
    report: str


@dataclass(frozen=True)
class Build:
    """The sanitizers that one build of the extension holds, and what is run on it."""

    name: str
    flags: str
    libraries: tuple[str, ...]
    symbol: bytes  # that a library built so asks for
    sanitizers: tuple[Sanitizer, ...]
    runs_tests: bool

    @property
    def folder(self) -> Path:
        """Where it is built and run."""
        return ROOT / "build" / "sanitize" / self.name


BUILDS = {
    build.name: build
    for build in (
        Build(
            "address",
            "-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined",
            ("libasan.so", "libubsan.so"),
            b"__asan_report_",
            (
                Sanitizer("AddressSanitizer", "memory", "heap-buffer-overflow"),
                Sanitizer("UndefinedBehaviorSanitizer", "arithmetic", "signed integer overflow"),
            ),
            runs_tests=True,
        ),
        Build(
            "thread",
            "-fsanitize=thread",
            ("libtsan.so",),
            b"__tsan_write",
            (Sanitizer("ThreadSanitizer", "race", "data race"),),
            runs_tests=False,
        ),
    )
}


def main() -> int:
    """Build, try and run. Returns 0 if all sanitizers are clean."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("builds", nargs="*", default=[*BUILDS], metavar=f"{{{','.join(BUILDS)}}}")
    parser.add_argument("-k", help="the tests that pytest is to choose")
    arguments = parser.parse_args()
    if unknown := set(arguments.builds) - set(BUILDS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(BUILDS)}")
    if shutil.which("g++") is None:
        raise SystemExit("there is no g++ here: the sanitizers are gcc's")
    lines, clean = [], True
    for build in (BUILDS[name] for name in arguments.builds):
        began = time.monotonic()
        fault = run(build, arguments.k)
        clean &= fault is None
        told = f"ok ({time.monotonic() - began:.0f} s)" if fault is None else f"FAILED: {fault}"
        lines += [f"{sanitizer.name}: {told}" for sanitizer in build.sanitizers]
    print("\n".join(lines))
    return 0 if clean else 1


def run(build: Build, chosen: str | None) -> str | None:
    """What is wrong, in one line; None: nothing."""
    print(f"== {build.name}: building in {build.folder} ==", flush=True)
    copy_sources(build.folder)
    compile_extension(build)
    if fault := fault_of_the_watch(build):
        return fault
    print(f"== {build.name}: running ==", flush=True)
    if not build.runs_tests:
        process = probe(build, "threads")
        print(process.stdout, end="")
        return None if process.returncode == 0 else "see the report above"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    command += ["-k", chosen] if chosen else []
    status = subprocess.run(command, cwd=build.folder, env=environment(build), check=False).returncode
    return None if status == 0 else f"pytest ended with {status}, see above"


def copy_sources(folder: Path) -> None:
    """The sources as they are now. What was compiled there stays, so that only what has changed is compiled again."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "_build.json")
    for name in COPIED:
        if name != "esam_kernels":  # the extension is in there
            shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(ROOT / name, folder / name, ignore=ignored, dirs_exist_ok=True)
    for name in FILES:
        shutil.copy2(ROOT / name, folder / name)


def compile_extension(build: Build) -> None:
    """setup.py's own build, with the sanitizers' flags behind its own."""
    flags = {"CXX": "g++", "ESAM_KERNELS_NATIVE": "1", "ESAM_KERNELS_CXXFLAGS": f"{FLAGS} {build.flags}"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    process = subprocess.run(
        command,
        cwd=build.folder,
        env={**os.environ, **flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if process.returncode != 0:
        raise SystemExit(f"{process.stdout}\nthe extension could not be built with {build.flags}")


def fault_of_the_watch(build: Build) -> str | None:
    """Why the sanitizers would see nothing: another extension is imported, or a probe gets through. None: they see."""
    process = probe(build, "where")
    path = Path(process.stdout.strip().splitlines()[-1]) if process.stdout.strip() else Path()
    if process.returncode != 0 or build.folder not in path.parents:
        return f"the extension is not imported from {build.folder}: {process.stdout.strip()}"
    if build.symbol not in path.read_bytes():
        return f"{path} is not built with {build.flags}"
    for sanitizer in build.sanitizers:
        process = probe(build, sanitizer.probe)
        if process.returncode == 0 or sanitizer.report not in process.stdout:
            return f"{sanitizer.name} does not see the fault of the probe {sanitizer.probe}: {process.stdout[-2000:]}"
    return None


def probe(build: Build, name: str) -> subprocess.CompletedProcess[str]:
    """A function of tools/sanitize_probes.py in a process of its own."""
    return subprocess.run(
        [sys.executable, "tools/sanitize_probes.py", name],
        cwd=build.folder,
        env=environment(build),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def environment(build: Build) -> dict[str, str]:
    """Python is not built with a sanitizer: the sanitizer's library has to be there before anything else is."""
    # Without the C++ library beside it, AddressSanitizer finds no exceptions to watch.
    preloaded = " ".join(map(library, (*build.libraries, "libstdc++.so.6")))
    return {
        **os.environ,
        "LD_PRELOAD": preloaded,
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1:exitcode=66",
        "PYTHONPATH": str(build.folder),
        "ESAM_KERNELS_BACKEND": "native",
        "CUDA_VISIBLE_DEVICES": "",
    }


def library(name: str) -> str:
    """Where gcc has a library of its own.

    Raises:
        SystemExit: it has none.
    """
    path = subprocess.run(["g++", f"-print-file-name={name}"], check=True, stdout=subprocess.PIPE, text=True).stdout
    if not os.path.isabs(path.strip()):
        raise SystemExit(f"gcc has no {name} here: install its sanitizers (on Debian and Ubuntu libgcc-12-dev)")
    return path.strip()


if __name__ == "__main__":
    raise SystemExit(main())
