"""Which mode, for whom, at which price: ``python -m benchmarks.study [run | report]``.

``run`` trains what is missing, and saves each training when it is finished: the same command goes on where an earlier
one was stopped. ``report`` writes docs/study.md and its charts from the rows (with --check: says whether the page is as
the rows have it). Exit code 3: stopped by --minutes, or interrupted, before all was trained.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from benchmarks.paper import ROOT
from benchmarks.rows import RESULTS
from benchmarks.study import modes, report, settings
from benchmarks.study.rows import Rows
from benchmarks.study.runner import Runner

# isort: split
from data import UserError
from train import Parser, positive_int

EXIT_USER_ERROR = 2
EXIT_NOT_FINISHED = 3


def parser() -> argparse.ArgumentParser:
    result = Parser(prog="benchmarks.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("command", nargs="?", choices=("run", "report"), default="run")
    names = ", ".join(settings.BY_NAME)
    result.add_argument("--settings", nargs="+", choices=settings.BY_NAME, metavar="NAME", help=f"of {names}")
    result.add_argument(
        "--modes", nargs="+", choices=modes.BY_NAME, metavar="NAME", help=f"of {', '.join(modes.BY_NAME)}"
    )
    result.add_argument("--scale", choices=settings.SCALES, default="full")
    result.add_argument("--jobs", type=positive_int, default=1, help="trainings at a time, of one thread each")
    result.add_argument("--minutes", type=float, help="stop after this time; the same command goes on")
    result.add_argument("--data", help="a folder with CIFAR-10 (default: $ESAM_DATA)")
    result.add_argument("--out", type=Path, help="the file of rows (default: benchmarks/results/study/cpu.json)")
    result.add_argument("--check", action="store_true", help="with report: change nothing, fail where it differs")
    return result


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    path = options.out or RESULTS / "study" / "cpu.json"
    try:
        rows = Rows(path)
        if options.command == "report":
            return report.update(rows, ROOT, check=options.check)
        chosen = [settings.BY_NAME[name] for name in options.settings or settings.BY_NAME]
        if options.scale == "smoke":
            chosen = [setting.smoke() for setting in chosen]
        tried = [modes.BY_NAME[name] for name in options.modes or modes.BY_NAME]
        if not any(setting.has(mode) for setting in chosen for mode in tried):
            raise UserError(
                f"the settings {', '.join(options.settings)} have none of the modes {', '.join(options.modes)}: "
                "benchmarks/study/settings.py says which modes each has"
            )
        deadline = float("inf") if options.minutes is None else time.monotonic() + 60.0 * options.minutes
        runner = Runner(rows, chosen, tried, data=options.data, jobs=options.jobs, deadline=deadline)
        return 0 if runner.run() else EXIT_NOT_FINISHED
    except (UserError, OSError) as error:
        print(f"benchmarks.study: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted: finished trainings are saved; the same command goes on", file=sys.stderr)
        return EXIT_NOT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
