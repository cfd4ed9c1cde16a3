"""The search of a mode's hyperparameters: the same stages for every mode.

1. Every combination of learning rate, batch size and weight decay is trained once. Each has one radius, so that every
   radius meets every learning rate; all modes try the same trials.
2. The best combinations of each weight decay are trained with their other radii. A weaker decay often needs a larger
   radius, so that one unlucky radius in stage 1 says little about it.
3. The best trials are trained on more seeds, in rounds that keep fewer and fewer: successive halving (Jamieson and
   Talwalkar, 2016), where what grows is the number of seeds.
4. While the best trial has the largest radius that was tried, it is also trained with twice that radius, on the same
   seeds; at most twice. While it has the smallest, it is also trained with half of it, in the same way.

The trial with the highest mean validation accuracy over the seeds of the last round is chosen.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from benchmarks.study.modes import Mode
from benchmarks.study.training import Trial

# The seeds of the search; those of the report start at 0.
FIRST_SEED = 100

Run = tuple[Trial, int]
"""A trial and the seed that trains it."""


@dataclass(frozen=True)
class Search:
    """The grid and the size of each stage."""

    rates: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2)
    batch_sizes: tuple[int, ...] = (32, 64, 128)
    weight_decays: tuple[float, ...] = (5e-4, 2e-3)
    combinations: int = 6
    """How many of the combinations are trained with all radii; as many of each weight decay."""
    rounds: tuple[tuple[int, int], ...] = ((8, 1), (3, 2))
    """How many trials stay in each later round, and on how many more seeds each of them is trained."""
    extensions: int = 2
    """How many times the largest radius may be doubled, or the smallest halved."""

    def first_trials(self, mode: Mode) -> list[Trial]:
        """Those of stage 1: the whole grid but for the radius, which is spread over it."""
        axes = (self.rates, self.batch_sizes, self.weight_decays)
        radii: tuple[float | None, ...] = mode.radii or (None,)
        return [
            Trial(self.rates[i], self.batch_sizes[j], self.weight_decays[k], radii[(i + j + 2 * k) % len(radii)])
            for i, j, k in itertools.product(*(range(len(axis)) for axis in axes))
        ]

    def next_runs(self, mode: Mode, accuracy: Callable[[Run], float | None]) -> tuple[list[Run], Trial | None]:
        """What is to be trained next, or where nothing is, the trial that is chosen.

        Args:
            accuracy: the validation accuracy that a run came to, None where it was not trained yet.
        """
        trials, seeds = self.first_trials(mode), [FIRST_SEED]

        def waiting() -> list[Run]:
            return [run for run in itertools.product(trials, seeds) if accuracy(run) is None]

        def best(count: int) -> list[Trial]:
            def mean(trial: Trial) -> float:
                return sum(accuracy((trial, seed)) or 0.0 for seed in seeds) / len(seeds)

            return sorted(trials, key=mean, reverse=True)[:count]

        if runs := waiting():
            return runs, None
        if len(mode.radii) > 1:
            trials = self._with_all_radii(trials, self._of_each_decay(best(len(trials))), mode)
            if runs := waiting():
                return runs, None
        for count, more in self.rounds:
            trials = best(count)
            seeds += range(seeds[-1] + 1, seeds[-1] + 1 + more)
            if runs := waiting():
                return runs, None
        for end, factor in ((max, 2.0), (min, 0.5)):
            outermost = end(mode.radii, default=None)
            for _ in range(self.extensions):
                found = best(1)[0]
                if outermost is None or found.rho != outermost:
                    break
                outermost *= factor
                trials = [*trials, replace(found, rho=outermost)]
                if runs := waiting():
                    return runs, None
        return [], best(1)[0]

    def size(self, mode: Mode) -> int:
        """How many trainings the search of a mode takes at least: with no radius outside those of the mode."""
        trials = len(self.first_trials(mode))
        more = min(self.combinations, trials) * max(0, len(mode.radii) - 1)
        total = trials = trials + more
        for count, seeds in self.rounds:
            trials = min(count, trials)
            total += trials * seeds
        return total

    def _of_each_decay(self, ranked: Sequence[Trial]) -> list[Trial]:
        """The first ``combinations`` of the trials, with no more of one weight decay than its share."""
        most = math.ceil(self.combinations / len(self.weight_decays))
        places: Counter[float] = Counter()
        kept = []
        for trial in ranked:
            places[trial.weight_decay] += 1
            if places[trial.weight_decay] <= most:
                kept.append(trial)
        return kept[: self.combinations]

    @staticmethod
    def _with_all_radii(trials: Sequence[Trial], best: Sequence[Trial], mode: Mode) -> list[Trial]:
        others = [replace(trial, rho=radius) for trial in best for radius in mode.radii if radius != trial.rho]
        return [*trials, *others]
