"""What a user sees of the package's inside: the log, the commands, what doctor prints."""

import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import esam_kernels
from esam_kernels import __main__ as commands
from esam_kernels import doctor, logs
from esam_kernels.backends import extensions

STEP = """
import torch
from esam_kernels import SAM, ops
model = torch.nn.Linear(4, 3)
optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, backend="reference")
model(torch.ones(2, 4)).sum().backward()
optimizer.first_step()
optimizer.second_step()
"""


def run(**environment):
    process = subprocess.run(
        [sys.executable, "-c", STEP], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    return process.returncode, process.stderr.splitlines()


def test_the_variable_shows_which_backend_serves_which_operator():
    code, lines = run(ESAM_KERNELS_LOG="debug")
    assert code == 0, lines
    assert "esam_kernels DEBUG: cpu tensors: backend 'reference', as was asked for" in lines
    assert "esam_kernels DEBUG: norm_partials: backend reference serves float32 on cpu" in lines
    assert sum("norm_partials" in line for line in lines) == 1
    not_fused = "the update of SGD is not fused into the restore, it takes its own step"
    assert f"esam_kernels DEBUG: {not_fused}: the backend 'reference' does not fuse updates" in lines


def test_a_level_that_there_is_not_is_refused():
    code, lines = run(ESAM_KERNELS_LOG="loud")
    assert code != 0
    assert lines[-1] == "ValueError: ESAM_KERNELS_LOG must be one of debug, info, warning, error, got 'loud'"


@pytest.fixture
def backends():
    """One backend that passes half precision on to another."""
    inner = SimpleNamespace(__name__="backends.inner", direct=None, norm=lambda x: x.sum())
    outer = SimpleNamespace(
        __name__="backends.outer", direct=None, norm=lambda x: inner.norm(x) if x.dtype == torch.half else x.sum()
    )
    for backend in (inner, outer):
        logs.report_calls(backend, ("norm",))
    return outer


def test_what_is_passed_on_says_by_whom_and_each_kind_of_tensor_once(backends, caplog):
    with caplog.at_level(logging.DEBUG, "esam_kernels"):
        for dtype in (torch.float32, torch.half, torch.float32, torch.half):
            backends.norm(torch.ones(2, dtype=dtype))
    assert [record.getMessage() for record in caplog.records] == [
        "norm: backend outer serves float32 on cpu",
        "norm: backend inner serves float16 on cpu, passed on by outer, which does not take them",
    ]


def test_without_a_command_the_commands_are_told(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["esam_kernels"])
    assert commands.main() == 0
    said = capsys.readouterr().out
    assert "doctor" in said
    assert "optimizer.step(losses, inputs, targets)" in said


@pytest.mark.parametrize(
    ("argument", "code", "beginning"),
    [
        ("--version", 0, f"esam_kernels {esam_kernels.__version__}"),
        ("docter", 2, "python -m esam_kernels: error: argument command: invalid choice: 'docter'"),
    ],
)
def test_the_version_and_what_is_no_command(monkeypatch, capsys, argument, code, beginning):
    monkeypatch.setattr(sys, "argv", ["esam_kernels", argument])
    with pytest.raises(SystemExit) as stopped:
        commands.main()
    assert stopped.value.code == code
    assert "".join(capsys.readouterr()).splitlines()[-1].startswith(beginning)


def test_doctor_prints_one_block_to_paste(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "self_check", lambda backend, device: [])
    monkeypatch.setattr(extensions, "is_present", lambda name: False)
    monkeypatch.setenv("ESAM_KERNELS_LOG", "info")
    assert doctor.main() == 0
    first, block, last = capsys.readouterr().out.split("```")
    assert first.startswith("To report a problem, paste this")
    assert last.strip() == ""
    for line in (
        f"torch         {torch.__version__}",
        "variable      ESAM_KERNELS_LOG=info",
        "_cuda         not built",
    ):
        assert line in block


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("fast", "ESAM_KERNELS_BACKEND must be one of reference, native, triton, cuda, got 'fast'"),
        ("cuda", "backend 'cuda' (ESAM_KERNELS_BACKEND=cuda) is not available for cpu tensors: "),
    ],
)
def test_doctor_says_which_variable_is_wrong_and_goes_on(monkeypatch, capsys, name, reason):
    monkeypatch.setattr(doctor, "self_check", lambda backend, device: [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("ESAM_KERNELS_BACKEND", name)
    assert doctor.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert [each for each in lines if each.startswith(f"  no default backend: {reason}")]
    assert "  reference  ok" in lines
    assert lines[-2] == "1 checks failed"
