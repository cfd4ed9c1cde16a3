"""clang++ compiles the kernels of every instruction set (g++ does so at every build); nvcc runs where it has to."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cpu"


@pytest.mark.skipif(shutil.which("clang++") is None, reason="clang++ is not installed")
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_clang_compiles_the_kernels(isa):
    command = ["clang++", "-O0", "-std=c++20", "-fPIC", "-c", str(SOURCES / f"kernels_{isa}.cpp"), "-o", "/dev/null"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (process.returncode, [line for line in process.stderr.splitlines() if "error" in line]) == (0, [])


@pytest.fixture
def cuda_build(tmp_path, monkeypatch):
    """csrc/cuda/build_cuda.py in a folder of its own, and the commands that it would give to nvcc."""
    csrc = tmp_path / "csrc"
    shutil.copytree(SOURCES.parent, csrc)
    (tmp_path / "esam_kernels" / "backends").mkdir(parents=True)
    shutil.copy(
        SOURCES.parents[1] / "esam_kernels" / "backends" / "source_digest.py", tmp_path / "esam_kernels/backends"
    )
    monkeypatch.chdir(tmp_path)
    for name in ("build_cuda", "build_record"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(csrc))
    monkeypatch.syspath_prepend(str(csrc / "cuda"))
    build_cuda = importlib.import_module("build_cuda")
    commands = []

    def run(command):
        commands.append(command)
        Path(command[command.index("-o") + 1]).touch()

    monkeypatch.setattr(build_cuda, "run", run)
    monkeypatch.setattr(build_cuda, "find_nvcc", lambda: ["nvcc"])
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    yield build_cuda, commands
    for name in ("build_cuda", "build_record"):
        sys.modules.pop(name, None)


def test_the_cuda_extension_is_compiled_again_only_where_something_has_changed(cuda_build, monkeypatch):
    """setuptools looks at the times of files, which a copy of the folder makes new."""
    build_cuda, commands = cuda_build

    def compiled(**options):
        commands.clear()
        build_cuda.CudaExtension(required=True).compile_into("build", "lib/_cuda.so", **options)
        return len(commands)

    everything = compiled()
    assert everything == 1 + len(list(Path("csrc/cuda").glob("*.c*"))) - len(list(Path("csrc/cuda").glob("*.cuh")))
    for path in Path("csrc").rglob("*.*"):
        path.touch()
    assert compiled() == 0
    assert compiled(again=True) == everything
    Path("lib/_cuda.so").unlink()
    assert compiled() == everything
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert compiled() == everything
    with Path("csrc/device/numbers.h").open("a") as header:
        header.write("// another\n")
    assert compiled() == everything

    def fails(command):
        raise build_cuda.CannotBuild("nvcc failed")

    with monkeypatch.context() as patch:
        patch.setattr(build_cuda, "run", fails)
        with pytest.raises(build_cuda.CannotBuild):
            compiled(again=True)
    assert compiled() == everything
