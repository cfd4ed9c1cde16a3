"""``python examples/train.py``: what it writes, and the lines and exit codes that users see."""

import json
import sys

import progress
import pytest
import report
import torch
import train
import trainer

from esam_kernels import ESAM, SAM
from esam_kernels.perturbation.ascent import ASCENTS, DEFAULT_RHO

pytest.importorskip("sklearn")


def test_default_path_prints_the_table_and_writes_plot_and_json(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert train.main(["--limit", "200", "--epochs", "2", "--seeds", "2", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("optimizer"))
    assert [line.split()[0] for line in lines[head + 1 : head + 4]] == ["sgd", "sam", "esam"]
    assert (tmp_path / "digits_cnn.png").read_bytes().startswith(b"\x89PNG")
    run = json.loads((tmp_path / "digits_cnn.json").read_text())
    assert {"device", "threads", "torch", "esam_kernels", "commit"} <= run["environment"].keys()
    assert [(result["optimizer"], result["seed"]) for result in run["results"]] == [
        (name, seed) for seed in (0, 1) for name in ("sgd", "sam", "esam")
    ]
    assert all(len(result["history"]) == 2 for result in run["results"])
    assert run["rows"][1]["speed_to_sam"] == 1.0


def test_the_end_says_what_was_learned_and_where_the_plot_is(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    small = ["--limit", "200", "--epochs", "2", "--seeds", "1", "--batch-size", "64"]
    assert train.main(["--recipe", "demo", *small, "--out", str(tmp_path)]) == 0
    meaning, learned, files = capsys.readouterr().out.splitlines()[-3:]
    assert meaning == "esam is SAM(..., ascent_share=0.25) here: pass 1 takes that share of the batch"
    plot, numbers = tmp_path / "digits_cnn.png", tmp_path / "digits_cnn.json"
    assert files == f"numbers: {numbers}  plot: {plot}"
    assert plot.exists()
    sgd, sam, esam = json.loads(numbers.read_text())["rows"]
    for other in (sgd, sam):
        points = esam["test_accuracy"]["mean"] - other["test_accuracy"]["mean"]
        more = "more" if points >= 0.0 else "less"
        speed = esam["images_per_second"] / other["images_per_second"]
        assert (
            f"{abs(points):.1f} points {more} accurate than {other['optimizer']} at {speed:.2f} x its speed" in learned
        )


def test_what_was_learned_may_be_that_esam_is_worse():
    sam = {"optimizer": "sam", "test_accuracy": {"mean": 90.0}}
    esam = {"optimizer": "esam", "test_accuracy": {"mean": 87.5}, "speed_to_sam": 0.9}
    assert report.learned([sam, esam]) == ["learned: esam is 2.5 points less accurate than sam at 0.90 x its speed"]


def test_nothing_is_learned_from_one_optimizer():
    row = {"optimizer": "esam", "test_accuracy": {"mean": 90.0}}
    assert report.learned([row]) == report.learned([{**row, "optimizer": "sgd"}]) == []


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("sgd", torch.optim.SGD, {}),
        ("sam", SAM, {"rho": 0.05, "adaptive": False}),
        ("asam", SAM, {"rho": 0.5, "adaptive": True}),
        ("esam", ESAM, {"rho": 0.05, "beta": 0.6, "gamma": 0.5}),
        ("esam-swp", ESAM, {"rho": 0.05, "beta": 0.6, "gamma": 1.0}),
        ("esam-sds", ESAM, {"rho": 0.05, "beta": 1.0, "gamma": 0.5}),
        ("esam-previous", ESAM, {"rho": DEFAULT_RHO["previous"], "beta": 1.0, "gamma": 1.0}),
        ("esam-momentum", ESAM, {"rho": DEFAULT_RHO["momentum"], "beta": 1.0, "gamma": 1.0}),
    ],
)
def test_optimizer_is_what_its_name_says(name, kind, expected):
    optimizer = trainer.build_optimizer(name, torch.nn.Linear(2, 2), train.parse_options([]))
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    assert {key: group[key] if key in group else getattr(optimizer, key) for key in expected} == expected
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.05, 0.9, 1e-3)


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        ([], ["sgd", "sam", "esam"]),
        (["--ascent", "previous"], ["sgd", "sam", "esam-previous"]),
        (
            ["--ascent", "current", "previous", "momentum"],
            ["sgd", "sam", "esam", "esam-previous", "esam-momentum"],
        ),
        (["--optimizer", "esam-momentum", "sgd"], ["esam-momentum", "sgd"]),
        (["--optimizer", "esam", "esam-previous", "--gamma", "0.3"], ["esam", "esam-previous"]),
        (["--optimizer", "esam-previous", "--gamma", "1"], ["esam-previous"]),
    ],
    ids=" ".join,
)
def test_each_ascent_has_a_row(arguments, rows):
    assert train.parse_options(arguments).optimizer == rows


