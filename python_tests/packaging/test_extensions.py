"""What the package knows of its compiled extensions without loading them, and what a build leaves behind."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from esam_kernels import backends, doctor
from esam_kernels.backends import extensions, source_digest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def recorded(monkeypatch, tmp_path):
    """Puts another record in the place of the package's."""

    def put(record):
        (tmp_path / "_build.json").write_text(json.dumps(record))
        monkeypatch.setattr(extensions, "_RECORD", tmp_path / "_build.json")
        extensions._records.cache_clear()

    yield put
    extensions._records.cache_clear()


def test_an_extension_for_another_torch_is_not_loaded(recorded, monkeypatch):
    recorded({"native": {"torch": "1.9.0+cpu"}})
    monkeypatch.setattr(extensions.importlib, "import_module", lambda name: pytest.fail(f"{name} was loaded"))
    module, reason = extensions.load("native")
    assert module is None
    assert f"built for torch 1.9.0+cpu, found torch {torch.__version__}" in reason


@pytest.fixture
def loads(monkeypatch):
    """Puts a module in the place of an extension that is loaded."""

    def put(**attributes):
        monkeypatch.setattr(extensions.importlib, "import_module", lambda name: SimpleNamespace(**attributes))

    return put


@pytest.mark.parametrize(("attributes", "found"), [({}, "not known"), ({"SOURCES": "0123456789ab"}, "0123456789ab")])
@pytest.mark.parametrize("name", ["native", "cuda"])
def test_an_extension_of_other_sources_than_csrc_holds_is_not_used(recorded, loads, name, attributes, found):
    recorded({})
    loads(**attributes)
    module, reason = extensions.load(name)
    assert module is None
    assert f"found {found}, this package has {source_digest.digest(name, ROOT / 'csrc')}" in reason
    assert "run `python setup.py build_ext --inplace` in the source folder" in reason


@pytest.mark.parametrize("name", ["native", "cuda"])
def test_an_extension_of_the_sources_in_csrc_is_used(recorded, loads, name):
    recorded({name: {"sources": "of a build that was overwritten"}})
    loads(SOURCES=source_digest.digest(name, ROOT / "csrc"))
    module, reason = extensions.load(name)
    assert reason is None
    assert module is not None


def test_without_csrc_the_record_of_the_build_says_which_sources(recorded, loads, monkeypatch, tmp_path):
    monkeypatch.setattr(extensions, "_CSRC", tmp_path)
    recorded({"native": {"sources": "new"}})
    loads(SOURCES="old")
    _, reason = extensions.load("native")
    assert "found old, this package has new" in reason
    assert "pip install --force-reinstall --no-deps ." in reason
    loads(SOURCES="new")
    assert extensions.load("native")[1] is None
    recorded({})
    assert extensions.load("native")[1] is None


def test_the_digest_is_that_of_names_and_contents(tmp_path):
    def digest(**contents):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, content in contents.items():
            (folder / f"{name}.cpp").write_text(content)
        return source_digest.digest("native", folder)

    assert digest() is None
    assert digest(a="1", b="2") == digest(b="2", a="1")
    assert len({digest(a="1", b="2"), digest(a="2", b="1"), digest(a="1", c="2"), digest(a="12", b="")}) == 4


@pytest.mark.parametrize("name", ["native", "cuda"])
def test_the_digest_covers_all_that_is_compiled(name):
    """Whatever a source includes, and what that includes."""
    csrc = ROOT / "csrc"
    covered = set(source_digest.files(name, csrc))
    included = {
        (path.parent / other).resolve()
        for path in covered
        for other in re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE)
        if other != "sources.h"
    }
    # A header may be named from the folder of csrc too.
    assert {path if path.exists() else csrc / path.name for path in included} <= covered
    sources = {"native": re.findall(r'"(csrc/.+\.cpp)"', (ROOT / "setup.py").read_text()), "cuda": []}[name]
    assert {ROOT / source for source in sources} <= covered


