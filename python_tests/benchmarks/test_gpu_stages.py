"""``make gpu``: stages that share the time, go on where a call stopped, and bring away what they have."""

from __future__ import annotations

import io
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from benchmarks import run
from benchmarks.cases import sizes_of
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import session, stages
from benchmarks.gpu.journal import Journal, read
from benchmarks.gpu.session import UNFINISHED, Job, Mirror, Session
from benchmarks.gpu.stages import STAGES, Stage, journals
from benchmarks.suites import Context


def job(code, name="a job"):
    return Job(name, [sys.executable, "-S", "-c", code])


def stage(name, code="", seconds=10.0):
    return Stage(name, seconds, lambda folder, given: [job(code or f"print({name!r})", name)])


def run_of(folder, seconds=60.0, most=20.0, least=0.0):
    return gpu.Run(folder, "a commit", seconds, most, least)


def test_a_job_is_stopped_at_its_limit_with_all_that_it_has_started():
    """The grandchild holds the pipe open for a minute."""
    start = time.monotonic()
    stopped = job("import subprocess; print('on', flush=True); subprocess.run(['sleep', '60'])")
    Session(io.StringIO()).run(stopped, 0.5)
    assert (stopped.code, stopped.outcome) == (None, "unfinished")
    assert time.monotonic() - start < 30


def test_a_job_that_ends_is_not_held_up_by_what_it_has_left_running(monkeypatch):
    monkeypatch.setattr(session, "PIPE_SECONDS", 0.2)
    start, left = time.monotonic(), job("import subprocess; subprocess.Popen(['sleep', '60'])")
    Session(io.StringIO()).run(left, 30.0)
    assert left.outcome == "ok"
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(("code", "outcome"), [(0, "ok"), (1, "failed"), (UNFINISHED, "unfinished")])
def test_jobs_end_with_their_codes_and_their_lines_are_in_the_log(code, outcome):
    log = io.StringIO()
    ended = job(f"print('fine'); raise SystemExit({code})")
    Session(log).run(ended, 30.0)
    assert ended.outcome == outcome
    assert "[a job] fine\n" in log.getvalue()


def test_every_stage_leaves_its_outcome_and_its_log_and_a_failure_stops_none(tmp_path):
    found = [stage("first"), stage("second", "raise SystemExit(1)"), stage("third")]
    assert run_of(tmp_path).stages(found) == {"first": "ok", "second": "failed", "third": "ok"}
    assert "[third] third" in (tmp_path / "third.log").read_text()
    entries = Journal(tmp_path / "stages.jsonl", "a commit").entries()
    assert {name: entry["outcome"] for name, entry in entries.items()} == {
        "first": "ok",
        "second": "failed",
        "third": "ok",
    }


def test_unused_time_is_passed_on():
    given = []

    def noting(name, seconds):
        return Stage(name, seconds, lambda folder, seconds: given.append(round(seconds)) or [])

    class Quick(gpu.Run):
        def _stage(self, stage, seconds):
            stage.jobs(self._folder, seconds)
            return "ok"

    shares = [noting("first", 100.0), noting("second", 50.0), noting("third", 400.0), noting("last", 10.0)]
    Quick(Path(), "a commit", 1000.0, 460.0, 30.0).stages(shares)
    assert given == [100, 150, 460, 460]


def test_what_no_time_is_left_for_is_not_begun(tmp_path):
    found = [stage("first"), stage("second")]
    assert run_of(tmp_path, seconds=5.0, least=30.0).stages(found) == {"first": "not begun", "second": "not begun"}
    assert not (tmp_path / "stages.jsonl").exists()


def test_a_call_goes_on_where_the_last_one_stopped_and_all_anew_once_all_are_finished(tmp_path):
    found = [stage("build"), stage("kernels"), stage("steps"), stage("graphs")]
    journal = Journal(tmp_path / "stages.jsonl", "a commit")

    def names(*asked, is_built=True, of=journal):
        return [stage.name for stage in gpu.chosen(found, asked, of, is_built)]

    assert names() == ["build", "kernels", "steps", "graphs"]
    for name, outcome in (("build", "ok"), ("kernels", "failed"), ("steps", "unfinished")):
        journal.add(name, outcome)
    assert names() == ["steps", "graphs"]
    assert names("kernels") == ["kernels"]
    assert names(of=Journal(journal.path, "another commit")) == ["build", "kernels", "steps", "graphs"]
    assert names("kernels", is_built=False) == ["build", "kernels"]
    journal.add("build", "failed")
    assert names("kernels", is_built=False) == ["kernels"], "it would fail again"
    for name in ("steps", "graphs"):
        journal.add(name, "ok")
    assert names() == ["build", "kernels", "steps", "graphs"]


def test_an_unfinished_stage_keeps_its_journal_and_log_and_a_finished_one_begins_anew(tmp_path):
    path = tmp_path / "first.jsonl"
    code = f"open({str(path)!r}, 'a').write('a line\\n'); raise SystemExit({{}})"

    def first(exit_code):
        command = [sys.executable, "-S", "-c", code.format(exit_code), "--journal", str(path)]
        return Stage("first", 10.0, lambda folder, seconds: [Job("first", command)])

    run_of(tmp_path).stages([first(UNFINISHED)])
    run_of(tmp_path).stages([first(0)])
    assert len(path.read_text().splitlines()) == 2
    assert (tmp_path / "first.log").read_text().count("== first") == 2
    run_of(tmp_path).stages([first(0)])
    assert len(path.read_text().splitlines()) == 1
    assert (tmp_path / "first.log").read_text().count("== first") == 1


