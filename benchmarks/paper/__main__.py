"""Measure a table or a figure of the paper again: ``python -m benchmarks.paper NAME``.

NAME is an experiment, ``all`` for one after the other, ``list`` for their names, or ``report`` to write
docs/reproduction.md from the rows (with --check: say whether it is as the rows have it). What was measured is saved
unit by unit; the same command goes on where an earlier one was stopped. Exit code 3: stopped by --minutes, or
interrupted, before all was measured.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from data import UserError
from train import Parser, find_device, positive_int

from benchmarks import rows as results
from benchmarks.paper import ROOT, report, runner
from benchmarks.paper.data_sets import VARIABLE, Data
from benchmarks.paper.experiment import SCALES, Experiment, Settings, find, registry

EXIT_USER_ERROR = 2
EXIT_NOT_FINISHED = 3


def parser() -> argparse.ArgumentParser:
    result = Parser(prog="benchmarks.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("name", metavar="NAME", help="an experiment, all, list or report")
    result.add_argument("--scale", choices=SCALES, default="small")
    result.add_argument("--seeds", type=positive_int, help="how many, from 0 on (default: the experiment's own)")
    result.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    result.add_argument("--data", help=f"a folder with CIFAR or ImageNet, an archive, or digits (default: ${VARIABLE})")
    result.add_argument("--out", type=Path, help="for rows and figures (default: benchmarks/results/paper/<device>)")
    result.add_argument("--minutes", type=float, help="stop after this time; the same command goes on")
    result.add_argument("--fresh", action="store_true", help="measure again what is there already")
    result.add_argument("--check", action="store_true", help="with report: change nothing, fail where it differs")
    return result


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.name == "list":
        for experiment in registry().values():
            print(f"{experiment.name:12} {experiment.title}")
        return 0
    try:
        if options.name == "report":
            return report.update(check=options.check)
        chosen = list(registry().values()) if options.name == "all" else [find(options.name)]
        return measure(chosen, options)
    except (UserError, OSError) as error:
        print(f"benchmarks.paper: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted: finished units are saved; the same command goes on", file=sys.stderr)
        return EXIT_NOT_FINISHED


def measure(chosen: list[Experiment], options: argparse.Namespace) -> int:
    """Run the experiments in turn. One that lacks its data does not keep the others from running."""
    device = find_device(options.device)
    out = options.out or results.RESULTS / "paper" / results.folder(device).name
    deadline = float("inf") if options.minutes is None else time.monotonic() + 60.0 * options.minutes
    data = Data(options.data, options.scale, device)
    code = 0
    for experiment in chosen:
        seeds = tuple(range(options.seeds or experiment.seeds[options.scale]))
        checkpoints = ROOT / "runs" / "paper" / out.name if options.out is None else out / "checkpoints"
        scratch = checkpoints / experiment.name / options.scale
        settings = Settings(options.scale, seeds, device, data, scratch, deadline)
        try:
            finished = runner.run(experiment, settings, out, options.fresh)
            code = max(code, 0 if finished else EXIT_NOT_FINISHED)
        except UserError as error:
            if len(chosen) == 1:
                raise
            print(f"{experiment.name}: {error}", file=sys.stderr)
            code = max(code, EXIT_USER_ERROR)
    return code


if __name__ == "__main__":
    sys.exit(main())
