"""What Tables 1, 2, 3 and 6 share: accuracy and images/s of several optimizers, for a network on a data set."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from data import DataSet, load
from train import WORKERS

from benchmarks.paper import plotting
from benchmarks.paper.curves import SMALL_CIFAR, SMALL_RECIPES
from benchmarks.paper.experiment import Claim, Settings, Unit
from benchmarks.paper.final import of, plus_minus, train_to_the_end, values
from benchmarks.paper.speed import side_by_side
from benchmarks.rows import Row, device_name

OPTIMIZERS = {"sgd": "SGD", "sam": "SAM", "esam-swp": "ESAM-SWP", "esam-sds": "ESAM-SDS", "esam": "ESAM"}
MODELS = {
    "resnet18": "ResNet-18",
    "wrn28-10": "Wide-28-10",
    "pyramidnet110": "PyramidNet-110",
    "resnet50": "ResNet-50",
    "resnet101": "ResNet-101",
    "vit-s16": "ViT-S/16",
}
DATA = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagenet": "ImageNet", "digits": "digits"}
# How a step is made on a GPU: options of train.py. The graph takes a batch whole, and so is not for m-sharpness.
WAYS = {
    "fp32": [],
    "bf16": ["--amp", "bf16", "--channels-last"],
    "graph": ["--amp", "bf16", "--channels-last", "--graph"],
}
TRAINED_WAY = "bf16"
# The network that stands in for all of the paper's where they are too large.
STAND_IN = "cnn"
# ESAM >= SAM - 0.1 > SGD + 0.5, in points: the order of Table 1.
LESS_THAN_SAM, MORE_THAN_SGD = 0.1, 0.5


@dataclass(frozen=True)
class Block:
    """One network on one data set, as a table prints it: accuracy and images/s, by optimizer."""

    table: str
    data: str
    model: str
    accuracy: dict[str, str]
    speed: dict[str, int]
    ratios: dict[str, float] = field(default_factory=dict)
    """ESAM's speed in percent of SAM's, where the table prints it: computed from its speeds, but for misprints."""

    @property
    def label(self) -> str:
        return f"{MODELS[self.model]} on {DATA[self.data]}"


def block(table: str, data: str, model: str, **lines: tuple[str, int] | tuple[str, int, float]) -> Block:
    """From the lines of a table: optimizer (with _ for -), accuracy, images/s, and percent of SAM's where printed."""
    by_name = {name.replace("_", "-"): line for name, line in lines.items()}
    accuracy = {name: line[0] for name, line in by_name.items()}
    speed = {name: line[1] for name, line in by_name.items()}
    return Block(table, data, model, accuracy, speed, {name: x[2] for name, x in by_name.items() if len(x) == 3})


def recipe(block: Block, optimizer: str) -> list[str]:
    """The paper's training, clean labels and constant gamma among it (Tables 7 and 8)."""
    return ["--recipe", f"{block.data}-{block.model}-{optimizer}"]


def small_recipe(settings: Settings, data: str, optimizer: str) -> list[str]:
    words = SMALL_RECIPES["digits" if data == "digits" else "cifar"].split()
    epochs = ["--epochs", "2"] if settings.scale == "smoke" else []
    return [*words, *epochs, "--optimizer", optimizer, "--gamma-warmup", "0"]


# -- units -------------------------------------------------------------------------------------------------------------


def units(settings: Settings, blocks: Sequence[Block]) -> list[Unit]:
    """The speeds first, which are quick; then the trainings, seed by seed."""
    return [*speed_units(settings, blocks), *accuracy_units(settings, blocks)]


def speed_units(settings: Settings, blocks: Sequence[Block]) -> list[Unit]:
    once = list({block.model: block for block in reversed(blocks)}.values())[::-1]  # 100 classes are as fast as ten
    chosen = settings.choose(smoke=blocks[:1], small=once, paper=blocks)
    return [
        speed_unit(settings, block, way)
        for way in (WAYS if settings.device.type == "cuda" else ("fp32",))
        for block in chosen
        if way != "graph" or block.data != "imagenet"
    ]


def speed_unit(settings: Settings, block: Block, way: str) -> Unit:
    """Synthetic images: what they show has no part in the speed. Smaller batches where a CPU has to finish."""
    data = settings.choose(smoke="synthetic-cifar10", small=f"synthetic-{block.data}", paper=f"synthetic-{block.data}")
    batch = settings.choose(smoke=16, small=4, paper=None)
    rounds, steps = settings.choose(smoke=(2, 1), small=(5, 1), paper=(5, 20))
    limit = settings.choose(smoke=64, small=64, paper=None)
    network = settings.choose(smoke=STAND_IN, small=block.model, paper=block.model)
    cases = {
        name: [
            *(small_recipe(settings, data, name) if network == STAND_IN else recipe(block, name)),
            *([] if batch is None else ["--batch-size", str(batch)]),
            *WAYS[way],
        ]
        for name in block.speed
    }
    made_with = {name: " ".join(arguments) for name, arguments in cases.items()}
    made_with |= {"rounds": rounds, "steps": steps, "device": device_name(settings.device)}
    made_with["threads"] = torch.get_num_threads()

    def run() -> list[Row]:
        images = load(data, limit=limit).to(settings.device)
        rows = side_by_side(settings, images, cases, rounds, steps, seed=0)
        common = {"part": "speed", "set": block.data, "model": block.model, "network": network, "way": way}
        return [{**common, **row} for row in rows]

    return Unit(f"speed/{way}/{block.data}/{block.model}", run, data, 0, made_with)


