"""What ESAM does under label noise: handwritten digits with 40 % wrong training labels, and with none.

Trains SGD, SAM, ESAM with the gamma warm-up and with a constant gamma, and the two kinds of ESAM with one pass a step,
with the defaults of train.py, writes the rows, every epoch and a plot into --out, and says which of the expected
relations hold. Exits with 1 where one does not.
It is about accuracy: the speed in the printed tables is not kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from data import UserError, load, with_label_noise
from progress import Progress
from report import Result, environment, plot, summarise, table
from train import Parser, parse_options, positive_int
from trainer import Trainer

# Seeds 0 to 4 chose the network and the weight decay of train.py; the study uses those after them.
FIRST_SEED = 5
CONSTANT_GAMMA = "esam, constant gamma"
ONE_PASS = {"esam, previous": ["--optimizer", "esam-previous"], "esam, momentum": ["--optimizer", "esam-momentum"]}
# The better of the two on the tuning seeds of ascent_study.py.
BETTER_ONE_PASS = "esam, momentum"
# What is trained at each label noise: the label in the report, and the options of train.py that make it.
CASES = {
    0.4: {
        "sgd": ["--optimizer", "sgd"],
        "sam": ["--optimizer", "sam"],
        "esam": ["--optimizer", "esam"],
        CONSTANT_GAMMA: ["--optimizer", "esam", "--gamma-warmup", "0"],
        **ONE_PASS,
    },
    0.0: {"sgd": ["--optimizer", "sgd"], "sam": ["--optimizer", "sam"], "esam": ["--optimizer", "esam"], **ONE_PASS},
}
# Relations between mean test accuracies, in points: (label noise, optimizer, other, least difference).
EXPECTED = (
    (0.4, "sam", "sgd", 8.0),
    (0.4, "esam", "sam", -0.5),
    (0.0, "esam", "sgd", -0.5),
    (0.4, BETTER_ONE_PASS, "sgd", 6.0),
    (0.4, BETTER_ONE_PASS, "sam", -2.0),
    (0.0, BETTER_ONE_PASS, "sgd", -0.5),
)


def train_side_by_side(label_noise: float, seeds: int, epochs: int) -> list[Result]:
    """All cases of one label noise, epoch by epoch in turn, so that all see the same machine."""
    data = load("digits")
    results: list[Result] = []
    with Progress(total=seeds * epochs * len(CASES[label_noise])) as progress:
        for seed in range(FIRST_SEED, FIRST_SEED + seeds):
            noisy = with_label_noise(data, label_noise, seed)
            trainers = {}
            for label, arguments in CASES[label_noise].items():
                options = parse_options([*arguments, "--epochs", str(epochs), "--device", "cpu"])
                trainers[label] = Trainer(options.optimizer[0], seed, noisy, options)
            for _ in range(epochs):
                for trainer in trainers.values():
                    trainer.train_epoch()
                    progress.step()
            accuracies = [f"{label} {t.history[-1]['test_accuracy']:.1f} %" for label, t in trainers.items()]
            progress.report(f"label noise {label_noise}  seed {seed}  {'  '.join(accuracies)}")
            results += [{**trainer.result(), "optimizer": label} for label, trainer in trainers.items()]
    return results


def check_expected(results: dict[float, list[Result]]) -> list[dict[str, object]]:
    """Each of ``EXPECTED`` with the difference that was measured, and whether it holds."""
    rows = {noise: {row["optimizer"]: row for row in summarise(own)} for noise, own in results.items()}
    checked = []
    for noise, name, other, least in EXPECTED:
        accuracy, to_compare = (rows[noise][case]["test_accuracy"]["mean"] for case in (name, other))
        difference = accuracy - to_compare
        claim = f"label noise {noise}: {name} - {other} >= {least} points"
        checked.append({"claim": claim, "difference": difference, "holds": difference >= least})
    return checked


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=positive_int, default=10)
    parser.add_argument("--epochs", type=positive_int, default=25)
    parser.add_argument("--out", metavar="DIR", default="runs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # as train.py does for this network
    try:
        results = {noise: train_side_by_side(noise, options.seeds, options.epochs) for noise in CASES}
        checked = check_expected(results)
        write(Path(options.out), results, checked)
    except (UserError, OSError) as error:
        parser.exit(2, f"digits_study.py: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted: nothing is saved\n")
    for noise, own in results.items():
        print(f"label noise {noise}\n{table(summarise(own))}")
    for check in checked:
        print(f"{'holds' if check['holds'] else 'FAILS'}: {check['claim']} ({check['difference']:+.1f})")
    return 0 if all(check["holds"] for check in checked) else 1


def write(directory: Path, results: dict[float, list[Result]], checked: list[dict[str, object]]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    study = {
        "command": " ".join(["python", "examples/digits_study.py", *sys.argv[1:]]),
        "environment": environment(torch.device("cpu")),
        "options": vars(parse_options([])),
        "rows": [
            without_speed({"label_noise": noise, **row}) for noise in results for row in summarise(results[noise])
        ],
        "expected": checked,
        "results": [
            {"label_noise": noise, **result, "history": [without_speed(entry) for entry in result["history"]]}
            for noise, own in results.items()
            for result in own
        ],
    }
    (directory / "digits_study.json").write_text(json.dumps(study) + "\n")
    plot(directory / "digits_study.png", "digits, 40 % wrong training labels", results[0.4], against="epoch")


def without_speed(values: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in values.items() if not name.startswith(("seconds", "images_per", "speed"))}


if __name__ == "__main__":
    sys.exit(main())
