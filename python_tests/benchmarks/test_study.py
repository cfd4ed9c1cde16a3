"""The study: its search is fair, it goes on where it stopped, and its page says what its rows say."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from benchmarks.paper import ROOT
from benchmarks.rows import RESULTS
from benchmarks.study import __main__ as program
from benchmarks.study import chart, report
from benchmarks.study.modes import BY_NAME as MODES
from benchmarks.study.modes import CentredByClass, Softened
from benchmarks.study.plan import missing, next_units, report_units, search_units
from benchmarks.study.rows import Rows, Unit, best_trial
from benchmarks.study.samples import Samples, digits, split
from benchmarks.study.settings import BY_NAME as SETTINGS_BY_NAME
from benchmarks.study.settings import FIRST_SEARCH_SEED, SETTINGS
from benchmarks.study.summary import Difference, Summary
from benchmarks.study.training import Outcome, Trial, cost_of, step, train
from esam_kernels import ESAM, RankingContext
from esam_kernels.ranking import Head

DIGITS = SETTINGS_BY_NAME["digits"].smoke()


def a_row(mode: str, purpose: str, trial: Trial, seed: int, accuracy: float, setting=DIGITS, cost: float = 1.0):
    unit = Unit(setting, mode, purpose, trial, setting.epochs, seed)
    return unit.row(Outcome(accuracy, accuracy, accuracy, cost, 1.0))


def test_every_mode_gets_the_same_number_of_trials():
    for setting in SETTINGS:
        for mode in MODES.values():
            trials = setting.trials_of(mode)
            assert len(trials) == min(setting.trials, len(set(trials))) == len(set(trials))
            assert trials == setting.trials_of(mode)
            assert all((trial.rho is None) == (mode.name == "sgd") for trial in trials)


def test_modes_that_share_a_search_try_the_same_trials_and_the_others_do_not():
    for setting in SETTINGS:
        tried = {name: setting.trials_of(MODES[name]) for name in ("sam", "sam-quarter", "sharp-quarter", "esam")}
        assert tried["sam"] == tried["sam-quarter"] == tried["sharp-quarter"]
        assert tried["esam"] != tried["sam"]


def test_seeds_that_choose_are_not_reported(tmp_path):
    rows = Rows(tmp_path / "rows.json")
    searched = search_units(DIGITS, MODES["sam"])
    assert {unit.seed for unit in searched} == {FIRST_SEARCH_SEED}
    for unit in searched:
        rows.add(unit.row(Outcome(50.0, 50.0, 50.0, 2.0, 1.0)))
    assert {unit.seed for unit in report_units(rows, DIGITS, MODES["sam"])} == {0, 1}


def test_the_validation_accuracy_chooses_the_trial():
    worse, better = Trial(0.1, 128, 0.0), Trial(0.2, 128, 0.0)
    rows = [
        {**a_row("sgd", "search", worse, 100, 90.0), "test_accuracy": 99.0},
        {**a_row("sgd", "search", better, 100, 91.0), "test_accuracy": 10.0},
    ]
    assert best_trial(rows, [worse, better]) == better


def test_equal_time_is_sams_time(tmp_path):
    rows = Rows(tmp_path / "rows.json")
    setting = dataclasses.replace(DIGITS, epochs=30)
    for unit in search_units(setting, MODES["esam"]):
        rows.add(unit.row(Outcome(50.0, 50.0, 50.0, 1.7, 1.0)))
    lengths = {unit.purpose: unit.epochs for unit in report_units(rows, setting, MODES["esam"])}
    assert lengths == {"epochs": 30, "time": 35}


def test_equal_time_comes_after_all_the_rest(tmp_path):
    rows, modes = Rows(tmp_path / "rows.json"), [MODES["sgd"], MODES["norm-random"]]
    stages = []
    while units := next_units(rows, [DIGITS], modes):
        stages.append({(unit.mode, unit.purpose) for unit in units})
        for unit in units:
            rows.add(unit.row(Outcome(50.0, 50.0, 50.0, 1.0, 1.0)))
    assert stages == [{(mode.name, purpose)} for mode in modes for purpose in ("search", "epochs")] + [
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
    step(optimizer, losses, inputs, targets, first_share=0.25)
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
    assert [row["purpose"] for row in rows] == ["search"] * 2 + ["epochs"] * 2 + ["time"] * 2
    assert all(math.isclose(row["cost"], 1.17, abs_tol=0.02) for row in rows)
    capsys.readouterr()
    assert program.main(arguments) == 0
    assert "0 of 6 trainings are missing" in capsys.readouterr().out
    assert json.loads((tmp_path / "rows.json").read_text()) == rows


def test_nothing_is_missing_once_all_stages_are_there(tmp_path):
    rows = Rows(tmp_path / "rows.json")
    mode, seen = MODES["sgd"], []
    while units := missing(rows, DIGITS, mode):
        seen.append({unit.purpose for unit in units})
        for unit in units:
            rows.add(unit.row(Outcome(50.0, 50.0, 50.0, 1.0, 1.0)))
    assert seen == [{"search"}, {"epochs", "time"}]


def test_a_training_depends_on_its_seed_alone():
    samples = digits()
    small = Samples(tuple(part[:256] for part in samples.train), samples.validation, samples.test)

    def outcome(seed: int) -> Outcome:
        torch.manual_seed(seed)
        network = DIGITS.network()
        trained = train("softened", Trial(0.1, 64, 5e-4, 0.1), small, network, 1, seed)
        return dataclasses.replace(trained, seconds=0.0)

    assert outcome(3) == outcome(3) != outcome(4)


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


def summary_of(tmp_path, **accuracies: list[float]) -> Summary:
    rows = Rows(tmp_path / "rows.json")
    setting = SETTINGS_BY_NAME["digits"]
    for mode, values in accuracies.items():
        for seed, value in enumerate(values):
            rows.add(a_row(mode.replace("_", "-"), "epochs", Trial(0.1, 64, 0.0), seed, value, setting))
    return Summary(rows)


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


def test_the_chart_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    summary = summary_of(tmp_path, sgd=[90.0] * 10, sam=[91.0] * 10)
    chart.draw(summary, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes()[:4] == b"\x89PNG"


def test_the_page_is_what_the_rows_say():
    page = (ROOT / report.PAGE).read_text()
    assert report.rendered(page, Rows(RESULTS / "study" / "cpu.json")) == page
    assert [what for _, what, _ in report.BLOCK.findall(page)] == [
        "verdicts",
        "accuracies",
        "sensitivity",
        "conditions",
    ]


def test_a_damaged_file_of_rows_is_not_overwritten(tmp_path, capsys):
    path = tmp_path / "rows.json"
    path.write_text("[{}]")
    assert program.main(["--out", str(path)]) == program.EXIT_USER_ERROR
    assert "rows without" in capsys.readouterr().err
    assert path.read_text() == "[{}]"
