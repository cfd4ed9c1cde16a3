"""How many kernels the stages of ``make gpu`` compile, counted without a GPU and without compiling them.

``python python_tests/dry/compilations.py`` runs the GPU tier's tests of kernels, steps and graphs on the stand-ins of
stand_in.py and cuda_graph.py, and writes benchmarks/results/compilations.json. Each operator is called twice: Triton's,
up to the point where it would compile, and another backend's, whose results the test goes on with.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpu"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import pytest
import stand_in
import torch
import triton
from test_dry_graph_kernels import install_both
from torch import Tensor
from triton.runtime.jit import JITFunction

from benchmarks.gpu.stages import test_files
from benchmarks.rows import RESULTS, commit
from esam_kernels import backends
from esam_kernels.backends import protocol

ROW = RESULTS / "compilations.json"
# Those whose tests compile kernels of Triton, and run without a GPU.
STAGES = ("kernels", "steps", "graphs")


class Both:
    """The Triton backend as far as it needs no GPU; what comes out is that of the backend ``computes``."""

    def __init__(self, computes: str = "reference") -> None:
        self._triton, self._computes = backends.load("triton"), backends.load(computes)
        self.__name__ = self._triton.__name__

    def __getattr__(self, name: str) -> Any:
        ours = getattr(self._triton, name)
        if name not in protocol.OPERATORS:
            return ours
        return self._twice(ours, self._losses if name == "cross_entropy_forward" else getattr(self._computes, name))

    def _losses(self, logits: Tensor, target: Tensor, smoothing: float, ignore_index: int) -> tuple[Tensor, Tensor]:
        """Losses; NaN for classes that do not exist, as on a GPU: on the CPU it refuses them."""
        if target.is_floating_point():
            return self._computes.cross_entropy_forward(logits, target, smoothing, ignore_index)
        unknown = (target != ignore_index) & ((target < 0) | (target >= logits.shape[1]))
        known = target.masked_fill(unknown, 0)
        losses, normalizer = self._computes.cross_entropy_forward(logits, known, smoothing, ignore_index)
        return losses.masked_fill(unknown, torch.nan), normalizer

    def _twice(self, ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            # Counters of steps, which the host advances: once, not twice.
            lists = [argument for argument in args if isinstance(argument, (list, tuple))]
            single = [t for found in lists for t in found if isinstance(t, Tensor) and t.numel() == 1]
            before = [tensor.clone() for tensor in single]
            ours(*args, **kwargs)
            for tensor, value in zip(single, before):
                tensor.copy_(value)
            return theirs(*args, **kwargs)

        return run


@contextmanager
def counted(patch: pytest.MonkeyPatch, steps: bool = False) -> Iterator[set[tuple[str, str]]]:
    """The kernels that would have been compiled, as (name, key of the specialisation); none is compiled or launched.

    ``steps``: tensors are on a CUDA device as far as whole steps ask, and are captured by the stand-in for CUDA graphs.
    """
    found: set[tuple[str, str]] = set()

    def do_compile(kernel: JITFunction, key: str, *_: Any, **__: Any) -> None:
        found.add((kernel.__name__.removesuffix("_kernel"), key))

    with stand_in.installed(patch) as installed:
        patch.setattr(JITFunction, "_do_compile", do_compile)
        if steps:
            gpu = install_both(patch, installed)
            patch.setattr(gpu, "check", lambda *_: None)  # the closures of some tests hold memory of their own
        yield found


def row_of(stage: str, *options: str) -> dict[str, Any] | None:
    """The row of a stage, by its tests; None where one of them fails."""
    with pytest.MonkeyPatch.context() as patch, counted(patch, steps=stage != "kernels") as found:
        patch.setenv("ESAM_GPU_TESTS_DEVICE", "cpu")
        # A capture forbids the reference's Adam, which reads its counters.
        both, load = Both("reference" if stage == "kernels" else "native"), backends.load
        # On this device the GPU tier asks for the reference, and its trainings for Triton: each gets both.
        patch.setattr(backends, "load", lambda name: both if name in ("reference", "triton") else load(name))
        if pytest.main(["-q", "-p", "no:cacheprovider", *map(str, test_files(stage)), *options]) != 0:
            return None
    kernels = dict(sorted(Counter(name for name, _ in found).items()))
    row = {"stage": stage, "backend": "triton", "compilations": len(found), "kernels": kernels}
    today = datetime.now(timezone.utc).date().isoformat()
    return row | {"triton": triton.__version__, "commit": commit(), "date": today}


def main() -> int:
    rows = [row_of(stage, *sys.argv[1:]) for stage in STAGES]
    print("\n".join(map(json.dumps, rows)))
    if None in rows:
        return 1
    ROW.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
