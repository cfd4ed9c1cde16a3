"""Figure 3: accuracy and time per epoch over beta and gamma (section 3.2)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from data import load

from benchmarks.paper import plotting, tables
from benchmarks.paper.experiment import Claim, Experiment, Settings, Unit
from benchmarks.paper.final import of, plus_minus, train_to_the_end, values
from benchmarks.paper.speed import side_by_side
from benchmarks.rows import Row, device_name

# [0.3, 0.9] "with a same step size of 0.1", for beta and for gamma.
GRID = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# Both at once, where trainings are short: the paper varies one at a time.
COARSE = (0.3, 0.6, 0.9)
# ESAM's beta in section 3.1; gamma is 0.5.
PAPER_BETA = {"resnet18": 0.6, "wrn28-10": 0.5}
CASES = [(model, data) for model in PAPER_BETA for data in ("cifar10", "cifar100")]
# What is varied in a line of the figure, the paper's best, and what it says of the time.
LINES = {
    "SWP": (
        "beta",
        "0.6 for ResNet-18, 0.5 for WideResNet-28-10 (section 3.2)",
        '"SWP can further improve the efficiency by using a smaller beta" (section 3.2)',
    ),
    "SDS": (
        "gamma",
        '0.5 is "the smallest value that is optimal for efficiency while maintaining comparable performance to SAM" '
        "(section 3.2)",
        '"The reduction is linear in 1 - gamma" (section 2.3)',
    ),
}
# Points below SAM that count as comparable: those of Table 3's SDS on CIFAR-10 are 0.07 and 0.03.
COMPARABLE = 0.1


def cases(settings: Settings, model: str) -> dict[str, dict[str, Any]]:
    """Line, beta and gamma of each training by its name; those of SGD are None."""
    few = settings.choose(smoke=(0.3, 0.6), small=GRID, paper=GRID)
    both = settings.choose(smoke=(), small=COARSE, paper=())
    return {
        "sgd": {"line": "SGD", "beta": None, "gamma": None},
        "sam": {"line": "SAM", "beta": 1.0, "gamma": 1.0},
        "esam": {"line": "ESAM", "beta": PAPER_BETA[model], "gamma": 0.5},
        **{f"swp {beta}": {"line": "SWP", "beta": beta, "gamma": 1.0} for beta in few},
        **{f"sds {gamma}": {"line": "SDS", "beta": 1.0, "gamma": gamma} for gamma in few},
        **{f"esam {b} {g}": {"line": "grid", "beta": b, "gamma": g} for b in both for g in both},
    }


def words(settings: Settings, data: str, model: str, line: str, beta: float | None, gamma: float | None) -> list[str]:
    """Options of train.py; SWP and SDS alone have no part that would only cost time."""
    optimizer = {"SGD": "sgd", "SAM": "sam", "SWP": "esam-swp", "SDS": "esam-sds"}.get(line, "esam")
    at_paper = settings.scale == "paper"
    recipe = ["--recipe", f"{data}-{model}-{optimizer}"]
    found = recipe if at_paper else tables.small_recipe(settings, data, optimizer)
    shares = [] if beta is None else ["--beta", str(beta), "--gamma", str(gamma)]
    on_gpu = settings.device.type == "cuda"
    return [*found, *(shares if optimizer.startswith("esam") else []), *(tables.WAYS["bf16"] if on_gpu else [])]


def units(settings: Settings) -> list[Unit]:
    """On the data sets that are there; below the paper's scale a small CNN on one of them."""
    if settings.scale == "paper":
        there = settings.data.available("cifar10", "cifar100")
        chosen = [(model, data) for model, data in CASES if data in there]
    else:
        chosen = [("resnet18", settings.data.available("cifar10")[0])]
    found = [speed_unit(settings, model, data) for model, data in chosen]
    for seed in settings.seeds:
        for model, data in chosen:
            found += [
                training(settings, model, data, name, case, seed) for name, case in cases(settings, model).items()
            ]
    return found


