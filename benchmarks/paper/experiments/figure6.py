"""Figure 6: how well the gradients of B+, of B- and of a random part point along that of the batch (appendix A.2)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from trainer import Trainer

from benchmarks.paper import curves, plotting
from benchmarks.paper.experiment import Claim, Experiment, Settings, Unit
from benchmarks.rows import Row
from esam_kernels.diagnostics import GradientCosine, gradient_cosine

CURVES = {"selected": "B+", "random": "random", "rest": "B-"}
CLAIMS = (
    ("the gradient of B+ is closer to that of B than a random part's is, in every epoch", "selected", "random"),
    ("the gradient of a random part is closer to that of B than B-'s is, in every epoch", "random", "rest"),
)
PAPER = {
    "random": 'B+ "has the highest cosine similarities with B", in every epoch (Figure 6)',
    "rest": "not stated: B+ is above both (Figure 6)",
}


def measure(trainer: Trainer) -> list[Row]:
    """The three cosines at w + e, as means over the batches; a batch in which a gradient is 0 has none."""
    options = trainer.options
    shares = curves.shares_of(options)
    found = []
    for number, batch in enumerate(curves.probed_batches(trainer)):
        more = {"mask": options.mask, "seed": len(trainer.history) * 1000 + number}
        found.append(gradient_cosine(trainer.model, trainer.losses, *batch, **shares, **more))
    found = [cosines for cosines in found if not any(map(math.isnan, cosines))]
    if not found:
        return []
    means = {name: statistics.mean(getattr(cosines, name) for cosines in found) for name in GradientCosine._fields}
    return [{**means, "batches": len(found)}]


def units(settings: Settings) -> list[Unit]:
    return curves.units_of_esam(settings, measure)


def claims(rows: Sequence[Row]) -> list[Claim]:
    found = []
    for text, high, low in CLAIMS:
        for data in curves.data_sets(rows):
            own = [row for row in rows if row["data"] == data]
            found.append(Claim(text, PAPER[low], *curves.always_above(own, high, low), own))
        if not rows:
            found.append(Claim(text, PAPER[low]))
    return found


def figure(rows: Sequence[Row], path: Path) -> None:
    names = curves.data_sets(rows)
    with plotting.figure(
        path, "Cosine to the gradient of the batch, at w + e", rows, panels=len(names), sharey=True
    ) as axes:
        for axis, name in zip(axes, names):
            own = [row for row in rows if row["data"] == name]
            for color, (field, label) in zip(plotting.COLORS[1:], CURVES.items()):
                values = curves.by_epoch(own, field)
                plotting.band(axis, list(values), list(values.values()), label=label, color=color)
            axis.set(title=name, xlabel="epoch")
        axes[0].set_ylabel("cosine")
        axes[-1].legend(frameon=False, fontsize=8)


EXPERIMENT = Experiment(
    name="figure6",
    title="cosine of the gradients of B+, B- and a random part to that of the batch",
    paper=(
        "Figure 6 shows that, at the perturbed weights, the gradient of B+ is closer to that of the whole batch than "
        "the gradients of B- and of as many samples drawn at random. Here: means over batches of the training's size, "
        "of the first 512 training images, after each epoch of a training with ESAM (beta = 0.6, gamma = 0.5). B+ and "
        "a random part are parts of B, and so point along its gradient to begin with."
    ),
    units=units,
    claims=claims,
    figure=figure,
    seeds={"smoke": 1, "small": 2, "paper": 3},
)
