"""Train with SGD, SAM and ESAM side by side, and compare accuracy, speed and sharpness.

Without options, or with --recipe demo: scikit-learn's handwritten digits with 40 % wrong training labels, three seeds,
about a minute on a CPU. Prints a table and what it shows, and writes a plot and a JSON file into the directory --out.
With options but no --recipe, the defaults below are taken in place of those of demo.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
from checkpoint import FILE, alone_in, load_checkpoint, save_checkpoint
from data import DATA_SETS, DataSet, UserError, load, with_label_noise
from learning_rate import SCHEDULES
from models import MODELS, needs_two_images
from option_types import not_negative, phase, positive_int, seed_number, share, workers
from progress import Progress
from recipes import RECIPES, parse_with_recipe, recipe_name
from report import Result, learned, plot, summarise, table, write_json
from trainer import (
    DEFAULT_RHO,
    DEFAULT_RHO_ASAM,
    ONE_PASS,
    OPTIMIZERS,
    PERTURBED,
    RANKED,
    SHORT_ASCENT,
    Trainer,
    gamma_of,
)

from esam_kernels.perturbation.ascent import ASCENTS
from esam_kernels.perturbation.ascent import DEFAULT_RHO as DEFAULT_RHOS
from esam_kernels.ranking import RANKINGS
from esam_kernels.selection import num_selected

# Options that do not change what is trained, and may differ when a run is resumed.
NOT_COMPARED = ("checkpoint", "resume", "out", "data_path", "device", "workers", "recipe")
# One for each core that the process may use.
WORKERS = min(len(os.sched_getaffinity(0)), 16)
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """Reports an error as one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER_ERROR, f"{self.prog}: error: {message} (--help lists the options)\n")


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    parser.add_argument(
        "--recipe",
        type=recipe_name,
        help="demo, esam-fast, or one of the paper: sets the options not given; list: all names",
    )

    data = parser.add_argument_group("data and model")
    data.add_argument("--data", choices=DATA_SETS, default="digits", help="default %(default)s")
    data.add_argument("--data-path", help="CIFAR: a directory, .tar.gz or .npz; ImageNet: a directory")
    data.add_argument("--label-noise", type=share, help="share of wrong training labels (digits 0.4, others 0)")
    data.add_argument("--limit", type=positive_int, help="only the first so many training and test images, for tries")
    data.add_argument("--model", choices=MODELS, default="cnn", help="default %(default)s")

    training = parser.add_argument_group("training")
    training.add_argument(
        "--optimizer", choices=OPTIMIZERS, nargs="+", default=["sgd", "sam", "esam"], help="default sgd sam esam"
    )
    training.add_argument(
        "--ascent",
        choices=ASCENTS,
        nargs="+",
        default=["current"],
        help="what esam perturbs along, a row each: previous and momentum take one pass a step (default current)",
    )
    training.add_argument(
        "--ranking",
        choices=RANKINGS,
        default="rise",
        help="what esam and esam-sds choose B+ by: rise measures it in a forward of its own (default), first_order and "
        "random do without",
    )
    training.add_argument(
        "--perturb",
        choices=PERTURBED,
        default="all",
        help="SAM, ESAM: all weights, or those of the normalization layers (default all)",
    )
    training.add_argument(
        "--phase",
        type=phase,
        default=(0.0, 1.0),
        metavar="START:STOP",
        help="SAM, ESAM: perturb in this part of the steps only, 0.7:1 for the last 30 %% (default 0:1); the base "
        "optimizer's steps elsewhere",
    )
    training.add_argument("--rho", type=not_negative, help=f"radius (default: {default_radii()})")
    training.add_argument(
        "--rho-warmup", type=share, default=0.0, help="share of the steps over which rho rises from 0 (default 0)"
    )
    training.add_argument("--beta", type=float, help="ESAM: share of the weights perturbed (default 0.6; one pass: 1)")
    training.add_argument(
        "--gamma", type=float, help="ESAM: share of the batch in pass 2 (default 0.5; one pass: always 1)"
    )
    training.add_argument(
        "--ascent-share",
        type=float,
        default=1.0,
        help="esam, esam-swp: share of the batch in pass 1 (default 1); below 1 pass 2 takes the whole batch (gamma 1)",
    )
    training.add_argument(
        "--gamma-warmup", type=share, default=0.5, help="share of the steps over which gamma falls from 1 (default 0.5)"
    )
    training.add_argument(
        "--mask", choices=("tensor", "element"), default="tensor", help="what ESAM draws (default tensor)"
    )
    training.add_argument("--lr", type=not_negative, default=0.05, help="default %(default)s")
    training.add_argument("--lr-schedule", choices=SCHEDULES, default="constant", help="default %(default)s")
    training.add_argument(
        "--lr-warmup", type=not_negative, default=0.0, metavar="EPOCHS", help="over which lr rises from 0 (default 0)"
    )
    training.add_argument("--label-smoothing", type=share, default=0.0, help="default %(default)s")
    training.add_argument("--momentum", type=not_negative, default=0.9, help="default %(default)s")
    training.add_argument("--weight-decay", type=not_negative, default=1e-3, help="default %(default)s")
    training.add_argument("--epochs", type=positive_int, default=25, help="default %(default)s")
    training.add_argument("--batch-size", type=positive_int, default=64, help="default %(default)s")
    training.add_argument("--micro-batch", type=positive_int, help="SAM, ESAM: so many samples at a time (default all)")
    training.add_argument("--seed", type=seed_number, default=0, help="of the first training (default 0)")
    training.add_argument("--seeds", type=positive_int, default=3, help="trainings of each optimizer (default 3)")

    machine = parser.add_argument_group("machine and files")
    machine.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")
    machine.add_argument(
        "--amp", choices=("none", "bf16"), default="none", help="autocast of the forward (default none)"
    )
    machine.add_argument("--channels-last", action="store_true", help="memory format of images and weights")
    machine.add_argument("--graph", action="store_true", help="SAM, ESAM: each step as one CUDA graph")
    machine.add_argument(
        "--cudnn-benchmark", action="store_true", help="the fastest convolutions: resumed runs may differ in last bits"
    )
    machine.add_argument(
        "--workers", type=workers, default=WORKERS, help=f"processes decoding ImageNet (default {WORKERS})"
    )
    machine.add_argument("--checkpoint", metavar="DIR", help="save the state there after every epoch")
    machine.add_argument("--resume", action="store_true", help="go on from the state in --checkpoint")
    machine.add_argument("--out", metavar="DIR", default="runs", help="for the plot and the JSON (default runs)")

    options = parse_with_recipe(parser, arguments)
    options.optimizer = with_ascents(parser, options)
    if options.resume and options.checkpoint is None:
        parser.error("--resume needs --checkpoint")
    if options.data_path is not None and options.data not in ("cifar10", "cifar100", "imagenet"):
        parser.error("--data-path is for --data cifar10, cifar100 and imagenet")
    if options.graph and options.micro_batch is not None:
        parser.error("--graph takes the batch whole: leave --micro-batch out")
    if options.phase != (0.0, 1.0) and options.rho_warmup:
        parser.error("--phase and --rho-warmup both set rho over the steps: leave one out")
    if options.ranking != "rise" and not set(options.optimizer) & RANKED:
        if options.ranking != RECIPES.get(options.recipe, {}).get("ranking"):  # else nobody has asked for it
            parser.error(f"--ranking is for --optimizer {' or '.join(sorted(RANKED))}")
        options.ranking = "rise"
    if options.ascent_share != 1.0 and not set(options.optimizer) & SHORT_ASCENT:
        if options.ascent_share != RECIPES.get(options.recipe, {}).get("ascent_share"):
            parser.error(f"--ascent-share is for --optimizer {' or '.join(sorted(SHORT_ASCENT))}")
        options.ascent_share = 1.0
    if options.lr_warmup >= options.epochs:
        parser.error(f"--lr-warmup {options.lr_warmup:g} leaves nothing of {options.epochs} epochs")
    if options.label_noise is None:
        options.label_noise = 0.4 if options.data == "digits" else 0.0
    return options


