"""Table 6: accuracy and images/s of SGD, SAM, ESAM and its two parts with ViT-S/16 on ImageNet (appendix A.6)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.paper import tables
from benchmarks.paper.experiment import Claim, Experiment, Settings, Unit
from benchmarks.paper.tables import block
from benchmarks.rows import Row

BLOCKS = [
    block(
        *("Table 6", "imagenet", "vit-s16"),
        sgd=("79.72", 1133),
        sam=("80.34", 581),
        esam_swp=("80.88", 616),
        esam_sds=("79.97", 693),
        esam=("80.46", 734),
    )
]


def units(settings: Settings) -> list[Unit]:
    return tables.units(settings, BLOCKS)


def claims(rows: Sequence[Row]) -> list[Claim]:
    return tables.claims(rows, BLOCKS)


def figure(rows: Sequence[Row], path: Path) -> None:
    tables.figure(rows, path, "SGD, SAM, ESAM and its two parts, ViT-S/16")


EXPERIMENT = Experiment(
    name="table6",
    title="accuracy and images/s on ImageNet, ViT-S/16",
    paper=(
        "SGD, SAM, ESAM, SWP alone and SDS alone with beta = 0.5 and gamma = 0.7, other hyperparameters as for "
        "ResNet-50. Here: images/s of the whole loop on synthetic images; accuracies where there is ImageNet. Below "
        "the paper's scale, a small CNN on other images stands in for the accuracies. On "
        "the digits, one test image is 0.22 points."
    ),
    units=units,
    claims=claims,
    figure=figure,
    seeds={"smoke": 1, "small": 3, "paper": 1},
)
