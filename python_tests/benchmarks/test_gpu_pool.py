"""The pool of ``make gpu``: what kills or blocks a process costs one test, and what is known is written at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from benchmarks.gpu import pool
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.session import UNFINISHED, environment
from benchmarks.rows import ROOT

TESTS = """
import os, signal, time
import pytest

def test_first(): pass
def test_killed(): os.kill(os.getpid(), signal.SIGKILL)
def test_sticky(): raise RuntimeError("CUDA error: an illegal memory access was encountered\\x00")
def test_wrong(): assert 1 == 2
@pytest.fixture
def broken(): raise ValueError("in the fixture")
def test_fixture(broken): pass
def test_left_out(): pytest.skip("for a reason")
@pytest.mark.parametrize("value", ["a b", "c"])
def test_value(value): assert value
def test_last(): pass
"""


@pytest.fixture
def run(tmp_path, capsys):
    """A pool over a file of tests: its code, outcomes by the name of the test, and what it printed."""

    def run(source, workers=1, seconds=60.0, test_seconds=30.0):
        file = tmp_path / "test_stand_in.py"
        file.write_text(source)
        journal = Journal(tmp_path / "stage.jsonl", "a commit")
        tests = ["--rootdir", str(tmp_path), str(file)]
        code = pool.Pool(tests, journal, tmp_path / "stage.xml", workers, seconds, test_seconds).run()
        entries = {name.partition("::")[2]: entry for name, entry in journal.entries().items()}
        return code, entries, capsys.readouterr().out

    return run


def test_a_worker_that_dies_or_meets_a_sticky_error_costs_one_test(run, tmp_path):
    code, entries, printed = run(TESTS, workers=2)
    assert code == 1
    assert {name: entry["outcome"] for name, entry in entries.items()} == {
        "test_first": "passed",
        "test_killed": "failed",
        "test_sticky": "failed",
        "test_wrong": "failed",
        "test_fixture": "failed",
        "test_left_out": "skipped",
        "test_value[a b]": "passed",
        "test_value[c]": "passed",
        "test_last": "passed",
    }
    assert "SIGKILL" in entries["test_killed"]["text"]
    assert "illegal memory access" in entries["test_sticky"]["text"]
    assert "assert 1 == 2" in entries["test_wrong"]["text"]
    assert "in the fixture" in entries["test_fixture"]["text"]
    assert "for a reason" in entries["test_left_out"]["text"]
    assert "PASSED test_stand_in.py::test_value[a b]" in printed
    assert "4 passed, 4 failed, 1 skipped, 0 left" in printed
    suite = ElementTree.parse(tmp_path / "stage.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("9", "4", "1")


def test_a_backend_of_which_no_test_ran_is_a_failure_with_its_reason(run):
    source = """
import pytest
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_kernel(backend, dtype):
    if backend == {!r} or dtype == "float16":
        pytest.skip("it is not built")
"""
    code, _, printed = run(source.format("cuda"))
    assert code == 1
    assert "1 passed, 0 failed, 3 skipped, 0 left\nNOT RUN the backend cuda: Skipped: it is not built\n" in printed


def test_a_backend_that_ran_in_one_test_is_no_failure(run):
    source = """
import pytest
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("number", [0, 1])
def test_kernel(backend, number):
    if number:
        pytest.skip("not for this number")
"""
    code, _, printed = run(source)
    assert (code, "NOT RUN" in printed) == (0, False)


def test_the_sticky_process_is_not_used_again(run):
    source = """
import os
def test_sticky(): raise RuntimeError(f"CUDA error in {os.getpid()}")
def test_other(): raise RuntimeError(f"process {os.getpid()}")
"""
    _, entries, _ = run(source)
    texts = [entries[name]["text"].split() for name in ("test_sticky", "test_other")]
    first, second = ({word for word in words if word.isdigit() and len(word) > 1} for words in texts)
    assert first.isdisjoint(second)


def test_the_processes_share_the_cores(run, monkeypatch):
    """Threads that have no core of their own slow each other down by more than their number."""
    monkeypatch.setattr(pool.os, "cpu_count", lambda: 6)
    source = "import os\ndef test_threads(): assert os.environ['OMP_NUM_THREADS'] == '3'\n"
    assert run(source, workers=2)[0] == 0


def test_a_test_that_hangs_costs_itself_and_the_rest_goes_on(run):
    source = "import time\ndef test_hangs(): time.sleep(60)\ndef test_after(): pass\n"
    code, entries, _ = run(source, test_seconds=0.5)
    assert code == 1
    assert "no answer" in entries["test_hangs"]["text"]
    assert entries["test_after"]["outcome"] == "passed"


def test_when_time_is_up_the_rest_runs_in_the_next_call(run, tmp_path):
    source = f"""
import pathlib, time
here = pathlib.Path({str(tmp_path)!r})
def test_first():
    assert not (here / "ran").exists()
    (here / "ran").touch()
def test_long():
    if not (here / "second").exists():
        time.sleep(60)
"""
    code, entries, printed = run(source, seconds=6.0)
    assert code == UNFINISHED
    assert list(entries) == ["test_first"]
    assert "CUT OFF test_stand_in.py::test_long" in printed
    (tmp_path / "second").touch()
    code, entries, _ = run(source)
    assert code == 0, "test_first would fail if it ran again"
    assert list(entries) == ["test_first", "test_long"]


def test_tests_that_cannot_be_collected_fail_the_stage(run):
    code, entries, printed = run("import nothing_of_this_name\n")
    assert (code, entries) == (1, {})
    assert "nothing_of_this_name" in printed


def test_names_survive_the_death_of_the_pool(tmp_path):
    file = tmp_path / "test_stand_in.py"
    file.write_text("import time\ndef test_first(): pass\ndef test_long(): time.sleep(60)\n")
    command = [sys.executable, "-m", "benchmarks.gpu.pool", "--journal", str(tmp_path / "stage.jsonl")]
    command += ["--xml", str(tmp_path / "stage.xml"), "--workers", "1", str(file)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "PASSED" in process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert "test_first" in (tmp_path / "stage.jsonl").read_text()
    assert ElementTree.parse(tmp_path / "stage.xml").getroot().get("tests") == "1"
