"""Fresh environments, for dist.py and matrix.py."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, cwd: Path = ROOT, check: bool = True, **environment: str) -> str:
    """What a command prints, without a PYTHONPATH of ours.

    Raises:
        SystemExit: it failed; its output is the message.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if check and process.returncode != 0:
        raise SystemExit(f"failed ({process.returncode}): {' '.join(map(str, command))}\n{process.stdout}")
    return process.stdout


def environment(folder: Path, python: str, lends_packages: bool = False) -> Path:
    """The Python of a new environment in ``folder``.

    ``lends_packages``: the packages of the running environment can be imported too, so that torch is not installed
    again. Not those that are installed in place: a path file does not read other path files.
    """
    run(python, "-m", "venv", folder)
    found = folder / "bin" / "python"
    if lends_packages:
        site = Path(run(found, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return found
