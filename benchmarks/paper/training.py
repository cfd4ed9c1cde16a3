"""Training with the program of examples/, measured after each epoch, and resumed within a unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from checkpoint import FILE, load_checkpoint, save_checkpoint
from data import DataSet, UserError
from train import parse_options
from trainer import Trainer

from benchmarks.paper.experiment import Settings
from benchmarks.rows import Row


def train_and_measure(
    settings: Settings,
    scratch: Path,
    data: DataSet,
    arguments: Sequence[str],
    seed: int,
    measure: Callable[[Trainer], list[Row]],
    before_training: bool = False,
) -> list[Row]:
    """Train as ``examples/train.py`` does with ``arguments``, and give the rows of ``measure(trainer)`` of each epoch.

    Each row gets ``epoch``, ``train_loss``, ``test_loss`` and ``test_accuracy``; ``before_training`` adds those of
    epoch 0, without these. After every epoch the state is saved in ``scratch``, from which the same call goes on.
    ``measure`` must leave the weights as they are.
    """
    options = parse_options([*arguments, "--device", str(settings.device)])
    trainer = Trainer(options.optimizer[0], seed, data, options)
    images = len(data.train_labels)
    made_with: dict[str, Any] = {"arguments": list(arguments), "seed": seed, "images": images}
    rows: list[Row] = []
    state = saved_state(settings, scratch, made_with)
    if state is not None:
        rows = state["rows"]
        trainer.load_state_dict(state["trainer"])
    elif before_training:
        rows = [{"epoch": 0, **row} for row in measure(trainer)]
    while len(trainer.history) < options.epochs:
        trainer.train_epoch()
        trained = {name: trainer.history[-1][name] for name in ("epoch", "train_loss", "test_loss", "test_accuracy")}
        rows += [{**trained, **row} for row in measure(trainer)]
        save_checkpoint(str(scratch), {"options": made_with, "rows": rows, "trainer": trainer.state_dict()})
        settings.check_time()
    return rows


def saved_state(settings: Settings, scratch: Path, made_with: dict[str, Any]) -> dict[str, Any] | None:
    """The checkpoint of the same training, or None: one made otherwise, or damaged, is said to be of no use."""
    if not (scratch / FILE).exists():
        return None
    try:
        return load_checkpoint(str(scratch), made_with, settings.device)
    except UserError as error:
        print(f"from the beginning: {error}", flush=True)
        return None
