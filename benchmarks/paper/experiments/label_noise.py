"""A figure of our own: accuracy against label noise, where SDS collapses, and what prevents it."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from data import DataSet, with_label_noise
from digits_study import CASES, CONSTANT_GAMMA, FIRST_SEED
from trainer import Trainer, gamma_of

from benchmarks.paper import plotting
from benchmarks.paper.experiment import Claim, Experiment, Settings, Unit
from benchmarks.paper.final import plus_minus, train_to_the_end, values
from benchmarks.rows import Row
from esam_kernels import SAM, frozen_batch_norm, select
from esam_kernels.selection import num_selected

NOISE = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
WARM_UP = "esam"
LABELS = {"sgd": "SGD", "sam": "SAM", WARM_UP: "ESAM, gamma warm-up", CONSTANT_GAMMA: "ESAM, constant gamma"}
# What is trained, and how: options of train.py. The warm-up of gamma is its default.
TRAINED = {case: CASES[0.4][case] for case in LABELS}
PAPER_OPTIONS = "--model resnet18 --epochs 200 --batch-size 128 --lr-schedule cosine"
# Images of which it is looked up, after every fifth epoch, which of them SDS would choose.
PROBED_IMAGES, PROBED_EVERY = 512, 5
# A mean accuracy so many points below SAM's is called a collapse; one so many points below SAM's is as good.
COLLAPSE, AS_GOOD = 10.0, 0.5
OWN = "not in the paper, whose labels are clean"


def units(settings: Settings) -> list[Unit]:
    """Seed by seed, so that whatever is there of an interrupted run can be compared."""
    name = "digits" if settings.scale != "paper" else settings.data.available("cifar10")[0]
    options = settings.with_epochs(settings.choose(smoke="--epochs 2", small="", paper=PAPER_OPTIONS).split())
    limit = settings.choose(smoke=192, small=None, paper=None)
    read: list[DataSet] = []

    def run(key: str, noise: float, case: str, seed: int) -> list[Row]:
        if not read:
            read.append(settings.data.load(name, limit))
        clean = read[0]
        noisy = with_label_noise(clean, noise, seed)
        wrong = noisy.train_labels != clean.train_labels

        def measure(trainer: Trainer) -> Row:
            probed = len(trainer.history) % PROBED_EVERY == 0 or settings.scale == "smoke"
            return {"wrong_selected": round(wrong_share_of_selected(trainer, wrong), 4) if probed else None}

        rows = train_to_the_end(settings, key, noisy, [*TRAINED[case], *options], seed, measure)
        return [{"noise": noise, "optimizer": case, **row} for row in rows]

    found = []
    for seed in (FIRST_SEED + number for number in settings.seeds):
        for noise in settings.choose(smoke=(0.0, 0.4), small=NOISE, paper=NOISE):
            for case, arguments in TRAINED.items():
                key = f"{name}/noise {noise}/{case}/seed {seed}"
                made_with = {"options": " ".join([*arguments, *options]), "images": limit, "probed": PROBED_IMAGES}
                run_it = functools.partial(run, key, noise, case, seed)
                found.append(Unit(key, run_it, settings.data.label(name), seed, made_with))
    return found


def wrong_share_of_selected(trainer: Trainer, wrong: torch.Tensor) -> float:
    """The share of wrong labels among those that SDS would choose with SAM's perturbation, for gamma of the options."""
    trainer.model.train()
    probe = SAM(trainer.model.parameters(), torch.optim.SGD, rho=0.05, lr=0.0, flatten=False)
    chosen, start = [], 0
    with frozen_batch_norm(trainer.model):
        for images, labels in trainer.data.plain_training_batches(trainer.options.batch_size):
            if start + len(labels) > PROBED_IMAGES:
                break
            before = trainer.losses(images, labels)
            probe.zero_grad()
            probe.backward(before.mean())
            probe.first_step(zero_grad=True)
            with torch.no_grad():
                after = trainer.losses(images, labels)
            probe.restore()
            indices = select(before.detach(), after, num_selected(gamma_of("esam", trainer.options), len(labels)))
            chosen.append(wrong[start : start + len(labels)][indices])
            start += len(labels)
    return torch.cat(chosen).float().mean().item()


def accuracies(rows: Sequence[Row], noise: float) -> dict[str, list[float]]:
    """The test accuracies after the last epoch, by what was trained, over the seeds."""
    found = {case: values(rows, "test_accuracy", noise=noise, optimizer=case) for case in TRAINED}
    return {case: each for case, each in found.items() if each}


def selected_shares(rows: Sequence[Row], noise: float, case: str) -> list[float]:
    """The wrong labels that SDS would choose, in percent: the mean over the epochs looked at, for each seed."""
    looked_up = values(rows, "wrong_selected", noise=noise, optimizer=case)
    return [100.0 * statistics.mean(share for share in shares if share is not None) for shares in looked_up]


