"""What the tables have in common: trainings of which the last epoch, and the speed, are what counts."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from data import DataSet
from trainer import Trainer

from benchmarks.paper.experiment import Settings
from benchmarks.paper.training import train_and_measure
from benchmarks.rows import Row


def train_to_the_end(
    settings: Settings,
    key: str,
    data: DataSet,
    arguments: Sequence[str],
    seed: int,
    measure: Callable[[Trainer], Row] = lambda trainer: {},
) -> list[Row]:
    """One row for the training of the unit ``key``: its last and best accuracy, and images/s of its whole loop.

    Lists with a number for each epoch are kept beside them: the test accuracies, and what ``measure(trainer)`` gives.
    An epoch's images/s are those of the training alone, evaluation not counted; the median is taken over the epochs.
    """
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False  # resuming with the same bits

    def of_epoch(trainer: Trainer) -> list[Row]:
        return [
            {"images": len(trainer.data.train_labels), "seconds": trainer.history[-1]["seconds"], **measure(trainer)}
        ]

    epochs = train_and_measure(settings, settings.scratch_of(key), data, arguments, seed, of_epoch)
    last = epochs[-1]
    accuracies = [epoch["test_accuracy"] for epoch in epochs]
    fixed = ("epoch", "train_loss", "test_loss", "test_accuracy", "cost", "images", "seconds")
    more = {name: [epoch[name] for epoch in epochs] for name in last if name not in fixed}
    speed = last["images"] / statistics.median(epoch["seconds"] for epoch in epochs)
    kept = {name: last[name] for name in ("train_loss", "test_loss", "test_accuracy")}
    row = {"epochs": len(epochs), **kept, "best_accuracy": max(accuracies), "images_per_second": round(speed, 1)}
    return [{**row, "accuracies": [round(accuracy, 3) for accuracy in accuracies], **more}]


def of(rows: Sequence[Row], **wanted: object) -> list[Row]:
    """The rows whose fields have the ``wanted`` values."""
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def values(rows: Sequence[Row], field: str, **wanted: object) -> list[float]:
    return [row[field] for row in of(rows, **wanted)]


def plus_minus(found: Sequence[float], digits: int = 1) -> str:
    """Mean and, of several, their standard deviation."""
    mean = f"{statistics.mean(found):.{digits}f}"
    return f"{mean} ± {statistics.stdev(found):.{digits}f}" if len(found) > 1 else mean
