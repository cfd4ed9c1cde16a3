"""Trains what is missing, in several processes of one thread each, and saves each training when it is finished."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence

import torch

from benchmarks.rows import Row
from benchmarks.study.modes import BY_NAME, Mode
from benchmarks.study.plan import counts, next_units
from benchmarks.study.rows import Rows, Unit
from benchmarks.study.settings import Setting
from benchmarks.study.training import train

# isort: split
from progress import Progress


def run_unit(unit: Unit, data: str | None) -> Row:
    """Train once; all that is random in it follows from its seed."""
    samples = unit.setting.load(data).redrawn(unit.seed).with_label_noise(unit.setting.label_noise, unit.seed)
    torch.manual_seed(unit.seed)
    network = unit.setting.network()
    mode = BY_NAME[unit.mode]
    return unit.row(train(mode, unit.trial, samples, network, unit.epochs, unit.seed, unit.setting.bfloat16))


def prepare_worker() -> None:
    """One thread, a low priority; Ctrl-C is the parent's business, and a worker does not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)
    os.nice(10)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


class Runner:
    """Runs the study until nothing is missing, or the time is over."""

    def __init__(
        self,
        rows: Rows,
        settings: Sequence[Setting],
        modes: Sequence[Mode],
        *,
        data: str | None = None,
        jobs: int = 1,
        deadline: float = float("inf"),
    ) -> None:
        self.rows, self.settings, self.modes = rows, settings, modes
        self.data, self.jobs, self.deadline = data, jobs, deadline

    def run(self) -> bool:
        """Train what is missing; False where the time was over before all was there."""
        done, total = counts(self.rows, self.settings, self.modes)
        print(f"{total - done} of {total} trainings are missing", flush=True)
        context = multiprocessing.get_context("spawn")
        pool = concurrent.futures.ProcessPoolExecutor(self.jobs, context, prepare_worker)
        try:
            with Progress(total, done) as progress:
                while units := next_units(self.rows, self.settings, self.modes):
                    if not self._train(pool, units, progress):
                        return False
            return True
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _train(self, pool: concurrent.futures.Executor, units: list[Unit], progress: Progress) -> bool:
        """All units, no more at a time than there are processes, so that little is lost at a stop."""
        waiting = iter(units)
        running: dict[concurrent.futures.Future[Row], Unit] = {}
        while True:
            is_over = time.monotonic() >= self.deadline
            while not is_over and len(running) < self.jobs and (unit := next(waiting, None)) is not None:
                running[pool.submit(run_unit, unit, self.data)] = unit
            if not running:
                return not is_over
            finished, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in finished:
                unit = running.pop(future)
                row = future.result()
                self.rows.add(row)
                progress.step()
                progress.report(
                    f"{unit.setting.name} {unit.mode} {unit.purpose} {unit.trial}: {row['test_accuracy']:.1f}"
                )
