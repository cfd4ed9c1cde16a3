"""Figure 7: how linear the loss is along the perturbation, for different beta (appendix A.3)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from trainer import Trainer

from benchmarks.paper import curves, plotting
from benchmarks.paper.experiment import Claim, Experiment, Settings, Unit
from benchmarks.rows import Row
from esam_kernels.diagnostics import Linearity, linearity

BETAS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
# Linearity takes a forward for each beta and draw: fewer batches than in the other figures.
BATCHES, DRAWS = 4, 4
SCALINGS = {True: "e of Equation 5, scaled by 1/beta", False: "e without the scaling by 1/beta"}
PLACES = {True: "each beta trained by itself", False: "all betas at the weights of SAM"}
PAPER = '"a smaller beta can result in better linearity"; the axis runs from 0.016 to 0.030 (Figure 7)'


def measure(trainer: Trainer) -> list[Row]:
    """zeta, as a mean over batches and draws: for the beta of the training, and after SAM's for all of them."""
    options = trainer.options
    rho = 0.05 if options.rho is None else options.rho
    betas = BETAS if options.beta == 1.0 else (options.beta,)
    rows = []
    for rescale in SCALINGS:
        found: dict[float, list[Linearity]] = {beta: [] for beta in betas}
        for number, batch in enumerate(curves.probed_batches(trainer)[:BATCHES]):
            more = {"draws": DRAWS, "mask": options.mask, "seed": len(trainer.history) * 1000 + number}
            for one in linearity(trainer.model, trainer.losses, *batch, rho=rho, betas=betas, rescale=rescale, **more):
                found[one.beta].append(one)
        for beta, several in found.items():
            fields = ("linearity", "first_order", "radius")
            means = {name: statistics.mean(getattr(one, name) for one in several) for name in fields}
            rows.append({"trained_with": options.beta, "beta": beta, "rescaled": rescale, **means})
    return rows


def units(settings: Settings) -> list[Unit]:
    found = []
    for name in settings.data.available("cifar10"):
        few = (0.2, 0.4, 0.6, 0.8, 1.0)
        for beta in settings.choose(smoke=(0.5, 1.0), small=BETAS if name == "digits" else few, paper=BETAS):
            arguments = ["--optimizer", "esam-swp", "--beta", str(beta)]
            found += curves.units_of(settings, name, f"beta {beta}", arguments, measure)
    return found


def chosen(rows: Sequence[Row], data: str, rescaled: bool, by_itself: bool) -> list[Row]:
    """Those of one data set and scaling, of trainings with their own beta, or of SAM's."""
    own = [row for row in rows if row["data"] == data and row["rescaled"] == rescaled]
    return [row for row in own if (row["beta"] if by_itself else 1.0) == row["trained_with"]]


def zeta_by_beta(rows: Sequence[Row]) -> dict[float, float]:
    """Means over epochs and seeds."""
    betas = sorted({row["beta"] for row in rows})
    return {beta: statistics.mean(row["linearity"] for row in rows if row["beta"] == beta) for beta in betas}


def claims(rows: Sequence[Row]) -> list[Claim]:
    found = []
    for by_itself, place in PLACES.items():
        for rescaled, scaling in SCALINGS.items():
            text = f"zeta falls with beta, at every step ({scaling}; {place})"
            for data in curves.data_sets(rows):
                own = chosen(rows, data, rescaled, by_itself)
                measured, holds = falls_with_beta(own)
                found.append(Claim(text, PAPER, measured, holds, own if measured else ()))
            if not rows:
                found.append(Claim(text, PAPER))
    return found


def falls_with_beta(rows: Sequence[Row]) -> tuple[str | None, bool | None]:
    """Whether zeta is smaller for every smaller beta, in words and as a truth value; None without two betas."""
    zeta = zeta_by_beta(rows)
    if len(zeta) < 2:
        return None, None
    steps = [low < high for low, high in pairwise(zeta.values())]
    (least, first), (most, last) = min(zeta.items()), max(zeta.items())
    ends = f"{first:.3g} at beta = {least}, {last:.3g} at {most}"
    return f"at {sum(steps)} of {len(steps)} steps; {ends}", all(steps)


def figure(rows: Sequence[Row], path: Path) -> None:
    names = curves.data_sets(rows)
    with plotting.figure(path, "Distance of the loss from linear, zeta", rows, panels=2 * len(names)) as axes:
        panels = [(name, rescaled) for name in names for rescaled in SCALINGS]
        for axis, (name, rescaled) in zip(axes, panels):
            for by_itself, place in PLACES.items():
                own = chosen(rows, name, rescaled, by_itself)
                betas = sorted({row["beta"] for row in own})
                values = [zeta_by_seed(own, beta) for beta in betas]
                plotting.band(axis, betas, values, marker="o", color=plotting.COLORS[2 - by_itself], label=place)
            axis.set_title(f"{name}: {SCALINGS[rescaled]}", fontsize=9)
            axis.set(xlabel="beta (1: SAM)", ylim=(0, None))
            axis.legend(frameon=False, fontsize=8)
        axes[0].set_ylabel("zeta, mean over the epochs")


def zeta_by_seed(rows: Sequence[Row], beta: float) -> list[float]:
    """The mean over the epochs, for each seed."""
    own = [row for row in rows if row["beta"] == beta]
    seeds = sorted({row["seed"] for row in own})
    return [statistics.mean(row["linearity"] for row in own if row["seed"] == seed) for seed in seeds]


EXPERIMENT = Experiment(
    name="figure7",
    title="linearity of the loss along the perturbation, for different beta",
    paper=(
        "Figure 7 shows zeta = |L_B(w + e) - L_B(w) - e . grad L_B(w)| with ResNet-18 on CIFAR-10, smaller for smaller "
        "beta: the loss is more linear along SWP's perturbation than along SAM's. Equation 5 scales e by 1/beta, which "
        "makes it longer the smaller beta is, whereas appendix A.3 says that a smaller beta makes it shorter: both are "
        "measured, with the perturbation of Equation 5 and with the mask alone. Trainings are with SWP alone (gamma = "
        "1), so that beta = 1 is SAM; zeta is the mean over all epochs, four batches and four draws."
    ),
    units=units,
    claims=claims,
    figure=figure,
    seeds={"smoke": 1, "small": 2, "paper": 1},
)