def speed_unit(settings: Settings, model: str, data: str) -> Unit:
    source = data if data == "digits" else f"synthetic-{data}"
    network = model if settings.scale == "paper" else tables.STAND_IN
    chosen = cases(settings, model)
    options = {name: words(settings, data, model, **case) for name, case in chosen.items()}
    limit = settings.choose(smoke=128, small=1000, paper=None)
    rounds, steps = settings.choose(smoke=(2, 1), small=(20, 2), paper=(5, 20))
    made_with = {"options": {name: " ".join(one) for name, one in options.items()}, "rounds": rounds, "steps": steps}
    made_with |= {"device": device_name(settings.device), "threads": torch.get_num_threads()}

    def run() -> list[Row]:
        images = load(source, limit=limit).to(settings.device)
        rows = side_by_side(settings, images, options, rounds, steps, seed=0)
        common = {"part": "speed", "set": data, "network": network}
        return [{**common, **chosen[row["optimizer"]], **row} for row in rows]

    return Unit(f"speed/{data}/{network}", run, source, 0, made_with)


def training(settings: Settings, model: str, data: str, name: str, case: dict[str, Any], seed: int) -> Unit:
    options = settings.with_epochs(words(settings, data, model, **case))
    limit = settings.choose(smoke=192, small=None if data == "digits" else tables.SMALL_CIFAR, paper=None)
    network = model if settings.scale == "paper" else tables.STAND_IN
    key = f"{data}/{network}/{name}/seed {seed}"
    common = {"part": "accuracy", "set": data, "network": network, "optimizer": name, **case}

    def run() -> list[Row]:
        found = train_to_the_end(settings, key, tables.read(settings, data, limit), options, seed)
        return [{**common, **row} for row in found]

    return Unit(key, run, settings.data.label(data), seed, {"options": " ".join(options), "images": limit})


# -- claims ------------------------------------------------------------------------------------------------------------


def claims(rows: Sequence[Row]) -> list[Claim]:
    found = []
    groups = dict.fromkeys((row["set"], row["network"]) for row in rows)
    for data, network in groups:
        own = of(rows, set=data, network=network)
        label = f"{tables.MODELS.get(network, 'small CNN')} on {tables.DATA[data]}"
        for line, (share, best, speed) in LINES.items():
            found += [best_of(own, label, line, share, best), faster_when_smaller(own, label, line, share, speed)]
        found.append(comparable(own, label))
    if not groups:
        for line, (share, best, speed) in LINES.items():
            found += [best_of([], "any", line, share, best), faster_when_smaller([], "any", line, share, speed)]
        found.append(comparable([], "any"))
    return found


def accuracy_by(rows: Sequence[Row], line: str, share: str) -> dict[float, list[float]]:
    """The best accuracies over the epochs, one for each seed, by beta or gamma."""
    own = of(rows, part="accuracy", line=line)
    return {value: values(own, "best_accuracy", **{share: value}) for value in sorted({row[share] for row in own})}


def best_of(rows: Sequence[Row], label: str, line: str, share: str, paper: str) -> Claim:
    text = f"{label}, {line} alone: the {share} with the best mean accuracy"
    found = accuracy_by(rows, line, share)
    if not found:
        return Claim(text, paper)
    best = max(found, key=lambda value: statistics.mean(found[value]))
    listed = ", ".join(f"{value}: {plus_minus(accuracies, 2)}" for value, accuracies in found.items())
    return Claim(text, paper, f"{best} ({listed})", None, of(rows, part="accuracy", line=line))


def faster_when_smaller(rows: Sequence[Row], label: str, line: str, share: str, paper: str) -> Claim:
    text = f"{label}, {line} alone: faster with every step to a smaller {share}"
    own = sorted(of(rows, part="speed", line=line), key=lambda row: row[share])
    if len(own) < 2:
        return Claim(text, paper)
    steps = [low["ratio_to_sam"] > high["ratio_to_sam"] for low, high in pairwise(own)]
    ends = " and ".join(f"{100 * row['ratio_to_sam']:.1f} % at {row[share]}" for row in (own[0], own[-1]))
    return Claim(
        text,
        paper,
        f"at {sum(steps)} of {len(steps)} steps; SAM's speed times {ends}",
        all(steps),
        own,
    )


