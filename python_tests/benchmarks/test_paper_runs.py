"""``python -m benchmarks.paper``: every experiment runs, goes on where it was stopped, and says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from benchmarks.paper import __main__ as program
from benchmarks.paper import experiment as experiments
from benchmarks.paper import runner, store, training
from benchmarks.paper.experiment import Claim, Experiment, OutOfTime, Settings, Unit

EXPERIMENTS = experiments.registry()
# What differs between two runs that measure the same.
CONDITIONS = ("date", "load")


pytestmark = pytest.mark.usefixtures("one_thread")


def command(out: Path, *arguments: str) -> int:
    return program.main([*arguments, "--out", str(out), "--device", "cpu"])


def rows_of(out: Path, name: str) -> list[dict]:
    return json.loads((out / f"{name}.json").read_text())


def without_conditions(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in CONDITIONS} for row in rows]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_smoke_scale_measures_every_unit_and_draws_the_figure(name, tmp_path, capsys):
    settings = Settings("smoke", (0,), torch.device("cpu"), program.Data("digits", "smoke", "cpu"), tmp_path)
    keys = [unit.key for unit in EXPERIMENTS[name].units(settings)]
    assert command(tmp_path, name, "--scale", "smoke", "--data", "digits") == 0
    rows = rows_of(tmp_path, name)
    assert list(dict.fromkeys(row["unit"] for row in rows)) == keys
    assert all(row["scale"] == "smoke" and row["torch"] == torch.__version__ for row in rows)
    assert (tmp_path / f"{name}_smoke.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    printed = capsys.readouterr().out
    for claim in EXPERIMENTS[name].claims(rows):
        assert claim.text in printed
        assert f"paper: {claim.paper}" in printed
        assert f"here:  {claim.measured or 'not measured'}\n" in printed


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_without_rows_nothing_is_claimed_to_be_measured(name):
    claims = EXPERIMENTS[name].claims([])
    assert claims
    assert [(claim.measured, claim.holds, list(claim.rows)) for claim in claims] == [(None, None, [])] * len(claims)
    assert all(claim.text and claim.paper for claim in claims)


# -- stopping and going on ---------------------------------------------------------------------------------------------


def numbers(ran: list[str], interrupted_at: str | None = None) -> Experiment:
    """Three units that draw random numbers; ``ran`` collects their keys."""

    def units(settings: Settings) -> list[Unit]:
        def run(key: str) -> list[dict]:
            if key == interrupted_at:
                raise KeyboardInterrupt
            ran.append(key)
            return [{"drawn": torch.rand(()).item(), "number": n} for n in range(2)]

        return [Unit(key, lambda key=key: run(key), seed=seed) for seed, key in enumerate("abc")]

    def claims(rows: list[dict]) -> list[Claim]:
        return [Claim("numbers are drawn", "none", f"{len(rows)} rows", True, rows)]

    return Experiment("numbers", "three units", "nothing", units, claims, lambda rows, path: path.touch())


def register(monkeypatch, experiment: Experiment) -> None:
    monkeypatch.setattr(program, "registry", lambda: {experiment.name: experiment})
    monkeypatch.setattr(program, "find", lambda name: {experiment.name: experiment}[name])


def test_a_stopped_run_goes_on_with_the_rest_and_ends_with_the_same_rows(tmp_path, monkeypatch):
    undisturbed, before, after = [], [], []
    register(monkeypatch, numbers(undisturbed))
    assert command(tmp_path / "whole", "numbers") == 0
    register(monkeypatch, numbers(before, interrupted_at="b"))
    assert command(tmp_path / "parts", "numbers") == program.EXIT_NOT_FINISHED
    assert [row["unit"] for row in rows_of(tmp_path / "parts", "numbers")] == ["a", "a"]
    register(monkeypatch, numbers(after))
    assert command(tmp_path / "parts", "numbers") == 0
    assert (undisturbed, before, after) == (["a", "b", "c"], ["a"], ["b", "c"])
    whole, parts = (without_conditions(rows_of(tmp_path / folder, "numbers")) for folder in ("whole", "parts"))
    assert whole == parts
    assert len({row["drawn"] for row in whole}) == 6


def test_fresh_measures_again_and_other_scales_stay(tmp_path, monkeypatch):
    ran = []
    register(monkeypatch, numbers(ran))
    for arguments in (["--scale", "smoke"], [], [], ["--fresh"]):
        assert command(tmp_path, "numbers", *arguments) == 0
    assert ran == list("abc" * 3)
    assert [row["scale"] for row in rows_of(tmp_path, "numbers")] == ["smoke"] * 6 + ["small"] * 6


def test_a_unit_with_other_settings_is_measured_again_and_replaces_its_rows(tmp_path):
    rows = [{"scale": "small", "unit": "a", "data": "none", "settings": {"epochs": 2}}]
    same, other = (Unit("a", list, settings={"epochs": epochs}) for epochs in (2, 3))
    assert store.is_done(rows, "small", same)
    assert not store.is_done(rows, "small", other)
    assert not store.is_done(rows, "paper", same)
    assert not store.is_done([], "small", same)


def test_stopped_while_saving_the_file_has_the_earlier_rows(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    store.save(path, [{"value": 1}])

    def stop(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        store.save(path, [{"value": 1}, {"value": 2}])
    assert json.loads(path.read_text()) == [{"value": 1}]


def test_minutes_stop_between_units_and_the_rest_follows(tmp_path, monkeypatch, capsys):
    ran = []
    register(monkeypatch, numbers(ran))
    assert command(tmp_path, "numbers", "--minutes", "0") == program.EXIT_NOT_FINISHED
    assert ran == []
    assert "the time is over" in capsys.readouterr().out
    assert command(tmp_path, "numbers") == 0
    assert ran == ["a", "b", "c"]


def settings_for(tmp_path: Path, deadline: float = float("inf")) -> Settings:
    device = torch.device("cpu")
    return Settings("smoke", (0,), device, program.Data("digits", "smoke", device), tmp_path, deadline)


def trained(tmp_path: Path, deadline: float = float("inf")) -> list[dict]:
    settings = settings_for(tmp_path, deadline)
    data = settings.data.load("digits", 128)
    arguments = ["--optimizer", "esam", "--epochs", "3"]

    def weights(trainer):
        return [{"weights": next(trainer.model.parameters()).detach().double().sum().item()}]

    scratch = settings.scratch_of("digits/seed 0")
    return training.train_and_measure(settings, scratch, data, arguments, 0, weights, before_training=True)


def test_a_training_stopped_within_a_unit_goes_on_bitwise(tmp_path):
    undisturbed = trained(tmp_path / "whole")
    for _ in range(3):
        with pytest.raises(OutOfTime):
            trained(tmp_path / "parts", deadline=0.0)
    resumed = trained(tmp_path / "parts")
    assert [row["epoch"] for row in resumed] == [0, 1, 2, 3]
    assert resumed == undisturbed
    assert len({row["weights"] for row in resumed}) == 4


def test_a_damaged_checkpoint_begins_again(tmp_path, capsys):
    with pytest.raises(OutOfTime):
        trained(tmp_path, deadline=0.0)
    (path,) = tmp_path.rglob("checkpoint.pt")
    path.write_bytes(b"cut")
    assert trained(tmp_path) == trained(tmp_path / "whole")
    assert "not a checkpoint" in capsys.readouterr().out


# -- what is wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "no experiment 'nothing': choose from "),
        (["table4-5", "--data", "/no/such/folder"], "no data set there"),
    ],
)
def test_what_is_not_there_is_named_with_the_choices(arguments, message, tmp_path, capsys):
    assert command(tmp_path, *arguments) == program.EXIT_USER_ERROR
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", [["--scale", "huge"], ["--seeds", "0"]])
def test_options_that_are_none_are_refused(option, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        command(tmp_path, "table4-5", *option)
    assert exit_.value.code == program.EXIT_USER_ERROR
    assert option[0] in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[{", '{"a": 1}', '[{"unit": "a"}]', "[1]", "null"])
def test_a_damaged_file_of_rows_is_refused_and_kept(content, tmp_path, monkeypatch, capsys):
    ran = []
    register(monkeypatch, numbers(ran))
    (tmp_path / "numbers.json").write_text(content)
    assert command(tmp_path, "numbers", "--fresh") == program.EXIT_USER_ERROR
    assert "numbers.json: not a file of rows" in capsys.readouterr().err
    assert ran == []
    assert (tmp_path / "numbers.json").read_text() == content


def test_the_paper_scale_needs_the_papers_data(monkeypatch, tmp_path):
    monkeypatch.delenv("ESAM_DATA", raising=False)
    monkeypatch.setattr("benchmarks.paper.data_sets.ROOT", tmp_path)
    with pytest.raises(program.UserError, match="'paper' needs cifar10 or cifar100: --data FOLDER"):
        program.Data(None, "paper", torch.device("cpu")).available("cifar10", "cifar100")
    assert program.Data(None, "small", torch.device("cpu")).available("cifar10") == ["digits"]


def test_data_sets_are_found_in_a_folder_and_in_the_variable(monkeypatch, tmp_path):
    (tmp_path / "cifar-100-binary").mkdir()
    (tmp_path / "cifar10_jpeg.npz").touch()
    monkeypatch.setenv("ESAM_DATA", str(tmp_path))
    device = torch.device("cpu")
    for root in (None, str(tmp_path)):
        data = program.Data(root, "paper", device)
        assert data.available("cifar10", "cifar100", "imagenet") == ["cifar10", "cifar100"]
        assert [data.label(name) for name in ("cifar10", "cifar100")] == ["cifar10 (JPEG)", "cifar100"]
    only = program.Data(str(tmp_path / "cifar10_jpeg.npz"), "paper", device)
    assert only.paths == {"cifar10": tmp_path / "cifar10_jpeg.npz"}
    assert program.Data("digits", "small", device).available("cifar10") == ["digits"]


def test_one_experiment_without_data_does_not_keep_the_others_from_running(tmp_path, monkeypatch, capsys):
    ran = []
    good = numbers(ran)

    def no_data(settings):
        raise program.UserError("needs cifar10")

    bad = Experiment("lacking", "no data", "nothing", no_data, good.claims, good.figure)
    monkeypatch.setattr(program, "registry", lambda: {"lacking": bad, "numbers": good})
    assert command(tmp_path, "all") == program.EXIT_USER_ERROR
    assert ran == ["a", "b", "c"]
    assert "lacking: needs cifar10" in capsys.readouterr().err


def test_a_unit_without_rows_is_an_error(tmp_path):
    empty = Experiment("empty", "", "", lambda _: [Unit("a", list)], lambda rows: [], lambda rows, path: None)
    with pytest.raises(program.UserError, match="gave no rows"):
        runner.run(empty, settings_for(tmp_path), tmp_path)
