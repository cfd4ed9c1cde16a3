"""--ranking, --perturb and --phase: what they build, what their steps cost, and what is refused."""

import pytest
import torch
import train
from data import load
from report import summarise, table
from trainer import Trainer, build_optimizer

SMALL = ["--data", "synthetic-cifar10", "--limit", "32", "--batch-size", "8", "--seeds", "1", "--epochs", "2"]


def trainer_of(name, *arguments):
    options = train.parse_options([*SMALL, "--optimizer", name, *arguments])
    return Trainer(name, 0, load(options.data, limit=options.limit), options)


@pytest.mark.parametrize("name", ["esam", "esam-sds"])
@pytest.mark.parametrize("ranking", ["rise", "first_order", "random"])
def test_the_ranking_is_the_optimizers(name, ranking):
    optimizer = trainer_of(name, "--ranking", ranking).optimizer
    assert optimizer.state_dict()["esam"]["ranking"] == ranking


def test_optimizers_that_choose_no_data_have_no_ranking():
    for name in ("sam", "esam-swp", "esam-momentum"):
        trainer = Trainer(
            name,
            0,
            load("synthetic-cifar10", limit=32),
            train.parse_options([*SMALL, "--optimizer", name, "esam", "--ranking", "first_order"]),
        )
        assert trainer.optimizer.state_dict()["esam"]["ranking"] == "rise"


@pytest.mark.parametrize(("name", "rho"), [("sam", 0.05), ("asam", 0.5), ("esam", 0.05), ("esam-momentum", 1.0)])
def test_only_normalization_layers_have_a_radius(name, rho):
    trainer = trainer_of(name, "--perturb", "normalization")
    normalizing, others = trainer.optimizer.param_groups
    norms = [m for m in trainer.model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert {id(p) for p in normalizing["params"]} == {id(p) for norm in norms for p in norm.parameters()}
    assert (normalizing["rho"], others["rho"]) == (rho, 0.0)
    assert len(normalizing["params"]) + len(others["params"]) == len(list(trainer.model.parameters()))


@pytest.mark.parametrize(
    ("phase", "expected"),
    [
        ("0:1", [1.7] * 8),
        ("0.5:1", [1.0] * 4 + [1.7] * 4),
        ("0.5:", [1.0] * 4 + [1.7] * 4),
        (":0.25", [1.7] * 2 + [1.0] * 6),
        ("0.25:0.5", [1.0] * 2 + [1.7] * 2 + [1.0] * 4),
    ],
)
def test_steps_outside_the_phase_cost_the_base_optimizers(phase, expected):
    trainer = trainer_of("esam", "--phase", phase, "--gamma-warmup", "0")
    costs, step = [], trainer.step
    trainer.step = lambda *batch: (costs.append(trainer.optimizer.relative_cost), step(*batch))[1]
    for _ in range(2):
        trainer.train_epoch()
    assert costs == pytest.approx(expected)
    assert [entry["cost"] for entry in trainer.history] == pytest.approx([sum(expected[:4]) / 4, sum(expected[4:]) / 4])


def test_the_phase_of_normalization_layers_leaves_the_others_alone():
    trainer = trainer_of("esam", "--phase", "0.5:1", "--perturb", "normalization")
    seen, step = [], trainer.step
    trainer.step = lambda *batch: (seen.append([g["rho"] for g in trainer.optimizer.param_groups]), step(*batch))[1]
    for _ in range(2):
        trainer.train_epoch()
    assert seen == [[0.0, 0.0]] * 4 + [[0.05, 0.0]] * 4


def test_the_table_has_the_counted_cost_of_each_optimizer():
    results = []
    for name, arguments in (("sgd", []), ("sam", []), ("esam", ["--ranking", "first_order", "--gamma-warmup", "0"])):
        trainer = trainer_of(name, *arguments)
        trainer.train_epoch()
        results.append(trainer.result())
    head, *lines = table(summarise(results)).splitlines()
    assert "counted cost" in head
    place = head.index("counted cost") + len("counted cost")
    assert [line[:place].split()[-1] for line in lines] == ["1.00", "2.00", "1.37"]


def test_esam_fast_trains_from_its_recipe(tmp_path, capsys):
    arguments = ["--recipe", "cifar10-resnet18-esam-fast", *SMALL, "--model", "cnn", "--out", str(tmp_path)]
    assert train.main(arguments) == 0
    row, meaning = [line for line in capsys.readouterr().out.splitlines() if line.startswith("esam ")]
    assert " 1.25 " in row
    assert meaning.startswith("esam is SAM(..., ascent_share=0.25) here")


def test_an_ascent_share_makes_pass_2_take_the_whole_batch_and_leaves_sam_alone():
    options = train.parse_options(["--optimizer", "sam", "esam", "esam-swp", "--ascent-share", "0.5"])
    model = torch.nn.Linear(2, 2)
    sam, esam, swp = (build_optimizer(name, model, options) for name in options.optimizer)
    assert [each.ascent_share for each in (sam, esam, swp)] == [1.0, 0.5, 0.5]
    assert [each.gamma for each in (sam, esam, swp)] == [1.0, 1.0, 1.0]


def test_a_share_of_0_and_a_choice_of_data_beside_a_short_pass_1_are_refused(tmp_path, capsys):
    common = ["--optimizer", "esam", "--epochs", "1", "--out", str(tmp_path)]
    assert train.main([*common, "--ascent-share", "0"]) == train.EXIT_USER_ERROR
    assert "esam: ascent_share must lie in (0, 1], got 0.0" in capsys.readouterr().err
    assert train.main([*common, "--ascent-share", "0.25", "--gamma", "0.5"]) == train.EXIT_USER_ERROR
    assert "ascent_share < 1 needs gamma = 1" in capsys.readouterr().err


def test_a_recipes_share_is_not_held_against_an_optimizer_without_it(capsys):
    assert train.parse_options(["--recipe", "demo", "--optimizer", "sgd"]).ascent_share == 1.0
    assert train.parse_options(["--recipe", "demo", "--optimizer", "esam"]).ascent_share == 0.25
    with pytest.raises(SystemExit):
        train.parse_options(["--recipe", "demo", "--optimizer", "sgd", "--ranking", "random"])
    assert "--ranking is for --optimizer esam" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--phase", "0.7"], "0.7 is not START:STOP with 0 <= START < STOP <= 1"),
        (["--phase", "0.7:0.2"], "0.7:0.2 is not START:STOP"),
        (["--phase", "0.5:1.5"], "1.5 does not lie in"),
        (["--phase", "0.5:1", "--rho-warmup", "0.1"], "--phase and --rho-warmup both set rho"),
        (["--optimizer", "sam", "--ranking", "random"], "--ranking is for --optimizer esam or esam-sds"),
        (["--optimizer", "esam", "--ascent", "momentum", "--ranking", "random"], "--ranking is for --optimizer esam"),
        (["--ranking", "loss"], "argument --ranking: invalid choice: 'loss'"),
        (["--optimizer", "sam", "--ascent-share", "0.5"], "--ascent-share is for --optimizer esam or esam-swp"),
        (["--perturb", "bias"], "argument --perturb: invalid choice: 'bias'"),
    ],
)
def test_what_cannot_be_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.parse_options(arguments)
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
