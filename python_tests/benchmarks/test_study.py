"""The study: its search is fair, it goes on where it stopped, and its page says what its rows say."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest
import torch

from benchmarks.paper import ROOT
from benchmarks.rows import RESULTS
from benchmarks.study import __main__ as program
from benchmarks.study import chart, report
from benchmarks.study.modes import BY_NAME as MODES
from benchmarks.study.modes import CentredByClass, Mode, Softened
from benchmarks.study.plan import missing, next_units, report_units, search
from benchmarks.study.rows import Rows, Unit
from benchmarks.study.samples import Samples, digits, split
from benchmarks.study.search import Search
from benchmarks.study.settings import BY_NAME as SETTINGS_BY_NAME
from benchmarks.study.settings import SETTINGS
from benchmarks.study.summary import Difference, Summary
from benchmarks.study.training import Outcome, Trial, cost_of, step, train
from esam_kernels import ESAM, RankingContext
from esam_kernels.ranking import Head

DIGITS = SETTINGS_BY_NAME["digits"].smoke()


def a_row(mode: str, purpose: str, trial: Trial, seed: int, accuracy: float, setting=DIGITS, cost: float = 1.0):
    unit = Unit(setting, mode, purpose, trial, setting.epochs, seed)
    return unit.row(Outcome(accuracy, accuracy, accuracy, cost, 1.0))


def searched(search: Search, mode: str, accuracy) -> tuple[list[list[tuple[Trial, int]]], Trial]:
    """The stages of a search in which each run comes to accuracy(trial, seed), and the trial that it chooses."""
    known, stages = {}, []
    while True:
        runs, best = search.next_runs(MODES[mode], lambda run: known.get((str(run[0]), run[1])))
        if best is not None:
            return stages, best
        stages.append(runs)
        known |= {(str(trial), seed): accuracy(trial, seed) for trial, seed in runs}


def test_all_modes_with_the_same_radii_start_with_the_same_trials():
    for setting in SETTINGS:
        first = {name: setting.search.first_trials(mode) for name, mode in MODES.items()}
        assert first["sam"] == first["sharp-quarter"] == first["sam-quarter"] == first["esam"]
        combinations = [dataclasses.replace(trial, rho=None) for trial in first["sam"]]
        assert combinations == first["sgd"] == [dataclasses.replace(t, rho=None) for t in first["norm-random"]]
        assert len(set(combinations)) == len(combinations)


def test_each_radius_meets_each_learning_rate_in_the_first_trials():
    trials = Search().first_trials(MODES["sam"])
    assert {(trial.lr, trial.rho) for trial in trials} == set(itertools.product(Search().rates, MODES["sam"].radii))


def test_the_search_finds_a_best_trial_that_was_not_in_its_first_stage():
    wanted = Trial(0.1, 64, 2e-3, 0.1)
    assert wanted not in Search().first_trials(MODES["sam"])

    def accuracy(trial: Trial, seed: int) -> float:
        parts = ((trial.lr, 0.1), (trial.batch_size, 64), (trial.weight_decay, 2e-3), (trial.rho, 0.1))
        return 90.0 - sum(abs(math.log(value / best)) for value, best in parts)

    stages, best = searched(Search(), "sam", accuracy)
    assert best == wanted
    assert [len(stage) for stage in stages] == [24, 6 * 3, 8, 6]
    assert [sorted({seed for _, seed in stage}) for stage in stages] == [[100], [100], [101], [102, 103]]


def test_the_mean_over_the_seeds_of_the_last_round_chooses():
    lucky, steady = Trial(0.02, 32, 5e-4), Trial(0.05, 32, 5e-4)

    def accuracy(trial: Trial, seed: int) -> float:
        if trial == lucky:
            return 99.0 if seed == 100 else 91.0
        return 95.0 if trial == steady else 50.0

    assert searched(Search(), "sgd", accuracy)[1] == steady


@pytest.mark.parametrize("mode", ["sgd", "sam", "momentum"])
@pytest.mark.parametrize("setting", ["digits", "cifar10"])
def test_the_size_of_a_search_is_known_before(setting, mode):
    search = SETTINGS_BY_NAME[setting].search
    stages, _ = searched(search, mode, lambda trial, seed: trial.lr)
    assert search.size(MODES[mode]) == sum(len(stage) for stage in stages)


def finish_search(rows: Rows, setting, mode: str, cost: float = 1.0) -> Trial:
    while True:
        units, best = search(rows, setting, MODES[mode])
        if best is not None:
            return best
        for unit in units:
            rows.add(unit.row(Outcome(50.0, 50.0, 50.0, cost, 1.0)))


def test_seeds_that_choose_are_not_reported(tmp_path):
    rows = Rows(tmp_path / "rows.json")
    best = finish_search(rows, DIGITS, "sam", cost=2.0)
    assert {row["seed"] for row in rows} == {100, 101}
    assert {unit.seed for unit in report_units(rows, DIGITS, MODES["sam"], best)} == {0, 1}


def test_the_validation_accuracy_chooses_the_trial(tmp_path):
    rows = Rows(tmp_path / "rows.json")
    units, _ = search(rows, DIGITS, MODES["sgd"])
    for unit, validation, test in zip(units, (90.0, 91.0), (99.0, 10.0), strict=True):
        rows.add(unit.row(Outcome(50.0, validation, test, 1.0, 1.0)))
    assert [unit.trial for unit in search(rows, DIGITS, MODES["sgd"])[0]] == [units[1].trial]


def test_equal_time_is_sams_time(tmp_path):
    rows = Rows(tmp_path / "rows.json")
    setting = dataclasses.replace(DIGITS, epochs=30)
    best = finish_search(rows, setting, "esam", cost=1.7)
    lengths = {unit.purpose: unit.epochs for unit in report_units(rows, setting, MODES["esam"], best)}
    assert lengths == {"epochs": 30, "time": 35}


def test_equal_time_comes_after_all_the_rest(tmp_path):
    rows, modes = Rows(tmp_path / "rows.json"), [MODES["sgd"], MODES["norm-random"]]
    stages = []
    while units := next_units(rows, [DIGITS], modes):
        stages.append({(unit.mode, unit.purpose) for unit in units})
        for unit in units:
            rows.add(unit.row(Outcome(50.0, 50.0, 50.0, 1.0, 1.0)))
    purposes = {"sgd": ["search"] * 2, "norm-random": ["search"] * 3}
    assert stages == [{(mode.name, p)} for mode in modes for p in (*purposes[mode.name], "epochs")] + [
        {(mode.name, "time")} for mode in modes
    ]


def test_pass_1_on_a_quarter_perturbs_along_it_and_pass_2_takes_all():
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    inputs, targets = (
        torch.tensor([[1.0, 0.5], [0.0, 1.0], [2.0, 1.0], [-1.0, 3.0]]),
        torch.tensor([0.5, 1.0, 0.0, 2.0]),
    )

    def losses(x, y):
        return (x @ weight - y) ** 2

    def gradient(w, x, y):
        return 2.0 * ((x @ w - y)[:, None] * x).mean(dim=0)

    optimizer = ESAM([weight], torch.optim.SGD, lr=0.1, rho=0.3, beta=1.0, gamma=1.0)
    w = weight.detach().clone()
    assert cost_of(optimizer, 0.25) == 1.25
    first = gradient(w, inputs[:1], targets[:1])
    step(optimizer, losses, (inputs, targets), first_share=0.25)
    torch.testing.assert_close(weight.detach(), w - 0.1 * gradient(w + 0.3 * first / first.norm(), inputs, targets))


def test_a_stopped_study_goes_on_where_it_stopped(tmp_path, capsys):
    arguments = [
        "--scale",
        "smoke",
        "--settings",
        "digits",
        "--modes",
        "norm-random",
        "--out",
        str(tmp_path / "rows.json"),
    ]
    assert program.main([*arguments, "--minutes", "0"]) == program.EXIT_NOT_FINISHED
    assert program.main(arguments) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["purpose"] for row in rows] == ["search"] * 6 + ["epochs"] * 2 + ["time"] * 2
    assert all(math.isclose(row["cost"], 1.17, abs_tol=0.02) for row in rows)
    capsys.readouterr()
    assert program.main(arguments) == 0
    assert "0 of 10 trainings are missing" in capsys.readouterr().out
    assert json.loads((tmp_path / "rows.json").read_text()) == rows


def test_nothing_is_missing_once_all_stages_are_there(tmp_path):
    rows = Rows(tmp_path / "rows.json")
    mode, seen = MODES["sgd"], []
    while units := missing(rows, DIGITS, mode):
        seen.append({unit.purpose for unit in units})
        for unit in units:
            rows.add(unit.row(Outcome(50.0, 50.0, 50.0, 1.0, 1.0)))
    assert seen == [{"search"}, {"search"}, {"epochs", "time"}]


def test_a_training_depends_on_its_seed_alone():
    samples = digits()
    small = Samples(tuple(part[:256] for part in samples.train), samples.validation, samples.test)

    def outcome(seed: int) -> Outcome:
        torch.manual_seed(seed)
        network = DIGITS.network()
        trained = train("softened", Trial(0.1, 64, 5e-4, 0.1), small, network, 1, seed)
        return dataclasses.replace(trained, seconds=0.0)

    assert outcome(3) == outcome(3) != outcome(4)


class WrongFirst:
    """Scores by which the wrong labels are chosen first."""

    def __init__(self, seed: int) -> None:
        del seed

    def __call__(self, context: RankingContext) -> torch.Tensor:
        return context.batch[2].float()


def test_the_share_of_wrong_labels_in_the_selection_is_recorded():
    samples = digits().with_label_noise(0.25, seed=0)

    def outcome(samples: Samples, **settings) -> Outcome:
        mode = Mode("mode", "", (0.05,), {"beta": 1.0, **settings})
        return train(mode, Trial(0.1, len(samples.train[1]), 5e-4, 0.05), samples, DIGITS.network(), 1, 0)

    assert outcome(samples, gamma=0.5, ranking=WrongFirst).wrong_in_selection == 50.0
    assert outcome(samples, sharpness_share=0.25).wrong_in_selection is None
    assert outcome(digits(), gamma=0.5, ranking="random").wrong_in_selection is None


def test_sgd_costs_1_and_is_torchs(monkeypatch):
    samples = digits()
    small = Samples(tuple(part[:128] for part in samples.train), samples.validation, samples.test)
    torch.manual_seed(0)
    network = DIGITS.network()
    outcome = train("sgd", Trial(0.1, 64, 5e-4), small, network, 1, 0)
    torch.manual_seed(0)
    twin = DIGITS.network()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)
    for chosen in torch.randperm(128, generator=torch.Generator().manual_seed(0)).split(64):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(twin(small.train[0][chosen]), small.train[1][chosen]).backward()
        optimizer.step()
        rates.step()
    assert outcome.cost == 1.0
    for ours, theirs in zip(network.parameters(), twin.parameters()):
        torch.testing.assert_close(ours, theirs)


def test_label_noise_replaces_exactly_its_share():
    labels = torch.arange(1000) % 10
    samples = Samples((torch.zeros(1000, 1), labels), (labels, labels), (labels, labels))
    noisy = samples.with_label_noise(0.2, seed=1)
    assert (noisy.train[1] != labels).sum() == 200
    assert int(noisy.train[1].max()) == 9
    assert samples.with_label_noise(0.0, seed=1) is samples


def test_the_three_sets_have_nothing_in_common():
    inputs = torch.arange(100.0)
    parts = split(inputs, inputs.long(), 50, 30, 20)
    together = torch.cat([parts.train[0], parts.validation[0], parts.test[0]])
    assert torch.equal(together.sort().values, inputs)


def test_each_seed_draws_its_own_training_and_validation_set():
    inputs = torch.arange(100.0)
    parts = split(inputs, inputs.long(), 50, 30, 20)
    drawn, again, other = (parts.redrawn(seed) for seed in (1, 1, 2))
    assert torch.equal(drawn.train[0], again.train[0])
    assert not torch.equal(drawn.train[0], other.train[0])
    assert (len(drawn.train[1]), len(drawn.validation[1])) == (50, 30)
    assert torch.equal(drawn.train[0].long(), drawn.train[1])
    together = torch.cat([drawn.train[0], drawn.validation[0], drawn.test[0]])
    assert torch.equal(together.sort().values, inputs)
    assert torch.equal(drawn.test[0], parts.test[0])


def head_context(labels: torch.Tensor) -> RankingContext:
    generator = torch.Generator().manual_seed(0)
    head = Head(torch.randn(8, 3, generator=generator), torch.randn(8, 4, generator=generator))
    return RankingContext(torch.zeros(8), (torch.zeros(8, 1), labels), head, seed=0, step=0)


def test_softened_scores_draw_in_proportion_to_the_exponential_of_the_score():
    context = head_context(torch.zeros(8, dtype=torch.int64))
    from esam_kernels.ranking import first_order_scores

    scores = first_order_scores(context.head.input, context.head.output_grad)
    expected = torch.softmax((scores - scores.mean()) / scores.std(), dim=0)
    ranking = Softened(seed=5)
    first = torch.stack([ranking(context).argmax() for _ in range(4000)])
    torch.testing.assert_close(torch.bincount(first, minlength=8) / 4000, expected, atol=0.025, rtol=0)


def test_scores_centred_by_class_have_mean_0_in_each_class():
    labels = torch.tensor([0, 0, 0, 2, 2, 2, 1, 1])
    scores = CentredByClass(seed=0)(head_context(labels))
    for label in range(3):
        assert scores[labels == label].mean().abs() < 1e-5


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
    lines = report.recommendation(summary_of(tmp_path, sgd=sgd, sam=sam, sharp_quarter=rows_of_it), None).splitlines()
    assert "a step costs 1.00 steps of SGD" in lines[0]
    assert lines[1].endswith(
        "more accurate in 0, no clear difference in 0, less accurate in 1: digits, small CNN (-1.0)."
    )
    assert lines[2].endswith("more accurate in 1, no clear difference in 0, less accurate in 0.")


def test_the_table_of_selections_has_the_modes_that_choose_data_where_labels_are_wrong(tmp_path):
    rows, setting = Rows(tmp_path / "rows.json"), SETTINGS_BY_NAME["digits-40"]
    for mode, accuracy in (("sgd", 90.0), ("sam", 92.0), ("random", 91.0), ("sharp-quarter", 91.0)):
        for seed in range(10):
            unit = Unit(setting, mode, "epochs", Trial(0.1, 64, 0.0), setting.epochs, seed)
            wrong = 40.0 + seed if mode == "random" else None
            rows.add(unit.row(Outcome(accuracy, accuracy, accuracy + seed % 2, 1.0, 1.0, wrong)))
    lines = report.selections(Summary(rows), rows).splitlines()
    random = "| digits, small CNN | 40 % | ESAM, random half | 44 % | **+1.0 ± 0.0** | **-1.0 ± 0.0** |"
    assert lines[2:] == [random]


def test_the_chart_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    summary = summary_of(tmp_path, sgd=[90.0] * 10, sam=[91.0] * 10)
    chart.draw(summary, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes()[:4] == b"\x89PNG"


def test_pages_and_chart_are_what_the_rows_say(capsys):
    assert report.update(Rows(RESULTS / "study" / "cpu.json"), ROOT, check=True) == 0, capsys.readouterr().err
    blocks = [[what for _, what, _ in report.BLOCK.findall((ROOT / page).read_text())] for page in report.PAGES]
    whole = ["recommendation", "verdicts", "selections", "accuracies", "sensitivity", "conditions"]
    assert blocks == [whole, ["recommendation"], ["short"]]


def test_a_page_and_a_chart_of_other_rows_are_found(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "docs").mkdir()
    for page in report.PAGES:
        (tmp_path / page).write_text("<!-- study:short -->\n<!-- /study -->\n")
    assert report.update(rows_of(tmp_path, sgd=[90.0] * 10, sam=[91.0] * 10), tmp_path) == 0
    assert "| digits, small CNN | 90.0 ± 0.0 | 91.0 ± 0.0 |" in (tmp_path / "README.md").read_text()
    others = rows_of(tmp_path, sgd=[90.0] * 10, sam=[91.02] * 10)
    assert report.update(others, tmp_path, check=True) == 1
    found = capsys.readouterr().err
    assert str(tmp_path / report.CHART) in found
    assert "README.md" not in found  # 91.02 is written as 91.0


def test_a_damaged_file_of_rows_is_not_overwritten(tmp_path, capsys):
    path = tmp_path / "rows.json"
    path.write_text("[{}]")
    assert program.main(["--out", str(path)]) == program.EXIT_USER_ERROR
    assert "rows without" in capsys.readouterr().err
    assert path.read_text() == "[{}]"
