"""Builds sdist and wheel into dist/, and proves them: ``make dist``.

The sdist is unpacked and builds the wheel by itself. The wheel goes into fresh environments, where ``doctor`` and a
step run from another directory: with a compiler, without one, and with an extension that is for another torch. A build
without torch records that as its reason.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from fresh import ROOT, environment, run

DIST = ROOT / "dist"
STEP = """
import torch, esam_kernels
model = torch.nn.Linear(4, 3)
optimizer = esam_kernels.ESAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
before = model.weight.detach().clone()
for _ in range(3):
    optimizer.step(lambda x, y: esam_kernels.cross_entropy(model(x), y), torch.randn(8, 4), torch.randint(3, (8,)))
assert not torch.equal(model.weight, before) and model.weight.isfinite().all()
print(esam_kernels.__file__)
"""
# What the wheel may hold: modules, the marker of type hints, the record of the build, extensions.
ALLOWED = re.compile(r"esam_kernels/(.+/)?(\w+\.py|py\.typed|_build\.json|_(native|cuda)\.[\w-]+\.so)$")


def main() -> int:
    """Build and prove. Returns 0, or stops with what is wrong."""
    DIST.mkdir(exist_ok=True)
    for old in [*DIST.glob("*.tar.gz"), *DIST.glob("*.whl")]:
        old.unlink()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = unpacked(built_sdist(), folder)
        wheel = built_wheel(source, DIST)
        check_wheel(wheel, extension=True)
        proves(wheel, folder / "with compiler", "native")
        check_another_torch(folder / "with compiler")

        pure = built_wheel(source, folder / "pure", CXX="no-such-compiler")
        check_wheel(pure, extension=False)
        said = proves(pure, folder / "without compiler", "reference")
        expect("there was no C++ compiler (no-such-compiler)" in said, f"doctor does not tell the reason:\n{said}")

        blank = environment(folder / "blank", sys.executable)
        run(blank, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder / "blank wheel", source)
        (found,) = (folder / "blank wheel").glob("*.whl")
        expect(
            "torch could not be imported" in record(found)["native"]["missing"], "no reason for a build without torch"
        )
    print(f"proved: {', '.join(path.name for path in sorted(DIST.iterdir()))}")
    return 0


def expect(condition: bool, message: str) -> None:
    """Stop with ``message`` unless ``condition`` holds."""
    if not condition:
        raise SystemExit(message)


def built_sdist() -> Path:
    """The sdist, in dist/."""
    code = "import setuptools.build_meta as build; build.build_sdist('dist')"
    run(sys.executable, "-c", code, ESAM_KERNELS_NATIVE="0", ESAM_KERNELS_CUDA="0")
    (found,) = DIST.glob("*.tar.gz")
    return found


def unpacked(sdist: Path, folder: Path) -> Path:
    """Where the sdist was unpacked. It holds every source that git knows, and nothing that was built."""
    shutil.unpack_archive(sdist, folder)
    (source,) = (path for path in folder.iterdir() if path.is_dir())
    held = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.suffix != ".pyc"}
    expected = {name for name in expected if (ROOT / name).is_file()}
    expect(expected <= held, f"the sdist lacks {sorted(expected - held)}")
    stray = [name for name in held if name.endswith((".so", ".o", ".pyc", "_build.json"))]
    expect(not stray, f"the sdist holds what was built: {stray}")
    return source


def built_wheel(source: Path, folder: Path, **variables: str) -> Path:
    """The wheel that plain pip builds from ``source``, in its isolated build."""
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source, **variables)
    (found,) = folder.glob("*.whl")
    return found


def record(wheel: Path) -> dict[str, dict[str, str]]:
    """What the build has recorded in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        found: dict[str, dict[str, str]] = json.loads(archive.read("esam_kernels/_build.json"))
    return found


def check_wheel(wheel: Path, extension: bool) -> None:
    """Whether the wheel is tagged for what it holds, and holds nothing stray."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    stray = [name for name in names if not ALLOWED.match(name) and ".dist-info/" not in name]
    expect(not stray, f"{wheel.name} holds {stray}")
    expect(any("_native." in name for name in names) == extension, f"{wheel.name}: {record(wheel)}")
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}" if extension else "py3-none-any"
    expect(tag in wheel.name, f"{wheel.name} should be tagged {tag}")


def proves(wheel: Path, folder: Path, backend: str) -> str:
    """What doctor says of the wheel in a fresh environment, where a step runs too."""
    python = environment(folder, sys.executable, lends_packages=True)
    run(python, "-m", "pip", "install", "-q", "--no-deps", wheel)
    said = run(python, "-m", "esam_kernels", "doctor", cwd=folder)
    expect(f"default backend: {backend}" in said, f"the backend should be {backend}:\n{said}")
    where = run(python, "-c", STEP, cwd=folder).splitlines()[-1]
    expect(where.startswith(str(folder)), f"the step ran from {where}")
    return said


def check_another_torch(folder: Path) -> None:
    """Whether an extension for another torch costs one line, and nothing else."""
    (path,) = folder.rglob("_build.json")
    path.write_text(json.dumps({"native": {"torch": "1.0.0"}}))
    said = run(folder / "bin" / "python", "-c", STEP, cwd=folder).splitlines()
    lines = [line for line in said if "built for torch 1.0.0, found" in line]
    expect(len(lines) == 1, "an extension for another torch should be told in one line:\n" + "\n".join(said))


if __name__ == "__main__":
    sys.exit(main())
