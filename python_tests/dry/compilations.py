"""How many kernels a stage of ``make gpu`` compiles, counted without a GPU and without compiling them.

``python python_tests/dry/compilations.py`` runs the GPU tier's kernel tests on the stand-in of stand_in.py and writes
benchmarks/results/compilations.json. Each operator is called twice: Triton's, up to the point where it would compile,
and the reference, whose results the test goes on with.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import pytest
import stand_in
import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from benchmarks.gpu.stages import test_files
from benchmarks.rows import RESULTS, commit
from esam_kernels import backends
from esam_kernels.backends import protocol

ROW = RESULTS / "compilations.json"


class Both:
    """The Triton backend as far as it needs no GPU; what comes out is the reference's."""

    def __init__(self) -> None:
        self._triton, self._reference = backends.load("triton"), backends.load("reference")
        self.__name__ = self._triton.__name__

    def __getattr__(self, name: str) -> Any:
        ours = getattr(self._triton, name)
        if name not in protocol.OPERATORS:
            return ours
        return self._twice(ours, self._losses if name == "cross_entropy_forward" else getattr(self._reference, name))

    def _losses(self, logits: Tensor, target: Tensor, smoothing: float, ignore_index: int) -> tuple[Tensor, Tensor]:
        """The reference's losses; NaN for classes that do not exist, as on a GPU: on the CPU it refuses them."""
        if target.is_floating_point():
            return self._reference.cross_entropy_forward(logits, target, smoothing, ignore_index)
        unknown = (target != ignore_index) & ((target < 0) | (target >= logits.shape[1]))
        known = target.masked_fill(unknown, 0)
        losses, normalizer = self._reference.cross_entropy_forward(logits, known, smoothing, ignore_index)
        return losses.masked_fill(unknown, torch.nan), normalizer

    def _twice(self, ours: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            # Counters of steps, which the host advances: once, not twice.
            lists = [argument for argument in args if isinstance(argument, (list, tuple))]
            single = [t for found in lists for t in found if isinstance(t, Tensor) and t.numel() == 1]
            before = [tensor.clone() for tensor in single]
            ours(*args, **kwargs)
            for tensor, value in zip(single, before):
                tensor.copy_(value)
            return reference(*args, **kwargs)

        return run


@contextmanager
def counted(patch: pytest.MonkeyPatch) -> Iterator[set[tuple[str, str]]]:
    """The kernels that would have been compiled, as (name, key of the specialisation); none is compiled or launched."""
    found: set[tuple[str, str]] = set()

    def do_compile(kernel: JITFunction, key: str, *_: Any, **__: Any) -> None:
        found.add((kernel.__name__.removesuffix("_kernel"), key))

    with stand_in.installed(patch):
        patch.setattr(JITFunction, "_do_compile", do_compile)
        yield found


def main() -> int:
    os.environ["ESAM_GPU_TESTS_DEVICE"] = "cpu"
    with pytest.MonkeyPatch.context() as patch, counted(patch) as found:
        both, load = Both(), backends.load
        # The GPU tier asks for the reference on this device, and gets both.
        patch.setattr(backends, "load", lambda name: both if name == "reference" else load(name))
        code = pytest.main(["-q", "-p", "no:cacheprovider", *map(str, test_files("kernels")), *sys.argv[1:]])
    kernels = dict(sorted(Counter(name for name, _ in found).items()))
    row = {"stage": "kernels", "backend": "triton", "compilations": len(found), "kernels": kernels}
    row |= {"triton": triton.__version__, "commit": commit(), "date": datetime.now(timezone.utc).date().isoformat()}
    print(json.dumps(row))
    if code == 0:
        ROW.write_text(f"[\n{json.dumps(row)}\n]\n")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
