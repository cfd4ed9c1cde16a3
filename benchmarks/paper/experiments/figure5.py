"""Figure 5: the losses of B+ and B-, before and after the perturbation, epoch by epoch (appendix A.2)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from trainer import Trainer

from benchmarks.paper import curves, plotting
from benchmarks.paper.experiment import Claim, Experiment, Settings, Unit
from benchmarks.rows import Row
from esam_kernels.diagnostics import SplitLosses, split_losses

CURVES = {
    "selected": "B+, w",
    "rest": "B-, w",
    "selected_perturbed": "B+, w + e",
    "rest_perturbed": "B-, w + e",
}
CLAIMS = (
    ("the loss of B+ lies above that of B- at w, in every epoch", "selected", "rest", "Figure 5, Equation 9"),
    (
        "the loss of B+ lies above that of B- at w + e, in every epoch",
        "selected_perturbed",
        "rest_perturbed",
        "Figure 5, Equation 10",
    ),
)


def measure(trainer: Trainer) -> list[Row]:
    """The four losses, as means over the batches, for ESAM's perturbation and selection."""
    options = trainer.options
    shares = curves.shares_of(options)
    batches = curves.probed_batches(trainer)
    found = [split_losses(trainer.model, trainer.losses, *batch, **shares, mask=options.mask) for batch in batches]
    means = {name: statistics.mean(getattr(losses, name) for losses in found) for name in SplitLosses._fields}
    return [{**means, "batches": len(batches)}]


def units(settings: Settings) -> list[Unit]:
    return curves.units_of_esam(settings, measure)


def claims(rows: Sequence[Row]) -> list[Claim]:
    found = []
    for text, high, low, where in CLAIMS:
        paper = f"in every epoch, with ResNet-18 and Wide-28-10, on CIFAR-10 and CIFAR-100 ({where})"
        for data in curves.data_sets(rows):
            own = [row for row in rows if row["data"] == data]
            found.append(Claim(text, paper, *curves.always_above(own, high, low), own))
        if not rows:
            found.append(Claim(text, paper))
    return found


def figure(rows: Sequence[Row], path: Path) -> None:
    names = curves.data_sets(rows)
    with plotting.figure(path, "Training losses of B+ and B-", rows, panels=len(names)) as axes:
        for axis, name in zip(axes, names):
            own = [row for row in rows if row["data"] == name]
            for number, (field, label) in enumerate(CURVES.items()):
                values = curves.by_epoch(own, field)
                style = {"color": plotting.COLORS[2 - number % 2], "linestyle": "-" if number < 2 else "--"}
                plotting.band(axis, list(values), list(values.values()), label=label, **style)
            axis.set(title=name, xlabel="epoch", ylabel="loss", yscale="log")
            axis.legend(frameon=False, fontsize=8)


EXPERIMENT = Experiment(
    name="figure5",
    title="losses of the selected samples B+ and of the rest B-",
    paper=(
        "Figure 5 shows that the samples that SDS selects, those whose losses rise most under the perturbation, have "
        "the higher loss too, before and after it, in every epoch. Here: means over batches of the training's size, "
        "of the first 512 training images, after each epoch of a training with ESAM (beta = 0.6, gamma = 0.5). "
        "The small scale on CIFAR-10 is the second that was tried. The first one (2,000 images, lr 0.05, 10 epochs, "
        "two seeds; rows in commit 73b9a05) hardly learned: it reached 24 % test accuracy, and B+ lay above B- in 2 of "
        "10 epochs."
    ),
    units=units,
    claims=claims,
    figure=figure,
    seeds={"smoke": 1, "small": 2, "paper": 3},
)
