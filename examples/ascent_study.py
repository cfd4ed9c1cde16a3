"""Which radius for ESAM with one pass a step: a grid of rho for each ascent, beside SGD and SAM.

Trains with the options of train.py on the digits (40 % wrong training labels, and none), on a synthetic table with an
MLP, and, given --cifar, on 1,500 images of CIFAR-10. Stage "tune" tries every radius on the tuning seeds; stage
"report" trains on other seeds with the default radii of ``esam_kernels.perturbation.ascent`` alone. Each finished
training is a line of --out/ascent_study.jsonl and is not repeated; --summarise writes the means and the plot from these
lines.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from data import DataSet, UserError, load, with_label_noise
from report import COLORS, digest, environment, spread
from torch import nn
from train import Parser, parse_options
from trainer import ONE_PASS, Trainer

from esam_kernels.perturbation.ascent import DEFAULT_RHO

RADII = {
    "esam-previous": (0.0125, 0.025, 0.05, 0.1, 0.2),
    "esam-momentum": (0.05, 0.1, 0.2, 0.5, 1.0, 2.0),
}
# Share of the steps over which rho rises from 0.
WARMUP = 0.25
SEEDS = {"tune": range(5), "report": range(5, 10)}
CIFAR_SEEDS = {"tune": range(1), "report": range(5, 6)}
TABLE = {"train": 1000, "test": 4000, "features": 64, "classes": 10}

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What is trained, and the options of train.py that say so."""

    data: str
    label_noise: float
    arguments: tuple[str, ...] = ()


TASKS = {
    "digits, 40 % flipped": Task("digits", 0.4),
    "digits": Task("digits", 0.0),
    "table, 20 % flipped": Task("table", 0.2),
    "table": Task("table", 0.0),
    "CIFAR-10, 1,500 images": Task("cifar10", 0.0, ("--epochs", "10", "--limit", "1500")),
}


class TableTrainer(Trainer):
    """Trains an MLP on features, (n, features, 1, 1)."""

    def _network(self) -> nn.Module:
        features, width = self.data.train_images.shape[1], 128
        hidden = [nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, self.data.classes))


def make_table() -> DataSet:
    """Ten classes of two Gaussian clusters each, in 16 of 64 dimensions; the others are noise or sums."""
    try:
        from sklearn.datasets import make_classification
    except ImportError:
        raise UserError("the table needs scikit-learn: pip install scikit-learn") from None
    features, labels = make_classification(
        n_samples=TABLE["train"] + TABLE["test"],
        n_features=TABLE["features"],
        n_informative=16,
        n_redundant=16,
        n_classes=TABLE["classes"],
        n_clusters_per_class=2,
        random_state=0,
    )
    x = torch.from_numpy(features).float()[:, :, None, None]
    y = torch.from_numpy(labels).to(torch.int64)
    n = TABLE["train"]
    return DataSet(x[:n], y[:n], x[n:], y[n:], classes=TABLE["classes"], augmented=False)


def runs(task: str, stage: str) -> Iterator[Row]:
    """What identifies each training of a task and stage: all seeds without the warm-up of rho, then with it."""
    is_cifar = TASKS[task].data == "cifar10"
    radii = RADII if stage == "tune" else {name: (DEFAULT_RHO[ascent],) for name, ascent in ONE_PASS.items()}
    plain = {"rho_warmup": 0.0, "beta": 1.0}
    one_pass = [{"optimizer": name, "rho": rho, **plain} for name in ONE_PASS for rho in radii[name]]
    cases = [{"optimizer": name, "rho": None, **plain} for name in ("sgd", "sam")] + one_pass
    with_warmup = [{**case, "rho_warmup": WARMUP} for case in one_pass]
    with_mask = [{**case, "beta": 0.6} for case in one_pass] if stage == "report" else []
    # A training on CIFAR-10 takes half a minute.
    for part in (cases,) if is_cifar and stage == "tune" else (cases, with_warmup, with_mask):
        for seed in (CIFAR_SEEDS if is_cifar else SEEDS)[stage]:
            for case in part:
                yield {"task": task, "stage": stage, "seed": seed, **case}


def train_one(run: Row, data: DataSet) -> Row:
    """The run with what came out of it."""
    task = TASKS[run["task"]]
    arguments = ["--optimizer", run["optimizer"], "--rho-warmup", str(run["rho_warmup"]), "--device", "cpu"]
    if run["rho"] is not None:
        arguments += ["--rho", str(run["rho"]), "--beta", str(run["beta"])]
    options = parse_options([*arguments, *task.arguments])
    noisy = with_label_noise(data, task.label_noise, run["seed"])
    trainer = (TableTrainer if task.data == "table" else Trainer)(run["optimizer"], run["seed"], noisy, options)
    while len(trainer.history) < options.epochs:
        trainer.train_epoch()
    last = trainer.history[-1]
    return {**run, **{name: last[name] for name in ("test_accuracy", "train_loss")}, **environment(trainer.device)}


