"""The numbers of compilations that docs/gpu.md shows: counted without compiling, and the same as with it."""

from __future__ import annotations

import json

import operator_checks as checks
import pytest
import stand_in as stand_ins
import torch
from compilations import ROW, STAGES, Both, counted
from steps import Training, batches
from test_dry_graph_kernels import install_both
from triton.runtime.jit import JITFunction

from esam_kernels import backends, make_graphed_step
from esam_kernels.graphs import WARMUP_STEPS


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


@pytest.mark.skipif(
    backends.unavailable("native", torch.device("cpu")) is not None, reason="no backend on the CPU fuses updates"
)
def test_what_is_counted_of_graphed_steps_is_what_triton_compiles(monkeypatch):
    """A captured step reads its learning rate on the device: another kernel than that of an eager step."""

    def run():
        training = Training(torch.device("cpu"), "triton", mask="element")
        (given,) = batches(torch.device("cpu"), 1)
        step = make_graphed_step(training.optimizer, training.losses, *given)
        for _ in range(WARMUP_STEPS + 1):
            step(*given)

    with monkeypatch.context() as patch, counted(patch, steps=True) as found:
        both, load = Both("native"), backends.load
        patch.setattr(backends, "load", lambda name: both if name == "triton" else load(name))
        run()
    compiled = set()
    with monkeypatch.context() as patch, stand_ins.installed(patch) as stand_in:
        install_both(patch, stand_in)
        compile_kernel = JITFunction._do_compile

        def do_compile(kernel, key, *rest):
            compiled.add((kernel.__name__.removesuffix("_kernel"), key))
            return compile_kernel(kernel, key, *rest)

        patch.setattr(JITFunction, "_do_compile", do_compile)
        run()
        assert len(stand_in.compilations) == len(compiled) > 0
    assert found == compiled


def test_the_rows_are_of_each_stage_and_name_every_kernel_that_is_launched():
    rows = json.loads(ROW.read_text())
    assert tuple(row["stage"] for row in rows) == STAGES
    assert all(sum(row["kernels"].values()) == row["compilations"] for row in rows)
    kernels = {kernel.__name__ for kernel in stand_ins.kernels() if kernel.__name__.endswith("_kernel")}
    assert set(rows[0]["kernels"]) == {name.removesuffix("_kernel") for name in kernels}
