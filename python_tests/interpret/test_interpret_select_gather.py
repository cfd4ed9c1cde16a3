"""select and gather: bit for bit the reference's."""

from __future__ import annotations

import mmap
import platform
import sys

import pytest
import torch
from tensors import FLOATS

from esam_kernels import ops
from esam_kernels.backends import reference


def losses_with_ties(samples, dtype):
    before = torch.randint(-3, 4, (samples,)).to(dtype)
    after = torch.where(torch.rand(samples) < 0.5, torch.randint(-3, 4, (samples,)).to(dtype), torch.randn(samples))
    return before, after.to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("samples", [1, 2, 7, 256, 1000, 8192])
def test_selection_is_the_references(kernels, samples, dtype):
    before, after = losses_with_ties(samples, dtype)
    for k in sorted({1, (samples + 1) // 2, samples}):
        actual = kernels.select(before, after, k)
        assert torch.equal(actual, reference.select(before, after, k))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_ranks_below_minus_infinity_and_signed_zeros_tie(kernels, dtype):
    after = torch.tensor([torch.nan, -torch.inf, -0.0, 0.0, -torch.nan, torch.inf, -1.0, -0.0, 1e-7]).to(dtype)
    before = torch.zeros(9, dtype=dtype)
    before[2] = 0.0
    for k in range(1, 10):
        assert torch.equal(kernels.select(before, after, k), reference.select(before, after, k)), k
    assert kernels.select(before, after, 8).tolist() == [0, 1, 2, 3, 5, 6, 7, 8]


def test_selection_of_negative_zero_rises_goes_by_index(kernels):
    # -0.0 - 0.0 is -0.0: the only rise of that sign, and the first in line
    before, after = torch.tensor([0.0, 0.0]), torch.tensor([-0.0, 0.0])
    assert kernels.select(before, after, 1).tolist() == [0]


def test_losses_may_be_strided_and_of_two_dtypes(kernels):
    before, after = torch.randn(200).bfloat16()[::2], torch.randn(300).double()[::3]
    assert torch.equal(kernels.select(before, after, 30), reference.select(before, after, 30))


def test_batches_beyond_one_program_go_to_the_reference(kernels):
    before, after = losses_with_ties(16385, torch.float32)
    assert torch.equal(kernels.select(before, after, 1000), reference.select(before, after, 1000))


def batches():
    image = torch.randn(9, 3, 5, 5)
    return {
        "contiguous": image,
        "channels_last": image.to(memory_format=torch.channels_last),
        "misaligned": torch.randn(28)[1:].view(9, 3),
        "slice of rows": torch.randn(10, 2500)[1:],
        "padded rows": torch.randn(9, 8)[:, :5],
        "rows with gaps": torch.randn(9, 6, 8)[:, :, :5],
        "16-byte lanes": torch.randn(9, 1200, dtype=torch.float64),
        "long rows": torch.randint(0, 256, (9, 40001), dtype=torch.uint8),
        "one number a row": torch.arange(9),
        "bool": torch.rand(9, 7) < 0.5,
        "half": torch.randn(9, 33).half(),
        "complex": torch.randn(9, 3, dtype=torch.complex64),
        "conjugate": torch.randn(9, 3, dtype=torch.complex64).conj(),
        "batch not in front": torch.randn(5, 9).t(),
        "expanded": torch.randn(1, 3).expand(9, 3),
        "empty rows": torch.empty(9, 0),
    }


@pytest.mark.parametrize("name", batches())
def test_gathered_rows_are_the_references_in_the_same_memory_format(kernels, poisoned_memory, name):
    batch = batches()[name]
    for indices in (torch.tensor([0, 3, 8, 3]), torch.arange(9)[::2], torch.tensor([], dtype=torch.int64)):
        (actual,) = kernels.gather([batch], indices)
        (expected,) = reference.gather([batch], indices)
        assert torch.equal(actual, expected)
        assert actual.stride() == expected.stride()
        assert actual.dtype == expected.dtype


def test_several_tensors_are_gathered_alike(kernels):
    batch = [torch.randn(600, 4), torch.arange(600)]
    indices = torch.randperm(600)[:300]
    inputs, targets = kernels.gather(batch, indices)
    assert torch.equal(inputs, batch[0][indices])
    assert torch.equal(targets, indices)


def test_an_index_outside_the_batch_reads_nothing(kernels):
    (rows,) = kernels.gather([torch.ones(4, 3)], torch.tensor([1, 4, -1, 2**40]))
    assert rows.sum(1).tolist() == [3.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_losses_selection_and_rows_of_one_operator_are_the_references(kernels, label_smoothing):
    """Logits whose losses lie far apart: rounding decides nothing."""
    logits = torch.zeros(12, 5)
    target = torch.arange(12) % 5
    target[3] = -100
    logits[torch.arange(12), target.clamp(min=0)] = torch.randperm(12) - 6.0
    arguments = (torch.zeros(12), logits, [logits, target], 5, target, label_smoothing, -100)
    found, rows = ops.select_gather(*arguments, backend="triton")
    expected, expected_rows = ops.select_gather(*arguments, backend="reference")
    assert torch.equal(found, expected)
    assert all(map(torch.equal, rows, expected_rows))


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="MAP_32BIT is x86-64 Linux's")
def test_memory_below_two_gigabytes_is_gathered_too():
    """There an address is a 32-bit argument of the kernel. Where the heap lies is the system's choice, run by run."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40  # MAP_32BIT
    with mmap.mmap(-1, 4096, flags=flags) as memory:
        low = torch.frombuffer(memory, dtype=torch.int32, count=64).view(8, 8)
        assert low.data_ptr() < 2**31
        low.copy_(torch.arange(64, dtype=torch.int32).view(8, 8))
        (rows,) = ops.gather([low], torch.tensor([1, 6]), backend="triton")
        assert rows.tolist() == [list(range(8, 16)), list(range(48, 56))]
        del low