def identity(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("task", "stage", "seed", "optimizer", "rho", "rho_warmup", "beta"))


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def train_missing(path: Path, task: str, stage: str, cifar: str | None) -> None:
    """Train what the file does not hold yet, and add a line to it after each training."""
    kind = TASKS[task].data
    data = make_table() if kind == "table" else load(kind, cifar, limit_of(task))
    done = {identity(row) for row in read_rows(path)}
    for run in runs(task, stage):
        if identity(run) not in done:
            row = train_one(run, data)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{task}  {run['optimizer']} rho {run['rho']} warm-up {run['rho_warmup']}  seed {run['seed']}  "
                  f"{row['test_accuracy']:.1f} %", flush=True)  # fmt: skip


def limit_of(task: str) -> int | None:
    return parse_options(["--data", "cifar10", "--data-path", "-", *TASKS[task].arguments]).limit


def summarise(rows: list[Row]) -> list[Row]:
    """A row for each case, over its seeds, with the mean difference to SGD of the same seeds."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        task, stage, _, *case = identity(row)
        found.setdefault((stage, task, *case), []).append(row)
    sgd = {(r["stage"], r["task"], r["seed"]): r["test_accuracy"] for r in rows if r["optimizer"] == "sgd"}
    summary = []
    for (stage, task, optimizer, rho, warmup, beta), own in found.items():
        gains = [row["test_accuracy"] - sgd[stage, task, row["seed"]] for row in own]
        case = {"stage": stage, "task": task, "optimizer": optimizer, "rho": rho, "rho_warmup": warmup, "beta": beta}
        accuracy = spread([row["test_accuracy"] for row in own])
        summary.append({**case, "seeds": len(own), "test_accuracy": accuracy, "over_sgd": mean(gains)})
    return summary


def plot(path: Path, summary: list[Row]) -> None:
    """Points over SGD against rho, a panel an ascent and a line a task; dashed with the warm-up of rho."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tuned = [row for row in summary if row["stage"] == "tune"]
    figure, axes = pyplot.subplots(1, len(ONE_PASS), figsize=(11, 4.2), layout="constrained", sharey=True)
    for axis, name in zip(axes, ONE_PASS):
        for task, color in zip(TASKS, COLORS):
            for share, style in ((0.0, "-"), (WARMUP, "--")):
                own = [r for r in tuned if (r["optimizer"], r["task"], r["rho_warmup"]) == (name, task, share)]
                own.sort(key=lambda row: row["rho"])
                label = task if style == "-" else None
                values = [row["over_sgd"] for row in own]
                axis.plot([row["rho"] for row in own], values, style, color=color, label=label, marker=".")
        axis.axvline(DEFAULT_RHO[ONE_PASS[name]], color="0.7", zorder=0)
        axis.axhline(0.0, color="0.7", linewidth=0.8, zorder=0)
        axis.set(xscale="log", xlabel="rho", title=name)
        axis.set_xticks(RADII[name], [f"{rho:g}" for rho in RADII[name]])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("test accuracy over SGD's (points)")
    axes[0].legend(frameon=False)
    figure.suptitle(f"dashed: rho rises from 0 over {WARMUP:.0%} of the steps; grey: the default")
    figure.savefig(path, dpi=120, metadata={"Description": digest(summary)})
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=SEEDS, default="tune")
    parser.add_argument("--task", choices=TASKS, nargs="+", help="default: all, CIFAR-10 only with --cifar")
    parser.add_argument("--cifar", metavar="PATH", help="where CIFAR-10 is: a directory, .tar.gz or .npz")
    parser.add_argument("--out", metavar="DIR", default="runs")
    parser.add_argument("--summarise", action="store_true", help="train nothing: means and plot from the lines")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    out = Path(options.out)
    lines = out / "ascent_study.jsonl"
    try:
        out.mkdir(parents=True, exist_ok=True)
        for task in [] if options.summarise else options.task or TASKS:
            if options.cifar or TASKS[task].data != "cifar10":
                train_missing(lines, task, options.stage, options.cifar)
        rows = read_rows(lines)
        summary = summarise(rows)
        versions = {name: sorted({row[name] for row in rows}) for name in ("device", "python", "torch", "commit")}
        (out / "ascent_study.json").write_text(json.dumps({"environment": versions, "rows": summary}, indent=1) + "\n")
        plot(out / "ascent_study.png", summary)
    except (UserError, OSError) as error:
        parser.exit(2, f"ascent_study.py: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"interrupted: {lines} holds what was finished, and the same command goes on\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