def accuracy_units(settings: Settings, blocks: Sequence[Block]) -> list[Unit]:
    """The paper's data sets where they are; below the paper's scale one stand-in for all, on the digits or a CIFAR."""
    if settings.scale != "paper":
        block = blocks[0]
        optimizers = list(dict.fromkeys(name for each in blocks for name in each.accuracy))
        wanted = "cifar10" if block.data == "imagenet" else block.data
        (name,) = settings.data.available(wanted)
        return [
            accuracy_unit(settings, block, name, optimizer, seed) for seed in settings.seeds for optimizer in optimizers
        ]
    return [
        accuracy_unit(settings, block, block.data, optimizer, seed)
        for seed in settings.seeds
        for block in blocks
        if block.data in settings.data.paths
        for optimizer in block.accuracy
    ]


def accuracy_unit(settings: Settings, block: Block, name: str, optimizer: str, seed: int) -> Unit:
    at_paper = settings.scale == "paper"
    on_gpu = settings.device.type == "cuda"
    words = recipe(block, optimizer) if at_paper else small_recipe(settings, name, optimizer)
    words = settings.with_epochs([*words, *(WAYS[TRAINED_WAY] if on_gpu else [])])
    limit = settings.choose(smoke=192, small=None if name == "digits" else SMALL_CIFAR, paper=None)
    network = block.model if at_paper else STAND_IN
    key = f"{name}/{network}/{optimizer}/seed {seed}"

    def run() -> list[Row]:
        data = read(settings, name, limit)
        common = {"part": "accuracy", "set": name, "model": block.model, "network": network, "optimizer": optimizer}
        return [{**common, **row} for row in train_to_the_end(settings, key, data, words, seed)]

    made_with = {"options": " ".join(words), "images": limit}
    return Unit(key, run, settings.data.label(name), seed, made_with)


@functools.lru_cache(maxsize=1)
def _read(data: object, name: str, limit: int | None) -> DataSet:
    return data.load(name, limit)


def read(settings: Settings, name: str, limit: int | None) -> DataSet:
    """The data set, read once for trainings after each other."""
    if name == "imagenet":
        return load(name, str(settings.data.paths[name]), limit, WORKERS).to(settings.device)
    return _read(settings.data, name, limit)


# -- claims ------------------------------------------------------------------------------------------------------------


def claims(rows: Sequence[Row], blocks: Sequence[Block]) -> list[Claim]:
    """For each block: the accuracies and their order, the images/s and ESAM's to SAM's."""
    accuracy, speed = of(rows, part="accuracy"), of(rows, part="speed")
    found = []
    for block in blocks:
        own = of(accuracy, set=block.data, model=block.model, network=block.model)
        found += accuracy_claims(block, block.label, own)
        found += speed_claims(block, of(speed, set=block.data, model=block.model))
    stand_in = [row for row in accuracy if row["network"] != row["model"]]
    if stand_in:
        where = DATA[stand_in[0]["set"]]
        found += accuracy_claims(blocks[0], f"a small CNN on {where} in the place of {blocks[0].label}", stand_in)
    return found


def accuracy_claims(block: Block, label: str, rows: Sequence[Row]) -> list[Claim]:
    """Best accuracies over the epochs, as the paper reports them."""
    by_optimizer = {name: values(rows, "best_accuracy", optimizer=name) for name in OPTIMIZERS}
    measured = {name: found for name, found in by_optimizer.items() if found}
    here = "; ".join(f"{OPTIMIZERS[name]} {plus_minus(found, 2)}" for name, found in measured.items())
    if here:
        here += f" ({', '.join(sorted({str(row['epochs']) for row in rows}))} epochs)"
    printed = "; ".join(f"{OPTIMIZERS[name]} {text}" for name, text in block.accuracy.items())
    numbers = Claim(f"{label}: best test accuracy (%)", f"{printed} ({block.table})", here or None, None, rows)
    means = {name: statistics.mean(found) for name, found in measured.items()}
    return [numbers, order(block, label, means, rows)]


