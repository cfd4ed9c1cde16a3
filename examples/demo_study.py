"""Which radius suits the recipe ``demo``, tried on seeds that the demo does not report.

The demo gives SAM and ESAM one radius: that at which SAM is most accurate here. Writes demo_study.json into --out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from data import load, with_label_noise
from train import Parser, parse_options, positive_int
from trainer import Trainer

# The demo reports seeds 0 to 2.
FIRST_SEED = 10
RADII = (0.05, 0.1, 0.2)


def accuracies(optimizer: str, rho: float, seeds: int, given: list[str]) -> list[float]:
    """The test accuracy of each seed's training with the recipe, and with the options ``given``."""
    recipe = ["--recipe", "demo", "--device", "cpu", "--optimizer", optimizer, "--rho", str(rho)]
    options = parse_options([*recipe, *given])
    data = load("digits")
    found = []
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        trainer = Trainer(optimizer, seed, with_label_noise(data, options.label_noise, seed), options)
        for _ in range(options.epochs):
            trainer.train_epoch()
        found.append(trainer.history[-1]["test_accuracy"])
    print(f"{optimizer} rho {rho}: {statistics.mean(found):.1f} %", flush=True)
    return found


def study(seeds: int, given: list[str]) -> dict[str, Any]:
    """All trials, and the radius that they choose."""
    trials = {name: {rho: accuracies(name, rho, seeds, given) for rho in RADII} for name in ("sam", "esam")}
    best = max(RADII, key=lambda rho: statistics.mean(trials["sam"][rho]))
    return {"seeds": list(range(FIRST_SEED, FIRST_SEED + seeds)), "by rho": trials, "chosen": best}


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=positive_int, default=3)
    parser.add_argument("--epochs", type=positive_int, help="instead of the recipe's")
    parser.add_argument("--out", metavar="DIR", default="runs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # as train.py does for this network
    found = study(options.seeds, ["--epochs", str(options.epochs)] if options.epochs else [])
    found["command"] = " ".join(["python", "examples/demo_study.py", *sys.argv[1:]])
    Path(options.out).mkdir(parents=True, exist_ok=True)
    (Path(options.out) / "demo_study.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"chosen: rho {found['chosen']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