@pytest.mark.parametrize("ascent", ["previous", "momentum"])
def test_one_pass_looks_once_at_each_batch_along_its_ascent(ascent, tiny, monkeypatch):
    options = train.parse_options([*tiny, "--ascent", ascent, "--rho", "0.1", "--beta", "0.9"])
    data = train.load("digits", limit=150)
    running = trainer.Trainer(options.optimizer[-1], 0, data, options)
    calls = []
    losses = running.losses
    monkeypatch.setattr(running, "losses", lambda *batch: calls.append(len(batch[0])) or losses(*batch))
    running.train_epoch()
    assert calls == [64, 64, 22]
    optimizer = running.optimizer
    assert (optimizer.param_groups[0]["rho"], optimizer.beta, running.gamma_schedule) == (0.1, 0.9, None)
    assert type(optimizer._perturbation.ascent) is ASCENTS[ascent]


@pytest.mark.parametrize("name", trainer.OPTIMIZERS)
def test_every_optimizer_learns(name):
    options = train.parse_options(
        ["--optimizer", name, "--limit", "300", "--epochs", "3", "--seeds", "1", "--label-noise", "0"]
    )
    (result,) = train.train(options)
    assert result["history"][-1]["test_accuracy"] > 30.0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--mask", "element"],
        ["--amp", "bf16"],
        ["--lr-schedule", "cosine", "--gamma-warmup", "0"],
        ["--model", "resnet18", "--limit", "24", "--batch-size", "12"],
    ],
    ids=" ".join,
)
def test_options_train(arguments, tiny, tmp_path):
    assert train.main([*tiny, "--epochs", "1", "--optimizer", "esam", *arguments, "--out", str(tmp_path)]) == 0


def test_gamma_falls_from_one_over_the_share_of_the_training():
    options = train.parse_options(["--epochs", "4", "--limit", "128", "--gamma-warmup", "0.5", "--optimizer", "esam"])
    esam = trainer.Trainer("esam", 0, train.load("digits", limit=128), options)
    gammas = []
    while len(esam.history) < 4:
        gammas.append(esam.optimizer.gamma)
        esam.train_epoch()
    assert gammas == [1.0, 0.75, 0.5, 0.5]


def test_rho_rises_from_zero_over_the_share_of_the_training():
    arguments = ["--epochs", "4", "--limit", "128", "--rho", "0.2", "--rho-warmup", "0.5", "--ascent", "momentum"]
    options = train.parse_options(arguments)
    momentum = trainer.Trainer("esam-momentum", 0, train.load("digits", limit=128), options)
    radii = []
    while len(momentum.history) < 4:
        radii.append(momentum.optimizer.param_groups[0]["rho"])
        momentum.train_epoch()
    assert radii == [0.0, 0.1, 0.2, 0.2]


def test_optimizers_beside_each_other_do_not_disturb_one_another(tiny):
    alone = train.train(train.parse_options([*tiny, "--optimizer", "esam"]))
    beside = train.train(train.parse_options([*tiny, "--optimizer", "sam", "esam"]))
    measured = [
        [{key: value for key, value in entry.items() if key != "seconds"} for entry in result["history"]]
        for result in (alone[0], beside[1])
    ]
    assert measured[0] == measured[1]


def test_sharpness_changes_nothing_and_is_repeatable(tiny):
    options = train.parse_options(tiny)
    esam = trainer.Trainer("esam", 0, train.load("digits", limit=150), options)
    esam.train_epoch()
    before = {name: value.clone() for name, value in esam.model.state_dict().items()}
    sharpness = esam.sharpness(0.05)
    assert sharpness > 0.0
    assert sharpness == esam.sharpness(0.05)
    assert all(torch.equal(value, before[name]) for name, value in esam.model.state_dict().items())
    assert esam.sharpness(0.1) > sharpness


@pytest.mark.parametrize("name", ["sgd", "sam", "esam"])
def test_step_reads_nothing_from_the_device(name, tiny):
    options = train.parse_options([*tiny, "--gamma-warmup", "0"])
    data = train.load("digits", limit=150)
    running = trainer.Trainer(name, 0, data, options)
    images, labels = next(data.training_batches(64, torch.Generator()))
    running.step(images, labels)
    with torch.profiler.profile() as profile:
        running.step(images, labels)
    called = {event.key for event in profile.key_averages()}
    assert "aten::convolution" in called
    assert not called & {"aten::item", "aten::nonzero", "aten::_local_scalar_dense"}


