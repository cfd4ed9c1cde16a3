"""Whether Triton can launch a kernel here. It compiles its driver when it first needs it, on the user's machine."""

from __future__ import annotations

import functools
import os
import shutil
import sys
import sysconfig
from pathlib import Path


@functools.cache
def why_not() -> str | None:
    """Why Triton's driver does not start, and what to install; None if it does. Found out once."""
    try:
        from triton import knobs, runtime
        from triton.backends.nvidia import driver as nvidia

        # Triton 3.6 compiles a launcher for each kind of kernel as well, in the middle of a step.
        if hasattr(nvidia, "make_launcher") and knobs.build.impl is None and (missing := _missing()) is not None:
            return missing
        runtime.driver.active  # noqa: B018  compiled and loaded here, unless Triton has it in its cache
    except Exception as error:
        return _missing() or f"Triton's driver does not start ({type(error).__name__}: {error})"
    return None


def _missing() -> str | None:
    """What of a C compiler and Python's headers is not there."""
    named = os.environ.get("CC")
    if named is not None and shutil.which(named) is None:
        return (
            f"Triton compiles its driver with {named!r}, which CC names and which is not there: set CC to a C compiler"
        )
    if named is None and shutil.which("gcc") is None and shutil.which("clang") is None:
        return "Triton compiles its driver, and there is no C compiler: install one (apt-get install gcc), or set CC"
    # As Triton asks: Debian's own scheme has no headers.
    scheme = sysconfig.get_default_scheme()
    headers = Path(sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"])
    if not (headers / "Python.h").exists():
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        return f"Triton compiles its driver, and {headers} has no Python.h: install it (apt-get install {package})"
    return None
