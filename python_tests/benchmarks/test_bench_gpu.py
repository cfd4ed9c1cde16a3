"""``make gpu``: one clock for its jobs, and one line where there is no GPU."""

from __future__ import annotations

import io
import sys
import time

import pytest
import torch

from benchmarks import gpu


def job(code):
    return gpu.Job("a job", [sys.executable, "-c", code])


def test_a_job_is_stopped_at_its_limit_with_all_that_it_has_started():
    """The grandchild holds the pipe open for a minute."""
    session, start = gpu.Session(io.StringIO()), time.monotonic()
    stopped = job("import subprocess; print('on', flush=True); subprocess.run(['sleep', '60'])")
    session.together([stopped], 2.0)
    assert stopped.code is None
    assert time.monotonic() - start < 30
    assert not session.summary()


def test_jobs_end_with_their_codes_and_their_lines_are_in_the_log():
    log = io.StringIO()
    session = gpu.Session(log)
    good, bad = job("print('fine')"), job("raise SystemExit(3)")
    session.together([good, bad], 60.0)
    assert (good.code, bad.code) == (0, 3)
    assert not session.summary()
    assert "[a job] fine\n" in log.getvalue()
    assert "FAILED" in log.getvalue()


def test_all_parts_fit_nine_minutes():
    assert gpu.TOTAL_SECONDS < 9 * 60
    rest = gpu.BUILD_SECONDS + gpu.SANITIZER_SECONDS + gpu.PLOT_SECONDS + 60 * gpu.BENCH_MINUTES
    assert gpu.TOTAL_SECONDS - rest >= 60, "nothing is left for the tests"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_stops_with_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", "tests"])
    assert gpu.main() == 2
    assert capsys.readouterr().err == "no CUDA device: the GPU tests and benchmarks were not run\n"