def test_log_has_plain_lines(tiny, tmp_path, capsys):
    train.main([*tiny, "--out", str(tmp_path)])
    out, err = capsys.readouterr()
    assert "\r" not in out + err
    assert [line for line in out.splitlines() if line.startswith("seed 0  epoch 2/2  sgd")]


def test_terminal_has_a_bar(tiny, tmp_path, capsys, monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    train.main([*tiny, "--out", str(tmp_path)])
    out, err = capsys.readouterr()
    assert "\r" in err
    assert "18/18" in err
    assert "epoch" not in out.split("optimizer")[0]


def test_bar_of_a_resumed_run_starts_where_it_was(tiny, tmp_path, capsys, monkeypatch):
    pytest.importorskip("tqdm")
    arguments = [*tiny, "--checkpoint", str(tmp_path), "--out", str(tmp_path / "out")]
    train.main(arguments)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    train.main([*arguments, "--resume"])
    err = capsys.readouterr().err
    assert "18/18" in err
    assert "0/18" not in err


def test_terminal_without_tqdm_has_plain_lines(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "tqdm", None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    train.main([*tiny, "--out", str(tmp_path)])
    assert "seed 0  epoch 1/2" in capsys.readouterr().out


def test_without_matplotlib_the_table_and_the_json_remain(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert train.main([*tiny, "--optimizer", "sgd", "--out", str(tmp_path)]) == 0
    assert "no plot: pip install matplotlib" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["digits_cnn.json"]


def run_expecting_an_error(arguments, tmp_path, capsys):
    try:
        code = train.main([*arguments, "--out", str(tmp_path / "out")])
    except SystemExit as stopped:
        code = stopped.code
    err = capsys.readouterr().err
    assert code == 2
    assert err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "5000"], "--batch-size 5000 is larger than the training set, 1347 images"),
        (["--limit", "10"], "--batch-size 64 is larger than the training set, 10 images"),
        (["--batch-size", "0"], "--batch-size: 0 is not 1 or more"),
        (["--model", "resnet18", "--batch-size", "2"], "a batch of one digit"),
        (["--model", "vit-s16"], "vit-s16 needs images of a multiple of 16 pixels a side, got 8"),
        (["--device", "cuda:99"], "no such device: cuda:99"),
        (["--device", "nonsense"], "no such device: nonsense"),
        (["--device", "meta"], "no such device: meta"),
        (["--optimizer", "adam"], "invalid choice: 'adam'"),
        (["--optimizer", "esam", "--beta", "0"], "beta must lie in (0, 1]"),
        (["--optimizer", "esam", "--gamma", "1.5"], "gamma must lie in (0, 1]"),
        (["--ascent", "momentum", "--gamma", "0.5"], "--gamma 0.5 needs two passes a step"),
        (["--optimizer", "esam-previous", "--gamma", "0.5"], "esam-previous and esam-momentum take one"),
        (
            ["--recipe", "cifar10-resnet18-esam", "--ascent", "momentum"],
            "--recipe holds rho, beta and gamma for two passes",
        ),
        (["--ascent", "momentum", "--momentum", "0"], "needs a base optimizer with momentum"),
        (["--ascent", "previous", "--optimizer", "sgd"], "--ascent is for --optimizer esam"),
        (["--ascent", "sideways"], "invalid choice: 'sideways'"),
        (["--rho", "-1"], "--rho: -1 is not a finite number of 0 or more"),
        (["--lr", "-1"], "--lr: -1 is not a finite number of 0 or more"),
        (["--label-noise", "2"], "--label-noise: 2 does not lie in [0, 1]"),
        (["--seed", "-1"], "--seed: -1 does not lie in"),
        (["--resume"], "--resume needs --checkpoint"),
        (["--resume", "--checkpoint", "nowhere"], "nothing to resume: no such file: nowhere"),
        (["--data-path", "somewhere"], "--data-path is for"),
        (["--data", "cifar10"], "needs --data-path"),
        (["--data", "cifar10", "--data-path", "nowhere"], "no such file or directory: nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_user_errors_are_one_line_with_exit_code_2(arguments, message, tmp_path, capsys):
    assert message in run_expecting_an_error(arguments, tmp_path, capsys)


def test_missing_scikit_learn_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "pip install scikit-learn" in run_expecting_an_error([], tmp_path, capsys)


def test_backend_that_is_not_there_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ESAM_KERNELS_BACKEND", "nonsense")
    assert "ESAM_KERNELS_BACKEND must be one of" in run_expecting_an_error([], tmp_path, capsys)


def test_directory_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    assert "out" in run_expecting_an_error([], tmp_path, capsys)