def claims(rows: Sequence[Row]) -> list[Claim]:
    by_noise = {noise: accuracies(rows, noise) for noise in NOISE}
    found = []
    for noise, measured in by_noise.items():
        text = f"{noise:.0%} wrong labels: test accuracy after the last epoch"
        here = "; ".join(f"{LABELS[case]} {plus_minus(each)}" for case, each in measured.items())
        found.append(Claim(text, OWN, here or None, None, [row for row in rows if row["noise"] == noise]))
    means = {
        noise: {case: statistics.mean(each) for case, each in measured.items()}
        for noise, measured in by_noise.items()
        if len(measured) == len(TRAINED)
    }
    return [*found, *relations(means, rows), chosen_claim(rows)]


def relations(means: dict[float, dict[str, float]], rows: Sequence[Row]) -> list[Claim]:
    """Where constant gamma collapses, and whether the warm-up prevents it, from the mean accuracies."""
    texts = (
        f"SDS with gamma = 0.5 throughout collapses: {COLLAPSE:g} points or more below SAM at some noise",
        f"where it collapses, ESAM with the warm-up of gamma is at most {AS_GOOD:g} points below SAM",
        f"ESAM with the warm-up of gamma is at most {AS_GOOD:g} points below SAM at every noise",
    )
    if not means:
        return [Claim(text, OWN) for text in texts]
    below = {noise: one["sam"] - one[CONSTANT_GAMMA] for noise, one in means.items()}
    collapsed = [noise for noise, by in below.items() if by >= COLLAPSE]
    where = ", ".join(f"{noise:.0%} (-{below[noise]:.1f} points)" for noise in collapsed)
    ahead = {noise: one[WARM_UP] - one["sam"] for noise, one in means.items()}
    prevented = {noise: ahead[noise] for noise in collapsed}
    return [
        Claim(texts[0], OWN, f"at {where}" if collapsed else "nowhere", bool(collapsed), rows),
        Claim(texts[1], OWN, *as_good(prevented), rows) if collapsed else Claim(texts[1], OWN),
        Claim(texts[2], OWN, *as_good(ahead), rows),
    ]


def as_good(ahead: dict[float, float]) -> tuple[str, bool]:
    """At how many of the noises a difference to SAM is no less than ``AS_GOOD`` points below it, and whether at all."""
    good = [by >= -AS_GOOD for by in ahead.values()]
    differences = ", ".join(f"{by:+.1f} at {noise:.0%}" for noise, by in ahead.items())
    return f"at {sum(good)} of {len(good)}: {differences} points", all(good)


def chosen_claim(rows: Sequence[Row]) -> Claim:
    """Whether SDS would choose wrong labels rather than right ones in SAM's trainings."""
    text = "B+ would hold more wrong labels than the training set, in SAM's trainings, at every noise"
    own = [row for row in rows if row["optimizer"] == "sam" and row["noise"] > 0.0]
    shares = {noise: selected_shares(own, noise, "sam") for noise in sorted({row["noise"] for row in own})}
    if not shares:
        return Claim(text, OWN)
    means = {noise: statistics.mean(each) for noise, each in shares.items()}
    here = ", ".join(f"{share:.0f} % of B+ at {noise:.0%}" for noise, share in means.items())
    return Claim(text, OWN, here, all(share > 100.0 * noise for noise, share in means.items()), own)


def figure(rows: Sequence[Row], path: Path) -> None:
    title = "Test accuracy, and what SDS would choose, against label noise"
    with plotting.figure(path, title, rows, panels=2) as (accuracy, selected):
        for color, (case, label) in zip(plotting.COLORS, LABELS.items()):
            noises = sorted({row["noise"] for row in rows if row["optimizer"] == case})
            percent = [100.0 * noise for noise in noises]
            finals = [accuracies(rows, noise)[case] for noise in noises]
            plotting.band(accuracy, percent, finals, color=color, label=label, marker="o", markersize=4)
            shares = [selected_shares(rows, noise, case) for noise in noises]
            plotting.band(selected, percent, shares, color=color, label=label, marker="o", markersize=4)
        selected.plot([0, 60], [0, 60], color="#999999", linestyle=":", label="a random half")
        accuracy.set(xlabel="wrong training labels (%)", ylabel="test accuracy after the last epoch (%)", ylim=(0, 100))
        selected.set(xlabel="wrong training labels (%)", ylabel="wrong labels in B+ (%)")
        accuracy.legend(frameon=False, fontsize=8, loc="lower left")
        selected.legend(frameon=False, fontsize=8, loc="upper left")


EXPERIMENT = Experiment(
    name="label-noise",
    title="accuracy against label noise",
    paper=(
        "A figure of our own: the paper trains with clean labels. Here a share of the training labels is replaced by "
        "another class, drawn at random. The trainings are on handwritten digits, with the defaults of "
        "examples/train.py. Those were chosen on seeds 0 to 4; these are later seeds. The second panel shows how many "
        "labels are wrong in the half that SDS would choose. It is looked up with SAM's perturbation on the first 512 "
        "training images, after every fifth epoch of each of the four trainings."
    ),
    units=units,
    claims=claims,
    figure=figure,
    seeds={"smoke": 1, "small": 5, "paper": 3},
)