def default_radii() -> str:
    one_pass = [f"{name} {DEFAULT_RHOS[ascent]}" for name, ascent in ONE_PASS.items()]
    return "; ".join([f"{DEFAULT_RHO}", f"asam {DEFAULT_RHO_ASAM}", *one_pass])


def with_ascents(parser: Parser, options: argparse.Namespace) -> list[str]:
    """The names in --optimizer, each once, with a name for each --ascent in the place of "esam"."""
    if options.ascent != ["current"] and "esam" not in options.optimizer:
        parser.error("--ascent is for --optimizer esam")
    names = {"current": "esam", **{ascent: name for name, ascent in ONE_PASS.items()}}
    esam = [names[ascent] for ascent in options.ascent]
    found = list(dict.fromkeys(each for name in options.optimizer for each in (esam if name == "esam" else [name])))
    if options.recipe and set(found) & set(ONE_PASS):
        parser.error(f"--recipe holds rho, beta and gamma for two passes: not for {' and '.join(ONE_PASS)}")
    if options.gamma not in (None, 1.0) and set(found) & set(ONE_PASS) and not set(found) & {"esam", "esam-sds"}:
        parser.error(
            f"--gamma {options.gamma} needs two passes a step, and {' and '.join(ONE_PASS)} take one: leave it out"
        )
    return found


