"""docs/reproduction.md is what the rows give, and claims are what their numbers say."""

from __future__ import annotations

import pytest

from benchmarks.paper import experiment as experiments
from benchmarks.paper import plotting, report, runner, store
from benchmarks.paper.experiment import Claim, Experiment
from benchmarks.paper.experiments import figure5, figure6, figure7, table4_5

CONDITIONS = {"device": "a CPU", "torch": "2.13", "commit": "abc", "date": "2026-01-01", "settings": {}}


def test_the_page_agrees_with_the_rows():
    assert report.PAGE.read_text() == report.rendered()


@pytest.mark.parametrize("name", experiments.registry())
def test_the_figures_are_drawn_from_the_rows(name):
    experiment = experiments.find(name)
    for folder, scale, rows in report.measured(experiment, report.RESULTS):
        image = runner.figure_path(experiment, scale, folder)
        assert plotting.digest(rows).encode() in image.read_bytes(), f"draw {image.name} anew: make paper NAME={name}"


def test_check_fails_where_the_page_differs_and_changes_nothing(tmp_path, capsys):
    page = tmp_path / "docs" / "reproduction.md"
    assert report.update(check=True, folder=tmp_path, page=page) == 1
    assert not page.exists()
    assert report.update(folder=tmp_path, page=page) == 0
    assert report.update(check=True, folder=tmp_path, page=page) == 0
    wrong = page.read_text().replace("not measured", "99 %", 1)
    page.write_text(wrong)
    assert report.update(check=True, folder=tmp_path, page=page) == 1
    assert "99 %" in capsys.readouterr().err
    assert page.read_text() == wrong


