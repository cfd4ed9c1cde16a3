"""What every Triton kernel compiles to, ahead of time, for sm_80, sm_90 and sm_100. Needs no GPU."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    raise RuntimeError("kernels that are bound to the interpreter cannot be compiled: unset TRITON_INTERPRET")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

triton = pytest.importorskip("triton")

from benchmarks import codegen  # noqa: E402

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


@pytest.fixture(scope="module")
def summary():
    return codegen.summarize()


def measurements(summary, names):
    for name in names:
        for architecture, measured in summary["kernels"][name].items():
            yield f"{name}, {architecture}", CASES[name], measured


def test_nothing_spills(summary):
    spills = {label: measured["spills"] for label, case, measured in measurements(summary, CASES) if measured["spills"]}
    # ptxas parks one address there, outside the loop's arithmetic, though it has registers to spare
    assert spills in ({}, {"norm float64, sm_100": 2})


def test_walks_over_blocks_access_128_bits_at_a_time(summary):
    for label, case, measured in measurements(summary, WALKING):
        name, dtype = case.name.rsplit(" ", 1)
        itemsize = {"float64": 8, "float32": 4, "bfloat16": 2}[dtype]
        vectors = int(case.elements * itemsize // 16)
        loads, stores = ACCESSES[name]
        assert (measured["loads_128"], measured["stores_128"]) == (loads * vectors, stores * vectors), label


def test_images_are_gathered_128_bits_at_a_time(summary):
    for label, _, measured in measurements(summary, ["gather 3x224x224 float32", "gather 3x32x32 uint8"]):
        assert measured["loads_128"] == measured["stores_128"] == 4, label


def test_walks_over_blocks_leave_memory_the_bottleneck(summary):
    for label, case, measured in measurements(summary, WALKING):
        assert measured["instructions_per_element"] <= INSTRUCTIONS_PER_BYTE * case.bytes, label


def test_register_use_leaves_512_threads_to_a_multiprocessor(summary):
    for label, _, measured in measurements(summary, CASES):
        assert measured["registers"] <= 65536 // 512, label


def test_committed_summary_is_what_is_compiled_now(summary):
    committed = json.loads(codegen.SUMMARY.read_text())
    assert set(committed["kernels"]) == set(CASES)
    if committed["triton"] == triton.__version__:
        assert committed == summary, "run `make codegen`"
