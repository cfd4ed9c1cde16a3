"""ruff, mypy on the package, clang-format on csrc. ``--fix`` formats instead. What is not installed is named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    fix = "--fix" in sys.argv
    suffixes = (".h", ".inl", ".cpp", ".cuh", ".cu")
    sources = sorted(str(path) for path in (ROOT / "csrc").rglob("*") if path.suffix in suffixes)
    checks = [
        ["ruff", "check", *(["--fix"] if fix else []), "."],
        ["ruff", "format", *([] if fix else ["--check"]), "."],
        ["clang-format", *(["-i"] if fix else ["--dry-run", "--Werror"]), *sources],
        ["mypy"],
    ]
    # The tools of this environment first, then those of the system.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    failed = False
    for tool, *arguments in checks:
        program = shutil.which(tool, path=path)
        if program is None:
            print(f"{tool}: not installed, not run")
            continue
        print(f"{tool} {' '.join(arguments[:2])}", flush=True)
        failed |= subprocess.run([program, *arguments], cwd=ROOT).returncode != 0
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
