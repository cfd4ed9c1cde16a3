import math

import pytest
import torch
from native_cases import (
    DTYPES,
    SIZES,
    assert_same_bits,
    assert_within,
    bits,
    clones,
    extension,
    offsets_of,
    tensors,
)

from esam_kernels.backends import native, reference

GROUPS = [i % 2 for i in range(len(SIZES))]
SCALE = torch.tensor([0.05, 0.2], dtype=torch.float64)
ETA = 0.01
# A seed and a step above 32 bits: both halves of each must count.
RANDOM_STATE = torch.tensor([2**40 + 5, 2**33 + 7, round(0.6 * 2**32) - 1])


def perturb(backend, params, grads, backups, partials, adaptive=(False, False), random_state=None, groups=None):
    groups = GROUPS[: len(params)] if groups is None else groups
    backend.perturb_(
        params,
        grads,
        backups,
        groups,
        offsets_of(params),
        partials,
        SCALE,
        list(adaptive),
        ETA,
        1.0,
        1e-12,
        random_state,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adaptive", [(False, False), (True, False)])
def test_norm_is_the_reference_norm(isa, dtype, adaptive):
    params, grads = tensors(dtype), tensors(dtype)
    expected = reference.norm_partials(params, grads, GROUPS, adaptive, ETA).sum()
    actual = native.norm_partials(params, grads, GROUPS, list(adaptive), ETA)
    assert actual.shape == (reference.NUM_PARTIALS,)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual.sum(), expected, rtol=1e-12, atol=0)


