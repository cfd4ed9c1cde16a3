"""Triton where it cannot compile its driver: the next backend serves, one line says why, and nothing is half-changed.

Triton's own code runs up to the point where it fails; only the GPU that it looks for is pretended.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sysconfig

import pytest
import torch
import triton
from steps import Training, assert_same_weights, batches

from esam_kernels import backends
from esam_kernels.backends.triton import driver

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def without_compiler(patch, folder):
    patch.setenv("PATH", str(folder))
    patch.delenv("CC", raising=False)


def with_a_compiler_that_is_not_there(patch, folder):
    patch.setenv("CC", "cc-of-nobody")


def without_headers(patch, folder):
    paths = sysconfig.get_paths

    def get_paths(*args, **kwargs):
        return {**paths(*args, **kwargs), "include": str(folder)}

    patch.setattr(sysconfig, "get_paths", get_paths)


MACHINES = {
    "no compiler": (without_compiler, "there is no C compiler: install one (apt-get install gcc)"),
    "no such compiler": (with_a_compiler_that_is_not_there, "'cc-of-nobody', which CC names and which is not there"),
    "no headers": (without_headers, "has no Python.h: install it (apt-get install python3"),
}


@pytest.fixture
def triton_looks_for_its_driver(monkeypatch, tmp_path):
    """As in a new process on a machine with a GPU, with nothing in Triton's cache."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton.runtime.driver, "_default", None)
    monkeypatch.setattr(triton.runtime.driver, "_active", None)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(tmp_path))
    driver.why_not.cache_clear()
    yield
    driver.why_not.cache_clear()


@pytest.mark.parametrize("machine", MACHINES)
def test_what_is_missing_is_told_with_what_to_install(triton_looks_for_its_driver, monkeypatch, tmp_path, machine):
    lack, message = MACHINES[machine]
    lack(monkeypatch, tmp_path)
    with pytest.raises((RuntimeError, subprocess.CalledProcessError, FileNotFoundError)):
        triton.runtime.driver.active  # noqa: B018
    assert message in backends.unavailable("triton", CUDA)


def test_a_driver_that_fails_for_another_reason_is_told_with_it(triton_looks_for_its_driver, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "driver does not start (RuntimeError: 0 active drivers" in backends.unavailable("triton", CUDA)


def test_a_triton_that_compiles_launchers_is_refused_before_the_first_of_them(monkeypatch, tmp_path):
    """Triton 3.6 with its driver in the cache: the first launch would fail."""
    from triton.backends.nvidia import driver as nvidia

    monkeypatch.setattr(nvidia, "make_launcher", None, raising=False)
    monkeypatch.setattr(triton.runtime.driver, "_active", object())
    driver.why_not.cache_clear()
    assert driver.why_not() is None
    without_compiler(monkeypatch, tmp_path)
    driver.why_not.cache_clear()
    assert "no C compiler" in driver.why_not()
    driver.why_not.cache_clear()


def test_the_next_backend_serves_and_one_line_says_why(triton_looks_for_its_driver, monkeypatch, tmp_path, caplog):
    unavailable = {name: backends.load(name).unavailable for name in ("triton", "cuda")}
    monkeypatch.setitem(backends._DEFAULT_ORDER, "cpu", backends._DEFAULT_ORDER["cuda"])
    monkeypatch.setattr(backends, "_resolved", {})
    monkeypatch.setattr(backends.load("triton"), "unavailable", lambda device: unavailable["triton"](CUDA))
    without_compiler(monkeypatch, tmp_path)
    assert shutil.which("gcc") is None
    with caplog.at_level(logging.INFO, "esam_kernels"):
        default, reference = (Training(CPU, name) for name in ("", "reference"))
        for batch in batches(CPU, 3):
            default.step(batch)
            reference.step(batch)
    assert_same_weights(default, reference)
    (line,) = [record.getMessage() for record in caplog.records if "not available" in record.getMessage()]
    assert line.startswith("backend 'triton' is not available for cpu tensors: Triton compiles its driver")
    assert line.endswith("backend 'reference' takes its place")


@pytest.mark.parametrize("version", ["3.4.0", "2.1.0+git1234"])
def test_a_triton_that_is_too_old_is_told_and_the_kernels_are_not_imported(monkeypatch, version):
    monkeypatch.setattr(triton, "__version__", version)
    for device in (CPU, CUDA):
        reason = backends.unavailable("triton", device)
        assert reason == f"Triton {version} is installed, the kernels need 3.6 or newer: a newer torch brings it"


ORDERS = [(None, None, "triton"), ("broken", None, "cuda"), ("broken", "not built", "reference")]


@pytest.mark.parametrize(("triton_reason", "cuda_reason", "expected"), ORDERS)
def test_a_gpu_takes_triton_then_cuda_then_the_reference(monkeypatch, caplog, triton_reason, cuda_reason, expected):
    monkeypatch.setattr(backends, "_resolved", {})
    for name, reason in (("triton", triton_reason), ("cuda", cuda_reason)):
        monkeypatch.setattr(backends.load(name), "unavailable", lambda device, reason=reason: reason)
    assert backends.resolve(None, CUDA) is backends.load(expected)
    assert len(caplog.records) == (expected != "triton")
    assert all(record.levelno == logging.WARNING for record in caplog.records)
