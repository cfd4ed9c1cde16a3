"""docs/ascent.md: its snippets run one after the other, with one pass a step, and its defaults are the code's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from esam_kernels.perturbation.ascent import DEFAULT_RHO

PAGE = Path(__file__).resolve().parents[2] / "docs" / "ascent.md"
TEXT = PAGE.read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def namespace() -> dict:
    torch.manual_seed(0)
    found: dict = {}
    for code in SNIPPETS:
        exec(compile(code, str(PAGE), "exec"), found)
    return found


def test_snippets_take_a_step_for_each_batch(namespace):
    assert len(SNIPPETS) == 3
    assert namespace["optimizer"].state_dict()["esam"]["step"] == 3 * len(namespace["loader"])


def test_the_radius_is_the_default_that_the_page_names(namespace):
    assert namespace["optimizer"].param_groups[0]["rho"] == DEFAULT_RHO["momentum"]
    (named,) = re.findall(r'([\d.]+) for "current" and "previous", ([\d.]+) for\s+"momentum"', TEXT)
    assert tuple(map(float, named)) == (DEFAULT_RHO["previous"], DEFAULT_RHO["momentum"])
    assert DEFAULT_RHO["current"] == DEFAULT_RHO["previous"]
