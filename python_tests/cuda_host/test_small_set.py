"""What compute-sanitizer watches on a GPU, run on the emulator: else a wrong call would show on a card only."""

from __future__ import annotations

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
