"""Norm, perturb, restore and SGD over the first network once more, in a heap that keeps its memory.

In a default heap some of the published way's temporaries lie in new pages, as many as chance will have it. Here
nobody's do, as in a process with jemalloc or tcmalloc.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from benchmarks.rows import Row
from benchmarks.suites import Case, Context, perturb

KEEPS_HEAP = True


def cases(context: Context) -> Iterator[Case]:
    if context.device.type == "cuda" or context.default_heap:  # on CUDA torch keeps its memory itself
        return
    first = dict([next(iter(context.sizes.parameters.items()))])
    sizes = dataclasses.replace(context.sizes, parameters=first, compiles=False)
    for case in perturb.cases(dataclasses.replace(context, sizes=sizes)):
        if "stage" not in case.name:
            yield _named(case, f"{case.name}, memory kept")


def _named(case: Case, name: str) -> Case:
    def run(seconds: float) -> list[Row]:
        return [row | {"suite": "kept_heap", "case": name} for row in case.run(seconds)]

    return Case(name, case.seconds, run)