def order(block: Block, label: str, means: dict[str, float], rows: Sequence[Row]) -> Claim:
    """ESAM >= SAM - 0.1 and SAM - 0.1 > SGD + 0.5, from the mean accuracies."""
    text = f"{label}: ESAM >= SAM - {LESS_THAN_SAM} > SGD + {MORE_THAN_SGD} points"
    printed = {name: float(value.split()[0].rstrip("*")) for name, value in block.accuracy.items()}
    paper = f"{differences(printed)} ({block.table})"
    if not {"sgd", "sam", "esam"} <= means.keys():
        return Claim(text, paper)
    bar = means["sam"] - LESS_THAN_SAM
    holds = means["esam"] >= bar > means["sgd"] + MORE_THAN_SGD
    return Claim(text, paper, differences(means), holds, rows)


def differences(means: dict[str, float]) -> str:
    esam, sam = means["esam"] - means["sam"], means["sam"] - means["sgd"]
    return f"ESAM - SAM {esam:+.2f}, SAM - SGD {sam:+.2f}"


def speed_claims(block: Block, rows: Sequence[Row]) -> list[Claim]:
    """For each way of making a step that was measured; one line each where none was."""
    text = f"{block.label}: images/s"
    printed = "; ".join(f"{OPTIMIZERS[name]} {speed:,}" for name, speed in block.speed.items())
    esams = [name for name in block.speed if name.startswith("esam")]
    ratios = {name: block.ratios.get(name, 100.0 * block.speed[name] / block.speed["sam"]) / 100.0 for name in esams}
    ratio_text = f"{block.label}: ESAM is faster than SAM"
    ratio_paper = f"{shares(ratios)} ({block.table})"
    if not rows:
        return [Claim(text, f"{printed} ({block.table})"), Claim(ratio_text, ratio_paper)]
    found = []
    for way in dict.fromkeys(row["way"] for row in rows):
        own = of(rows, way=way)
        network = "" if own[0]["network"] == block.model else ", a small CNN in its place"
        here = "; ".join(f"{OPTIMIZERS[row['optimizer']]} {row['images_per_second']:,.4g}" for row in own)
        found.append(Claim(f"{text} ({way}{network})", f"{printed} ({block.table})", here, None, own))
        measured = {row["optimizer"]: row["ratio_to_sam"] for row in own if row["optimizer"].startswith("esam")}
        faster = measured["esam"] > 1.0
        found.append(Claim(f"{ratio_text} ({way}{network})", ratio_paper, shares(measured), faster, own))
    return found


def shares(ratios: dict[str, float]) -> str:
    """SAM's speed is 100 %."""
    return ", ".join(f"{OPTIMIZERS[name]} {100.0 * ratio:.1f} %" for name, ratio in ratios.items()) + " of SAM's speed"


# -- figure ------------------------------------------------------------------------------------------------------------


def figure(rows: Sequence[Row], path: Path, title: str) -> None:
    """Accuracy by optimizer (each seed a point), and images/s to those of SGD."""
    accuracy, speed = of(rows, part="accuracy"), of(rows, part="speed")
    names = [name for name in OPTIMIZERS if any(row["optimizer"] == name for row in rows)]
    with plotting.figure(path, title, rows, panels=2) as (left, right):
        groups = dict.fromkeys((row["set"], row["network"]) for row in accuracy)
        for color, (data, network) in zip(plotting.COLORS, groups):
            label = f"{MODELS.get(network, 'small CNN')} on {DATA[data]}"
            own = {name: values(accuracy, "best_accuracy", optimizer=name, set=data, network=network) for name in names}
            points = [(names.index(name), value) for name, found in own.items() for value in found]
            left.plot(*zip(*points), "o", color=color, alpha=0.4, markersize=4)
            means = [(names.index(name), statistics.mean(found)) for name, found in own.items() if found]
            left.plot(*zip(*means), "_", color=color, markersize=24, label=label)
        cases = list(dict.fromkeys((row["model"], row["set"], row["network"], row["way"]) for row in speed))
        width = 0.8 / max(len(cases), 1)
        for number, (color, case) in enumerate(zip(plotting.COLORS * 4, cases)):
            model, data, network, way = case
            own = of(speed, model=model, set=data, network=network, way=way)
            sgd = values(own, "images_per_second", optimizer="sgd")[0]
            heights = {row["optimizer"]: 100.0 * row["images_per_second"] / sgd for row in own}
            at = [names.index(name) + (number - (len(cases) - 1) / 2) * width for name in heights]
            label = f"{MODELS.get(network, 'small CNN')}, {DATA[data]}, {way}"
            right.bar(at, list(heights.values()), width, color=color, alpha=0.8, label=label)
        for axis, label in ((left, "best test accuracy (%)"), (right, "images/s (% of SGD's)")):
            axis.set_xticks(range(len(names)), [OPTIMIZERS[name] for name in names])
            axis.set(ylabel=label, xlim=(-0.6, len(names) - 0.4))
            if axis.has_data():
                axis.legend(frameon=False, fontsize=7, markerscale=0.4)
