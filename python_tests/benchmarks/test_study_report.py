"""The study's report: differences count beyond their error, and pages and chart say what the rows say."""

from __future__ import annotations

import pytest

from benchmarks.paper import ROOT
from benchmarks.rows import RESULTS
from benchmarks.study import chart, report
from benchmarks.study.modes import MODES
from benchmarks.study.rows import Rows, Unit
from benchmarks.study.settings import BY_NAME as SETTINGS_BY_NAME
from benchmarks.study.summary import Difference, Summary
from benchmarks.study.training import Outcome, Trial

DIGITS = SETTINGS_BY_NAME["digits"].smoke()


def a_row(mode: str, purpose: str, trial: Trial, seed: int, accuracy: float, setting=DIGITS, cost: float = 1.0):
    unit = Unit(setting, mode, purpose, trial, setting.epochs, seed)
    return unit.row(Outcome(accuracy, accuracy, accuracy, cost, 1.0))


@pytest.mark.parametrize(
    ("mean", "error", "below", "above"), [(-1.0, 0.4, True, False), (-1.0, 0.6, False, False), (1.0, 0.4, False, True)]
)
def test_a_difference_counts_beyond_two_standard_errors(mean, error, below, above):
    difference = Difference(mean, error)
    assert (difference.is_below, difference.is_above) == (below, above)
    assert str(difference).startswith("**") == (below or above)


def rows_of(tmp_path, **accuracies: list[float]) -> Rows:
    rows = Rows(tmp_path / "rows.json")
    setting = SETTINGS_BY_NAME["digits"]
    for mode, values in accuracies.items():
        for seed, value in enumerate(values):
            rows.add(a_row(mode.replace("_", "-"), "epochs", Trial(0.1, 64, 0.0), seed, value, setting))
    return rows


def summary_of(tmp_path, **accuracies: list[float]) -> Summary:
    return Summary(rows_of(tmp_path, **accuracies))


def test_a_mode_loses_where_it_is_below_sam_and_sam_is_above_sgd(tmp_path):
    sgd = [90.0 + 0.1 * (seed % 3) for seed in range(10)]
    summary = summary_of(
        tmp_path,
        sgd=sgd,
        sam=[value + 2.0 + 0.1 * (seed % 2) for seed, value in enumerate(sgd)],
        esam=[value + 1.0 + 0.1 * (seed % 2) for seed, value in enumerate(sgd)],
        norm=[value + 2.0 + 0.1 * ((seed + 1) % 2) for seed, value in enumerate(sgd)],
    )
    assert summary.losses("esam") == ["digits, small CNN"]
    assert summary.losses("norm") == []


def test_where_sam_is_not_above_sgd_a_mode_only_has_to_reach_sgd(tmp_path):
    sgd = [90.0 + 0.1 * (seed % 3) for seed in range(10)]
    summary = summary_of(tmp_path, sgd=sgd, sam=sgd[::-1], esam=sgd, norm=[value - 1.0 for value in sgd])
    assert summary.losses("esam") == []
    assert summary.losses("norm") == ["digits, small CNN"]


def test_the_recommendation_names_where_its_mode_is_less_accurate(tmp_path):
    sgd = [90.0 + 0.1 * (seed % 3) for seed in range(10)]
    sam = [value + 2.0 + 0.1 * (seed % 2) for seed, value in enumerate(sgd)]
    rows_of_it = [value + 1.0 + 0.1 * (seed % 2) for seed, value in enumerate(sgd)]
    lines = report.recommendation(summary_of(tmp_path, sgd=sgd, sam=sam, sam_quarter=rows_of_it), None).splitlines()
    assert "a step costs 1.00 steps of SGD" in lines[0]
    assert lines[1].endswith(
        "more accurate in 0, no clear difference in 0, less accurate in 1: digits, small CNN (-1.0)."
    )
    assert lines[2].endswith("more accurate in 1, no clear difference in 0, less accurate in 0.")


