"""norm_partials, perturb_, restore_: each kernel against the reference."""

from __future__ import annotations

import pytest
import torch
from tensors import FLOATS, assert_same_bits, assert_within_one_ulp, copies, like, parameters
from walk_checks import check_perturb_walks_backwards_over_what_the_norm_has_read

from esam_kernels.backends import reference
from esam_kernels.backends.triton import blocks

GROUPS = [0, 1, 1, 0, 0, 1, 0]
# a counter's high word changes inside the first tensor; the others begin at arbitrary counters
OFFSETS = [2**34 - 8, 0, 40, 2**40, 4, 2**35 + 12, 1024]
RANDOM_STATE = torch.tensor([-5, 2**40 + 7, round(0.6 * 2**32) - 1])
SCALE = torch.tensor([0.05, 0.7], dtype=torch.float64)
ADAPTIVE = {"plain": [False, False], "one group": [False, True], "all": [True, True]}


@pytest.fixture(params=ADAPTIVE.values(), ids=ADAPTIVE)
def adaptive(request):
    return request.param


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_norm_is_the_references(kernels, three_programs, poisoned_memory, dtype, adaptive):
    params = parameters(dtype)
    grads = like(params)
    expected = reference.norm_partials(params, grads, GROUPS, adaptive, 0.01).sum()
    actual = kernels.norm_partials(params, grads, GROUPS, adaptive, 0.01)
    assert actual.shape == (reference.NUM_PARTIALS,)
    torch.testing.assert_close(actual.sum(), expected, rtol=1e-6 if dtype != torch.float64 else 1e-14, atol=0)


def test_norm_gives_the_same_bits_each_time(kernels, three_programs):
    params = parameters(torch.float32)
    grads = like(params)
    runs = [kernels.norm_partials(params, grads, GROUPS, [False, True], 0.0) for _ in range(2)]
    assert torch.equal(*runs)


def test_norm_is_one_over_all_dtypes(kernels):
    params = [tensor for dtype in FLOATS for tensor in parameters(dtype)[1:3]]
    grads = like(params)
    groups = [0, 1] * len(FLOATS)
    expected = reference.norm_partials(params, grads, groups, [False, True], 0.1).sum()
    actual = kernels.norm_partials(params, grads, groups, [False, True], 0.1).sum()
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


def test_norm_of_nothing_is_zero(kernels, poisoned_memory):
    empty = [torch.empty(0)]
    assert torch.equal(kernels.norm_partials(empty, empty, [0], [False], 0.0), torch.zeros(1024, dtype=torch.float64))


def test_tables_follow_a_tensor_that_grows_in_place(kernels):
    memory = torch.randn(3000)
    for numel in (2100, 3000, 10):
        views = [memory[:numel]]
        torch.testing.assert_close(
            kernels.norm_partials(views, views, [0], [False], 0.0).sum(),
            memory[:numel].double().square().sum(),
            rtol=1e-6,
            atol=0,
        )


def test_perturb_walks_backwards_over_what_the_norm_has_read(kernels):
    check_perturb_walks_backwards_over_what_the_norm_has_read(kernels, 10)


def test_a_program_of_several_blocks_walks_forwards_in_the_norm_and_backwards_in_the_perturbation(kernels, monkeypatch):
    """Told by what float32 rounds away (2^24 + 1 + 1), and by a backup that all blocks share."""
    monkeypatch.setattr(blocks, "MAX_PROGRAMS", 1)
    grads = [torch.zeros(2048) for _ in range(3)]
    for grad, value in zip(grads, (4096.0, 1.0, 1.0)):
        grad[0] = value
    params = [torch.full((2048,), float(1 + i)) for i in range(3)]
    partials = kernels.norm_partials(params, grads, [0] * 3, [False], 0.0)
    assert partials[0] == 2.0**24
    backup, scale = torch.empty(2048), torch.ones(1, dtype=torch.float64)
    rest = ([0] * 3, [0, 2048, 4096], partials, scale, [False], 0.0, 1.0, 0.0, None)
    kernels.perturb_(params, grads, [backup] * 3, *rest)
    assert (backup == 1.0).all()


