"""docs/ascent.md: its snippets run one after the other, with one pass a step, and its defaults are the code's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from esam_kernels.perturbation.ascent import DEFAULT_RHO, DEFAULT_RHO_ADAPTIVE

PAGE = Path(__file__).resolve().parents[2] / "docs" / "ascent.md"
TEXT = PAGE.read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def namespace() -> dict:
    torch.manual_seed(0)
    found: dict = {}
    found["optimizers"] = []
    for code in SNIPPETS:
        exec(compile(code, str(PAGE), "exec"), found)
        if found["optimizer"] not in found["optimizers"]:
            found["optimizers"].append(found["optimizer"])
    return found


def test_snippets_take_a_step_for_each_batch(namespace):
    assert len(SNIPPETS) == 4
    first, second = namespace["optimizers"]
    assert first.state_dict()["esam"]["step"] == 4 * len(namespace["loader"])
    assert second.state_dict()["esam"]["step"] == 2 * len(namespace["loader"])


def test_the_radius_grows_over_a_tenth_of_the_steps(namespace):
    radius, optimizer = namespace["radius"], namespace["optimizers"][0]
    assert (radius.start, radius.end, radius.total_iters) == (0.0, DEFAULT_RHO["momentum"], 1)
    assert "total_iters=max(1, total_steps // 10))" in TEXT  # the page's loader is too short to tell
    assert radius.last_epoch == 2 * len(namespace["loader"])
    assert optimizer.param_groups[0]["rho"] == DEFAULT_RHO["momentum"]


def test_the_perturbation_begins_after_the_warm_up_and_the_memory_of_the_momentum(namespace):
    _, optimizer = namespace["optimizers"]
    phase = namespace["phase"]
    assert phase.start == 4 < phase.last_epoch
    assert optimizer.param_groups[0]["rho"] == DEFAULT_RHO_ADAPTIVE["momentum"]
    (named,) = re.findall(r"Without `rho=` it is ([\d.]+) then", TEXT)
    assert float(named) == DEFAULT_RHO_ADAPTIVE["momentum"]


def test_the_radius_is_the_default_that_the_page_names(namespace):
    assert namespace["optimizers"][0].param_groups[0]["rho"] == DEFAULT_RHO["momentum"]
    (named,) = re.findall(r'([\d.]+) for "current" and "previous", ([\d.]+) for\s+"momentum"', TEXT)
    assert tuple(map(float, named)) == (DEFAULT_RHO["previous"], DEFAULT_RHO["momentum"])
    assert DEFAULT_RHO["current"] == DEFAULT_RHO["previous"]
