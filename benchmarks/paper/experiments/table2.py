"""Table 2: accuracy and images/s of SGD, SAM and ESAM with ResNet-50 and ResNet-101 on ImageNet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.paper import tables
from benchmarks.paper.experiment import Claim, Experiment, Settings, Unit
from benchmarks.paper.tables import block
from benchmarks.rows import Row

# An asterisk: "referred to Chen et al. (2021)", not trained by the authors.
BLOCKS = [
    block(
        *("Table 2", "imagenet", "resnet50"),
        sgd=("76.00*", 1327),
        sam=("76.70*", 654),
        esam=("77.05", 846, 129.3),
    ),
    block(
        *("Table 2", "imagenet", "resnet101"),
        sgd=("77.80*", 891),
        sam=("78.60*", 438),
        esam=("79.09", 564, 128.7),
    ),
]


def units(settings: Settings) -> list[Unit]:
    return tables.units(settings, BLOCKS)


def claims(rows: Sequence[Row]) -> list[Claim]:
    return tables.claims(rows, BLOCKS)


def figure(rows: Sequence[Row], path: Path) -> None:
    tables.figure(rows, path, "SGD, SAM and ESAM with ImageNet's networks")


EXPERIMENT = Experiment(
    name="table2",
    title="accuracy and images/s on ImageNet, ResNet-50 and ResNet-101",
    paper=(
        "SGD, SAM and ESAM with the hyperparameters of Table 8, beta = 0.6, gamma = 0.7 and m-sharpness with m = 128. "
        "Accuracies with * are those of Chen et al. (2021), to whose SGD and SAM the paper refers. Here: images/s of "
        "the whole loop on synthetic images; accuracies where there is ImageNet. Below the paper's scale, a small CNN "
        "on other images stands in for the accuracies. On "
        "the digits, one test image is 0.22 points."
    ),
    units=units,
    claims=claims,
    figure=figure,
    seeds={"smoke": 1, "small": 3, "paper": 1},
)
