"""What the package says of itself to pip."""

import email
import os
import shutil
import subprocess
import sys
from pathlib import Path

import esam_kernels

ROOT = Path(__file__).resolve().parents[2]


def test_setuptools_reads_the_metadata_without_a_warning(tmp_path):
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "esam_kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    told = {**os.environ, "ESAM_KERNELS_NATIVE": "0", "ESAM_KERNELS_CUDA": "0"}
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info"], cwd=tmp_path, env=told, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "Deprecat" not in result.stdout + result.stderr
    found = email.message_from_string((tmp_path / "esam_kernels.egg-info" / "PKG-INFO").read_text())
    assert found["License"] == "Apache-2.0"
    assert found["Version"] == esam_kernels.__version__
    assert found["Requires-Python"] == ">=3.10"
