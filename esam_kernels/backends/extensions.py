"""The compiled extensions, and what their build has recorded: for which torch, or why one is missing.

``_build.json`` is written by setup.py beside the extensions. It is read first: an extension that was built for another
torch may crash when it is loaded. One that was built from other sources loads, but may lack what the package calls: the
digest of the sources is compiled in, and compared with that of csrc.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import torch

from esam_kernels.backends import source_digest

HOW_TO_BUILD = "run `pip install --force-reinstall --no-deps .` in the source folder of esam_kernels"
HOW_TO_REBUILD = "run `python setup.py build_ext --inplace` in the source folder of esam_kernels"
_PACKAGE = Path(__file__).resolve().parent.parent
_RECORD = _PACKAGE / "_build.json"
_CSRC = _PACKAGE.parent / "csrc"


@functools.cache
def _records() -> dict[str, dict[str, str]]:
    try:
        records: dict[str, dict[str, str]] = json.loads(_RECORD.read_text())
    except (OSError, ValueError):
        return {}
    return records


def record(name: str) -> dict[str, str]:
    """What the build has recorded about the extension ``_name``; empty where it was not built by this setup.py."""
    return _records().get(name, {})


def why_missing(name: str) -> str | None:
    """Why the extension ``_name`` was not built, as far as that is known."""
    if not record(name) and _CSRC.is_dir():
        return (
            f"Python took the package from its source folder, {_PACKAGE.parent}, where it was not built; to use a "
            "package that you have installed, start Python in another folder"
        )
    return record(name).get("missing")


def is_present(name: str) -> bool:
    """Whether there is a compiled file, of use or not."""
    return importlib.util.find_spec(f"esam_kernels._{name}") is not None


def load(name: str) -> tuple[ModuleType | None, str | None]:
    """The extension ``_name``, and in one line why it cannot be used (None if it can)."""
    module = f"esam_kernels._{name}"
    for_torch = record(name).get("torch")
    if for_torch is not None and is_another_torch(for_torch):
        return None, another_torch(for_torch)
    try:
        extension = importlib.import_module(module)
    except ModuleNotFoundError:
        reason = why_missing(name)
        return None, f"{module} was not built{f': {reason}' if reason else ''}"
    except ImportError as error:
        return None, f"{module} cannot be loaded ({error}): {HOW_TO_BUILD}"
    other = other_sources(name, extension)
    return (extension, None) if other is None else (None, other)


def other_sources(name: str, extension: ModuleType) -> str | None:
    """In one line, that the extension was built from other sources than this package's; None if from these."""
    found = getattr(extension, "SOURCES", "not known")
    in_csrc = source_digest.digest(name, _CSRC)
    expected = in_csrc or record(name).get("sources", found)
    if found == expected:
        return None
    how = HOW_TO_REBUILD if in_csrc else HOW_TO_BUILD
    return f"the extension was built from other C++ sources (found {found}, this package has {expected}): {how}"


def is_another_torch(version: str) -> bool:
    """Whether this is not the torch in use. Local parts are left out: a tensor's layout is that of the CUDA build."""
    return version.split("+")[0] != torch.__version__.split("+")[0]


def another_torch(version: str) -> str:
    """In one line, that an extension is for another torch."""
    return f"the extension was built for torch {version}, found torch {torch.__version__}: {HOW_TO_BUILD}"
