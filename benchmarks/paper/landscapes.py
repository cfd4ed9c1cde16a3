"""What Figures 4 and 8 share: trainings with SGD, SAM and ESAM, and the loss around the weights where they end."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from checkpoint import save_checkpoint
from torch import Tensor
from trainer import Trainer

from benchmarks.paper import plotting, tables
from benchmarks.paper.experiment import Claim, Settings, Unit
from benchmarks.paper.final import of
from benchmarks.paper.training import saved_state, train_and_measure
from benchmarks.rows import Row
from esam_kernels.diagnostics import loss_landscape

OPTIMIZERS = {"sgd": "SGD", "sam": "SAM", "esam": "ESAM"}
# Training images over which the loss is the mean, and how many of them go through the network at a time.
IMAGES, AT_A_TIME = 512, 128
# Rings around w by which the rise of the loss is drawn, and the least loss on a logarithmic scale.
RINGS = 12
LEAST_DRAWN = 1e-6


def units(
    settings: Settings, data: str, model: str, kinds: Mapping[str, Mapping[str, Any]], groups: int, points: int
) -> list[Unit]:
    """A training for each optimizer and seed; ``kinds`` are arguments of loss_landscape by their names."""
    at_paper = settings.scale == "paper"
    network = model if at_paper else tables.STAND_IN
    limit = settings.choose(smoke=192, small=None if data == "digits" else tables.SMALL_CIFAR, paper=None)
    found = []
    for seed in settings.seeds:
        for optimizer in OPTIMIZERS:
            recipe = ["--recipe", f"{data}-{model}-{optimizer}"]
            words = recipe if at_paper else tables.small_recipe(settings, data, optimizer)
            words += tables.WAYS[tables.TRAINED_WAY] if settings.device.type == "cuda" else []
            words = settings.with_epochs(words)
            key = f"{data}/{network}/{optimizer}/seed {seed}"
            common = {"optimizer": optimizer, "set": data, "model": model, "network": network}
            run = functools.partial(run_unit, settings, key, words, limit, seed, kinds, groups, points, common)
            made_with = {"options": " ".join(words), "images": limit, "looked_at": IMAGES}
            made_with |= {"kinds": {name: dict(kind) for name, kind in kinds.items()}}
            made_with |= {"groups": groups, "points": points}
            found.append(Unit(key, run, settings.data.label(data), seed, made_with))
    return found


def run_unit(
    settings: Settings,
    key: str,
    words: Sequence[str],
    limit: int | None,
    seed: int,
    kinds: Mapping[str, Mapping[str, Any]],
    groups: int,
    points: int,
    common: Row,
) -> list[Row]:
    """Train, and after the last epoch give a row for each kind of landscape: the mean over the groups."""
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    data = tables.read(settings, common["set"], limit)
    scratch = settings.scratch_of(key)

    def measure(trainer: Trainer) -> list[Row]:
        if len(trainer.history) < trainer.options.epochs:
            return []
        rows = []
        for name, kind in kinds.items():
            losses = mean_landscape(settings, scratch / name, trainer, kind, groups, points)
            rises = [[float(f"{rise:.5g}") for rise in line] for line in (losses - middle(losses)).tolist()]
            landscape = {"extent": kind["extent"], "groups": groups, "loss": middle(losses), "rises": rises}
            rows.append({**common, "kind": name, **landscape})
        return rows

    return train_and_measure(settings, scratch, data, words, seed, measure)


def mean_landscape(
    settings: Settings, scratch: Path, trainer: Trainer, kind: Mapping[str, Any], groups: int, points: int
) -> Tensor:
    """float64 (points, points): the mean over ``groups`` pairs of directions, which are saved one by one."""
    trainer.model.eval()
    batch = [torch.cat(parts)[:IMAGES] for parts in zip(*first_batches(trainer))]
    made_with = {"training": trainer.history[-1]["train_loss"], "kind": repr(dict(kind)), "points": points}
    state = saved_state(settings, scratch, made_with) or {"options": made_with, "total": None, "groups": 0}
    for group in range(state["groups"], groups):
        found = loss_landscape(
            trainer.model, trainer.losses, *batch, points=points, seed=group, micro_batch=AT_A_TIME, **kind
        ).losses
        total = found if state["total"] is None else state["total"].cpu() + found
        state |= {"total": total, "groups": group + 1}
        save_checkpoint(str(scratch), state)
        settings.check_time()
    return state["total"].cpu() / groups


def first_batches(trainer: Trainer) -> list[tuple[Tensor, Tensor]]:
    """Training images without augmentation, ``IMAGES`` of them where there are so many."""
    found, images = [], 0
    for batch in trainer.data.plain_training_batches(AT_A_TIME):
        found.append(batch)
        images += len(batch[1])
        if images >= IMAGES:
            break
    return found


# -- what is read off a landscape --------------------------------------------------------------------------------------


def middle(losses: Tensor) -> float:
    """The loss at w, or, where the number of points is even, the mean of the four around it."""
    n = len(losses)
    return losses[(n - 1) // 2 : n // 2 + 1, (n - 1) // 2 : n // 2 + 1].mean().item()


def grid(row: Row) -> tuple[Tensor, Tensor]:
    """The positions along an axis, (points,), and how far the loss lies above that at w, (points, points)."""
    rises = torch.tensor(row["rises"], dtype=torch.float64)
    return torch.linspace(-row["extent"], row["extent"], len(rises), dtype=torch.float64), rises


def mean_rise(row: Row) -> float:
    """How far the loss lies above that at w, as a mean over the plane."""
    return grid(row)[1].mean().item()


def rise_by_distance(row: Row) -> tuple[list[float], list[float]]:
    """Distances from w, and the mean rise of the loss there, over all directions in the plane."""
    axis, rises = grid(row)
    distance = (axis[:, None].square() + axis[None, :].square()).sqrt()
    ring = (distance / row["extent"] * RINGS).round()
    inside = [number for number in range(RINGS + 1) if (ring == number).any()]
    means = [rises[ring == number].mean().item() for number in inside]
    return [number * row["extent"] / RINGS for number in inside], means


def flatter(rows: Sequence[Row], text: str, paper: str) -> Claim:
    """Whether the loss rises less around the weights of SAM and of ESAM than around those of SGD."""
    found = {name: [mean_rise(row) for row in of(rows, optimizer=name)] for name in OPTIMIZERS}
    if not all(found.values()):
        return Claim(text, paper)
    means = {name: statistics.mean(rises) for name, rises in found.items()}
    here = "; ".join(
        f"{OPTIMIZERS[name]} {means[name]:.3g} ({min(rises):.3g} to {max(rises):.3g})" for name, rises in found.items()
    )
    return Claim(text, paper, here, max(means["sam"], means["esam"]) < means["sgd"], rows)


def claims(rows: Sequence[Row], kinds: Mapping[str, str], paper: str) -> list[Claim]:
    """One for each kind of landscape; ``kinds`` say in words what their directions are."""
    return [
        flatter(
            of(rows, kind=kind),
            f"mean rise of the loss over the plane lower for SAM and ESAM than SGD ({words})",
            paper,
        )
        for kind, words in kinds.items()
    ]


# -- figure ------------------------------------------------------------------------------------------------------------


def figure(rows: Sequence[Row], path: Path, title: str, axis_labels: Mapping[str, str]) -> None:
    """Contours of the first kind, for each optimizer's first seed, and the rise over the distance, for every kind.

    ``axis_labels`` say what the axes of each kind are measured in.
    """
    first = of(rows, kind=next(iter(axis_labels)))
    shown = {name: of(first, optimizer=name)[0] for name in OPTIMIZERS if of(first, optimizer=name)}
    with plotting.figure(path, title, rows, panels=len(shown) + len(axis_labels)) as axes:
        draw_contours(axes[: len(shown)], shown, next(iter(axis_labels.values())))
        for axis, (kind, label) in zip(axes[len(shown) :], axis_labels.items()):
            for color, name in zip(plotting.COLORS, shown):
                curves = [rise_by_distance(row) for row in of(rows, kind=kind, optimizer=name)]
                rises = list(zip(*(rise for _, rise in curves)))
                plotting.band(axis, curves[0][0], rises, color=color, label=OPTIMIZERS[name])
            axis.set(xlabel=f"distance from w ({label})", ylabel="mean rise of the loss")
            axis.legend(frameon=False, fontsize=8)


def draw_contours(axes: Sequence[Any], shown: Mapping[str, Row], axis_label: str) -> None:
    """The losses, on one logarithmic scale of colours."""
    from matplotlib.colors import LogNorm

    losses = {name: (row["loss"] + grid(row)[1]).clamp(min=LEAST_DRAWN) for name, row in shown.items()}
    bounds = torch.stack(list(losses.values())).aminmax()
    levels = torch.logspace(bounds.min.log10().item(), (1.0001 * bounds.max).log10().item(), 25).tolist()
    for panel, (name, row) in zip(axes, shown.items()):
        at = grid(row)[0].tolist()
        drawn = panel.contourf(at, at, losses[name].T.tolist(), levels=levels, norm=LogNorm(levels[0], levels[-1]))
        panel.set(title=f"{OPTIMIZERS[name]}, seed {row['seed']}", xlabel=axis_label, aspect="equal")
    bar = {"label": "loss", "shrink": 0.8, "ticks": levels[::6], "format": "%.2g"}
    axes[0].figure.colorbar(drawn, ax=list(axes), **bar)