def find_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"no such device: {name} ({str(error).splitlines()[0]})") from None
    return device


def check_batches(options: argparse.Namespace, data: DataSet) -> None:
    """Refuse batches that cannot be drawn, and those of one value per channel, which BatchNorm cannot normalise."""
    images = len(data.train_labels)
    if options.batch_size > images:
        raise UserError(f"--batch-size {options.batch_size} is larger than the training set, {images} images")
    size = options.batch_size
    last = images % size or size
    if options.micro_batch:
        last = last % options.micro_batch or options.micro_batch
    shares = [gamma_of(name, options) for name in options.optimizer]
    smallest = min((num_selected(gamma, last) for gamma in shares if 0.0 < gamma <= 1.0), default=last)
    if smallest == 1 and needs_two_images(options.model, data.image_shape[1]):
        thing = "digit" if options.data == "digits" else "image"
        raise UserError(f"--batch-size {options.batch_size} leaves {options.model} with a batch of one {thing}")


def train(options: argparse.Namespace) -> list[Result]:
    """All trainings, seed by seed."""
    device = find_device(options.device)
    torch.backends.cudnn.deterministic = not options.cudnn_benchmark  # resuming with the same bits needs it
    torch.backends.cudnn.benchmark = options.cudnn_benchmark
    if options.graph and device.type != "cuda":
        print("--graph: not on a CUDA device, so that every step runs eagerly")
    if options.data == "digits" and options.model == "cnn":
        torch.set_num_threads(1)  # too little work to divide: with more, the threads mostly wait for one another
    saved = starting_point(options, device)
    data = load(options.data, options.data_path, options.limit, options.workers).to(device)
    check_batches(options, data)

    results: list[Result] = saved["results"]
    finished_seeds = {result["seed"] for result in results}
    epochs_done = sum(len(run["history"]) for run in [*results, *saved["trainers"].values()])
    steps_per_epoch = -(-len(data.train_labels) // options.batch_size)
    total = options.seeds * len(options.optimizer) * options.epochs * steps_per_epoch
    with Progress(total, done=epochs_done * steps_per_epoch) as progress:
        for seed in range(options.seed, options.seed + options.seeds):
            if seed in finished_seeds:
                continue
            noisy = with_label_noise(data, options.label_noise, seed)
            trainers = [Trainer(name, seed, noisy, options) for name in options.optimizer]
            for trainer in trainers:
                if state := saved["trainers"].pop(trainer.name, None):
                    trainer.load_state_dict(state)
            train_in_turn(trainers, options, progress, results)
            results += [trainer.result() for trainer in trainers]
    return results


def starting_point(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The results of finished seeds, and the states of the trainers of the seed that is not."""
    if options.resume:
        return load_checkpoint(options.checkpoint, compared_options(options), device)
    if options.checkpoint and (Path(options.checkpoint) / FILE).exists():
        raise UserError(f"{options.checkpoint} holds a checkpoint already: add --resume, or name another directory")
    return {"results": [], "trainers": {}}


def compared_options(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if name not in NOT_COMPARED}


def train_in_turn(
    trainers: list[Trainer], options: argparse.Namespace, progress: Progress, results: list[Result]
) -> None:
    """The trainings of one seed, epoch by epoch in turn, so that all see the same machine."""
    for epoch in range(len(trainers[0].history), options.epochs):
        for trainer in trainers:
            trainer.train_epoch(progress.step)
        accuracies = "  ".join(f"{trainer.name} {trainer.history[-1]['test_accuracy']:.1f} %" for trainer in trainers)
        progress.report(f"seed {trainers[0].seed}  epoch {epoch + 1}/{options.epochs}  {accuracies}")
        if options.checkpoint:
            states = {trainer.name: trainer.state_dict() for trainer in trainers}
            state = {"options": compared_options(options), "results": results, "trainers": states}
            save_checkpoint(options.checkpoint, state)


def report(options: argparse.Namespace, results: list[Result]) -> None:
    rows = summarise(results)
    print(table(rows))
    rho = DEFAULT_RHO if options.rho is None else options.rho
    print(
        f"after epoch {options.epochs}, mean +- standard deviation over {options.seeds} seed(s); sharpness: mean rise "
        f"of the loss over the training set under SAM's perturbation with rho = {rho}"
    )
    name = f"{options.data}_{options.model}"
    json_path, plot_path = Path(options.out) / f"{name}.json", Path(options.out) / f"{name}.png"
    write_json(json_path, torch.device(options.device), vars(options), results)
    try:
        plot(plot_path, f"{options.data}, {options.label_noise:.0%} wrong training labels, {options.model}", results)
    except ImportError:
        where = f"numbers: {json_path} (no plot: pip install matplotlib)"
    else:
        where = f"numbers: {json_path}  plot: {plot_path}"
    print("\n".join([*meaning_of_esam(options), *learned(rows), where]))


def meaning_of_esam(options: argparse.Namespace) -> list[str]:
    """One line where the options make of "esam" another mode than that of the paper."""
    if "esam" in options.optimizer and options.beta == 1.0 and options.ascent_share < 1.0:
        return [f"esam is SAM(..., ascent_share={options.ascent_share:g}) here: pass 1 takes that share of the batch"]
    return []


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    options = parse_options(given or ["--recipe", "demo"])
    try:
        Path(options.out).mkdir(parents=True, exist_ok=True)
        if options.checkpoint and not options.resume:
            Path(options.checkpoint).mkdir(parents=True, exist_ok=True)
        with alone_in(options.checkpoint) if options.checkpoint else contextlib.nullcontext():
            report(options, train(options))
    except (UserError, OSError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except torch.OutOfMemoryError:
        print("train.py: error: the device has too little memory: try a smaller --batch-size", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print(f"interrupted: {how_to_resume(options, given)}", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def how_to_resume(options: argparse.Namespace, given: list[str]) -> str:
    if options.checkpoint is None:
        return "nothing is saved (--checkpoint DIR saves the state after every epoch)"
    if not (Path(options.checkpoint) / FILE).exists():
        return "no epoch was finished, so nothing is saved yet: start again"
    command = [sys.executable, sys.argv[0], *given, *([] if options.resume else ["--resume"])]
    return f"go on with: {shlex.join(command)}"


if __name__ == "__main__":
    sys.exit(main())
