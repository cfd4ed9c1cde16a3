"""The random bits of the masks: Philox4x32-10, and how it is counted."""

import math

import oracles
import pytest
import torch

from esam_kernels.backends import reference

ONES = 0xFFFFFFFF
# From Random123's kat_vectors, philox4x32 with 10 rounds.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def signed64(low: int, high: int) -> int:
    value = (high << 32) | low
    return value - 2**64 if value >= 2**63 else value


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_philox_gives_the_published_words(counter, key, expected):
    words = reference.philox(torch.tensor([signed64(*counter[:2])]), signed64(*counter[2:]), signed64(*key))
    assert tuple(int(w) for w in words) == expected


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_oracle_gives_the_published_words(counter, key, expected):
    assert oracles.philox(counter, key) == expected


def random_state(seed: int, step: int, beta: float) -> torch.Tensor:
    return torch.tensor([seed, step, oracles.bound(beta)])


@pytest.mark.parametrize("offset", [0, 4, 4 * 2**30, 4 * (2**32 - 1), 4 * 2**40])
@pytest.mark.parametrize(("seed", "step"), [(0, 0), (7, 3), (2**63 - 1, 2**33 + 1)])
def test_element_mask_is_the_oracles_bit_for_bit(offset, seed, step):
    mask = reference.element_mask(41, offset, random_state(seed, step, 0.6))
    assert mask.tolist() == oracles.element_mask(seed, step, 0.6, offset, 41).tolist()


def test_element_mask_does_not_depend_on_where_the_block_begins():
    state = random_state(5, 2, 0.4)
    whole = reference.element_mask(1000, 0, state)
    for start, length in ((0, 10), (4, 33), (128, 500), (996, 4), (3, 9)):
        assert torch.equal(reference.element_mask(length, start, state), whole[start : start + length])


@pytest.mark.parametrize("beta", [0.01, 0.3, 0.6, 0.99])
def test_rate_of_element_masks_is_beta_within_four_standard_deviations(beta):
    n = 200_000
    for seed in range(3):
        kept = int(reference.element_mask(n, 0, random_state(seed, 0, beta)).sum())
        assert abs(kept - n * beta) < 4 * math.sqrt(n * beta * (1 - beta))


def test_beta_one_keeps_every_element():
    assert reference.element_mask(100_000, 0, random_state(0, 0, 1.0)).all()


def test_masks_of_other_seeds_and_steps_are_independent():
    n = 100_000
    masks = [reference.element_mask(n, 0, random_state(*key, 0.5)) for key in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for i in range(4):
        for j in range(i):
            agreeing = int((masks[i] == masks[j]).sum())
            assert abs(agreeing - n / 2) < 4 * math.sqrt(n / 4)


def test_neighbouring_elements_are_independent():
    mask = reference.element_mask(100_001, 0, random_state(3, 0, 0.5))
    for lag in (1, 2, 3, 4, 5):
        agreeing = int((mask[lag:] == mask[:-lag]).sum())
        n = len(mask) - lag
        assert abs(agreeing - n / 2) < 4 * math.sqrt(n / 4)


def test_a_smaller_beta_keeps_a_part_of_what_a_larger_one_keeps():
    small = reference.element_mask(10_000, 0, random_state(1, 1, 0.2))
    large = reference.element_mask(10_000, 0, random_state(1, 1, 0.7))
    assert (small <= large).all()
    assert small.sum() < large.sum()