def test_a_stage_that_is_killed_with_its_call_counts_as_unfinished(tmp_path):
    seen = []

    def jobs(folder, seconds):
        seen.extend(entry["outcome"] for entry in read(tmp_path / "stages.jsonl"))
        return [job("")]

    run_of(tmp_path).stages([Stage("first", 10.0, jobs)])
    assert "unfinished" in seen


def test_a_line_that_a_kill_has_cut_short_is_passed_over(tmp_path):
    journal = Journal(tmp_path / "stage.jsonl", "a commit")
    journal.add("first", "passed")
    with journal.path.open("a") as file:
        file.write('{"name": "sec')
    assert list(journal.entries()) == ["first"]
    journal.add("third", "passed")
    assert list(journal.entries()) == ["first", "third"]


def packed(archive):
    with tarfile.open(archive) as opened:
        return {member.name: opened.extractfile(member).read().decode() for member in opened}


def test_what_is_written_is_packed_into_one_file_while_the_stages_run(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "MIRROR_SECONDS", 0.01)
    folder, target = tmp_path / "card", tmp_path / "out" / "card.tar.gz"
    folder.mkdir()
    with Mirror(folder, target):
        (folder / "stage.log").write_text("first")
        deadline = time.monotonic() + 10
        while not target.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert target.exists(), "only at the end: a call that is killed would lose it"
        (folder / "stage.log").write_text("first and last")
        (folder / "rows.json").write_text("[]")
    assert packed(target) == {"card/stage.log": "first and last", "card/rows.json": "[]"}
    assert [path.name for path in target.parent.iterdir()] == ["card.tar.gz"]


def test_a_file_that_becomes_shorter_while_it_is_packed_is_taken_in_the_next_round(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "MIRROR_SECONDS", 0.01)
    folder, target, add, rounds = tmp_path / "card", tmp_path / "card.tar.gz", tarfile.TarFile.add, []
    folder.mkdir()
    (folder / "rows.json").write_text("[1]")

    def adding(archive, *arguments):
        rounds.append(None)
        if len(rounds) == 1:
            raise OSError("unexpected end of data")
        add(archive, *arguments)

    monkeypatch.setattr(tarfile.TarFile, "add", adding)
    with Mirror(folder, target):
        deadline = time.monotonic() + 10
        while not target.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert packed(target) == {"card/rows.json": "[1]"}


def test_what_make_has_built_first_is_part_of_the_time_of_a_call(monkeypatch):
    monkeypatch.delenv("ESAM_GPU_BEGAN", raising=False)
    assert gpu.seconds_before() == 0.0
    monkeypatch.setenv("ESAM_GPU_BEGAN", str(int(time.time()) - 90))
    assert 90.0 <= gpu.seconds_before() <= 92.0
    monkeypatch.setenv("ESAM_GPU_BEGAN", str(int(time.time()) + 90))
    assert gpu.seconds_before() == 0.0, "a clock that was set back gives no more time"


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [({"a": "ok"}, 0), ({"a": "ok", "b": "failed", "c": "not begun"}, 1), ({"a": "ok", "b": "not begun"}, UNFINISHED)],
)
def test_the_report_says_what_the_next_call_goes_on_with(outcomes, code, capsys):
    assert gpu.report(outcomes) == code
    assert ("goes on with: " in capsys.readouterr().out) == ("not begun" in outcomes.values())


def test_each_stage_fits_eight_minutes_and_a_call_nine():
    assert gpu.STAGE_SECONDS < 8 * 60
    assert gpu.CALL_SECONDS < 9 * 60
    assert [found.name for found in STAGES] == (
        ["build", "kernels", "steps", "graphs", "large", "sanitizer", "perturb", "steps-bench", "loss", "memory"]
    )
    for found in STAGES:
        assert found.seconds <= gpu.STAGE_SECONDS
        commands = [one.command for one in found.jobs(Path("folder"), 460.0)]
        minutes = [
            60 * float(command[command.index("--minutes") + 1]) for command in commands if "--minutes" in command
        ]
        seconds = [float(command[command.index("--seconds") + 1]) for command in commands if "--seconds" in command]
        assert sum(minutes + seconds) <= 451


# What a case takes beside its seconds: models are made, kernels loaded, graphs captured.
SECONDS_BESIDE = 2.0


@pytest.mark.parametrize("name", ["perturb", "steps-bench"])
def test_all_cases_of_a_stage_fit_into_one_call_of_it(name):
    """Else it would end unfinished each time that it is called alone."""
    (found,) = (one for one in STAGES if one.name == name)
    context = Context(torch.device("cuda"), sizes_of(torch.device("cuda")), inductor="without")
    for command in (one.command for one in found.jobs(Path("folder"), gpu.STAGE_SECONDS)):
        given = dict(zip(command[3::2], command[4::2]))
        if given["--inductor"] == "without":
            minutes, cases = float(given["--minutes"]), list(run.suite_named(given["--suite"]).cases(context))
            measuring = sum(case.seconds for case in cases) * minutes / run.NOMINAL_MINUTES
            assert measuring + SECONDS_BESIDE * len(cases) <= 60 * minutes, given["--suite"]


def test_every_file_of_gpu_tests_is_in_one_stage_and_journals_are_each_in_one_file():
    tested = [path for name in ("kernels", "steps", "graphs", "large") for path in stages.test_files(name)]
    assert sorted(tested) == sorted(stages.TESTS.glob("test_*.py"))
    paths = [path for found in STAGES for path in journals(Path("folder"), found)]
    assert len(paths) == len(set(paths)) == 12


def test_an_unknown_stage_is_refused_with_the_known_ones(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", "kernel"])
    assert gpu.main() == 2
    assert "there is no stage kernel: choose from build, kernels, steps" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_stops_with_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", "kernels"])
    assert gpu.main() == 2
    assert capsys.readouterr().err == "no CUDA device: the GPU tests and benchmarks were not run\n"