# The additions that a square passes: in its lane, 8192 / 32 of a chunk; from 32 lanes to one; and the chunks of SIZES.
ADDITIONS = 256 + 5 + sum(-(-size // 8192) for size in SIZES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("constant", [False, True])
def test_norm_is_exact_to_one_rounding_an_addition(isa, dtype, adaptive, constant):
    """torch's own sum, the reference's, adds in fewer lanes and without chunks: its error grows with the tensor."""
    params, grads = tensors(dtype), tensors(dtype)
    if constant:  # every addition of a lane rounds the same way: the worst case
        grads = [torch.full_like(grad, 0.1) for grad in grads]
    partials = native.norm_partials(params, grads, [0] * len(SIZES), [adaptive], ETA)
    scaled = [g.double() * (w.double().abs() + ETA if adaptive else 1.0) for w, g in zip(params, grads)]
    exact = math.fsum(square for tensor in scaled for square in tensor.square().tolist())
    assert math.fsum(partials.tolist()) == pytest.approx(exact, rel=ADDITIONS * 2.0**-53, abs=0)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_norm_survives_squares_outside_float32(isa, scale):
    grads = tensors(torch.float32, scale)
    partials = native.norm_partials(grads, grads, GROUPS, [False, False], 0.0)
    expected = math.sqrt(sum(grad.double().square().sum().item() for grad in grads))
    assert partials.sum().sqrt().item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adaptive", [[False, False], [True, False]])
def test_norm_has_the_same_bits_on_every_isa_and_thread_count(dtype, adaptive):
    params, grads = tensors(dtype), tensors(dtype)
    results = []
    before = extension.isa(), torch.get_num_threads()
    for name in extension.available_isas():
        for threads in (1, 2, 3):
            extension.use_isa(name)
            torch.set_num_threads(threads)
            results.append(native.norm_partials(params, grads, GROUPS, adaptive, ETA))
    extension.use_isa(before[0])
    torch.set_num_threads(before[1])
    assert_same_bits(results, results[:1] * len(results))


@pytest.mark.parametrize("first", [0, 2**32 - 7, 2**63 - 100])
@pytest.mark.parametrize("counters", [1, 7, 8, 9, 33])
def test_philox_words_are_the_reference_words(isa, first, counters):
    words = torch.empty(4 * counters, dtype=torch.int32)
    seed, step = 2**40 + 5, 2**33 + 7
    extension.philox_words(first, step, seed, words)
    expected = reference.philox(first + torch.arange(counters), step, seed)
    assert torch.equal(words.long() & 0xFFFFFFFF, torch.stack(expected, dim=1).flatten())


@pytest.mark.parametrize("over_gradients", [True, False])
@pytest.mark.parametrize("adaptive", [(False, False), (False, True)])
@pytest.mark.parametrize("random_state", [None, RANDOM_STATE], ids=["all", "drawn"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_perturb_is_within_one_unit_of_the_reference(isa, dtype, random_state, adaptive, over_gradients):
    params, grads = tensors(dtype), tensors(dtype)
    partials = reference.norm_partials(params, grads, GROUPS, adaptive, ETA)
    results = []
    for backend in (reference, native):
        w, g = clones(params, grads)
        backups = [] if over_gradients else [torch.full_like(param, torch.nan) for param in params]
        perturb(backend, w, g, backups, partials, adaptive, random_state)
        results.append(w)
        assert_same_bits(backups or g, params)
        if backups:
            assert_same_bits(g, grads)
    assert_within(1, results[1], results[0], params)


def test_element_mask_is_bitwise_the_reference_mask(isa, threads):
    params = [torch.zeros(size) for size in SIZES]
    grads = [torch.ones(size) for size in SIZES]
    partials = reference.norm_partials(params, grads, GROUPS, [False, False], ETA)
    w, g = clones(params, grads)
    perturb(native, w, g, [], partials, random_state=RANDOM_STATE)
    for moved, offset in zip(w, offsets_of(params)):
        assert torch.equal(moved != 0, reference.element_mask(moved.numel(), offset, RANDOM_STATE))


@pytest.mark.parametrize(
    ("dtype", "nan"), [(torch.float32, 0x7F812345), (torch.bfloat16, 0x7FA5), (torch.float16, 0x7D23)]
)
def test_elements_not_drawn_keep_their_bits_nan_payloads_included(isa, dtype, nan):
    whole = torch.int32 if dtype == torch.float32 else torch.int16
    params, grads = [torch.full((1000,), nan, dtype=whole).view(dtype)], [torch.ones(1000, dtype=dtype)]
    partials = reference.norm_partials(grads, grads, [0], [False, False], ETA)
    w, g = clones(params, grads)
    perturb(native, w, g, [], partials, random_state=RANDOM_STATE, groups=[0])
    kept = ~reference.element_mask(1000, 0, RANDOM_STATE)
    assert torch.equal(bits(w[0])[kept], bits(params[0])[kept])
    assert_same_bits(g, params)


@pytest.mark.parametrize("bound", [-1, 0, 2**32 - 1])
def test_extreme_bounds_of_the_mask(isa, bound):
    state = torch.tensor([5, 7, bound])
    params, grads = [torch.zeros(5000)], [torch.ones(5000)]
    partials = reference.norm_partials(params, grads, [0], [False, False], ETA)
    perturb(native, params, grads, [], partials, random_state=state, groups=[0])
    assert torch.equal(params[0] != 0, reference.element_mask(5000, 0, state))


@pytest.mark.parametrize("bad", [0.0, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_norm_moves_nothing_and_still_saves_the_weights(isa, dtype, bad):
    params, grads = tensors(dtype), [torch.zeros_like(param) for param in tensors(dtype)]
    grads[-1][-1] = bad
    partials = native.norm_partials(params, grads, GROUPS, [False, False], ETA)
    for random_state in (None, RANDOM_STATE):
        w, g = clones(params, grads)
        perturb(native, w, g, [], partials, random_state=random_state)
        assert_same_bits(w, params)
        assert_same_bits(g, params)


@pytest.mark.parametrize("random_state", [None, RANDOM_STATE], ids=["all", "drawn"])
def test_misaligned_views_are_perturbed_and_their_neighbours_left_alone(isa, random_state):
    storages = [torch.randn(size + 2) for size in SIZES]
    grads = tensors(torch.float32)
    views = [storage[1:-1] for storage in storages]
    expected_storages, expected_grads = clones(storages, grads)
    partials = reference.norm_partials(views, grads, GROUPS, [False, False], ETA)
    perturb(native, views, grads, [], partials, random_state=random_state)
    expected = [storage[1:-1] for storage in expected_storages]
    perturb(reference, expected, expected_grads, [], partials, random_state=random_state)
    assert_within(1, storages, expected_storages, expected_storages)
    for storage, before in zip(storages, expected_storages):
        assert storage[0] == before[0]
        assert storage[-1] == before[-1]


def test_channels_last_and_transposed_weights_are_taken_in_the_order_of_their_memory(isa):
    params = [torch.randn(8, 5, 3, 3).to(memory_format=torch.channels_last), torch.randn(33, 65).t()]
    grads = [torch.randn_like(param) for param in params]
    partials = native.norm_partials(params, grads, [0, 1], [False, True], ETA)
    results = []
    for backend in (reference, native):
        w = [param.clone(memory_format=torch.preserve_format) for param in params]
        g = [grad.clone(memory_format=torch.preserve_format) for grad in grads]
        perturb(backend, w, g, [], partials, (False, True), RANDOM_STATE, groups=[0, 1])
        assert all(torch.equal(saved, param) for saved, param in zip(g, params))
        results.append(w)
    assert_within(1, results[1], results[0], params)


def test_mixed_dtypes_share_one_norm(isa):
    params = [torch.randn(1000, dtype=torch.float32).to(dtype) for dtype in DTYPES]
    grads = [torch.randn(1000, dtype=torch.float32).to(dtype) for dtype in DTYPES]
    partials = native.norm_partials(params, grads, [0] * 4, [False], ETA)
    expected = reference.norm_partials(params, grads, [0] * 4, [False], ETA)
    torch.testing.assert_close(partials.sum(), expected.sum(), rtol=1e-12, atol=0)


def test_layouts_that_the_kernels_do_not_take_go_to_the_reference():
    w, g = torch.randn(6, 6)[:, ::2], torch.randn(6, 6)[:, ::2]
    expected = reference.norm_partials([w], [g], [0], [True], ETA)
    assert_same_bits([native.norm_partials([w], [g], [0], [True], ETA)], [expected])
    backup = w.clone()
    native.restore_([w], [backup + 1])
    assert torch.equal(w, backup + 1)


def test_lists_that_do_not_match_are_not_touched():
    params, grads = [torch.zeros(10)], [torch.zeros(9)]
    assert not extension.restore(params, grads)
    assert not extension.restore(params, [])
    assert not extension.norm_partials(params, grads, [0], [False], 0.0, torch.empty(reference.NUM_PARTIALS))


@pytest.mark.parametrize("dtype", DTYPES)
def test_restore_is_bitwise_in_the_same_storage(isa, threads, dtype):
    backups, params = tensors(dtype), tensors(dtype)
    backups[3][0], backups[3][1] = torch.nan, -0.0
    pointers = [param.data_ptr() for param in params]
    native.restore_(params, backups)
    assert_same_bits(params, backups)
    assert [param.data_ptr() for param in params] == pointers
