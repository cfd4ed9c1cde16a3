import math

import pytest
import torch
from native_cases import extension  # noqa: F401  (skips the module where the extension is not built)

from esam_kernels.backends import native, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("samples", [1, 2, 7, 128, 1000])
def test_selection_is_the_reference_selection(samples, dtype):
    before, after = torch.rand(samples).to(dtype), torch.rand(samples).to(dtype)
    for k in {1, max(1, samples // 2), samples}:
        assert torch.equal(native.select(before, after, k), reference.select(before, after, k))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_zeros_infinities_and_nan_rank_as_specified(dtype):
    values = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0], dtype=dtype)
    for _ in range(20):
        after = values[torch.randint(len(values), (64,))]
        for before in (torch.zeros(64, dtype=dtype), values[torch.randint(len(values), (64,))]):
            for k in (1, 5, 32, 63, 64):
                assert torch.equal(native.select(before, after, k), reference.select(before, after, k))


def test_nan_ranks_below_minus_infinity_and_ties_go_to_the_lower_index():
    before = torch.zeros(6)
    after = torch.tensor([math.nan, -math.inf, 0.0, -0.0, 0.0, math.nan])
    assert native.select(before, after, 1).tolist() == [2]
    assert native.select(before, after, 2).tolist() == [2, 3]
    assert native.select(before, after, 4).tolist() == [1, 2, 3, 4]
    assert native.select(before, after, 5).tolist() == [0, 1, 2, 3, 4]


def test_losses_of_two_dtypes_are_compared_in_the_wider():
    before, after = torch.rand(50, dtype=torch.float64), torch.rand(50)
    assert torch.equal(native.select(before, after, 25), reference.select(before, after, 25))


def batches():
    images = torch.randn(16, 3, 5, 7)
    return {
        "images": images,
        "channels_last": images.to(memory_format=torch.channels_last),
        "channels_last_3d": torch.randn(16, 2, 3, 4, 5).to(memory_format=torch.channels_last_3d),
        "labels": torch.arange(16),
        "bytes": torch.arange(48, dtype=torch.uint8).view(16, 3),
        "booleans": torch.rand(16, 3) > 0.5,
        "half": torch.randn(16, 3).bfloat16(),
        "complex": torch.randn(16, 3, dtype=torch.complex64),
        "conjugated": torch.randn(16, 3, dtype=torch.complex64).conj(),
        "transposed": torch.randn(3, 16).t(),
        "strided": torch.randn(16, 6)[:, ::2],
        "sliced": torch.randn(18, 6)[1:-1],
        "expanded": torch.randn(16, 1).expand(16, 4),
        "no_features": torch.empty(16, 0),
        "large": torch.randn(16, 20_000),
    }


@pytest.mark.parametrize("name", batches())
def test_gathered_rows_and_their_memory_are_the_reference_rows(name, threads):
    tensor = batches()[name]
    indices = torch.tensor([15, 0, 3, 3, 8, 1, 14])
    (actual,), (expected,) = native.gather([tensor], indices), reference.gather([tensor], indices)
    assert torch.equal(actual, expected)
    assert actual.dtype == expected.dtype
    assert actual.stride() == expected.stride()


def test_a_list_is_gathered_together():
    tensors, indices = list(batches().values()), torch.tensor([1, 2, 15])
    for actual, expected in zip(native.gather(tensors, indices), reference.gather(tensors, indices), strict=True):
        assert torch.equal(actual, expected)
    assert native.gather([], indices) == []
    assert native.gather([torch.randn(4, 2)], torch.empty(0, dtype=torch.int64))[0].shape == (0, 2)


@pytest.mark.parametrize("bad", [-1, 4, 2**40])
def test_an_index_outside_the_batch_is_refused(bad):
    with pytest.raises(IndexError, match=f"index {bad} is out of range: tensor 0 of those to gather from has 4 rows"):
        native.gather([torch.randn(4, 2)], torch.tensor([0, bad]))
