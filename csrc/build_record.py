"""What was built, for setup.py: ``_build.json`` in the package says for which torch, or why an extension is missing.

pip hides what a build prints, and an extension for another torch may not survive being loaded: ``doctor`` and the
backends read this file instead.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

PACKAGE = "esam_kernels"
FILE = "_build.json"
NAMES = ("native", "cuda")

_record: dict[str, dict[str, str]] = {}

# By its path: the package cannot be imported where torch is missing.
_SPEC = importlib.util.spec_from_file_location("source_digest", f"{PACKAGE}/backends/source_digest.py")
assert _SPEC is not None
assert _SPEC.loader is not None
source_digest = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(source_digest)


def built(name: str, **facts: str) -> None:
    """The extension ``name`` is being built: what is known of it."""
    _record[name] = {**facts, "sources": source_digest.digest(name, Path("csrc"))}


def sources(name: str) -> list[str]:
    """The files that the extension ``name`` is compiled from, and the header that tells it their digest."""
    header = Path(digest_folder(name), "sources.h")
    text = f'#define ESAM_SOURCES "{source_digest.digest(name, Path("csrc"))}"\n'
    # Written where it changes only: what includes it is compiled again.
    if not header.exists() or header.read_text() != text:
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text(text)
    return [*map(str, source_digest.files(name, Path("csrc"))), str(header)]


def digest_folder(name: str) -> str:
    """Where that header is."""
    return os.path.abspath(f"build/digest/{name}")


def missing(name: str, reason: str) -> None:
    """The extension ``name`` is not built, and why."""
    _record[name] = {"missing": reason}


def is_missing(name: str) -> bool:
    """Whether the extension ``name`` is not built."""
    return "missing" in _record.get(name, {"missing": ""})


def _write(folder: str) -> None:
    """Write the record into ``folder``, and leave no older extension there where none was built."""
    if not os.path.isdir(folder):
        return
    for name in filter(is_missing, NAMES):
        for path in glob.glob(os.path.join(glob.escape(folder), f"_{name}.*.so")):
            os.remove(path)
    with open(os.path.join(folder, FILE), "w") as file:
        json.dump(_record, file, indent=1, sort_keys=True)


def added_to(arguments: dict[str, Any]) -> dict[str, Any]:
    """``arguments`` of setup(), with commands that write the record. The last to be added."""
    commands = arguments.get("cmdclass", {})

    class BuildPython(commands.get("build_py", build_py)):  # type: ignore[misc]
        def run(self) -> None:
            super().run()
            _write(PACKAGE if self.editable_mode else os.path.join(self.build_lib, PACKAGE))

    class BuildExtensions(commands.get("build_ext", build_ext)):  # type: ignore[misc]
        def run(self) -> None:
            super().run()
            _write(os.path.join(self.build_lib, PACKAGE))
            if self.inplace or self.editable_mode:
                _write(PACKAGE)

    return {**arguments, "cmdclass": {**commands, "build_py": BuildPython, "build_ext": BuildExtensions}}


def find_torch() -> None:
    """Let ``import torch`` find the torch of the environment that pip installs into.

    pip builds where only the build's own requirements can be imported, but with the environment's Python: its
    site-packages are known, and are searched last.
    """
    folders = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    if not sys.flags.no_site and sys.prefix == sys.base_prefix:
        folders.append(site.getusersitepackages())
    for folder in folders:
        if folder not in sys.path and os.path.isdir(os.path.join(folder, "torch")):
            sys.path.append(folder)
            return


def find_compiler() -> str | None:
    """The C++ compiler: ``CXX``, or g++, or clang++; None where there is none."""
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["g++", "clang++"]
    return next((name for name in names if shutil.which(name)), None)


def version_of(compiler: str) -> str:
    """The first line of what the compiler says of itself."""
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    return said.splitlines()[0] if said else compiler