@pytest.mark.skipif(not extensions.is_present("native"), reason="the C++ extension is not built")
def test_a_stale_extension_costs_one_line_and_the_fallback(tmp_path):
    for name in ("csrc", "esam_kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    with open(tmp_path / "csrc" / "host.cpp", "a") as file:
        file.write("// Edited after the build.\n")
    code = (
        "import torch, esam_kernels\n"
        "for _ in range(2): print(esam_kernels.cross_entropy(torch.zeros(1, 4), torch.tensor([3])).item())\n"
        "from esam_kernels import doctor; print(doctor._build('native'))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    (line,) = process.stderr.splitlines()
    assert "backend 'native' is not available" in line
    assert "built from other C++ sources" in line
    first, second, built = process.stdout.splitlines()
    assert float(first) == float(second) == pytest.approx(1.3862944)
    assert "of no use: the extension was built from other C++ sources" in built


def test_the_cuda_build_of_the_same_torch_is_not_another(recorded):
    recorded({"none_such": {"torch": torch.__version__.split("+")[0] + "+cu999"}})
    _, reason = extensions.load("none_such")
    assert reason == "esam_kernels._none_such was not built"


def test_the_reason_of_the_build_is_told(recorded):
    recorded({"none_such": {"missing": "there was no C++ compiler (g++)"}})
    _, reason = extensions.load("none_such")
    assert reason == "esam_kernels._none_such was not built: there was no C++ compiler (g++)"


def test_a_source_folder_where_nothing_was_built_hides_an_installed_package(recorded):
    recorded({})
    _, reason = extensions.load("none_such")
    folder = f"Python took the package from its source folder, {ROOT}, where it was not built"
    advice = "to use a package that you have installed, start Python in another folder"
    assert reason == f"esam_kernels._none_such was not built: {folder}; {advice}"
    assert doctor._build("none_such") == f"not built: {folder}; {advice}"


@pytest.mark.parametrize(("present", "level"), [(True, logging.WARNING), (False, logging.INFO)])
def test_one_line_says_that_an_extension_is_of_no_use(monkeypatch, caplog, present, level):
    monkeypatch.setattr(extensions, "is_present", lambda name: present)
    monkeypatch.setattr(
        backends, "unavailable", lambda name, device: None if name == "reference" else "for another torch"
    )
    with caplog.at_level(logging.DEBUG, "esam_kernels"):
        assert backends._choose(backends._DEFAULT, torch.device("cpu")) is backends.load("reference")
    (line,) = [record for record in caplog.records if "not available" in record.getMessage()]
    assert line.levelno == level
    assert "for another torch" in line.getMessage()


def test_doctor_tells_what_was_built_where_no_device_could_use_it(recorded, monkeypatch):
    recorded({"cuda": {"missing": "nvcc is not found"}, "native": {"torch": "2.5.0", "compiler": "g++ 12"}})
    monkeypatch.setattr(extensions, "is_present", lambda name: name == "native")
    assert doctor._build("cuda") == "not built: nvcc is not found"
    built = "built for torch 2.5.0, by g++ 12, and of no use: the extension was built for torch 2.5.0, found torch"
    assert doctor._build("native").startswith(built)


def build(tree, *command, **environment):
    process = subprocess.run(
        [sys.executable, "setup.py", "-q", *command],
        cwd=tree,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout + process.stderr


@pytest.fixture
def tree(tmp_path):
    """A copy of what a build needs, in a folder with a space in its name."""
    copy = tmp_path / "a copy"
    copy.mkdir()
    for name in ("csrc", "esam_kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    return copy


def program(path, script):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def failing_compiler(tmp_path):
    return program(tmp_path / "failing", "echo 'no such flag' >&2; exit 1")


def test_a_failed_compilation_leaves_no_older_extension(tree, failing_compiler):
    older = tree / "esam_kernels" / "_native.cpython-311-x86_64-linux-gnu.so"
    older.write_bytes(b"older")
    said = build(tree, "build_ext", "--inplace", CXX=failing_compiler, ESAM_KERNELS_CUDA="0")
    assert "compilation failed" in said
    assert not older.exists()
    record = json.loads((tree / "esam_kernels" / "_build.json").read_text())
    assert record["native"]["missing"].startswith("compilation failed")
    assert record["cuda"]["missing"] == "ESAM_KERNELS_CUDA was 0 when the package was built"


def test_a_failed_compilation_for_the_cpu_leaves_the_cuda_extension(tree, tmp_path, failing_compiler):
    """nvcc here writes an empty file to whatever stands behind -o."""
    nvcc = 'echo "release 13.0"; while [ $# -gt 1 ]; do [ "$1" = -o ] && touch "$2"; shift; done; exit 0'
    program(tmp_path / "bin" / "nvcc", nvcc)
    environment = {"CXX": failing_compiler, "CUDA_HOME": str(tmp_path), "ESAM_KERNELS_CUDA": "1"}
    assert "compilation failed" in build(tree, "build_ext", "--inplace", **environment)
    assert [path.name.split(".")[0] for path in (tree / "esam_kernels").glob("*.so")] == ["_cuda"]
    record = json.loads((tree / "esam_kernels" / "_build.json").read_text())
    assert record["native"]["missing"].startswith("compilation failed")
    assert "missing" not in record["cuda"]


def test_a_build_without_extensions_records_why(tree):
    build(tree, "build", ESAM_KERNELS_CUDA="0", ESAM_KERNELS_NATIVE="0")
    (record,) = (tree / "build").rglob("_build.json")
    assert json.loads(record.read_text())["native"] == {
        "missing": "ESAM_KERNELS_NATIVE was 0 when the package was built"
    }


def test_without_a_compiler_the_build_says_so(tree):
    build(tree, "build", ESAM_KERNELS_CUDA="0", CXX="no-such-compiler")
    (record,) = (tree / "build").rglob("_build.json")
    assert json.loads(record.read_text())["native"] == {"missing": "there was no C++ compiler (no-such-compiler)"}
