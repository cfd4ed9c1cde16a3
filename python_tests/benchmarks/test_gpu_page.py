"""docs/gpu.md says what the results say: nothing before a card has run it, and then which commit passed what."""

from __future__ import annotations

import shutil

import pytest

from benchmarks.gpu import page
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.stages import STAGES
from benchmarks.rows import RESULTS


@pytest.fixture
def results(tmp_path):
    shutil.copy(RESULTS / "compilations.json", tmp_path)
    return tmp_path


def test_the_page_is_what_the_generator_writes():
    assert page.PAGE.read_text() == page.rendered()


def test_without_results_nothing_was_executed(results):
    text = page.rendered(results)
    assert page.NOTHING in text
    assert text.count("compiled, not run") == 2
    assert "| `make_graphed_step` | not run |" in text


def test_results_of_a_card_are_shown_with_their_commit(results):
    """Those of an earlier commit are not: they say nothing of this one."""
    for commit in ("earlier", "later"):
        tests = Journal(results / "a-card" / "kernels.jsonl", commit)
        for name in ("[triton-0]", "[cuda-0]") if commit == "earlier" else ("[triton-0]",):
            tests.add(f"file.py::test_norm{name}", "passed")
        tests.add("file.py::test_gather[triton]", "failed" if commit == "later" else "passed")
        tests.add("file.py::test_select[triton]", "skipped")
        stages = Journal(results / "a-card" / "stages.jsonl", commit)
        stages.add("kernels", "failed")
    Journal(results / "a-card" / "steps.jsonl", "earlier").add("file.py::test_step[cuda]", "failed")
    stages.add("steps", "unfinished")
    text = page.rendered(results)
    assert page.NOTHING not in text
    assert "### a-card" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| `kernels` | failed ")]
    assert line.startswith("| `kernels` | failed | 1 | 1 | 1 | later | 20")
    assert "| `steps` | unfinished |  |  |  | later | 20" in text
    assert "Failed:\n\n- `file.py::test_gather[triton]`\n" in text
    assert "| Triton kernels | 1 tests passed |" in text
    assert "| CUDA kernels | compiled, not run |" in text


def test_cases_of_the_benchmarks_are_counted_in_their_stage(results):
    for suite in ("step", "modes"):
        cases = Journal(results / "a-card" / f"{suite}.jsonl", "a commit")
        cases.begin("a case")
        cases.add("a case", "passed")
    Journal(results / "a-card" / "stages.jsonl", "a commit").add("steps-bench", "ok")
    assert "| `steps-bench` | ok | 2 | 0 | 0 | a commit | 20" in page.rendered(results)


def test_many_failures_are_cut_short_with_their_number(results):
    tests = Journal(results / "a-card" / "graphs.jsonl", "a commit")
    for i in range(page.SHOWN_FAILURES + 3):
        tests.add(f"test_{i}[triton]", "failed")
    Journal(results / "a-card" / "stages.jsonl", "a commit").add("graphs", "failed")
    text = page.rendered(results)
    assert text.count("- `test_") == page.SHOWN_FAILURES
    assert "- and 3 more\n" in text


def test_every_stage_is_explained():
    assert list(page.STAGE_TEXT) == [stage.name for stage in STAGES]
