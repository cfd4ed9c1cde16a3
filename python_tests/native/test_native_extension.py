"""How the extension is found, told its instruction set, and shares PyTorch's threads: each in a fresh process."""

import os
import subprocess
import sys

import pytest
import torch
from native_cases import extension

from esam_kernels.backends import native


def run(code, **environment):
    process = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.split("\n")[:-1]


PRINT_REASON = "import torch; from esam_kernels.backends import native; print(native.unavailable(torch.device('cpu')))"


def test_one_pool_of_threads_and_set_num_threads_governs_it():
    before, one, three, torch_too = run(
        "import os, torch\n"
        "from esam_kernels.backends import native\n"
        "def threads(): print(len(os.listdir('/proc/self/task')))\n"
        "grads = [torch.randn(1_000_000)]\n"
        "norm = lambda: native.norm_partials(grads, grads, [0], [False], 0.0)\n"
        "torch.set_num_threads(1); threads(); norm(); threads()\n"
        "torch.set_num_threads(3); norm(); threads()\n"
        "torch.randn(1_000_000).add_(1); threads()\n"
    )
    assert one == before, "work on one thread started others"
    assert int(three) == int(before) + 2, "three threads are the caller and two more"
    assert torch_too == three, "PyTorch started a pool of its own"


@pytest.mark.parametrize("isa", extension.available_isas())
def test_the_environment_picks_the_instruction_set(isa):
    code = "from esam_kernels.backends import native; print(native.extension.isa())"
    assert run(code, ESAM_KERNELS_ISA=isa) == [isa]


def test_an_instruction_set_that_is_not_there_makes_the_backend_unavailable():
    (reason,) = run(PRINT_REASON, ESAM_KERNELS_ISA="mmx")
    assert "mmx" in reason
    assert "portable" in reason
    with pytest.raises(ValueError, match="choose one of"):
        extension.use_isa("mmx")


def test_another_torch_version_makes_the_backend_unavailable():
    (reason,) = run("import torch; torch.__version__ = '2.0.1'\n" + PRINT_REASON)
    assert f"built for torch {torch.__version__}, found torch 2.0.1" in reason
    assert "pip install --force-reinstall --no-deps ." in reason


def test_a_missing_extension_makes_the_backend_unavailable():
    (reason,) = run("import sys; sys.modules['esam_kernels._native'] = None\n" + PRINT_REASON)
    assert "was not built" in reason
    assert "pip install --force-reinstall --no-deps ." in reason


def test_only_the_cpu_is_served():
    assert native.unavailable(torch.device("cpu")) is None
    assert "CPU" in native.unavailable(torch.device("cuda"))