def test_the_table_of_selections_has_the_modes_that_choose_data_where_labels_are_wrong(tmp_path):
    rows, setting = Rows(tmp_path / "rows.json"), SETTINGS_BY_NAME["digits-40"]
    for mode, accuracy in (("sgd", 90.0), ("sam", 92.0), ("random", 91.0), ("sam-quarter", 91.0)):
        for seed in range(10):
            unit = Unit(setting, mode, "epochs", Trial(0.1, 64, 0.0), setting.epochs, seed)
            wrong = 40.0 + seed if mode == "random" else None
            rows.add(unit.row(Outcome(accuracy, accuracy, accuracy + seed % 2, 1.0, 1.0, wrong)))
    lines = report.selections(Summary(rows), rows).splitlines()
    random = "| digits, small CNN | 40 % | ESAM, random half | 44 % | **+1.0 ± 0.0** | **-1.0 ± 0.0** |"
    assert lines[2:] == [random]


def test_the_short_table_has_a_dash_where_nothing_was_measured(tmp_path):
    rows = rows_of(tmp_path, sgd=[90.0] * 10, sam=[91.0] * 10)
    other = SETTINGS_BY_NAME["digits-40"]
    for mode in ("sgd", "sam", "random"):
        for seed in range(10):
            unit = Unit(other, mode, "epochs", Trial(0.1, 64, 0.0), other.epochs, seed)
            rows.add(unit.row(Outcome(80.0, 80.0, 80.0, 1.0, 1.0, 40.0)))
    assert report.short(Summary(rows), rows).splitlines() == [
        '| test accuracy, % | SGD | SAM | `ranking="random"` |',
        "|---|---:|---:|---:|",
        "| digits, small CNN | 90.0 ± 0.0 | 91.0 ± 0.0 | - |",
        "| digits, small CNN, 40 % wrong labels | 80.0 ± 0.0 | 80.0 ± 0.0 | 80.0 ± 0.0 |",
    ]


def test_the_chart_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    summary = summary_of(tmp_path, sgd=[90.0] * 10, sam=[91.0] * 10)
    chart.draw(summary, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes()[:4] == b"\x89PNG"


def test_the_chart_shows_what_was_measured_of_the_packages_modes(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    legends, draw = [], figure.Figure.legend

    def legend(self, handles, names, **options):
        legends.append({name: (h.lines[0].get_color(), h.lines[0].get_marker()) for name, h in zip(names, handles)})
        return draw(self, handles, names, **options)

    monkeypatch.setattr(figure.Figure, "legend", legend)
    values = [90.0] * 10
    summary = summary_of(
        tmp_path, sgd=values, sam=values, esam=values, softened=values, sharp_quarter=values, norm_sharp_quarter=values
    )
    chart.draw(summary, tmp_path / "all.png")
    chart.draw(summary, tmp_path / "few.png", [mode for mode in chart.SHOWN if mode.name in ("sgd", "esam")])
    sgd, sam, esam = {"SGD": ("black", "*")}, {"SAM": ("black", "o")}, {"ESAM, the paper's": ("royalblue", "D")}
    assert legends == [sgd | sam | esam, sgd | esam]


def test_readmes_chart_shows_the_modes_of_its_table():
    few, every = report.CHARTS.values()
    assert [mode.name for mode in few] == sorted(report.SHORT, key=[mode.name for mode in MODES].index)
    assert [mode.name for mode in every] == [mode.name for mode in MODES if mode.is_in_package]


def test_pages_and_chart_are_what_the_rows_say(capsys):
    assert report.update(Rows(RESULTS / "study" / "cpu.json"), ROOT, check=True) == 0, capsys.readouterr().err
    blocks = [[what for _, what, _ in report.BLOCK.findall((ROOT / page).read_text())] for page in report.PAGES]
    whole = ["recommendation", "verdicts", "selections", "accuracies", "sensitivity", "conditions"]
    assert blocks == [whole, ["recommendation"], ["short"]]


def test_a_page_and_a_chart_of_other_rows_are_found(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "docs").mkdir()
    for page in report.PAGES:
        (tmp_path / page).write_text("<!-- modes:short -->\n<!-- /modes -->\n")
    assert report.update(rows_of(tmp_path, sgd=[90.0] * 10, sam=[91.0] * 10), tmp_path) == 0
    assert "| digits, small CNN | 90.0 ± 0.0 | 91.0 ± 0.0 |" in (tmp_path / "README.md").read_text()
    others = rows_of(tmp_path, sgd=[90.0] * 10, sam=[91.02] * 10)
    assert report.update(others, tmp_path, check=True) == 1
    found = capsys.readouterr().err
    assert all(str(tmp_path / path) in found for path in report.CHARTS)
    assert "README.md" not in found  # 91.02 is written as 91.0
