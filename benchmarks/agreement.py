"""How well rankings from pass 1 alone agree with the measured rise of the losses, while a network trains.

    python -m benchmarks.agreement --data FOLDER     # trains, and writes benchmarks/results/cpu/ranking_agreement.json
    python -m benchmarks.readme                      # writes the table of docs/ranking.md from it

The data and the networks are those of the study (:mod:`benchmarks.study`), MNIST-1D needs its package
(``pip install "esam_kernels[study]"``) and CIFAR-10 a folder. Each network is trained by ESAM as the paper has it, at
beta = 0.6 and gamma = 0.5; after some epochs :func:`esam_kernels.diagnostics.ranking_agreement` compares the rankings
on batches of the training set that are drawn anew.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks import rows
from esam_kernels import ESAM, RankingContext, cross_entropy, diagnostics

RESULTS = rows.RESULTS / "cpu" / "ranking_agreement.json"
# For each measurement.
BATCHES = 20
SEED = 0


@dataclass(frozen=True)
class Run:
    """One training: a setting of the study, and after which epochs it is measured."""

    setting: str
    lr: float
    batch_size: int
    epochs: tuple[int, ...]
    samples: int | None = None
    """Only so many of the training samples."""


RUNS = (
    Run("digits", 0.05, 64, (1, 5, 25)),
    Run("digits-40", 0.05, 64, (1, 5, 25)),
    Run("mnist1d", 0.05, 64, (1, 5, 25)),
    Run("mnist1d-transformer", 0.02, 64, (1, 5, 25)),
    Run("cifar10", 0.05, 64, (1, 3, 8), samples=4000),
)


def largest_loss(context: RankingContext) -> torch.Tensor:
    """The ranking that costs nothing: the loss at w itself."""
    return context.losses


RANKINGS: dict[str, Any] = {"first_order": "first_order", "largest loss": largest_loss, "random": "random"}


def measure(run: Run, folder: str | None) -> list[dict[str, Any]]:
    """Train, and compare the rankings after each of the epochs."""
    from benchmarks.study.settings import BY_NAME

    setting = BY_NAME[run.setting]
    samples = setting.load(folder).with_label_noise(setting.label_noise, SEED)
    inputs, labels = (tensor[: run.samples] for tensor in samples.train)
    torch.manual_seed(SEED)
    network = setting.network()
    optimizer = ESAM(
        network.parameters(),
        torch.optim.SGD,
        lr=run.lr,
        momentum=0.9,
        weight_decay=5e-4,
        rho=0.05,
        seed=SEED,
        model=network,
    )
    order = torch.Generator().manual_seed(SEED)

    def losses(batch: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return cross_entropy(network(batch), target)

    def drawn() -> list[torch.Tensor]:
        chosen = torch.randperm(len(labels), generator=order).split(run.batch_size)
        return [part for part in chosen if len(part) == run.batch_size]

    found = []
    for epoch in range(1, max(run.epochs) + 1):
        for part in drawn():
            optimizer.step(losses, inputs[part], labels[part])
        if epoch in run.epochs:
            parts = (drawn() + drawn())[:BATCHES]
            for name, ranking in RANKINGS.items():
                compared = [
                    diagnostics.ranking_agreement(optimizer, losses, inputs[part], labels[part], ranking=ranking)
                    for part in parts
                ]
                found.append(
                    {
                        "setting": setting.title,
                        "epoch": epoch,
                        "ranking": name,
                        "shared": round(mean(each.shared for each in compared), 4),
                        "correlation": round(mean(each.correlation for each in compared), 4),
                        "batches": len(parts),
                        "batch_size": run.batch_size,
                        "training_samples": len(labels),
                    }
                )
                print(found[-1], flush=True)
    return found


def table(path: Path = RESULTS) -> str:
    """The share of B+ in percent, and in brackets the rank correlation, by setting, epoch and ranking."""
    saved = json.loads(path.read_text())
    cells = {(row["setting"], row["epoch"], row["ranking"]): row for row in saved["rows"]}
    names = list(dict.fromkeys(name for _, _, name in cells))
    lines = ["| network and data | after epoch | " + " | ".join(names) + " |", "|---|---:" + "|---:" * len(names) + "|"]
    for setting, epoch in dict.fromkeys((setting, epoch) for setting, epoch, _ in cells):
        found = [cells[setting, epoch, name] for name in names]
        texts = [f"{row['shared']:.0%} ({row['correlation']:.2f})" for row in found]
        lines.append(f"| {setting} | {epoch} | " + " | ".join(texts) + " |")
    row, environment = saved["rows"][0], saved["environment"]
    lines.append(
        f"\nMeans over {row['batches']} batches of {row['batch_size']}; torch {environment['torch']}, commit "
        f"{environment['commit']}, {environment['date']}."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="the folder with CIFAR-10")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    found = [row for run in RUNS for row in measure(run, arguments.data)]
    saved = {"environment": rows.environment(torch.device("cpu")), "rows": found}
    arguments.out.write_text(json.dumps(saved, indent=1) + "\n")


if __name__ == "__main__":
    main()
