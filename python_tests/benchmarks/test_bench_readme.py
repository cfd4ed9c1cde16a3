"""Every number of the README that comes from a measurement stands in the committed rows."""

from __future__ import annotations

import importlib.util
import json
import re
import sys

import pytest

from benchmarks import performance, plots, readme, rows

ROWS = [
    {
        "suite": "perturb",
        "case": case,
        "implementation": name,
        "device": "a CPU",
        "unit": "ms",
        "p20": 0.9 * value,
        "p50": value,
        "p80": 1.1 * value,
        "samples": 5,
        "copy_share": 0.8 / value,
        "torch": "2.13",
        "threads": 2,
        "backend": "native",
        "commit": "abc",
        "date": "2026-01-01",
        "load": 0.1,
        **({"ratio": value / 10.0} if name != "ours" else {}),
    }
    for case in ("ResNet-18 fp32 tensor", "ResNet-50 fp32 tensor")
    for name, value in (("ours", 10.0), ("as released", 72.0))
]
BLOCK = "<!-- rows:cpu/perturb ResNet-18 -->\n<!-- /rows -->\n"
MARK = "takes 0.0<!-- row: cpu/perturb.json#ResNet-18 fp32 tensor|as released|ratio --> times as long"


@pytest.fixture
def folder(tmp_path):
    rows.save(tmp_path / "cpu" / "perturb.json", ROWS)
    return tmp_path


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.name)
def test_pages_agree_with_the_rows(page):
    text = page.read_text()
    assert readme.differences(text, readme.rendered(text)) == []


def test_the_readme_says_how_far_the_time_of_a_mode_is_from_its_count():
    groups = rows.by_machine(rows.load(rows.RESULTS / "cpu" / "modes.json"))
    shares = [float(line[3]) for group in groups for line in performance.lines_of_modes(group)[1:]]
    said = re.search(r"or up to (\d+) % less\s+or (\d+) % more", readme.README.read_text())
    assert [int(number) for number in said.groups()] == [round(100 - 100 * min(shares)), round(100 * max(shares) - 100)]


def test_block_is_filled_with_the_chosen_cases(folder):
    text = readme.rendered(f"before\n{BLOCK}after\n", folder)
    assert "| ResNet-18 fp32 tensor | 10.0 | 72.0 (7.20x) | 8 % |" in text
    assert "ResNet-50" not in text
    assert "torch 2.13; backend native; commit abc; 2026-01-01" in text
    assert text.startswith("before\n")
    assert text.endswith("<!-- /rows -->\nafter\n")
    assert readme.rendered(text, folder) == text


def test_a_block_and_a_mark_take_the_number_of_threads_that_was_measured_last(folder):
    one_thread = [row | {"threads": 1, "date": "2026-01-02", "ratio": 3.5} for row in ROWS[:2]]
    rows.save(folder / "cpu" / "perturb.json", one_thread)
    text = readme.rendered(f"{BLOCK}{MARK}", folder)
    assert "72.0 (3.50x)" in text
    assert "72.0 (7.20x)" not in text
    assert "a CPU; 1 thread; torch" in text
    assert text.endswith(MARK.replace("0.0", "3.5", 1))
    resnet_50 = BLOCK.replace("ResNet-18", "ResNet-50")
    assert "a CPU; 2 threads; torch" in readme.rendered(resnet_50, folder), "one thread did not measure it"


def test_mark_is_rewritten_with_the_decimals_it_has(folder):
    assert readme.rendered(MARK, folder) == MARK.replace("0.0", "7.2", 1)
    assert readme.rendered(MARK.replace("0.0", "5", 1), folder) == MARK.replace("0.0", "7", 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- rows:cpu/perturb -->\n| 1 |\n", "not closed"),
        ("<!-- rows:cpu/nothing -->\n<!-- /rows -->\n", "does not exist"),
        ("<!-- rows:cpu/perturb VGG -->\n<!-- /rows -->\n", "no rows"),
        ("fast <!-- row: cpu/perturb.json#ResNet-18 fp32 tensor|as released|ratio -->", "does not follow a number"),
        (MARK.replace("|as released|", "|compile|"), "no number"),
        (MARK.replace("|ratio", "|torch"), "no number"),
    ],
)
def test_what_no_row_supports_is_refused(folder, text, message):
    with pytest.raises(ValueError, match=message):
        readme.rendered(text, folder)


