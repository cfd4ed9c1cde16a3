"""The guides to the training loop: their snippets run, and the examples and tests that they name exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [DOCS / name for name in ("training.md", "frameworks.md", "compile_and_graphs.md")]
FENCE = re.compile(r"^```python *(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def snippets(page: Path) -> list[tuple[str, str, str]]:
    """(the page, heading and line, the mark, the code) of each snippet."""
    text = page.read_text()
    found = []
    for match in FENCE.finditer(text):
        heading = re.findall(r"^## (.*)$", text[: match.start()], re.MULTILINE)[-1:]
        line = text[: match.start()].count("\n") + 2
        # Line numbers of an error are then those of the page.
        found.append((f"{page.stem}, {(heading or ['start'])[0]}, line {line}", match[1], "\n" * (line - 1) + match[2]))
    return found


SNIPPETS = [snippet for page in PAGES for snippet in snippets(page)]
SETUP = {name.split(",")[0]: code for name, mark, code in SNIPPETS if mark == "setup"}
RUNNABLE = [(name, code) for name, mark, code in SNIPPETS if mark == ""]


def execute(code: str, page: str, namespace: dict) -> None:
    exec(compile(code, str(DOCS / f"{page}.md"), "exec"), namespace)


def test_marks_are_known_and_every_section_has_a_snippet_that_runs_or_an_example():
    assert set(SETUP) == {"training", "compile_and_graphs"}
    assert {mark for _, mark, _ in SNIPPETS} == {"", "setup", "no-run"}
    assert len(RUNNABLE) >= 15


@pytest.mark.parametrize(("name", "code"), RUNNABLE, ids=[name for name, _ in RUNNABLE])
def test_snippet_runs(name, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    page = name.split(",")[0]
    execute(SETUP[page], page, namespace)
    before = [param.detach().clone() for param in namespace["model"].parameters()]
    execute(code, page, namespace)
    model, optimizer = namespace["model"], namespace["optimizer"]
    optimizer.state_dict()  # refuses perturbed weights
    assert all(param.isfinite().all() for param in model.parameters())
    if "frozen_batch_norm" not in code:
        assert any(not (param == old).all() for param, old in zip(model.parameters(), before)), "nothing was trained"


def test_the_cost_before_and_after_a_phase_is_what_the_comment_says(capsys):
    (code,) = [code for _, code in RUNNABLE if "relative_cost" in code]
    (said,) = re.findall(r"print\(.*relative_cost.*\)  # ([\d.]+), then ([\d.]+)$", code, re.MULTILINE)
    namespace: dict = {}
    execute(SETUP["training"], "training", namespace)
    execute(code, "training", namespace)
    assert tuple(dict.fromkeys(capsys.readouterr().out.split())) == said


@pytest.mark.parametrize("name", [name for name, mark, _ in SNIPPETS if mark == "no-run"])
def test_snippet_that_is_not_run_is_python(name):
    ast.parse(next(code for other, _, code in SNIPPETS if other == name))


def test_examples_that_the_pages_name_exist():
    text = "".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"(examples/(?!test_)[\w/]+\.py)", text))
    assert named
    assert all((ROOT / path).exists() for path in named)


def test_tests_that_the_page_names_exist():
    named = re.findall(r"`(\w+/test_\w+\.py)::(\w+)`", (DOCS / "tested.md").read_text())
    assert len(named) > 50
    for path, test in named:
        tree = ast.parse((ROOT / "python_tests" / path).read_text())
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert test in functions, f"{path} has no {test}"


def test_each_row_of_the_tables_names_a_test():
    text = (DOCS / "tested.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and line != "| | test |"]
    assert len(rows) >= 35
    for row in rows:
        assert re.search(r"`\w+/test_\w+\.py::\w+`", row), row
