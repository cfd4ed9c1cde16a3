"""Numbers that are written down in several languages have one value: they are read from the sources and compared."""

import ast
import re
from pathlib import Path

import pytest

import esam_kernels
from esam_kernels.backends import reference

PACKAGE = Path(esam_kernels.__file__).parent
SOURCES = PACKAGE.parent / "csrc"

pytestmark = pytest.mark.skipif(not SOURCES.is_dir(), reason="the package is installed without its C++ sources")

CUDA, CPU = "cuda/launchers.h", "cpu/kernels.h"


def constant(file, name):
    """The value of ``constexpr ... name = value;``."""
    return int(re.search(rf"constexpr \w+ {name} = (\w+);", (SOURCES / file).read_text())[1], 0)


def dtype_numbers(file):
    """Names and values of ``enum Dtype``."""
    listed = re.search(r"enum Dtype : int \{(.*?)\}", (SOURCES / file).read_text())[1]
    return {name: int(value) for name, value in re.findall(r"k(\w+) = (\d+)", listed)}


def assigned(file, name):
    """The expression that a Python module assigns to ``name``, unevaluated: the module may not be importable here."""
    for node in ast.parse((PACKAGE / file).read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return node.value
    raise AssertionError(f"{file} does not assign {name}")


def test_the_norm_has_as_many_partial_sums_in_every_language():
    written = [constant(CUDA, "kNumPartials"), constant("cpu/perturbation.h", "kNumPartials"), reference.NUM_PARTIALS]
    assert written == [1024] * 3
    assert ast.unparse(assigned("backends/triton/blocks.py", "MAX_PROGRAMS")) == "NUM_PARTIALS"


def test_philox_has_its_published_constants_in_every_language():
    multipliers, weyl, rounds = reference.PHILOX_MULTIPLIERS, reference.PHILOX_WEYL, reference.PHILOX_ROUNDS
    assert (multipliers, weyl, rounds) == ((0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 10)
    assert tuple(constant("philox.h", f"kPhiloxMultiplier{i}") for i in (0, 1)) == multipliers
    assert tuple(constant("philox.h", f"kPhiloxWeyl{i}") for i in (0, 1)) == weyl
    assert constant("philox.h", "kPhiloxRounds") == rounds


def test_triton_counts_as_many_philox_rounds():
    random = pytest.importorskip("triton.language.random")
    rounds = random.N_ROUNDS_DEFAULT  # a tl.constexpr since Triton 3.6
    assert getattr(rounds, "value", rounds) == reference.PHILOX_ROUNDS
    calls = re.findall(r"tl\.philox\((.*?)\n    \)", (PACKAGE / "backends/triton/philox.py").read_text(), re.DOTALL)
    assert ["n_rounds" in call for call in calls] == [False]  # the default holds


def test_a_dtype_has_the_same_number_in_python_and_in_both_extensions():
    numbers = {"Float32": 0, "BFloat16": 1, "Float16": 2}
    assert dtype_numbers(CUDA) == numbers
    assert dtype_numbers(CPU) == {**numbers, "Float64": 3, "NumDtypes": 4}
    table = assigned("backends/cuda/extension.py", "DTYPES")
    written = {ast.unparse(key): ast.literal_eval(value) for key, value in zip(table.keys, table.values, strict=True)}
    assert written == {"torch.float32": 0, "torch.bfloat16": 1, "torch.float16": 2}
