"""docs/reproduction.md is what the rows give, and claims are what their numbers say."""

from __future__ import annotations

import pytest

from benchmarks.paper import report, store
from benchmarks.paper.experiment import Claim, Experiment
from benchmarks.paper.experiments import table4_5

CONDITIONS = {"device": "a CPU", "torch": "2.13", "commit": "abc", "date": "2026-01-01", "settings": {}}


def test_the_page_agrees_with_the_rows():
    assert report.PAGE.read_text() == report.rendered()


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
    assert "| the answer | 42 (Table 0) | 42.0 | yes | paper | digits | 1 | a GPU | abc |\n" in text
    assert "| the answer | 42 (Table 0) | 41.5 | **no** | small | digits | 2 | a CPU | abc |\n" in text
    assert text.index("a GPU") < text.index("a CPU")
    assert "7.0" not in text
    assert "(../rows/cpu/answer_small.png)" in text
    assert "answer_paper.png" not in text


def test_what_has_no_rows_is_not_measured(folder):
    text = report.rendered(folder / "nothing", folder / "page.md")
    assert "| the answer | 42 (Table 0) | not measured |  |  |  |  |  |  |" in text


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
