"""The Makefile and the runner of the tiers, on a stand-in for the project: nothing is installed, nothing compiled."""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def project(tmp_path):
    """The Makefile in a folder with a space in its name; setup.py and doctor only say what they were given."""
    folder = tmp_path / "with a space"
    for name in ("esam_kernels", "csrc"):
        (folder / name).mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", folder)
    (folder / "pyproject.toml").touch()
    (folder / "constraints.txt").touch()
    (folder / "setup.py").write_text("import sys; print('setup.py', *sys.argv[1:])")
    (folder / "esam_kernels" / "__init__.py").touch()
    (folder / "esam_kernels" / "__main__.py").write_text("import os; print('path', os.environ['PYTHONPATH'])")
    return folder


def make(folder, *arguments, **environment):
    process = subprocess.run(
        ["make", *arguments],
        cwd=folder,
        # Without the variables of a make that runs these tests.
        env={**{k: v for k, v in os.environ.items() if not k.startswith("MAKE")}, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return process.returncode, process.stdout + process.stderr


def test_clean_makes_the_next_target_build_again(project):
    ready = project / ".venv" / "ready"
    ready.parent.mkdir()
    ready.touch()
    assert "pip install" not in make(project, "-n", "test")[1]
    assert make(project, "clean")[0] == 0
    assert not ready.exists()
    assert "pip install" in make(project, "-n", "test")[1]


def test_without_a_venv_the_extension_is_built_in_place_once(project):
    code, said = make(project, "doctor", "VENV=none", f"PYTHON={sys.executable}", PYTHONPATH="/somewhere/of mine")
    assert code == 0, said
    assert "setup.py -q build_ext --inplace" in said.splitlines()
    assert f"path {project}:/somewhere/of mine" in said.splitlines()
    assert "build_ext" not in make(project, "doctor", "VENV=none", f"PYTHON={sys.executable}")[1]


def test_make_gpu_says_when_it_began_before_it_builds(project):
    """A build takes a minute or two, and the call that contains it has nine."""
    (project / "benchmarks" / "gpu").mkdir(parents=True)
    for package in ("benchmarks", "benchmarks/gpu"):
        (project / package / "__init__.py").touch()
    (project / "benchmarks" / "gpu" / "__main__.py").write_text("import os; print('b', os.environ['ESAM_GPU_BEGAN'])")
    (project / "setup.py").write_text("import time; time.sleep(2)")
    before = int(time.time())
    code, said = make(project, "gpu", "VENV=none", f"PYTHON={sys.executable}")
    assert code == 0, said
    began = int(said.split("b ")[-1])
    assert before <= began <= time.time() - 2


def test_without_a_venv_and_without_torch_one_line_says_so(project, tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    code, said = make(project, "doctor", "VENV=none", f"PYTHON={python}", PYTHONPATH="")
    assert code != 0
    assert f"VENV=none uses the torch of {python}, which has none" in said


@pytest.fixture
def runner(monkeypatch):
    spec = importlib.util.spec_from_file_location("run_tiers", ROOT / "python_tests" / "run_tiers.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "run_tiers", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def all_tiers(runner):
    return runner.TIERS


@pytest.fixture
def run_tiers(runner, monkeypatch):
    module = runner
    monkeypatch.setattr(module, "TIERS", [module.Tier("here"), module.Tier("elsewhere", lambda: "there is no card")])
    return module


@pytest.mark.parametrize(("asked", "code"), [([], 0), (["here"], 0), (["elsewhere"], 1), (["here", "elsewhere"], 1)])
def test_a_tier_asked_for_that_cannot_run_is_a_failure(run_tiers, monkeypatch, capsys, asked, code):
    monkeypatch.setattr(run_tiers, "run", lambda tier: (True, {"passed": 1}))
    monkeypatch.setattr(sys, "argv", ["run_tiers.py", *asked])
    assert run_tiers.main() == code
    assert ("there is no card" in capsys.readouterr().out) == (asked != ["here"])


@pytest.mark.parametrize(("expected", "code"), [(True, 1), (False, 0)])
def test_a_tier_that_should_run_here_and_cannot_is_a_failure(run_tiers, monkeypatch, expected, code):
    monkeypatch.setattr(run_tiers, "run", lambda tier: (True, {"passed": 1}))
    native = run_tiers.Tier("native", lambda: "the compilation failed", is_expected=lambda: expected)
    monkeypatch.setattr(run_tiers, "TIERS", [run_tiers.Tier("here"), native])
    monkeypatch.setattr(sys, "argv", ["run_tiers.py"])
    assert run_tiers.main() == code


def test_a_tier_of_which_nothing_ran_is_a_failure(run_tiers, tmp_path, monkeypatch):
    (tmp_path / "python_tests" / "here").mkdir(parents=True)
    monkeypatch.setattr(run_tiers, "ROOT", tmp_path)
    assert run_tiers.run(run_tiers.Tier("here")) == (False, {})


def test_a_tier_of_another_ones_tests_runs_them_in_its_own_environment(run_tiers, tmp_path, monkeypatch):
    tests = tmp_path / "python_tests" / "here"
    tests.mkdir(parents=True)
    (tests / "test_it.py").write_text("import os\ndef test_it(): assert os.environ['DEVICE'] == 'cpu'\n")
    monkeypatch.setattr(run_tiers, "ROOT", tmp_path)
    on_cpu = run_tiers.Tier("here_on_cpu", environment={"DEVICE": "cpu"}, folder="here")
    assert run_tiers.run(on_cpu) == (True, {"passed": 1})


@pytest.mark.parametrize("needs_card", [False, True])
def test_a_tier_that_needs_no_card_sees_none(run_tiers, tmp_path, monkeypatch, needs_card):
    """What is tested on the CPU would otherwise run on the GPU of a machine that has one: train.py takes it."""
    tests = tmp_path / "python_tests" / "here"
    tests.mkdir(parents=True)
    seen = "7" if needs_card else ""
    (tests / "test_it.py").write_text(
        f"import os\ndef test_it(): assert os.environ['CUDA_VISIBLE_DEVICES'] == {seen!r}\n"
    )
    monkeypatch.setattr(run_tiers, "ROOT", tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert run_tiers.run(run_tiers.Tier("here", needs_card=needs_card)) == (True, {"passed": 1})


def test_only_the_gpu_tier_sees_the_card(all_tiers):
    assert [tier.name for tier in all_tiers if tier.needs_card] == ["gpu"]


def test_without_pytest_one_line_says_so(run_tiers, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pytest" else find_spec(name))
    monkeypatch.setattr(sys, "argv", ["run_tiers.py"])
    assert run_tiers.main() == 2
    assert "pytest is not installed in" in capsys.readouterr().err
