"""Recipes: the paper's numbers, and options that override them."""

import argparse
import re
from pathlib import Path

import pytest
import recipes
import torch
import train
from models import MODELS, build_model

PAGE = (Path(__file__).parents[2] / "docs" / "examples.md").read_text()

# As in the paper: epochs, batch size, learning rate, weight decay, rho (None: not the paper's), beta, gamma.
TABLE_7 = {
    ("resnet18", "sgd"): (200, 128, 0.05, 5e-4, None, None, None),
    ("resnet18", "sam"): (200, 128, 0.05, 1e-3, 0.05, None, None),
    ("resnet18", "esam"): (200, 128, 0.05, 1e-3, 0.05, 0.6, 0.5),
    ("wrn28-10", "sgd"): (200, 256, 0.05, 5e-4, None, None, None),
    ("wrn28-10", "sam"): (200, 256, 0.05, 1e-3, 0.1, None, None),
    ("wrn28-10", "esam"): (200, 256, 0.05, 1e-3, 0.1, 0.5, 0.5),
    ("pyramidnet110", "sgd"): (300, 256, 0.1, 5e-4, None, None, None),
    ("pyramidnet110", "sam"): (300, 256, 0.1, 5e-4, 0.2, None, None),
    ("pyramidnet110", "esam"): (300, 256, 0.1, 5e-4, 0.2, 0.6, 0.5),
}
TABLE_8 = {
    ("resnet50", "sgd"): (90, 512, 0.2, 1e-4, None, None, None),
    ("resnet50", "sam"): (90, 512, 0.2, 1e-4, 0.05, None, None),
    ("resnet50", "esam"): (90, 512, 0.2, 1e-4, 0.05, 0.6, 0.7),
    ("resnet101", "esam"): (90, 512, 0.2, 1e-4, 0.05, 0.6, 0.7),
    ("vit-s16", "esam"): (90, 512, 0.2, 1e-4, 0.05, 0.5, 0.7),
}
NAMES = ("epochs", "batch_size", "lr", "weight_decay", "rho", "beta", "gamma")
ALL = [
    *((data, model, optimizer) for data in ("cifar10", "cifar100") for model, optimizer in TABLE_7),
    *(("imagenet", model, optimizer) for model, optimizer in TABLE_8),
]


@pytest.mark.parametrize(("data", "model", "optimizer"), ALL)
def test_recipe_has_the_numbers_of_the_paper(data, model, optimizer):
    options = train.parse_options(["--recipe", f"{data}-{model}-{optimizer}"])
    expected = {**TABLE_7, **TABLE_8}[model, optimizer]
    for name, value in zip(NAMES, expected):
        assert value is None or getattr(options, name) == value, name
    assert (options.data, options.model, options.optimizer) == (data, model, [optimizer])
    assert (options.lr_schedule, options.lr_warmup, options.label_smoothing) == ("cosine", 0.0, 0.0)
    assert (options.momentum, options.label_noise, options.gamma_warmup) == (0.9, 0.0, 0.0)
    assert options.micro_batch == (128 if data == "imagenet" and optimizer != "sgd" else None)
    assert options.seeds == 3


def test_there_is_a_recipe_for_each_model_data_set_and_optimizer():
    assert len(recipes.RECIPES.keys() - {"demo", "esam-fast"}) == (2 * 3 + 3) * 6


@pytest.mark.parametrize("model", ["cifar10-resnet18", "cifar100-wrn28-10", "imagenet-vit-s16"])
def test_the_fast_recipe_is_sams_with_a_short_pass_1(model):
    fast, sam = (vars(train.parse_options(["--recipe", f"{model}-{name}"])) for name in ("esam-fast", "sam"))
    assert {name: value for name, value in fast.items() if value != sam[name]} == {
        "recipe": f"{model}-esam-fast",
        "optimizer": ["esam"],
        "beta": 1.0,
        "gamma": 1.0,
        "ascent_share": 0.25,
    }


def test_recipes_set_nothing_but_options():
    options = vars(train.parse_options([]))
    for name, recipe in recipes.RECIPES.items():
        assert recipe.keys() <= options.keys(), name


def test_ablations_leave_out_one_part():
    swp, sds = (recipes.RECIPES[f"cifar10-resnet18-{name}"] for name in ("esam-swp", "esam-sds"))
    assert (swp["beta"], swp.get("gamma")) == (0.6, None)
    assert (sds.get("beta"), sds["gamma"]) == (None, 0.5)


