"""docs/ranking.md: its snippets run, its costs are those that the optimizer counts, and it names every ranking."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from esam_kernels import ESAM
from esam_kernels.ranking import RANKINGS, RankingContext

PAGE = Path(__file__).resolve().parents[2] / "docs" / "ranking.md"
TEXT = PAGE.read_text()
SNIPPETS = re.findall(r"^```python *(\S*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_snippets_print_what_their_comments_say(capsys):
    torch.manual_seed(0)
    namespace: dict = {}
    printed = []
    for mark, code in SNIPPETS:
        assert mark in ("", "setup")
        exec(compile(code, str(PAGE), "exec"), namespace)
        printed += capsys.readouterr().out.split()
    assert len(SNIPPETS) == 3
    assert printed == re.findall(r"print\(.*\)  # ([\d.]+)$", TEXT, re.MULTILINE) == ["1.37"]


def test_the_table_has_every_ranking_with_its_counted_cost():
    found = re.findall(r"^\| (?:`\"(\w+)\"`|a function of yours).* = ([\d.]+) \| ([\d.]+) \|$", TEXT, re.MULTILINE)
    assert {name for name, _, _ in found if name} == set(RANKINGS)
    assert len(found) == len(RANKINGS) + 1
    for name, forwards, cost in found:
        model = torch.nn.Linear(3, 3)
        ranking = name or (lambda context: context.losses)
        optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, ranking=ranking, model=model)
        assert optimizer.relative_cost == pytest.approx(float(forwards) / 3)
        assert f"{optimizer.relative_cost:.2f}" == cost


def test_the_table_of_the_context_has_its_fields():
    named = set(re.findall(r"`context\.(\w+)`", TEXT))
    assert named == set(RankingContext.__dataclass_fields__)
