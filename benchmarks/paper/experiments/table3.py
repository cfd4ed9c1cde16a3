"""Table 3: the ablation, ESAM with SWP alone and with SDS alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.paper import tables
from benchmarks.paper.experiment import Claim, Experiment, Settings, Unit
from benchmarks.paper.final import of, values
from benchmarks.paper.tables import OPTIMIZERS, block
from benchmarks.rows import Row

PARTS = ("esam-swp", "esam-sds")
# Of ResNet-18 with SGD on CIFAR-100, Table 1 prints 3,483; of its ESAM's speed, 140.0 %.
BLOCKS = [
    block(
        *("Table 3", "cifar10", "resnet18"),
        sgd=("95.41", 3387),
        sam=("96.52", 1717),
        esam_swp=("96.74", 1896, 110.5),
        esam_sds=("96.45", 2105, 122.6),
        esam=("96.56", 2409, 140.3),
    ),
    block(
        *("Table 3", "cifar100", "resnet18"),
        sgd=("78.17", 3438),
        sam=("80.17", 1730),
        esam_swp=("80.53", 1887, 109.1),
        esam_sds=("80.38", 2103, 121.5),
        esam=("80.41", 2423, 140.9),
    ),
    block(
        *("Table 3", "cifar10", "wrn28-10"),
        sgd=("96.34", 801),
        sam=("97.27", 396),
        esam_swp=("97.37", 430, 108.5),
        esam_sds=("97.24", 495, 124.8),
        esam=("97.29", 551, 138.9),
    ),
    block(
        *("Table 3", "cifar100", "wrn28-10"),
        sgd=("81.56", 792),
        sam=("83.42", 391),
        esam_swp=("84.44", 423, 108.3),
        esam_sds=("84.46", 492, 125.8),
        esam=("84.51", 545, 139.4),
    ),
]


def units(settings: Settings) -> list[Unit]:
    return tables.units(settings, BLOCKS)


def claims(rows: Sequence[Row]) -> list[Claim]:
    return [*tables.claims(rows, BLOCKS), *part_claims(rows)]


def part_claims(rows: Sequence[Row]) -> list[Claim]:
    """Each part alone against SAM: accuracies where every block was trained with both, and speeds."""
    found = []
    for part in PARTS:
        for field, what, paper in (
            ("best_accuracy", "more accurate", {"esam-swp": "in all four cases", "esam-sds": "on CIFAR-100 only"}),
            ("images_per_second", "faster", {"esam-swp": "by 8.3 % to 10.5 %", "esam-sds": "by 21.5 % to 25.8 %"}),
        ):
            text = f"{OPTIMIZERS[part]} is {what} than SAM"
            found.append(Claim(text, f"{paper[part]} (Table 3)", *compared(rows, part, field)))
    return found


def compared(rows: Sequence[Row], part: str, field: str) -> tuple[str | None, bool | None, list[Row]]:
    """``part`` less SAM, in points or percent, in every case where both were measured; whether it is always above."""
    speed = field == "images_per_second"
    own = of(rows, part="speed" if speed else "accuracy")
    differences, used = {}, []
    for case in dict.fromkeys((row["set"], row["network"], row.get("way")) for row in own):
        data, network, way = case
        here = of(own, set=data, network=network, way=way)
        mine, sam = (values(here, "ratio_to_sam" if speed else field, optimizer=name) for name in (part, "sam"))
        if mine and sam:
            scale = 100.0 if speed else 1.0
            name = f"{tables.MODELS.get(network, 'small CNN')}, {tables.DATA[data]}{f', {way}' if way else ''}"
            differences[name] = scale * (statistics.mean(mine) - statistics.mean(sam))
            used += here
    if not differences:
        return None, None, []
    unit = "%" if speed else "points"
    digits = 1 if speed else 2
    text = "; ".join(f"{name}: {value:+.{digits}f} {unit}" for name, value in differences.items())
    return text, all(value > 0.0 for value in differences.values()), used


def figure(rows: Sequence[Row], path: Path) -> None:
    tables.figure(rows, path, "SGD, SAM, ESAM and its two parts")


EXPERIMENT = Experiment(
    name="table3",
    title="ablation: SWP alone and SDS alone",
    paper=(
        "SGD, SAM, SWP alone (gamma = 1), SDS alone (beta = 1) and ESAM, trained as for Table 1. Here: the same. "
        "Below the paper's scale, a small CNN on one data set stands in for the accuracies, and the speeds are those "
        "of the paper's networks at batches of four. On "
        "the digits, one test image is 0.22 points."
    ),
    units=units,
    claims=claims,
    figure=figure,
)