def perturbed(backend, params, grads, adaptive, *, in_gradients, random_state, partials=None, eps=1e-12):
    params, grads = copies(params), copies(grads)
    backups = [] if in_gradients else like(params)
    if partials is None:
        partials = reference.norm_partials(params, grads, GROUPS, adaptive, 0.01)
    backend.perturb_(params, grads, backups, GROUPS, OFFSETS, partials, SCALE, adaptive, 0.01, 1.3, eps, random_state)
    return params, backups or grads


@pytest.mark.parametrize("random_state", [None, RANDOM_STATE], ids=["all", "element mask"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_perturbation_is_within_one_ulp_and_its_backup_exact(kernels, three_programs, dtype, adaptive, random_state):
    params = parameters(dtype)
    grads = like(params)
    for in_gradients in (False, True):
        options = {"in_gradients": in_gradients, "random_state": random_state}
        expected, _ = perturbed(reference, params, grads, adaptive, **options)
        actual, backups = perturbed(kernels, params, grads, adaptive, **options)
        assert_within_one_ulp(actual, expected)
        assert_same_bits(backups, params)


@pytest.mark.parametrize("bound", [-1, 0, 2**31, 2**32 - 1])
def test_element_mask_has_the_references_bits(kernels, bound):
    random_state = torch.tensor([0x9E3779B97F4A7C15 - 2**63, 3, bound])
    for offset in (0, 2**34 - 2048, 2**34, 2**36 + 20, -4, -400, -(2**40)):
        params = [torch.zeros(5000)]
        kernels.perturb_(
            params,
            [torch.ones(5000)],
            [torch.empty(5000)],
            [0],
            [offset],
            torch.ones(1024, dtype=torch.float64),
            torch.ones(1, dtype=torch.float64),
            [False],
            0.0,
            1.0,
            0.0,
            random_state,
        )
        assert torch.equal(params[0] != 0, reference.element_mask(5000, offset, random_state)), offset


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bad_gradient_moves_nothing_and_still_writes_the_backup(kernels, dtype, bad):
    params = parameters(dtype)
    grads = like(params)
    for grad in grads:
        grad.mul_(0).add_(bad)
    partials = kernels.norm_partials(params, grads, GROUPS, [False, True], 0.01)
    options = {"in_gradients": False, "random_state": RANDOM_STATE, "partials": partials, "eps": 0.0}
    moved, backups = perturbed(kernels, params, grads, [False, True], **options)
    assert_same_bits(moved, params)
    assert_same_bits(backups, params)


def random_bits(tensors):
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    for tensor in tensors:
        kind = integers[tensor.itemsize]
        limits = torch.iinfo(kind)
        tensor.view(kind).copy_(torch.randint(limits.min, limits.max, tensor.shape, dtype=kind))
    return tensors


def test_restore_is_bitwise_whatever_the_bits_and_dtypes(kernels, three_programs):
    params = [tensor for dtype in FLOATS for tensor in parameters(dtype)]
    backups = random_bits(like(params))
    addresses = [param.data_ptr() for param in params]
    kernels.restore_(params, backups)
    assert_same_bits(params, backups)
    assert [param.data_ptr() for param in params] == addresses


@pytest.mark.parametrize("start", [4, 5])
@pytest.mark.parametrize("numel", [1, 2048, 2049, 2600])
def test_nothing_outside_a_tensor_is_written(kernels, start, numel):
    memory = [torch.full((numel + 12,), 7.0) for _ in range(5)]
    param, grad, backup, buffer, second = ([tensor[start : start + numel]] for tensor in memory)
    partials = kernels.norm_partials(param, grad, [0], [True], 0.0)
    kernels.perturb_(
        param, grad, backup, [0], [0], partials, SCALE[:1], [True], 0.0, 1.0, 0.0, torch.tensor([1, 2, 2**32 - 1])
    )
    kernels.restore_(param, backup)
    kernels.restore_sgd_(param, backup, grad, buffer, False, 0.1, None, 0.9, 0.0, 0.1, True, False)
    kernels.restore_adam_(
        *(param, backup, grad, buffer, second, [], [torch.tensor(1.0)]),
        *(0.1, None, 0.9, 0.99, 1e-8, 0.1, False, False, True),
    )
    torch.testing.assert_close(float(partials.sum()), 7.0**4 * numel)
    for tensor in memory:
        assert torch.equal(tensor[:start], torch.full((start,), 7.0))
        assert torch.equal(tensor[start + numel :], torch.full((12 - start,), 7.0))
