"""Figure 4: the loss over a plane of random directions, for SGD, SAM and ESAM (section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.paper import landscapes
from benchmarks.paper.experiment import Claim, Experiment, Settings, Unit
from benchmarks.rows import Row

KINDS = {"random": {"directions": "random", "normalize": "filter", "extent": 1.0}}
WORDS = {"random": "random directions, filter-normalised, as long as the weights"}
AXES = {"random": "filter norms of w"}
PAPER = '"both SAM and ESAM improve the sharpness significantly in comparison to SGD" (section 3.2, Figure 4)'


def units(settings: Settings) -> list[Unit]:
    at_paper = settings.scale == "paper"
    (data,) = settings.data.available("imagenet") if at_paper else settings.data.available("cifar10")
    groups = settings.choose(smoke=2, small=2, paper=10)
    points = settings.choose(smoke=3, small=13, paper=100)
    return landscapes.units(settings, data, "resnet50", KINDS, groups, points)


def claims(rows: Sequence[Row]) -> list[Claim]:
    return landscapes.claims(rows, WORDS, PAPER)


def figure(rows: Sequence[Row], path: Path) -> None:
    landscapes.figure(rows, path, "The training loss over a plane of random directions", AXES)


EXPERIMENT = Experiment(
    name="figure4",
    title="loss landscapes along random directions",
    paper=(
        "ResNet-50 trained on ImageNet with SGD, SAM and ESAM; the loss at 100 x 100 points over two orthogonal random "
        "directions after Li et al. (2018), that is, each filter as long as the network's own; the mean of ten pairs "
        "of directions. The figure has no numbers: here, the mean rise of the loss over the plane is compared. The "
        "loss is that of 512 training images, with BatchNorm as in evaluation; the axes reach one filter norm. Below "
        "the paper's scale: a small CNN on other images, two pairs of directions, 13 x 13 points."
    ),
    units=units,
    claims=claims,
    figure=figure,
    seeds={"smoke": 1, "small": 3, "paper": 1},
)
