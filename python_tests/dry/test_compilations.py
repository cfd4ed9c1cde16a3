"""The number of compilations that docs/gpu.md shows: counted without compiling, and the same as with it."""

from __future__ import annotations

import json

import operator_checks as checks
import pytest
import stand_in as stand_ins
import torch
from compilations import ROW, Both, counted


def test_what_is_counted_is_what_triton_compiles(monkeypatch):
    """Two dtypes, aligned and not; the same again compiles nothing."""
    cpu, seen = torch.device("cpu"), {}

    def run(backend):
        for dtype in (torch.float32, torch.bfloat16):
            for shift in (0, 1):
                checks.check_restore(backend, cpu, dtype, shift)

    with monkeypatch.context() as patch, counted(patch) as found:
        for _ in range(2):
            run(Both())
            seen[len(seen)] = len(found)
    with monkeypatch.context() as patch, stand_ins.installed(patch) as stand_in:
        run(Both())
        assert seen == {0: len(stand_in.compilations), 1: len(stand_in.compilations)}
        assert stand_in.compilations, "nothing was compiled"


def test_counters_of_steps_advance_once():
    """The check compares them, though two backends have been called."""
    with pytest.MonkeyPatch.context() as patch, counted(patch) as found:
        cpu = torch.device("cpu")
        checks.check_adam(Both(), cpu, torch.float32, True, True, False, cpu, None, 0)
    assert {name for name, _ in found} == {"restore_adam"}


def test_the_row_names_every_kernel_that_is_launched():
    (row,) = json.loads(ROW.read_text())
    kernels = {kernel.__name__ for kernel in stand_ins.kernels() if kernel.__name__.endswith("_kernel")}
    assert set(row["kernels"]) == {name.removesuffix("_kernel") for name in kernels}
    assert sum(row["kernels"].values()) == row["compilations"]
