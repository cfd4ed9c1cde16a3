"""The radius of the demo, chosen on seeds that the demo does not report."""

import json
import statistics
from pathlib import Path

import demo_study
import pytest
from train import parse_options

ROWS = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "cpu" / "demo_study.json").read_text())


def test_the_seeds_are_not_those_that_the_demo_reports():
    demo = parse_options(["--recipe", "demo"])
    assert len(ROWS["seeds"]) == 3
    assert not set(ROWS["seeds"]) & set(range(demo.seed, demo.seed + demo.seeds))


def test_the_demo_has_the_radius_at_which_sam_is_best():
    means = {float(rho): statistics.mean(values) for rho, values in ROWS["by rho"]["sam"].items()}
    assert tuple(means) == demo_study.RADII
    assert ROWS["chosen"] == max(means, key=means.get) == parse_options(["--recipe", "demo"]).rho


def test_the_page_has_the_accuracies_of_the_rows():
    page = (Path(__file__).parents[2] / "docs" / "examples.md").read_text()
    for name in ("sam", "esam"):
        means = [f"{statistics.mean(values):.1f}" for values in ROWS["by rho"][name].values()]
        assert f"{means[0]}, {means[1]} and {means[2]} %" in page


def test_the_study_runs_and_writes_its_rows(tmp_path, capsys):
    pytest.importorskip("sklearn")
    assert demo_study.main(["--seeds", "1", "--epochs", "1", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "demo_study.json").read_text())
    assert found["seeds"] == [10]
    assert {len(values) for rows in found["by rho"].values() for values in rows.values()} == {1}
    assert f"chosen: rho {found['chosen']}" in capsys.readouterr().out
