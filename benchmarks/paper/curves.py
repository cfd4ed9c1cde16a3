"""What Figures 5 to 7 share: a training whose weights are looked at after each epoch."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence

import torch
from data import DataSet
from torch import Tensor
from trainer import Trainer, beta_of, gamma_of

from benchmarks.paper.experiment import Settings, Unit
from benchmarks.paper.training import train_and_measure
from benchmarks.rows import Row

# ResNet-18 in Table 7. gamma is constant from the first step, as in the paper.
PAPER_RECIPE = "--model resnet18 --epochs 200 --batch-size 128 --lr 0.05 --lr-schedule cosine --weight-decay 1e-3"
SMALL_RECIPES = {
    "digits": "--model cnn --epochs 15 --batch-size 64 --lr 0.05 --lr-schedule cosine --weight-decay 1e-3",
    "cifar": "--model cnn --epochs 12 --batch-size 64 --lr 0.02 --lr-schedule cosine --weight-decay 1e-3",
}
# Training images that the small scale takes of CIFAR.
SMALL_CIFAR = 5000
# How many training images are looked at, in batches of the training's size.
PROBED_IMAGES = 512


def recipe(settings: Settings, data: str) -> tuple[list[str], int | None]:
    """Options of train.py, and how many images of the data set are used."""
    small = SMALL_RECIPES["digits" if data == "digits" else "cifar"]
    words = settings.choose(smoke=f"{small} --epochs 2", small=small, paper=PAPER_RECIPE).split()
    small_limit = None if data == "digits" else SMALL_CIFAR
    words = settings.with_epochs([*words, "--gamma-warmup", "0"])
    return words, settings.choose(smoke=256, small=small_limit, paper=None)


def units_of_esam(settings: Settings, measure: Callable[[Trainer], list[Row]]) -> list[Unit]:
    """Trainings with ESAM on each data set."""
    names = settings.data.available("cifar10", "cifar100")
    return [unit for name in names for unit in units_of(settings, name, "esam", ["--optimizer", "esam"], measure)]


def shares_of(options: argparse.Namespace) -> dict[str, float]:
    """rho, beta and gamma of a training with ESAM."""
    rho = 0.05 if options.rho is None else options.rho
    return {"rho": rho, "beta": beta_of("esam", options), "gamma": gamma_of("esam", options)}


def probed_batches(trainer: Trainer) -> list[tuple[Tensor, Tensor]]:
    """The first training images, unchanged, in batches as large as those of the training."""
    data, size = trainer.data, trainer.options.batch_size
    images, labels = data.train_images[:PROBED_IMAGES].split(size), data.train_labels[:PROBED_IMAGES].split(size)
    return [(data.normalised(i), k) for i, k in zip(images, labels) if len(k) == size]


def units_of(
    settings: Settings,
    data: str,
    case: str,
    arguments: Sequence[str],
    measure: Callable[[Trainer], list[Row]],
) -> list[Unit]:
    """A unit for each seed: train on ``data`` with ``arguments`` and the recipe, and measure after each epoch."""
    words, limit = recipe(settings, data)
    words = [*words, *arguments]
    made_with = {"options": " ".join(words), "images": limit, "probed": PROBED_IMAGES}
    read: list[DataSet] = []

    def run(key: str, seed: int) -> list[Row]:
        torch.backends.cudnn.deterministic = True  # resuming with the same bits needs it
        if not read:
            read.append(settings.data.load(data, limit))

        def in_training_mode(trainer: Trainer) -> list[Row]:
            trainer.model.train()  # BatchNorm as the optimizer sees it
            return measure(trainer)

        return train_and_measure(settings, settings.scratch_of(key), read[0], words, seed, in_training_mode)

    keys = {f"{data}/{case}/seed {seed}": seed for seed in settings.seeds}
    label = settings.data.label(data)
    return [Unit(key, lambda key=key, seed=seed: run(key, seed), label, seed, made_with) for key, seed in keys.items()]


def data_sets(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["data"] for row in rows))


def by_epoch(rows: Sequence[Row], field: str) -> dict[int, list[float]]:
    """The values of ``field`` over the seeds, for each epoch."""
    epochs = sorted({row["epoch"] for row in rows})
    return {epoch: [row[field] for row in rows if row["epoch"] == epoch] for epoch in epochs}


def epoch_means(rows: Sequence[Row], field: str) -> list[float]:
    return [statistics.mean(values) for values in by_epoch(rows, field).values()]


def always_above(rows: Sequence[Row], high: str, low: str) -> tuple[str, bool]:
    """Whether ``high`` lies above ``low`` in every epoch (means over the seeds), in words and as a truth value."""
    highs, lows = epoch_means(rows, high), epoch_means(rows, low)
    above = [a > b for a, b in zip(highs, lows)]
    means = f"{statistics.mean(highs):.3g} against {statistics.mean(lows):.3g}"
    accuracy = epoch_means(rows, "test_accuracy")[-1]
    text = f"in {sum(above)} of {len(above)} epochs; {means} on average; test accuracy {accuracy:.1f} % at the end"
    return text, all(above)
