"""Figures 4 and 8, and accuracy against label noise: what is read off the rows, and what is measured for them."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


from benchmarks.paper import __main__ as program
from benchmarks.paper import landscapes
from benchmarks.paper.experiment import OutOfTime, Settings
from benchmarks.paper.experiments import figure4, figure8, label_noise
from benchmarks.paper.final import train_to_the_end
from benchmarks.paper.training import Trainer, parse_options

CPU = torch.device("cpu")


def settings_for(folder, deadline: float = float("inf")) -> Settings:
    return Settings("smoke", (0,), CPU, program.Data("digits", "smoke", CPU), folder, deadline)


def bowl(optimizer: str, steepness: float, points: int = 9, extent: float = 2.0, kind: str = "random") -> dict:
    """The row of a loss 0.001 + steepness (x^2 + y^2)."""
    axis = torch.linspace(-extent, extent, points, dtype=torch.float64)
    rises = steepness * (axis[:, None].square() + axis.square())
    return {"optimizer": optimizer, "kind": kind, "extent": extent, "loss": 0.001, "rises": rises.tolist(), "seed": 0}


@pytest.mark.parametrize("points", [9, 101])
def test_the_mean_rise_of_a_bowl_is_that_of_its_formula(points):
    spacing = 4.0 / (points - 1)
    mean_square = spacing**2 * (points**2 - 1) / 12  # of evenly spaced positions
    assert landscapes.mean_rise(bowl("sgd", 3.0, points)) == pytest.approx(2 * 3.0 * mean_square, rel=1e-12)


def test_the_middle_of_an_even_number_of_points_is_between_them():
    assert landscapes.middle(torch.arange(16.0).reshape(4, 4)) == pytest.approx((5 + 6 + 9 + 10) / 4)
    assert landscapes.middle(torch.arange(9.0).reshape(3, 3)) == 4.0


def test_the_rise_by_distance_of_a_bowl_is_its_profile():
    distances, rises = landscapes.rise_by_distance(bowl("sgd", 3.0, points=101))
    assert (distances[0], distances[-1]) == (0.0, 2.0)
    half = 0.5 * 2.0 / landscapes.RINGS
    for distance, rise in zip(distances, rises):
        assert 3.0 * max(distance - half, 0.0) ** 2 <= rise <= 3.0 * (distance + half) ** 2


@pytest.mark.parametrize(("sam", "esam", "holds"), [(0.5, 0.9, True), (0.5, 1.1, False), (1.1, 0.5, False)])
def test_flatter_means_both_sam_and_esam(sam, esam, holds):
    rows = [bowl("sgd", 0.9), bowl("sgd", 1.1), bowl("sam", sam), bowl("esam", esam)]
    (found,) = figure4.claims(rows)
    assert (found.holds, len(found.rows)) == (holds, 4)
    first, second = figure8.claims([{**row, "kind": "filter"} for row in rows])
    assert (first.measured, second.holds) == (None, holds)


def test_rises_far_smaller_than_the_loss_are_kept(tmp_path, monkeypatch):
    """Around a minimum they are: along the gradients of the small scale of Figure 8, a thousandth of the loss."""
    losses = 1.0 + 1e-7 * torch.tensor([[1.0, 2.0, 1.0], [2.0, 0.0, 2.0], [1.0, 2.0, 1.0]], dtype=torch.float64)
    monkeypatch.setattr(landscapes, "mean_landscape", lambda *arguments: losses)
    units = landscapes.units(settings_for(tmp_path), "digits", "resnet18", {"a": {"extent": 1.0}}, 1, 3)
    (row,) = units[0].run()
    assert landscapes.mean_rise(row) == pytest.approx(12e-7 / 9, rel=1e-4)
    assert row["loss"] == 1.0


def test_landscapes_are_means_over_their_directions_and_go_on_where_they_were_stopped(tmp_path):
    settings = settings_for(tmp_path)
    trainer = Trainer("sgd", 0, settings.data.load("digits", 96), parse_options(["--optimizer", "sgd"]))
    trainer.train_epoch()
    kind = figure4.KINDS["random"]

    def measured(folder, groups, deadline=float("inf")):
        return landscapes.mean_landscape(settings_for(tmp_path, deadline), folder, trainer, kind, groups, points=3)

    one, whole = measured(tmp_path / "one", 1), measured(tmp_path / "whole", 2)
    batch = [torch.cat(parts) for parts in zip(*landscapes.first_batches(trainer))]
    second = landscapes.loss_landscape(trainer.model, trainer.losses, *batch, points=3, seed=1, **kind).losses
    torch.testing.assert_close(whole, (one + second) / 2, rtol=1e-5, atol=0.0)
    assert not torch.equal(one, whole)
    with pytest.raises(OutOfTime):
        measured(tmp_path / "parts", 2, deadline=0.0)
    assert torch.equal(measured(tmp_path / "parts", 2), whole)


def test_a_landscape_of_other_weights_is_not_gone_on_with(tmp_path, capsys):
    settings = settings_for(tmp_path)
    trainer = Trainer("sgd", 0, settings.data.load("digits", 96), parse_options(["--optimizer", "sgd"]))
    kind = figure8.KINDS["filter"]
    found = []
    for _ in range(2):
        trainer.train_epoch()
        found.append(landscapes.mean_landscape(settings, tmp_path, trainer, kind, 1, points=3))
    assert "from the beginning" in capsys.readouterr().out
    assert not torch.equal(*found)


def test_the_last_and_the_best_epoch_are_both_kept(tmp_path):
    settings = settings_for(tmp_path)
    words = ["--optimizer", "sgd", "--epochs", "3"]
    (row,) = train_to_the_end(
        settings, "a", settings.data.load("digits", 128), words, 0, lambda t: {"n": len(t.history)}
    )
    assert (row["epochs"], row["n"]) == (3, [1, 2, 3])
    assert row["test_accuracy"] == pytest.approx(row["accuracies"][-1], abs=1e-3)
    assert row["best_accuracy"] == pytest.approx(max(row["accuracies"]), abs=1e-3)
    assert row["images_per_second"] > 0


# -- label noise -------------------------------------------------------------------------------------------------------


def test_the_wrong_labels_that_sds_would_choose_are_those_of_a_plain_computation(tmp_path):
    clean = settings_for(tmp_path).data.load("digits", 64)
    noisy = label_noise.with_label_noise(clean, 0.4, 0)
    wrong = noisy.train_labels != clean.train_labels
    trainer = Trainer("sgd", 0, noisy, parse_options(["--optimizer", "sgd", "--gamma", "0.25"]))
    trainer.train_epoch()
    images, labels = noisy.normalised(noisy.train_images), noisy.train_labels
    model = copy.deepcopy(trainer.model).train()
    before = torch.nn.functional.cross_entropy(model(images), labels, reduction="none")
    gradients = torch.autograd.grad(before.mean(), list(model.parameters()))
    norm = torch.stack([g.norm() for g in gradients]).norm()
    with torch.no_grad():
        for weight, gradient in zip(model.parameters(), gradients):
            weight += 0.05 * gradient / norm
        after = torch.nn.functional.cross_entropy(model(images), labels, reduction="none")
    expected = wrong[(after - before).topk(16).indices].float().mean().item()
    weights = [weight.clone() for weight in trainer.model.parameters()]
    assert label_noise.wrong_share_of_selected(trainer, wrong) == expected
    assert all(map(torch.equal, weights, trainer.model.parameters()))


def noise_rows(by_noise: dict[float, tuple[float, float, float, float]], selected: float = 0.5) -> list[dict]:
    names = ("sgd", "sam", label_noise.WARM_UP, label_noise.CONSTANT_GAMMA)
    common = {"wrong_selected": [None, selected, None, selected - 0.2], "seed": 5}
    return [
        {**common, "noise": noise, "optimizer": name, "test_accuracy": accuracy}
        for noise, accuracies in by_noise.items()
        for name, accuracy in zip(names, accuracies)
    ]


def test_label_noise_says_where_constant_gamma_collapses_and_whether_the_warm_up_prevents_it():
    rows = noise_rows({0.0: (99.0, 99.0, 98.6, 98.0), 0.2: (90.0, 95.0, 94.0, 86.0), 0.4: (75.0, 85.0, 86.0, 50.0)})
    *numbers, collapse, prevented, everywhere, _ = label_noise.claims(rows)
    assert [claim.measured for claim in numbers if "40%" in claim.text] == [
        "SGD 75.0; SAM 85.0; ESAM, gamma warm-up 86.0; ESAM, constant gamma 50.0"
    ]
    assert (collapse.holds, collapse.measured) == (True, "at 40% (-35.0 points)")
    assert (prevented.holds, prevented.measured) == (True, "at 1 of 1: +1.0 at 40% points")
    assert (everywhere.holds, everywhere.measured) == (False, "at 2 of 3: -0.4 at 0%, -1.0 at 20%, +1.0 at 40% points")


def test_label_noise_compares_only_where_all_were_trained():
    rows = noise_rows({0.0: (99.0, 99.0, 99.0, 99.0)}) + noise_rows({0.6: (50.0, 60.0, 0.0, 0.0)})[:2]
    *_, collapse, prevented, everywhere, _ = label_noise.claims(rows)
    assert (collapse.holds, collapse.measured, prevented.measured) == (False, "nowhere", None)
    assert everywhere.measured == "at 1 of 1: +0.0 at 0% points"


@pytest.mark.parametrize(("selected", "holds"), [(0.65, True), (0.45, False)])
def test_label_noise_compares_the_wrong_labels_in_b_plus_with_those_of_the_training_set(selected, holds):
    """Of two measurements, the second finds 0.2 less."""
    found = label_noise.claims(noise_rows({0.0: (1.0,) * 4, 0.4: (1.0,) * 4}, selected))[-1]
    assert (found.holds, found.measured) == (holds, f"{100 * (selected - 0.1):.0f} % of B+ at 40%")
