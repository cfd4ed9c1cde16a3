"""Figure 8: the loss over a plane of adversarial directions, for SGD, SAM and ESAM (appendix A.5)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.paper import landscapes
from benchmarks.paper.experiment import Claim, Experiment, Settings, Unit
from benchmarks.rows import Row

# The peak learning rate of ResNet-18 in Table 7: the directions are the gradients of two halves times it.
LR = 0.05
KINDS = {
    "gradient": {"directions": "adversarial", "normalize": None, "extent": LR},
    "filter": {"directions": "adversarial", "normalize": "filter", "extent": 0.25},
}
WORDS = {
    "gradient": "gradients of two halves of the batch, times the learning rate",
    "filter": "gradients of two halves, filter-normalised, up to a quarter of the weights",
}
# The plane that is drawn, and the other: along unscaled gradients a small network's loss hardly moves.
AXES = {"filter": "filter norms of w", "gradient": "gradients of a half"}
PAPER = '"both SAM and ESAM improve the sharpness significantly in comparison to SGD" (appendix A.5, Figure 8)'


def units(settings: Settings) -> list[Unit]:
    groups = settings.choose(smoke=2, small=2, paper=1)
    points = settings.choose(smoke=3, small=13, paper=101)
    return [
        unit
        for data in settings.data.available("cifar10")
        for unit in landscapes.units(settings, data, "resnet18", KINDS, groups, points)
    ]


def claims(rows: Sequence[Row]) -> list[Claim]:
    return landscapes.claims(rows, WORDS, PAPER)


def figure(rows: Sequence[Row], path: Path) -> None:
    landscapes.figure(rows, path, "The training loss over a plane of adversarial directions", AXES)


EXPERIMENT = Experiment(
    name="figure8",
    title="loss landscapes along adversarial directions",
    paper=(
        "ResNet-18 trained on CIFAR-10 with SGD, SAM and ESAM; the axes are the gradients of two random halves of a "
        "batch, made orthogonal, times the learning rate; the losses drawn reach from 0 to 0.10. Here: halves of 512 "
        "training images, BatchNorm as in evaluation, and the peak learning rate. As a gradient is shorter where the "
        "loss is lower, so is the plane; a second measurement scales both directions, filter by filter, to a quarter "
        "of the weights. Below the paper's scale: a small CNN on other images, two pairs of halves, 13 x 13 points."
    ),
    units=units,
    claims=claims,
    figure=figure,
)
