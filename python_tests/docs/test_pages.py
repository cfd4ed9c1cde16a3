"""The pages of the site: their code runs, and the lists that they keep are complete."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from esam_kernels import ESAM, SAM

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```python *(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [
    "index",
    "which_mode",
    "how_it_works",
    "training",
    "compile_and_graphs",
    "faq",
    "tutorials/first_training",
    "tutorials/moving",
    "tutorials/label_noise",
    "tutorials/fine_tuning",
    "reference/optimizers",
]


def run(page):
    """Run the snippets of a page from top to bottom, and return what they define."""
    path = ROOT / "docs" / f"{page}.md"
    text = path.read_text()
    namespace = {}
    for match in FENCE.finditer(text):
        if match[1] != "no-run":
            # Line numbers of an error are then those of the page.
            code = "\n" * (text[: match.start()].count("\n") + 1) + match[2]
            exec(compile(code, str(path), "exec"), namespace)
    return namespace


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs_and_trains(page, tmp_path, monkeypatch):
    if page.endswith("first_training"):
        pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    found = run(page)
    assert all(param.isfinite().all() for param in found["model"].parameters())
    assert found["optimizer"].state_dict()["esam"]["step"] > 0


@pytest.mark.parametrize("page", ["which_mode", "faq", "reference/optimizers"])
def test_a_print_shows_what_the_comment_behind_it_says(page, capsys):
    run(page)
    said = re.findall(r"^ *print\(.*\)  # (.+)$", (ROOT / "docs" / f"{page}.md").read_text(), re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == said
    assert said


def test_the_first_training_learns():
    pytest.importorskip("sklearn")
    found = run("tutorials/first_training")
    assert found["sgd"] > 0.9
    assert found["sam"] > 0.9


def test_every_variable_that_the_package_or_its_build_reads_is_on_the_page():
    sources = [*(ROOT / "esam_kernels").rglob("*.py"), ROOT / "setup.py", *(ROOT / "csrc").rglob("*.py")]
    read = {name for path in sources for name in re.findall(r'"(ESAM_KERNELS_[A-Z_]+)"', path.read_text())}
    page = set(re.findall(r"`(ESAM_KERNELS_[A-Z_]+)`", (ROOT / "docs" / "environment.md").read_text()))
    assert page == read


def test_the_error_messages_of_the_questions_are_those_of_the_code():
    nodes = [node for path in (ROOT / "esam_kernels").rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    said = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    text = (ROOT / "docs" / "faq.md").read_text().partition("## Error messages")[2].partition("\n## ")[0]
    messages = re.findall(r"^\| `(.+?)` \|", text, re.MULTILINE)
    assert len(messages) == 11
    assert [message for message in messages if not any(message in text for text in said)] == []


def test_every_page_is_reached_from_the_first():
    pages = {str(path.relative_to(ROOT / "docs").with_suffix("")) for path in (ROOT / "docs").rglob("*.md")}
    reached, waiting = set(), ["index"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        text = (ROOT / "docs" / f"{page}.md").read_text()
        for tree in re.findall(r"```{toctree}\n(.*?)```", text, re.DOTALL):
            entries = [line for line in tree.splitlines() if line and not line.startswith(":") and "<self>" not in line]
            waiting += [os.path.join(os.path.dirname(page), entry) for entry in entries]
    assert reached == pages


def test_the_prices_of_the_modes_are_those_that_are_counted():
    page = (ROOT / "docs" / "which_mode.md").read_text()
    priced = re.findall(r"\| `(\w+\(\.\.\..*?\))` \| (\d\.\d\d) \|", page)
    assert len(priced) == 4
    model = torch.nn.Linear(4, 3)
    arguments = "model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, model=model"
    names = {"ESAM": ESAM, "SAM": SAM, "torch": torch, "model": model}
    found = [(code, f"{eval(code.replace('...', arguments), names).relative_cost:.2f}") for code, _ in priced]
    assert found == priced


def test_the_table_of_versions_is_that_of_the_rows():
    command = [sys.executable, str(ROOT / "tools" / "matrix.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0, "run `python tools/matrix.py --page`"