def test_check_fails_on_a_number_that_differs_from_the_rows(folder, monkeypatch, capsys):
    path = folder / "README.md"
    path.write_text(f"{BLOCK}\n{MARK}\n")

    def command(*options):
        monkeypatch.setattr("sys.argv", ["readme", *options, "--readme", str(path), "--results", str(folder)])
        return readme.main()

    assert command("--check") == 1
    assert command() == 0
    assert command("--check") == 0
    good = path.read_text()
    for wrong in (good.replace("7.20x", "7.30x"), good.replace("7.2<", "7.3<")):
        assert wrong != good
        path.write_text(wrong)
        assert command("--check") == 1
        assert "differs from the rows" in capsys.readouterr().err
        assert path.read_text() == wrong


def test_memory_is_drawn_by_method():
    found = plots.by_method([{"case": "3 steps", "implementation": name} for name in ("SGD", "ESAM element, ours")])
    assert [(row["case"], row["implementation"]) for row in found] == [
        ("SGD: 3 steps", "SGD alone"),
        ("ESAM element: 3 steps", "ours"),
    ]


def test_plots_are_drawn_from_the_rows(folder):
    pytest.importorskip("matplotlib")
    plots.draw(folder / "cpu")
    assert (folder / "cpu" / "perturb_fp32.png").stat().st_size > 10_000
    assert not (folder / "cpu" / "memory.png").exists()


def test_without_matplotlib_one_line_says_so_and_nothing_fails(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plots", str(folder / "cpu")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    plots.main()
    assert capsys.readouterr().out == "matplotlib is not installed: no plots are drawn (pip install matplotlib)\n"
    assert not list(folder.rglob("*.png"))


def test_a_study_block_shows_mean_and_spread_of_each_optimizer(tmp_path):
    cell = {"seeds": 3, "label_noise": 0.4, "optimizer": "sam", "test_accuracy": {"mean": 91.26, "std": 1.24}}
    study = {"rows": [cell], "environment": {"torch": "2.13.0", "commit": "0123456789abcdef"}}
    (tmp_path / "study.json").write_text(json.dumps(study))
    text = readme.rendered("<!-- study:study -->\n| sam | 99 |\n<!-- /study -->", tmp_path)
    assert "| SAM | 91.3 ± 1.2 |" in text
    assert "99" not in text
    assert "3 seeds, ± their standard deviation; torch 2.13.0, commit 0123456789." in text
    assert "| test accuracy, % | 40 % wrong labels |" in text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sgd", "SGD"),
        ("esam, constant gamma", "ESAM, constant gamma"),
        ("esam, momentum", 'ESAM, ascent="momentum"'),
    ],
)
def test_a_study_names_what_a_reader_can_type(name, words):
    assert readme._shown(name) == words


def test_a_block_of_radii_shows_the_gain_over_sgd_with_the_number_of_seeds(tmp_path):
    common = {"stage": "tune", "task": "digits", "rho": None, "rho_warmup": 0.0, "seeds": 5}
    rows = [
        {**common, "optimizer": "sam", "over_sgd": 1.25},
        {**common, "optimizer": "esam-previous", "rho": 0.1, "over_sgd": -0.75, "seeds": 3},
        {**common, "optimizer": "esam-previous", "rho": 0.05, "over_sgd": 2.0},
        {**common, "optimizer": "esam-previous", "rho": 0.05, "over_sgd": 9.0, "stage": "report"},
        {**common, "optimizer": "esam-previous", "rho": 0.1, "over_sgd": 0.5, "rho_warmup": 0.25},
    ]
    study = {"rows": rows, "environment": {"torch": ["2.13.0"], "commit": ["0123456789abcdef", "abc"]}}
    (tmp_path / "study.json").write_text(json.dumps(study))
    text = readme.rendered("<!-- study:study esam-previous -->\n<!-- /study -->", tmp_path)
    assert "| points over SGD | 0.05 | 0.1 | SAM |" in text
    assert "| digits | +2.0 (5) | -0.8 (3) | +1.2 (5) |" in text
    assert "| digits, warm-up of rho |  | +0.5 (5) |  |" in text
    assert "torch 2.13.0, commit 0123456789, abc." in text
    assert readme.rendered(text, tmp_path) == text
    with pytest.raises(ValueError, match="no rows of 'esam-momentum'"):
        readme.rendered(text.replace("esam-previous", "esam-momentum"), tmp_path)
