"""The study's search: the same for every mode, and on seeds that its report does not use."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest

from benchmarks.study.modes import BY_NAME as MODES
from benchmarks.study.plan import missing, next_units, report_units, search
from benchmarks.study.rows import Rows, Unit
from benchmarks.study.search import Search
from benchmarks.study.settings import BY_NAME as SETTINGS_BY_NAME
from benchmarks.study.settings import SETTINGS
from benchmarks.study.summary import Summary
from benchmarks.study.training import Outcome, Trial

DIGITS = SETTINGS_BY_NAME["digits"].smoke()


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
        assert first["sam"] == first["sharp-quarter"] == first["esam"]
        combinations = [dataclasses.replace(trial, rho=None) for trial in first["sam"]]
        assert combinations == first["sgd"]
        assert combinations == [dataclasses.replace(trial, rho=None) for trial in first["sam-quarter"]]
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


def test_a_weight_decay_that_needs_a_larger_radius_is_tried_with_it():
    """Every combination of the weaker decay is bad at the radius that the first stage gives it."""
    wanted = Trial(0.1, 32, 5e-4, 0.2)
    first = Search().first_trials(MODES["sam"])
    assert wanted not in first
    assert dataclasses.replace(wanted, rho=0.1) in first

    def accuracy(trial: Trial, seed: int) -> float:
        if trial == wanted:
            return 66.0
        distance = abs(math.log(trial.lr / wanted.lr)) + abs(math.log(trial.batch_size / wanted.batch_size))
        return (60.0 if trial.weight_decay == wanted.weight_decay else 64.0) - distance

    assert searched(Search(extensions=0), "sam", accuracy)[1] == wanted


def test_the_mean_over_the_seeds_of_the_last_round_chooses():
    lucky, steady = Trial(0.02, 32, 5e-4), Trial(0.05, 32, 5e-4)

    def accuracy(trial: Trial, seed: int) -> float:
        if trial == lucky:
            return 99.0 if seed == 100 else 91.0
        return 95.0 if trial == steady else 50.0

    assert searched(Search(), "sgd", accuracy)[1] == steady


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (0.005, {0.01, 0.005}),
        (0.01, {0.01, 0.005}),
        (0.02, {0.01}),
        (0.1, set()),
        (0.2, {0.4}),
        (0.4, {0.4, 0.8}),
        (0.8, {0.4, 0.8}),
    ],
)
def test_a_radius_at_the_edge_of_the_grid_is_doubled_or_halved_on_the_seeds_of_the_last_round(best, tried):
    stages, chosen = searched(Search(), "sam", lambda trial, seed: -abs(math.log(trial.rho / best)))
    assert chosen.rho == best
    outside = [run for stage in stages for run in stage if not 0.02 <= run[0].rho <= 0.2]
    assert {trial.rho for trial, _ in outside} == tried
    assert len(outside) == 4 * len(tried)
    assert {seed for _, seed in outside} == ({100, 101, 102, 103} if tried else set())


@pytest.mark.parametrize("mode", ["sgd", "sam", "momentum"])
@pytest.mark.parametrize("setting", ["digits", "cifar10"])
def test_the_size_of_a_search_is_known_before(setting, mode):
    search = SETTINGS_BY_NAME[setting].search
    radii = MODES[mode].radii
    stages, _ = searched(search, mode, lambda trial, seed: float(trial.rho in radii[1:-1]))
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


def test_what_an_earlier_choice_came_to_is_not_reported(tmp_path):
    rows, setting = Rows(tmp_path / "rows.json"), SETTINGS_BY_NAME["digits"]
    best = finish_search(rows, setting, "sgd")
    earlier = dataclasses.replace(best, lr=1.0)
    for seed in range(setting.seeds):
        for trial, accuracy in ((earlier, 10.0), (best, 90.0)):
            unit = Unit(setting, "sgd", "epochs", trial, setting.epochs, seed)
            rows.add(unit.row(Outcome(accuracy, accuracy, accuracy, 1.0, 1.0)))
    assert Summary(rows).result("digits", "sgd").mean == 90.0


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


def test_nothing_is_missing_once_all_stages_are_there(tmp_path):
    rows = Rows(tmp_path / "rows.json")
    mode, seen = MODES["sgd"], []
    while units := missing(rows, DIGITS, mode):
        seen.append({unit.purpose for unit in units})
        for unit in units:
            rows.add(unit.row(Outcome(50.0, 50.0, 50.0, 1.0, 1.0)))
    assert seen == [{"search"}, {"search"}, {"epochs", "time"}]