@pytest.mark.parametrize("position", ["before", "behind"])
def test_options_override_the_recipe(position):
    recipe = ["--recipe", "cifar10-resnet18-esam"]
    given = ["--lr", "0.3", "--data", "synthetic-cifar10", "--optimizer", "sgd", "sam", "--lr-schedule", "constant"]
    options = train.parse_options([*given, *recipe] if position == "before" else [*recipe, *given])
    assert (options.lr, options.data, options.optimizer) == (0.3, "synthetic-cifar10", ["sgd", "sam"])
    assert (options.lr_schedule, options.epochs, options.weight_decay) == ("constant", 200, 1e-3)


def test_without_options_the_demonstration_is_trained(monkeypatch):
    asked = []
    monkeypatch.setattr(train, "train", lambda options: asked.append(vars(options)) or [])
    monkeypatch.setattr(train, "report", lambda options, results: None)
    monkeypatch.setattr(train.Path, "mkdir", lambda *_, **__: None)
    monkeypatch.setattr("sys.argv", ["train.py"])
    assert train.main() == train.main(["--recipe", "demo", "--seeds", "1"]) == 0
    assert [options["recipe"] for options in asked] == ["demo", "demo"]
    assert asked[0] == {**asked[1], "seeds": 3}
    assert recipes.DEMO.items() <= asked[0].items()
    assert asked[0]["label_noise"] == 0.4


def test_make_train_runs_the_demonstration():
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    assert "examples/train.py --recipe demo $(ARGS)" in makefile


def test_an_option_given_with_its_usual_default_overrides_too():
    options = train.parse_options(["--recipe", "cifar10-resnet18-esam", "--batch-size", "64", "--epochs", "25"])
    assert (options.batch_size, options.epochs) == (64, 25)


def test_a_recipe_changes_no_later_parse():
    before = vars(train.parse_options([]))
    train.parse_options(["--recipe", "cifar10-wrn28-10-esam"])
    assert vars(train.parse_options([])) == before


def test_list_names_every_recipe_and_exits_with_0(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--recipe", "list"])
    assert stopped.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["recipe", *recipes.RECIPES]
    line = next(line for line in lines if line.startswith("cifar10-wrn28-10-esam "))
    assert line.split()[1:] == ["200", "256", "0.05", "0.001", "0.1", "0.5", "0.5", "-"]


@pytest.mark.parametrize(
    ("name", "hint"), [("cifar10-resnet18-easm", "did you mean cifar10-resnet18-esam?"), ("x", "--recipe list")]
)
def test_unknown_recipe_is_one_line(name, hint, capsys):
    with pytest.raises(argparse.ArgumentTypeError, match="no recipe"):
        recipes.recipe_name(name)
    with pytest.raises(SystemExit) as stopped:
        train.main(["--recipe", name])
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert f"no recipe {name}" in err
    assert hint in err
    assert err.count("\n") == 1


def test_recipe_trains_on_synthetic_data(tmp_path, capsys):
    small = ["--limit", "16", "--batch-size", "8", "--epochs", "1", "--seeds", "1", "--model", "cnn"]
    arguments = ["--recipe", "cifar10-resnet18-esam", "--data", "synthetic-cifar10", *small, "--out", str(tmp_path)]
    assert train.main(arguments) == 0
    assert "esam" in capsys.readouterr().out
    assert (tmp_path / "synthetic-cifar10_cnn.json").exists()


def test_page_names_the_options_that_there_are():
    known = {"--help", *(f"--{name.replace('_', '-')}" for name in vars(train.parse_options([])))}
    named = set(re.findall(r"--[a-z][a-z-]+", PAGE))
    assert named - known == set()
    assert {"--recipe", "--graph", "--channels-last", "--micro-batch", "--lr-warmup"} <= named


def test_page_names_the_networks_and_their_sizes():
    (table,) = re.findall(r"## Networks\n(.*?)\nThe tests", PAGE, re.S)
    assert set(re.findall(r"`([a-z0-9-]+)`", table)) - {"--model"} == set(MODELS)
    for names, numbers in re.findall(r"^\| (`resnet.*|`wrn.*|`pyramid.*|`vit.*?) \|.*\| (.*?) \|$", table, re.M):
        names = re.findall(r"`([a-z0-9-]+)`", names)
        classes = int(re.search(r"\((\d+)\)", numbers)[1])
        counts = [int(count.replace(",", "")) for count in re.findall(r"\d[\d,]{6,}", numbers)]
        with torch.device("meta"):
            models = [build_model(name, 3, 224, classes) for name in names]
        assert counts == [sum(parameter.numel() for parameter in model.parameters()) for model in models]
