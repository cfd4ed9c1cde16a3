"""The study: its data, its modes, its trainings, and a program that goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from benchmarks.study import __main__ as program
from benchmarks.study.modes import BY_NAME as MODES
from benchmarks.study.modes import CentredByClass, Mode, Softened
from benchmarks.study.report import RECOMMENDED
from benchmarks.study.samples import Samples, digits, split
from benchmarks.study.settings import BY_NAME as SETTINGS_BY_NAME
from benchmarks.study.settings import SETTINGS
from benchmarks.study.training import Outcome, Trial, cost_of, step, train
from esam_kernels import ESAM, RankingContext, normalization_groups
from esam_kernels.ranking import Head

DIGITS = SETTINGS_BY_NAME["digits"].smoke()


def test_sharpness_of_a_part_is_a_control_variate():
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    inputs = torch.tensor([[1.0, 0.5], [0.0, 1.0], [2.0, 1.0], [-1.0, 3.0]])
    target = torch.tensor([0.5, 1.0, 0.0, 2.0])

    def gradient(w, samples):
        x, y = inputs[samples], target[samples]
        return 2.0 * ((x @ w - y)[:, None] * x).mean(dim=0)

    optimizer = ESAM([weight], torch.optim.SGD, lr=0.1, rho=0.3, beta=1.0, gamma=1.0)
    w, few, whole = weight.detach().clone(), slice(2), slice(4)
    assert cost_of(optimizer, 0.5) == 1.5
    step(optimizer, lambda x, y: (x @ weight - y) ** 2, (inputs, target), sharpness_share=0.5)
    at = w + 0.3 * gradient(w, few) / gradient(w, few).norm()
    expected = gradient(w, whole) + gradient(at, few) - gradient(w, few)
    torch.testing.assert_close(weight.detach(), w - 0.1 * expected)


def test_sharpness_of_a_part_is_one_for_parameters_without_a_radius_too():
    weight, bias = torch.nn.Parameter(torch.tensor([1.0])), torch.nn.Parameter(torch.tensor([0.5]))
    inputs, target = torch.tensor([1.0, 0.0, 2.0, -1.0]), torch.tensor([0.5, 1.0, 0.0, 2.0])

    def of_bias(w, samples):
        return 2.0 * (w * inputs[samples] + 0.5 - target[samples]).mean()

    groups = [{"params": [weight]}, {"params": [bias], "rho": 0.0}]
    optimizer = ESAM(groups, torch.optim.SGD, lr=0.1, rho=0.3, beta=1.0, gamma=1.0)
    assert cost_of(optimizer, 0.5) == 1.5
    step(optimizer, lambda x, y: (x * weight + bias - y) ** 2, (inputs, target), sharpness_share=0.5)
    few, whole = slice(2), slice(4)
    slope = (2.0 * (inputs[few] + 0.5 - target[few]) * inputs[few]).mean()
    at = 1.0 + 0.3 * slope.sign()
    expected = of_bias(1.0, whole) + of_bias(at, few) - of_bias(1.0, few)
    torch.testing.assert_close(bias.detach(), 0.5 - 0.1 * expected[None])


def test_pass_1_on_a_part_is_a_setting_of_the_optimizer():
    weight = torch.nn.Parameter(torch.ones(2))
    shares = {"eighth": 0.125, "three-sixteenths": 0.1875, "quarter": 0.25, "three-eighths": 0.375}
    for name, share in shares.items():
        optimizer, _ = MODES[f"sam-{name}"].optimizer(torch.nn.ParameterList([weight]), 0.1, 0, 10, lr=0.1)
        assert (optimizer.ascent_share, optimizer.relative_cost) == (share, 1.0 + share)


@pytest.mark.parametrize(
    ("mode", "values"),
    [
        ("momentum-warm", [0.0, 0.15, 0.3, 0.3, 0.3]),
        ("esam-warm", [1.0, 0.95, 0.9, 0.5, 0.5]),
        ("sam-last", [0.0, 0.0, 0.0, 0.0, 0.3]),
    ],
)
def test_a_schedule_follows_its_share_of_the_training(mode, values):
    settings = {"rho": 0.3, "seed": 0, "steps": 100, "lr": 0.1, "momentum": 0.9}
    _, (schedule,) = MODES[mode].optimizer(torch.nn.Linear(2, 2), **settings)
    found = []
    for _ in range(101):
        found.append(schedule.get_last_value())
        schedule.step()
    assert [found[step] for step in (0, 5, 10, 50, 100)] == pytest.approx(values)


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
    assert outcome(samples, ascent_share=0.25).wrong_in_selection is None
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


def test_a_damaged_file_of_rows_is_not_overwritten(tmp_path, capsys):
    path = tmp_path / "rows.json"
    path.write_text("[{}]")
    assert program.main(["--out", str(path)]) == program.EXIT_USER_ERROR
    assert "rows without" in capsys.readouterr().err
    assert path.read_text() == "[{}]"


def test_modes_that_no_chosen_setting_has_are_refused(tmp_path, capsys):
    path = tmp_path / "rows.json"
    named = ["--settings", "mnist1d-mlp", "--modes", "norm", "norm-random", "--out", str(path)]
    assert program.main(named) == program.EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert "the settings mnist1d-mlp have none of the modes norm, norm-random" in error
    assert not path.exists()


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_a_setting_has_the_modes_to_compare_with_and_none_that_its_network_cannot_train(setting):
    assert {"sgd", "sam", RECOMMENDED} <= set(setting.modes) <= set(MODES)
    if any(MODES[name].only_normalization for name in setting.modes):
        perturbed, _ = normalization_groups(setting.network(), 1.0)  # ValueError where there are none
        assert perturbed["rho"] == 1.0
