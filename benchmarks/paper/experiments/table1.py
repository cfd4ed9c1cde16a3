"""Table 1: accuracy and images/s of SGD, SAM and ESAM, with three networks on CIFAR-10 and CIFAR-100."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.paper import tables
from benchmarks.paper.experiment import Claim, Experiment, Settings, Unit
from benchmarks.paper.tables import block
from benchmarks.rows import Row

BLOCKS = [
    block(
        *("Table 1", "cifar10", "resnet18"),
        sgd=("95.41 ± 0.03", 3387),
        sam=("96.52 ± 0.13", 1717),
        esam=("96.56 ± 0.08", 2409, 140.3),
    ),
    block(
        *("Table 1", "cifar100", "resnet18"),
        sgd=("78.17 ± 0.05", 3483),
        sam=("80.17 ± 0.17", 1730),
        esam=("80.41 ± 0.10", 2423, 140.0),
    ),
    block(
        *("Table 1", "cifar10", "wrn28-10"),
        sgd=("96.34 ± 0.12", 801),
        sam=("97.27 ± 0.11", 396),
        esam=("97.29 ± 0.11", 550, 138.9),
    ),
    block(
        *("Table 1", "cifar100", "wrn28-10"),
        sgd=("81.56 ± 0.13", 792),
        sam=("83.42 ± 0.04", 391),
        esam=("84.51 ± 0.01", 545, 139.4),
    ),
    block(
        *("Table 1", "cifar10", "pyramidnet110"),
        sgd=("96.62 ± 0.10", 580),
        sam=("97.30 ± 0.10", 289),
        esam=("97.81 ± 0.01", 401, 138.7),
    ),
    block(
        *("Table 1", "cifar100", "pyramidnet110"),
        sgd=("81.89 ± 0.17", 555),
        sam=("84.46 ± 0.04", 276),
        esam=("85.56 ± 0.05", 381, 137.9),
    ),
]


def units(settings: Settings) -> list[Unit]:
    return tables.units(settings, BLOCKS)


def claims(rows: Sequence[Row]) -> list[Claim]:
    return tables.claims(rows, BLOCKS)


def figure(rows: Sequence[Row], path: Path) -> None:
    tables.figure(rows, path, "SGD, SAM and ESAM")


EXPERIMENT = Experiment(
    name="table1",
    title="accuracy and images/s on CIFAR-10 and CIFAR-100",
    paper=(
        "SGD, SAM and ESAM with the hyperparameters of Table 7, three seeds each; the best accuracies over the epochs. "
        "Here: the same, from scratch with clean labels and gamma constant. Images/s are those of the whole loop, on "
        "synthetic images of the same shape: in fp32; on a GPU also in bf16 with channels last, and with the step as "
        "one CUDA graph besides. Trainings on a GPU use bf16. Below the paper's scale, a small CNN on one data set "
        "stands in for the accuracies, and the speeds are those of the paper's networks at batches of four. On "
        "the digits, one test image is 0.22 points."
    ),
    units=units,
    claims=claims,
    figure=figure,
)
