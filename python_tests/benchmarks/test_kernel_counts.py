"""The counts of how the streaming kernels fill a GPU: by hand, against the kernels, and the committed file."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import kernel_counts


@pytest.mark.parametrize(
    ("registers", "warps", "held"),
    [
        (32, 4, 16),  # as many warps as there may be
        (48, 4, 10),  # 1,536 registers a warp: 42 warps
        (64, 4, 8),
        (80, 4, 6),
        (91, 4, 5),  # granted as 96
        (168, 4, 3),
        (32, 8, 8),
        (37, 8, 6),
        (16, 1, 32),  # as many programs as there may be
    ],
)
def test_programs_that_a_multiprocessor_holds(registers, warps, held):
    assert kernel_counts.resident(registers, warps) == held


@pytest.mark.parametrize(
    ("blocks", "programs", "slots", "expected"),
    [
        (10, 10, 20, (1, 10)),
        (10, 4, 20, (3, 2)),  # shares of 3, 3, 2, 2
        (10, 10, 4, (3, 2)),  # 4, 4 and 2 blocks after each other
        (10, 5, 4, (4, 1)),  # four shares of two, then the fifth
        (7, 3, 2, (4, 1)),  # a share of 3, one of 2 and then the other
    ],
)
def test_rounds_until_all_blocks_are_done_and_who_works_in_the_last(blocks, programs, slots, expected):
    assert kernel_counts.rounds(blocks, programs, slots) == expected


def test_the_bytes_of_a_network():
    norm, perturb, sgd, adamw = kernel_counts.KERNELS
    parameters = 11173962
    for kernel, each in ((norm, 4), (perturb, 16), (sgd, 20), (adamw, 28)):
        row = kernel_counts.row("ResNet-18", kernel, "triton", "float32", 64, 8192, 1024)
        assert (row["parameters"], row["tensors"]) == (parameters, 62)
        assert row["bytes_moved"] == each * parameters
    assert kernel_counts.row("ResNet-18", perturb, "cuda", "bfloat16", 64, 8192, 1024)["bytes_moved"] == 8 * parameters


def test_no_row_of_logits_fits_where_it_is_said_not_to():
    rows = {(row["classes"], row["dtype"]): row for row in kernel_counts.losses()}
    assert [rows[128256, dtype]["fits_shared_memory"] for dtype in ("float32", "bfloat16")] == [False, False]
    assert rows[32768, "float32"]["fits_shared_memory"]


def test_blocks_and_programs_are_those_of_the_kernels():
    pytest.importorskip("triton")
    from esam_kernels.backends.triton import adam, blocks

    norm, _, _, adamw = kernel_counts.KERNELS
    assert kernel_counts.as_built(norm, "triton", "float32") == (blocks.BLOCK_BYTES, blocks.MAX_PROGRAMS)
    for dtype in ("float32", "bfloat16"):
        assert kernel_counts.as_built(adamw, "triton", dtype)[0] == adam.block_bytes(getattr(torch, dtype))
    assert 4 * blocks.NUM_WARPS * 32 * math.prod((4, 4)) == blocks.BLOCK_BYTES, "four 128-bit accesses a thread"


def test_the_committed_counts_are_those_of_the_code():
    assert kernel_counts.ROWS.read_text() == kernel_counts.text(kernel_counts.rows()), (
        "run `python -m benchmarks.kernel_counts`, then `python -m benchmarks.readme`"
    )
