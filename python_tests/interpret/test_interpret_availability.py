"""When the Triton backend may be asked for."""

from __future__ import annotations

import inspect
import subprocess
import sys

import torch

from esam_kernels import backends, ops
from esam_kernels.backends import protocol, reference


def test_interpreter_serves_the_cpu_and_nothing_else():
    assert backends.unavailable("triton", torch.device("cpu")) is None
    assert "TRITON_INTERPRET" in backends.unavailable("triton", torch.device("cuda"))
    assert "xpu" in backends.unavailable("triton", torch.device("xpu"))


def test_operators_reach_the_kernels():
    before, after = torch.zeros(4), torch.tensor([1.0, 3.0, 2.0, 0.0])
    assert ops.select(before, after, 2, backend="triton").tolist() == [1, 2]


def test_backend_has_every_operator_of_the_reference(kernels):
    assert "restore_adam_" in protocol.OPERATORS
    for name in protocol.OPERATORS:
        arguments = [list(inspect.signature(getattr(module, name)).parameters) for module in (kernels, reference)]
        assert arguments[0] == arguments[1], name


def test_module_imports_without_triton_and_says_what_to_install():
    program = (
        "import sys, importlib.util, torch\n"
        "find_spec = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'triton' else find_spec(name, *rest)\n"
        "from esam_kernels import backends\n"
        "print(backends.unavailable('triton', torch.device('cuda')), 'triton' in sys.modules)\n"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "pip install triton" in output
    assert output.split()[-1] == "False"
