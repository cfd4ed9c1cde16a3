"""The study of rho for one pass a step: its runs, its file that goes on, and its means."""

import json
from pathlib import Path

import ascent_study
import pytest

pytest.importorskip("sklearn")


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Two radii, two seeds, one epoch of a small table; the folder of the results."""
    monkeypatch.setattr(ascent_study, "RADII", {"esam-previous": (0.05,), "esam-momentum": (0.1,)})
    monkeypatch.setattr(ascent_study, "SEEDS", {"tune": range(2), "report": range(5, 6)})
    monkeypatch.setattr(ascent_study, "TASKS", {"table": ascent_study.Task("table", 0.2, ("--epochs", "1"))})
    monkeypatch.setattr(ascent_study, "TABLE", {"train": 128, "test": 100, "features": 40, "classes": 3})
    return tmp_path


def lines(folder):
    return (folder / "ascent_study.jsonl").read_text().splitlines()


def test_each_training_is_a_line_and_is_not_repeated(small, capsys):
    pytest.importorskip("matplotlib")
    arguments = ["--stage", "tune", "--out", str(small)]
    assert ascent_study.main(arguments) == 0
    whole = lines(small)
    assert len(whole) == 2 * (2 + 2 * 2)
    assert {"test_accuracy", "commit", "torch", "device"} <= json.loads(whole[0]).keys()
    (small / "ascent_study.jsonl").write_text("\n".join(whole[:5]) + "\n")
    capsys.readouterr()
    assert ascent_study.main(arguments) == 0
    assert capsys.readouterr().out.count("\n") == len(whole) - 5
    measured = [[json.loads(line)[key] for key in ("seed", "rho", "test_accuracy")] for line in whole]
    assert [[json.loads(line)[key] for key in ("seed", "rho", "test_accuracy")] for line in lines(small)] == measured
    assert (small / "ascent_study.png").read_bytes().startswith(b"\x89PNG")


def test_report_trains_at_the_default_radii_with_and_without_mask(small):
    cases = [
        (run["optimizer"], run["rho"], run["rho_warmup"], run["beta"]) for run in ascent_study.runs("table", "report")
    ]
    assert cases == [
        ("sgd", None, 0.0, 1.0),
        ("sam", None, 0.0, 1.0),
        *[
            (f"esam-{ascent}", ascent_study.DEFAULT_RHO[ascent], share, beta)
            for share, beta in ((0.0, 1.0), (ascent_study.WARMUP, 1.0), (0.0, 0.6))
            for ascent in ("previous", "momentum")
        ],
    ]


def test_means_and_gains_are_over_the_seeds_of_a_case():
    common = {"task": "table", "stage": "tune", "rho_warmup": 0.0, "beta": 1.0}
    rows = [
        {**common, "optimizer": name, "rho": rho, "seed": seed, "test_accuracy": accuracy}
        for name, rho, seed, accuracy in (
            ("sgd", None, 0, 50.0),
            ("sgd", None, 1, 70.0),
            ("esam-previous", 0.1, 0, 56.0),
            ("esam-previous", 0.1, 1, 80.0),
        )
    ]
    sgd, previous = ascent_study.summarise(rows)
    assert (sgd["test_accuracy"]["mean"], sgd["over_sgd"], sgd["seeds"]) == (60.0, 0.0, 2)
    assert (previous["rho"], previous["test_accuracy"]["mean"], previous["over_sgd"]) == (0.1, 68.0, 8.0)


def test_the_committed_plot_is_drawn_from_the_committed_means():
    folder = Path(ascent_study.__file__).parents[1] / "benchmarks" / "results" / "cpu"
    summary = json.loads((folder / "ascent_study.json").read_text())["rows"]
    assert summary == ascent_study.summarise(ascent_study.read_rows(folder / "ascent_study.jsonl"))
    assert ascent_study.digest(summary).encode() in (folder / "ascent_study.png").read_bytes()
