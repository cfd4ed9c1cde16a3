"""What every Triton kernel compiles to, ahead of time, for sm_80, sm_90 and sm_100. Needs no GPU."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    raise RuntimeError("kernels that are bound to the interpreter cannot be compiled: unset TRITON_INTERPRET")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402

from benchmarks import codegen  # noqa: E402
from esam_kernels import backends  # noqa: E402
from esam_kernels.backends.reference import NUM_PARTIALS  # noqa: E402
from esam_kernels.backends.triton import blocks  # noqa: E402

# An H200 executes some 120 instructions in the time in which it moves the 16 bytes of an element.
INSTRUCTIONS_PER_BYTE = 120 / 16

CASES = {case.name: case for case in codegen.cases()}
WALKING = [name for name, case in CASES.items() if case.walks]
ACCESSES = {  # loads and stores, for each 16 bytes that a thread handles in every list
    "norm": (1, 0),
    "norm adaptive": (2, 0),
    "perturb": (2, 2),
    "perturb mask": (2, 2),
    "perturb mask adaptive": (2, 2),
    "restore": (1, 1),
    "sgd": (3, 2),
    "adamw": (4, 3),
    "cross_entropy forward 128256": (1, 0),
    "cross_entropy backward 128256": (1, 1),
}
# Of these accesses, those of what nothing reads again before a whole forward pass.
EVICT_FIRST = {"norm": (0, 0), "perturb": (1, 1), "restore": (1, 0), "sgd": (3, 1), "adamw": (4, 2)}


# What Triton 3.8 spills, of 56 registers, with the ptxas of either version.
SPILLS_OF_TRITON_3_8 = {"norm adaptive float32, sm_100": 4}


@pytest.fixture(scope="module")
def summary():
    return codegen.summarize()


def measurements(summary, names):
    for name in names:
        for architecture, measured in summary["kernels"][name].items():
            yield f"{name}, {architecture}", CASES[name], measured


def test_nothing_spills(summary):
    spills = {label: measured["spills"] for label, case, measured in measurements(summary, CASES) if measured["spills"]}
    assert spills == (SPILLS_OF_TRITON_3_8 if triton.__version__.startswith("3.8.") else {})


def test_walks_over_blocks_access_128_bits_at_a_time(summary):
    for label, case, measured in measurements(summary, WALKING):
        name, dtype = case.name.rsplit(" ", 1)
        itemsize = {"float64": 8, "float32": 4, "bfloat16": 2}[dtype]
        vectors = int(case.elements * itemsize // 16)
        loads, stores = ACCESSES[name]
        assert (measured["loads_128"], measured["stores_128"]) == (loads * vectors, stores * vectors), label


@pytest.mark.parametrize("name", EVICT_FIRST)
def test_what_is_read_once_leaves_the_caches_first(name):
    case = CASES[f"{name} float32"]
    graph, _ = codegen.disassemble(codegen.compile_case(case, 90).asm["cubin"])
    opcodes = [instruction.opcode for block in graph.values() for instruction in block.instructions]
    found = [sum(opcode.startswith(access) for opcode in opcodes) for access in ("LDG.E.EF.128", "STG.E.EF.128")]
    vectors = int(case.elements * 4 // 16)
    assert found == [count * vectors for count in EVICT_FIRST[name]]


def test_images_are_gathered_128_bits_at_a_time(summary):
    for label, _, measured in measurements(summary, ["gather 3x224x224 float32", "gather 3x32x32 uint8"]):
        assert measured["loads_128"] == measured["stores_128"] == 4, label


def test_walks_over_blocks_leave_memory_the_bottleneck(summary):
    for label, case, measured in measurements(summary, WALKING):
        assert measured["instructions_per_element"] <= INSTRUCTIONS_PER_BYTE * case.bytes, label


def test_register_use_leaves_512_threads_to_a_multiprocessor(summary):
    for label, _, measured in measurements(summary, CASES):
        assert measured["registers"] <= 65536 // 512, label


def test_kernels_that_work_in_place_read_and_write_an_element_in_one_thread():
    for case in codegen.streaming_cases():
        ir = codegen.compile_case(case, 90).asm["ttgir"]
        layouts: dict[str, set[str]] = {}
        for size, layout in re.findall(r"tt\.(?:load|store) .*tensor<(\d+)x!tt\.ptr<\w+>, (#\w+)>", ir):
            layouts.setdefault(size, set()).add(layout)
        for size in (case.constants["BLOCK"], blocks.MASKED_BLOCK.value):
            if size != NUM_PARTIALS:
                assert len(layouts[str(size)]) == 1, (case.name, size, layouts)


def test_real_launches_bind_and_compile(monkeypatch):
    """Every operator, with a launcher that compiles for sm_90 what Triton's own would have launched."""
    gpu = GPUTarget("cuda", 90, 32)
    launched = []

    def compile_instead(kernel, *args, grid, warmup, **options):
        backend = make_backend(gpu)
        options |= {"debug": False, "instrumentation_mode": triton.knobs.compilation.instrumentation_mode}
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        parsed, signature, constants, attributes = kernel._pack_args(backend, options, *binder(*args, **options))
        source = ASTSource(kernel, signature, constants, attributes)
        triton.compile(source, target=gpu, options=parsed.__dict__)
        pointers = {name: kind for name, kind in signature.items() if name.endswith("_ptr")}
        assert all(kind.startswith("*") for kind in pointers.values())
        launched.append((kernel.__name__, grid))

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", compile_instead)
    kernels = backends.load("triton")
    w, g, m, v = ([torch.randn(3000), torch.randn(5)] for _ in range(4))
    numbers = torch.ones(2, dtype=torch.float64)
    partials = kernels.norm_partials(w, g, [0, 1], [True, False], 0.1)
    kernels.perturb_(
        w, g, [], [0, 1], [0, 3000], partials, numbers, [True, False], 0.1, 1.0, 1e-12, torch.tensor([1, 2, 3])
    )
    kernels.restore_(w, g)
    kernels.restore_sgd_(w, g, g, m, False, 0.1, torch.tensor(0.1), 0.9, 0.0, 1e-4, True, False)
    steps = [torch.tensor(1.0), torch.tensor(2.0)]
    kernels.restore_adam_(w, g, g, m, v, [], steps, 0.1, None, 0.9, 0.99, 1e-8, 1e-4, False, False, True)
    for classes in (1000, 20000):
        logits, target = torch.randn(8, classes), torch.randint(9, (8,))
        losses, normalizer = kernels.cross_entropy_forward(logits, target, 0.0, -100)
        kernels.cross_entropy_backward(losses, logits, target, normalizer, 0.1, -100)
        kernels.cross_entropy_forward(logits, torch.softmax(logits, 1), 0.0, -100)
    kernels.select(torch.randn(100), torch.randn(100), 5)
    kernels.gather([torch.randn(8, 3, 4, 4), torch.arange(8)], torch.tensor([1, 2]))
    streaming = ["norm_kernel", "perturb_kernel", "restore_kernel", "restore_sgd_kernel", "restore_adam_kernel"]
    assert launched[:5] == [(name, (3,)) for name in streaming]
    assert [name for name, _ in launched[-3:]] == ["select_kernel", "gather_kernel", "gather_kernel"]


def test_committed_summary_is_what_is_compiled_now(summary):
    committed = json.loads(codegen.SUMMARY.read_text())
    assert set(committed["kernels"]) == set(CASES)
    if committed["triton"] == triton.__version__:
        assert committed == summary, "run `make codegen`"


def test_a_default_of_a_constant_is_a_constant():
    """Triton 3.6 hands the default of a device function on as it is, and compiles no kernel that uses a plain one."""
    modules = (blocks, *codegen.MODULES)
    functions = {value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)}
    defaults = [(kernel.__name__, param) for kernel in functions for param in kernel.params if param.is_constexpr]
    defaults = [(name, param.name, param.default) for name, param in defaults if param.has_default]
    assert {(name, parameter) for name, parameter, _ in defaults} == {("load_tile", "POLICY"), ("store_tile", "POLICY")}
    assert all(isinstance(default, triton.language.constexpr) for *_, default in defaults)
