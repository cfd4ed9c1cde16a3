"""Images per second of the whole training loop, for several optimizers side by side."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence

import torch
from data import DataSet, UserError
from torch import Tensor
from train import parse_options
from trainer import Trainer

from benchmarks.clocks import clock_of
from benchmarks.harness import quantiles
from benchmarks.paper.experiment import Settings
from benchmarks.rows import Row

# Steps before anything is timed: libraries choose their algorithms, and a graphed step captures its pool of draws.
WARM_UP, GRAPH_WARM_UP = 2, 24


def side_by_side(
    settings: Settings, data: DataSet, cases: Mapping[str, Sequence[str]], rounds: int, steps: int, seed: int
) -> list[Row]:
    """A row for each of ``cases``, which are options of train.py by their names: images/s, and SAM's share of it.

    Each round times ``steps`` steps of each case, from drawing the batch to the update of the weights. On the CPU the
    cases take turns, so that all see the same machine, and a round's images/s are compared with SAM's of the same
    round. On a GPU they run one after the other, so that one model at a time is in its memory.
    """
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True
    on_gpu = settings.device.type == "cuda"
    found: dict[str, list[float]] = {}
    for group in [[name] for name in cases] if on_gpu else [list(cases)]:
        found |= in_turn({name: Loop(settings, data, cases[name], seed) for name in group}, rounds, steps)
        gc.collect()  # a model and its optimizer refer to one another
        if on_gpu:
            torch.cuda.empty_cache()
    return [summary(name, speeds, found.get("sam")) for name, speeds in found.items()]


def in_turn(loops: Mapping[str, Loop], rounds: int, steps: int) -> dict[str, list[float]]:
    """Images/s of each loop in each round."""
    found: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, loop in loops.items():
            found[name].append(loop.batch_size * steps / loop.seconds(steps))
    return found


def summary(name: str, speeds: Sequence[float], sam: Sequence[float] | None) -> Row:
    """Median and spread of the images/s, and the median of their ratio to those of SAM in the same round."""
    p20, p50, p80 = (round(value, 3) for value in quantiles(speeds))
    row = {"optimizer": name, "images_per_second": p50, "p20": p20, "p80": p80, "rounds": len(speeds)}
    if sam is not None:
        row["ratio_to_sam"] = round(quantiles([own / its for own, its in zip(speeds, sam)])[1], 4)
    return row


class Loop:
    """A training that can be run for so many steps and timed."""

    def __init__(self, settings: Settings, data: DataSet, arguments: Sequence[str], seed: int) -> None:
        options = parse_options([*arguments, "--device", str(settings.device)])
        self.batch_size = options.batch_size
        if self.batch_size > len(data.train_labels):
            raise UserError(f"batches of {self.batch_size} cannot be drawn from {len(data.train_labels)} images")
        self.trainer = Trainer(options.optimizer[0], seed, data, options)
        self.trainer.model.train()
        self.batches = self._full_batches(seed)
        self.clock = clock_of(settings.device)
        self.run(GRAPH_WARM_UP if options.graph else WARM_UP)

    def _full_batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The training set again and again, without the smaller batch at its end."""
        generator = torch.Generator(self.trainer.device).manual_seed(seed)
        while True:
            for images, labels in self.trainer.data.training_batches(self.batch_size, generator):
                if len(labels) == self.batch_size:
                    yield images, labels

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.trainer.step(*next(self.batches))

    def seconds(self, steps: int) -> float:
        return self.clock(lambda: self.run(steps))