def comparable(rows: Sequence[Row], label: str) -> Claim:
    """SDS with gamma = 0.5 against SAM."""
    text = f"{label}: SDS with gamma = 0.5 is at most {COMPARABLE} points below SAM"
    paper = "-0.07 and -0.03 on CIFAR-10, +0.21 and +1.04 on CIFAR-100 (Table 3)"
    sds, sam = accuracy_by(rows, "SDS", "gamma").get(0.5), accuracy_by(rows, "SAM", "gamma").get(1.0)
    if not sds or not sam:
        return Claim(text, paper)
    difference = statistics.mean(sds) - statistics.mean(sam)
    used = [row for row in of(rows, part="accuracy") if row["line"] == "SAM" or row["optimizer"] == "sds 0.5"]
    return Claim(text, paper, f"{difference:+.2f}", difference >= -COMPARABLE, used)


# -- figure ------------------------------------------------------------------------------------------------------------


def figure(rows: Sequence[Row], path: Path) -> None:
    """Accuracy against the time of an epoch; where beta and gamma were varied together, a map of the accuracies."""
    groups = list(dict.fromkeys((row["set"], row["network"]) for row in rows))
    with_map = [group for group in groups if of(rows, line="grid", part="accuracy", set=group[0], network=group[1])]
    with plotting.figure(path, "Beta and gamma", rows, panels=len(groups) + len(with_map)) as axes:
        for axis, (data, network) in zip(axes, groups):
            own = of(rows, set=data, network=network)
            for color, line in zip(plotting.COLORS, ("SGD", "SAM", "SWP", "SDS", "ESAM")):
                points = time_and_accuracy(own, line)
                if points:
                    axis.plot(*zip(*points.values()), "o-", color=color, label=line, markersize=5)
                for name, side in zip([*points][:: max(len(points) - 1, 1)], ("right", "left")):
                    text = f"{LINES[line][0]} {name.split()[-1]}" if line in LINES else ""
                    at = {"textcoords": "offset points", "xytext": (-6 if side == "right" else 6, -10), "ha": side}
                    axis.annotate(text, points[name], fontsize=7, color=color, **at)
            axis.margins(x=0.15)
            axis.set_title(f"{tables.MODELS.get(network, 'small CNN')} on {tables.DATA[data]}", fontsize=9)
            axis.set(xlabel="time per image (SAM: 1)", ylabel="best test accuracy (%)")
            axis.legend(frameon=False, fontsize=8)
        for axis, (data, network) in zip(axes[len(groups) :], with_map):
            draw_map(axis, of(rows, part="accuracy", set=data, network=network))


def time_and_accuracy(rows: Sequence[Row], line: str) -> dict[str, tuple[float, float]]:
    """What an image takes, with SAM's time as 1, and the mean accuracy, by the training's name."""
    speeds = {row["optimizer"]: row["ratio_to_sam"] for row in of(rows, part="speed", line=line)}
    found = {name: values(rows, "best_accuracy", part="accuracy", optimizer=name) for name in speeds}
    return {name: (1.0 / speeds[name], statistics.mean(each)) for name, each in found.items() if each}


def draw_map(axis: Any, rows: Sequence[Row]) -> None:
    """Mean accuracies at the betas and gammas of the grid, SWP alone (gamma = 1) and SDS alone (beta = 1) included."""
    shares = [*COARSE, 1.0]
    means = [[values(rows, "best_accuracy", beta=beta, gamma=gamma) for gamma in shares] for beta in shares]
    shown = [[statistics.mean(found) if found else float("nan") for found in line] for line in means]
    drawn = axis.imshow(shown, origin="lower", cmap="Blues", alpha=0.6)
    for i, line in enumerate(shown):
        for j, value in enumerate(line):
            axis.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=8)
    ticks = range(len(shares))
    axis.set_xticks(ticks, shares)
    axis.set_yticks(ticks, shares)
    axis.set(xlabel="gamma (1: SWP alone)", ylabel="beta (1: SDS alone)")
    axis.figure.colorbar(drawn, ax=axis, label="best test accuracy (%)", shrink=0.8)


EXPERIMENT = Experiment(
    name="figure3",
    title="accuracy and time over beta and gamma",
    paper=(
        "SWP alone with beta, and SDS alone with gamma, from 0.3 to 0.9 in steps of 0.1, beside SGD, SAM and ESAM: "
        "accuracy against the time of an epoch. Here: the same; time is that of the whole loop, side by side with "
        "SAM's. At the small scale also ESAM with both beta and gamma varied; on the digits, one test "
        "image is 0.22 points."
    ),
    units=units,
    claims=claims,
    figure=figure,
    seeds={"smoke": 1, "small": 2, "paper": 3},
)