def answer(rows):
    if not rows:
        return [Claim("the answer", "42 (Table 0)")]
    mean = sum(row["value"] for row in rows) / len(rows)
    return [Claim("the answer", "42 (Table 0)", f"{mean:.1f}", mean == 42, rows)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    experiment = Experiment("answer", "a title", "What the paper says.", list, answer, lambda rows, path: None)
    monkeypatch.setattr(report, "registry", lambda: {"answer": experiment})
    common = {"experiment": "answer", "unit": "a", "data": "digits", **CONDITIONS}
    rows = [{**common, "scale": "small", "seed": seed, "value": 41.0 + seed} for seed in range(2)]
    rows += [{**common, "scale": "smoke", "seed": 0, "value": 7.0}]
    store.save(tmp_path / "rows" / "cpu" / "answer.json", rows)
    rows = [{**common, "scale": "paper", "seed": 0, "value": 42.0, "device": "a GPU"}]
    store.save(tmp_path / "rows" / "gpu" / "answer.json", rows)
    (tmp_path / "rows" / "cpu" / "answer_small.png").touch()
    return tmp_path


def test_a_claim_is_a_line_with_its_conditions_and_smoke_is_not_shown(folder):
    text = report.rendered(folder / "rows", folder / "docs" / "page.md")
    assert "| the answer | 42 (Table 0) | 42.0 | yes | paper; digits; 1 seed; a GPU; abc |\n" in text
    assert "| the answer | 42 (Table 0) | 41.5 | **no** | small; digits; 2 seeds; a CPU; abc |\n" in text
    assert "| Answer: a title | 1 | 1 | 0 | 0 |\n" in text
    assert text.index("a GPU") < text.index("a CPU")
    assert "7.0" not in text
    assert "(../rows/cpu/answer_small.png)" in text
    assert "answer_paper.png" not in text


def test_rows_of_a_smaller_scale_do_not_measure_that_of_the_paper(folder):
    sentence = "At the scale of the paper: not measured."
    assert sentence not in report.rendered(folder / "rows", folder / "page.md")
    (folder / "rows" / "gpu" / "answer.json").unlink()
    assert sentence in report.rendered(folder / "rows", folder / "page.md")


def test_what_has_no_rows_is_not_measured(folder):
    text = report.rendered(folder / "nothing", folder / "page.md")
    assert "| the answer | 42 (Table 0) | not measured |  |  |" in text
    assert "| Answer: a title | 0 | 0 | 0 | 1 |\n" in text


@pytest.mark.parametrize(
    ("name", "words"), [("figure3", "Figure 3"), ("table4-5", "Tables 4 and 5"), ("label-noise", "Label noise")]
)
def test_an_experiment_is_called_what_the_paper_calls_it(name, words):
    experiment = Experiment(name, "a title", "What the paper says.", list, answer, lambda rows, path: None)
    assert report.name_of(experiment) == words


# -- tables 4 and 5 ----------------------------------------------------------------------------------------------------


def saved_rows(kind: str, saved: dict[tuple[int, float], float]) -> list[dict]:
    return [{"kind": kind, "depth": n, "beta": beta, "saved": share, "seed": 0} for (n, beta), share in saved.items()]


def test_the_fit_finds_the_numbers_that_made_the_points():
    points = [(n, b, 0.3 * (1 - b) + 0.2 * (1 - b) / (n * b)) for n in (5, 10) for b in table4_5.BETAS]
    assert table4_5.fit(points) == pytest.approx((0.3, 0.2, 1.0), abs=1e-12)


def test_the_fit_of_the_printed_points_is_near_the_papers():
    """The tables print a part of the points that the paper fitted."""
    for kind, table in table4_5.PAPER.items():
        points = [(n, beta, g / 100) for n, values in table.items() for beta, g in values.items()]
        k1, _, r2 = table4_5.fit(points)
        assert k1 == pytest.approx(table4_5.PAPER_FIT[kind][0], abs=0.02)
        assert r2 > 0.99


def test_growth_is_claimed_only_where_every_step_grows():
    growing = {(n, beta): (1 - beta) / 3 for n in (5, 10) for beta in table4_5.BETAS}
    holding, falling = (
        next(claim for claim in table4_5.claims(saved_rows("K = 1", saved)) if "grows" in claim.text)
        for saved in (growing, growing | {(10, 0.5): 0.0})
    )
    assert (holding.holds, holding.measured) == (True, "at 18 of 18 steps")
    assert (falling.holds, falling.measured) == (False, "at 17 of 18 steps")


# -- figures 5 to 7 ----------------------------------------------------------------------------------------------------

CURVE = {"data": "digits", "seed": 0, "test_accuracy": 90.0}


def test_figure_5_holds_only_where_every_epoch_does():
    losses = {"selected": 2.0, "rest": 1.0, "selected_perturbed": 4.0, "rest_perturbed": 1.0}
    rows = [{**CURVE, "epoch": epoch, **losses} for epoch in (1, 2)]
    found = figure5.claims(rows)
    assert [claim.measured for claim in found] == [
        "in 2 of 2 epochs; 2 against 1 on average; test accuracy 90.0 % at the end",
        "in 2 of 2 epochs; 4 against 1 on average; test accuracy 90.0 % at the end",
    ]
    assert [claim.holds for claim in found] == [True, True]
    rows[1]["rest_perturbed"] = 5.0
    assert [claim.holds for claim in figure5.claims(rows)] == [True, False]


def test_figure_5_compares_means_over_the_seeds_of_each_data_set():
    both = [("digits", 0, 1.0, 2.0), ("digits", 1, 4.0, 2.0), ("cifar10", 0, 1.0, 2.0)]
    losses = {"selected_perturbed": 1.0, "rest_perturbed": 1.0, "epoch": 1, "test_accuracy": 90.0}
    rows = [{"data": d, "seed": s, "selected": a, "rest": b, **losses} for d, s, a, b in both]
    digits, cifar = (claim for claim in figure5.claims(rows) if "at w," in claim.text)
    assert digits.measured.startswith("in 1 of 1 epochs; 2.5 against 2 on average")
    assert cifar.measured.startswith("in 0 of 1 epochs; 1 against 2 on average")
    assert [(claim.holds, len(claim.rows)) for claim in (digits, cifar)] == [(True, 2), (False, 1)]


def test_figure_6_orders_the_three_cosines():
    row = {**CURVE, "epoch": 1, "selected": 0.9, "random": 0.8, "rest": -0.1}
    assert [claim.holds for claim in figure6.claims([row])] == [True, True]
    assert [claim.holds for claim in figure6.claims([row | {"random": 0.95}])] == [False, True]
    assert [claim.holds for claim in figure6.claims([row | {"rest": 0.85}])] == [True, False]


def test_figure_7_takes_each_beta_from_its_own_training_or_all_from_sams():
    zeta = {  # (trained with, beta): with the scaling by 1/beta, without
        (0.5, 0.5): (4.0, 1.0),
        (1.0, 0.5): (1.0, 3.0),
        (1.0, 1.0): (2.0, 2.0),
    }
    rows = [
        {**CURVE, "epoch": 1, "trained_with": trained, "beta": beta, "rescaled": rescaled, "linearity": values[i]}
        for (trained, beta), values in zeta.items()
        for i, rescaled in enumerate((True, False))
    ]
    found = [(claim.holds, claim.measured) for claim in figure7.claims(rows)]
    assert found == [
        (False, "at 0 of 1 steps; 4 at beta = 0.5, 2 at 1.0"),
        (True, "at 1 of 1 steps; 1 at beta = 0.5, 2 at 1.0"),
        (True, "at 1 of 1 steps; 1 at beta = 0.5, 2 at 1.0"),
        (False, "at 0 of 1 steps; 3 at beta = 0.5, 2 at 1.0"),
    ]
    assert [claim.measured for claim in figure7.claims(rows[:2])] == [None] * 4
