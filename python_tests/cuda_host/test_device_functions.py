"""The device functions, compiled for the host, against torch."""

from __future__ import annotations

import ctypes
import math

import building
import pytest
import torch

from esam_kernels.backends import reference


@pytest.fixture(scope="module")
def functions():
    if building.compiler() is None:
        pytest.skip("there is no C++ compiler")
    return ctypes.CDLL(str(building.device_functions()))


def address(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


U64, I64 = ctypes.c_uint64, ctypes.c_int64
# Low and high words of counter, step and seed all take part.
COUNTERS = [(0, 0, 0), (5, 3, 2), ((1 << 32) - 3, (1 << 32) + 1, (1 << 62) + 12345), (1 << 62, 2**63 - 1, 2**63 - 1)]


@pytest.mark.parametrize(("first", "step", "seed"), COUNTERS)
def test_philox_words_are_the_references(functions, first, step, seed):
    found = torch.empty(9, 4, dtype=torch.int64)
    functions.philox_words(U64(first), I64(9), U64(step), U64(seed), address(found))
    expected = torch.stack(reference.philox(torch.arange(first, first + 9), step, seed), dim=1)
    assert torch.equal(found, expected)


def test_philox_is_the_published_one(functions):
    """The known answers of Random123 for zeros, and for all ones."""
    found = torch.empty(1, 4, dtype=torch.int64)
    functions.philox_words(U64(0), I64(1), U64(0), U64(0), address(found))
    assert found.tolist() == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]
    functions.philox_words(U64(2**64 - 1), I64(1), U64(2**64 - 1), U64(2**64 - 1), address(found))
    assert found.tolist() == [[0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]]


@pytest.mark.parametrize("first", [1 << 34, -4, -401, -(1 << 40)])
def test_an_elements_word_does_not_depend_on_how_it_is_reached(functions, first):
    kept = torch.empty(1000, dtype=torch.bool)
    state = torch.tensor([7, 9, round(0.6 * 2**32) - 1])
    functions.keep_one_by_one(I64(first), I64(1000), U64(9), U64(7), I64(state[2].item()), address(kept))
    assert torch.equal(kept, reference.element_mask(1000, first, state))


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_every_half_precision_number_is_widened_as_torch_does(functions, name):
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    values = torch.empty(2**16)
    getattr(functions, f"widen_{name}")(address(bits), I64(2**16), address(values))
    expected = bits.view(getattr(torch, name)).float()
    assert torch.equal(values.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(values[numbers].view(torch.int32), expected[numbers].view(torch.int32))


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_narrowing_rounds_to_nearest_even(functions, name):
    """Random bits, ties, the borders of overflow and of the subnormals."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**31), 2**31, (300_000,), generator=generator).to(torch.int32).view(torch.float32)
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(getattr(torch, name)).float()
    steps = torch.nextafter(every, torch.tensor(math.inf))
    middles = (every[1:].double() + every[:-1].double()).div(2).float()
    small = torch.linspace(-1e-4, 1e-4, 100_001)
    values = torch.cat((random, every, steps, middles, small, torch.tensor([65519.9, 65520.0, 3.4e38, -3.4e38])))
    bits = torch.empty(len(values), dtype=torch.int16)
    getattr(functions, f"narrow_{name}")(address(values), I64(len(values)), address(bits))
    found, expected = bits.view(getattr(torch, name)), values.to(getattr(torch, name))
    assert torch.equal(found.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(found[numbers].view(torch.int16), expected[numbers].view(torch.int16))


def test_keys_order_the_rises(functions):
    """NaN below everything, both zeros equal."""
    rises = torch.tensor([math.nan, -math.inf, -3e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 3e38, math.inf])
    keys = torch.empty(len(rises), dtype=torch.int64)
    zeros = torch.zeros(len(rises))
    functions.ordered_keys(address(zeros), address(rises), I64(len(rises)), address(keys))
    steps = (keys[1:] - keys[:-1]).tolist()
    assert keys[0] == 0
    assert [step == 0 for step in steps] == [i == 5 for i in range(len(steps))]
    assert min(steps) == 0


def test_threshold_is_the_kth_largest_key(functions):
    generator = torch.Generator().manual_seed(0)
    for high in (3, 2**16, 2**32):
        keys = torch.randint(0, high, (101,), generator=generator)
        keys[0] = 2**32 - 1
        descending = keys.sort(descending=True).values
        functions.kth_largest_key.restype = I64
        for k in (1, 2, 50, 100, 101):
            assert functions.kth_largest_key(address(keys), I64(101), I64(k)) == descending[k - 1]


@pytest.mark.parametrize("split", [0, 1, 20, 40])
@pytest.mark.parametrize("spread", [1.0, 300.0])
def test_online_softmax_in_any_pieces(functions, split, spread):
    generator = torch.Generator().manual_seed(1)
    x, q = spread * torch.randn(40, generator=generator), torch.rand(40, generator=generator)
    x[5] = x[6] = x.max()
    sums = torch.empty(4)
    functions.row_sums(address(x), address(q), I64(40), I64(split), address(sums))
    exact, weights = x.double(), q.double()
    lse = exact.logsumexp(0)
    expected = torch.stack((exact.max(), lse - exact.max(), weights.sum(), (weights * (lse - exact)).sum()))
    torch.testing.assert_close(sums.double(), expected, rtol=2e-6, atol=1e-6)


def test_rows_that_begin_with_minus_infinity(functions):
    x = torch.tensor([-math.inf, -math.inf, 1.0, 2.0])
    q, sums = torch.ones(4), torch.empty(4)
    for split in (0, 1, 2, 3, 4):
        functions.row_sums(address(x), address(q), I64(4), I64(split), address(sums))
        assert sums[0] == 2
        assert math.isclose(sums[1].item(), x[2:].logsumexp(0).item() - 2, rel_tol=1e-6)
        assert sums[3] == math.inf
    x.fill_(-math.inf)
    functions.row_sums(address(x), address(q), I64(4), I64(2), address(sums))
    assert sums[0] == -math.inf
    assert sums[3].isnan()
