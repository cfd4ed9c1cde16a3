"""The digest of the sources of an extension: setup.py compiles it in, so that an older extension is noticed.

setup.py loads this file by its path, before torch and the package can be imported.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

FILES = {
    "native": ("*.cpp", "*.h", "cpu/*.cpp", "cpu/*.h", "cpu/*.inl"),
    "cuda": ("cuda/*.cu", "cuda/*.cuh", "cuda/*.cpp", "cuda/*.h", "device/*.h", "philox.h"),
}
"""What each extension is compiled from, in csrc."""


def files(name: str, csrc: Path) -> list[Path]:
    """The files that the extension ``_name`` is compiled from."""
    return sorted({path for pattern in FILES.get(name, ()) for path in csrc.glob(pattern)})


def digest(name: str, csrc: Path) -> str | None:
    """The digest of these files, names and contents; None where there are none, as beside an installed package."""
    held = files(name, csrc)
    if not held:
        return None
    found = hashlib.sha256()
    for path in held:
        content = path.read_bytes()
        found.update(f"{path.relative_to(csrc).as_posix()} {len(content)}\n".encode() + content)
    return found.hexdigest()[:12]
