"""What compute-sanitizer watches on a GPU, run on the emulator: else a wrong call would show on a card only."""

from __future__ import annotations

import os
import sys

import pytest
import sanitize
import torch
from recorder import Recorder

from esam_kernels import backends
from esam_kernels.backends.cuda import extension

KERNELS = {
    "norm_partials",
    "perturb",
    "restore",
    "restore_sgd",
    "restore_adam",
    "increment_steps",
    "cross_entropy_forward",
    "cross_entropy_backward",
    "select",
    "gather",
    "losses_select_gather",
}


@pytest.fixture
def only_cuda(backend, monkeypatch):
    """A device that the CUDA backend serves, and Triton does not."""
    monkeypatch.setattr(backend, "unavailable", lambda device: None)
    monkeypatch.setattr(backends.load("triton"), "unavailable", lambda device: "not here")


def test_the_small_set_passes_and_calls_every_kernel(only_cuda, emulated, device, monkeypatch, capsys):
    recorder = Recorder(emulated)
    monkeypatch.setattr(extension, "kernels", recorder)
    assert sanitize.small_set(device) == ["cuda"]
    assert {call.name for call in recorder.calls} == KERNELS
    assert capsys.readouterr().out.splitlines() == ["cuda: done", "triton: not here"]


@pytest.mark.parametrize("ran", [[], ["triton"], ["cuda", "triton"]], ids=str)
def test_where_the_kernels_of_a_backend_did_not_run_the_sanitizer_has_not_passed(monkeypatch, ran):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sanitize, "small_set", lambda device: ran)
    monkeypatch.setattr(sys, "argv", ["sanitize.py", "--inside"])
    assert sanitize.main() == (0 if len(ran) == 2 else sanitize.NOT_ALL_RAN)


def test_calls_that_torch_makes_to_see_whether_they_fail_are_no_findings(tmp_path, monkeypatch, capsys):
    """It would end with the exit code of an error; and it waits as long as torch takes to load."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\ncase "$*" in *"--report-api-errors no"*"--launch-timeout 0"*) exit 0;; esac\nexit 9\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["sanitize.py"])
    assert sanitize.main() == 0
    assert "memcheck: nothing found\n" in (said := capsys.readouterr().out)
    assert "racecheck: nothing found\n" in said
