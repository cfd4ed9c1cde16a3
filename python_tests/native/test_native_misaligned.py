"""Memory at any byte, as ``torch.frombuffer`` takes it: no C++ loop reads it, and every value is the reference's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from native_cases import DTYPES, assert_same_bits, clones, extension, misaligned, tensors
from torch import Tensor

from esam_kernels import ESAM, cross_entropy, gather, select
from esam_kernels.backends import native, reference

SIZES = (1, 17, 1027, 8193)
GROUPS, OFFSETS = [0, 1, 0, 1], [0, 4, 24, 1052]
SCALE = torch.tensor([0.05, 0.2], dtype=torch.float64)
STATE = torch.tensor([5, 7, round(0.6 * 2**32) - 1])


def all_misaligned(tensors: list[Tensor]) -> list[Tensor]:
    return [misaligned(tensor) for tensor in tensors]


def perturb(backend, w: list[Tensor], g: list[Tensor], backups: list[Tensor], partials, scale=SCALE, state=STATE):
    backend.perturb_(w, g, backups, GROUPS, OFFSETS, partials, scale, [True, False], 0.01, 1.0, 1e-12, state)


@pytest.mark.parametrize("which", ["params", "grads", "backups", "partials", "scale", "random state"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_perturb_of_misaligned_memory_is_the_references(dtype, which):
    params, grads, backups = (tensors(dtype, sizes=SIZES) for _ in range(3))
    partials = reference.norm_partials(params, grads, GROUPS, [True, False], 0.01)
    expected, saved = clones(params, backups)
    perturb(reference, expected, grads, saved, partials)
    given = {"params": params, "grads": grads, "backups": backups}
    others = {"partials": partials, "scale": SCALE, "random state": STATE}
    if which in given:
        given[which] = all_misaligned(given[which])
    else:
        others[which] = misaligned(others[which])
    perturb(native, *given.values(), *others.values())
    assert_same_bits(given["params"], expected)
    assert_same_bits(given["backups"], saved)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_of_misaligned_memory_is_the_references(dtype):
    params, grads = tensors(dtype, sizes=SIZES), tensors(dtype, sizes=SIZES)
    expected = reference.norm_partials(params, grads, GROUPS, [True, False], 0.01)
    for lists in ((all_misaligned(params), grads), (params, all_misaligned(grads))):
        assert_same_bits([native.norm_partials(*lists, GROUPS, [True, False], 0.01)], [expected])


@pytest.mark.parametrize("dtype", DTYPES)
def test_restore_is_bitwise_in_misaligned_memory(dtype):
    params, backups = tensors(dtype, sizes=SIZES), tensors(dtype, sizes=SIZES)
    moved = all_misaligned(params)
    native.restore_(moved, backups)
    assert_same_bits(moved, backups)
    native.restore_(params, all_misaligned(backups))
    assert_same_bits(params, backups)


@pytest.mark.parametrize("place", range(5))
def test_adam_over_misaligned_memory_is_the_references(place):
    lists = [tensors(torch.float32, sizes=SIZES) for _ in range(5)]
    for square in lists[4]:
        square.abs_()
    rest = (0.1, None, 0.9, 0.99, 1e-8, 0.3, False, False, True)
    expected = clones(*lists)
    reference.restore_adam_(*expected, [], [torch.tensor(2.0) for _ in SIZES], *rest)
    lists[place] = all_misaligned(lists[place])
    native.restore_adam_(*lists, [], [torch.tensor(2.0) for _ in SIZES], *rest)
    for found, wanted in zip(lists, expected, strict=True):
        assert_same_bits(found, wanted)


def test_misaligned_step_counters_are_counted():
    lists = [tensors(torch.float32, sizes=SIZES) for _ in range(4)]
    lists.append([square.abs() for square in lists[3]])
    rest = (0.1, None, 0.9, 0.99, 1e-8, 0.3, False, False, True)
    expected = clones(*lists)
    reference.restore_adam_(*expected, [], [torch.tensor(2.0) for _ in SIZES], *rest)
    counters = [misaligned(torch.tensor(2.0)) for _ in SIZES]
    native.restore_adam_(*lists, [], counters, *rest)
    assert counters == [3.0] * len(SIZES)
    for found, wanted in zip(lists, expected, strict=True):
        assert_same_bits(found, wanted)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_over_misaligned_memory_is_the_references(momentum, place):
    lists = [tensors(torch.float32, sizes=SIZES) for _ in range(4)]
    rest = (False, 0.1, None, momentum, 0.0, 0.3, True, False)
    expected = clones(*lists)
    reference.restore_sgd_(*expected, *rest)
    lists[place] = all_misaligned(lists[place])
    native.restore_sgd_(*lists, *rest)
    for found, wanted in zip(lists, expected, strict=True):
        assert_same_bits(found, wanted)


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_and_gradients_of_misaligned_memory_are_those_of_aligned_memory(dtype, kind):
    logits, upstream = torch.randn(9, 37).to(dtype), torch.rand(9)
    target = torch.randint(37, (9,)) if kind == "index" else torch.rand(9, 37)
    losses, normalizer = native.cross_entropy_forward(logits, target, 0.1, -100)
    gradient = native.cross_entropy_backward(upstream, logits, target, normalizer, 0.1, -100)
    for place in range(2):
        given = [misaligned(tensor) if i == place else tensor for i, tensor in enumerate((logits, target))]
        found = native.cross_entropy_forward(*given, 0.1, -100)
        assert_same_bits(found, (losses, normalizer))
    for place in range(4):
        given = [
            misaligned(tensor) if i == place else tensor
            for i, tensor in enumerate((upstream, logits, target, normalizer))
        ]
        assert_same_bits([native.cross_entropy_backward(*given, 0.1, -100)], [gradient])


@pytest.mark.parametrize("place", ["logits", "target"])
def test_the_public_cross_entropy_takes_misaligned_memory(place):
    logits, target, weights = torch.randn(9, 37), torch.randint(37, (9,)), torch.rand(9)
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, target, reduction="none")
    (expected_gradient,) = torch.autograd.grad(expected, exact, weights.double())
    if place == "logits":
        logits = misaligned(logits)
    else:
        target = misaligned(target)
    losses = cross_entropy(logits.requires_grad_(), target)
    torch.testing.assert_close(losses.double(), expected)
    (gradient,) = torch.autograd.grad(losses, logits, misaligned(weights))
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-7)


def test_saved_tensors_that_a_hook_misaligns_give_the_same_gradient():
    logits, target = torch.randn(9, 37, requires_grad=True), torch.randint(37, (9,))
    (expected,) = torch.autograd.grad(cross_entropy(logits, target).sum(), logits)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: misaligned(tensor.detach()), lambda packed: packed):
        losses = cross_entropy(logits, target)
    assert_same_bits(torch.autograd.grad(losses.sum(), logits), [expected])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_selection_and_rows_of_misaligned_memory_are_the_references(dtype):
    before, after = torch.randn(2, 33).to(dtype).round(decimals=1)
    expected = reference.select(before, after, 7)
    for losses in ((misaligned(before), after), (before, misaligned(after))):
        assert torch.equal(native.select(*losses, 7), expected)
        assert torch.equal(select(*losses, 7), expected)
    rows = torch.arange(66.0).view(33, 2).to(dtype)
    for indices, source in ((misaligned(expected), rows), (expected, misaligned(rows))):
        assert torch.equal(native.gather([source], indices)[0], rows[expected])
        assert torch.equal(gather(indices, source), rows[expected])


def test_no_loop_is_given_misaligned_memory():
    """On some processors it works all the same; in C++ it is undefined."""
    one, bad = torch.ones(9), misaligned(torch.ones(9))
    partials, index = torch.empty(reference.NUM_PARTIALS, dtype=torch.float64), torch.tensor([0])
    assert not extension.restore([one], [bad])
    assert not extension.norm_partials([one], [bad], [0], [False], 0.0, partials)
    sgd = (False, 0.1, 0.9, 0.0, 0.0, False, False)
    assert not extension.restore_sgd([one], [one.clone()], [one.clone()], [bad], *sgd)
    adam = (0.1, False, 0.9, 0.99, 1e-8, 0.0, False, False, True)
    for counter in (misaligned(torch.tensor(1.0)), torch.tensor(1.0)):
        lists = [[one.clone()] for _ in range(5)]
        taken = extension.restore_adam(*lists, [], [counter], *adam)
        assert taken is (counter.data_ptr() % 4 == 0)
    assert extension.direct.cross_entropy(bad[None], index, 0.0, -100) is None
    assert extension.direct.cross_entropy(one[None], misaligned(index), 0.0, -100) is None
    assert extension.direct.select(one, bad, 1) is None
    assert extension.direct.gather([one], misaligned(index)) is None


def test_the_private_functions_refuse_misaligned_memory():
    """They have nowhere to put a copy of it."""
    logits, index, losses, normalizer = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.zeros(4), torch.zeros(2, 4)
    with pytest.raises(ValueError, match="is not aligned to its dtype: give a copy"):
        extension.cross_entropy_forward(misaligned(logits), index, None, 0.0, -100, losses, normalizer)
    with pytest.raises(ValueError, match="is not aligned to its dtype: give a copy"):
        extension.cross_entropy_forward(logits, misaligned(index), None, 0.0, -100, losses, normalizer)
    with pytest.raises(ValueError, match="grad_logits must be contiguous and aligned"):
        extension.cross_entropy_backward(losses, logits, index, None, normalizer, 0.0, -100, misaligned(logits))
    with pytest.raises(ValueError, match="is not aligned to its dtype: give a copy"):
        extension.select(losses, losses, 1, misaligned(torch.zeros(1, dtype=torch.int64)))


def test_a_step_over_misaligned_parameters_is_that_over_aligned_ones():
    ends = []
    start = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    for weight in (torch.nn.Parameter(misaligned(start)), torch.nn.Parameter(start.clone())):
        optimizer = ESAM([weight], torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.5, flatten=False, backend="native")
        inputs, target = torch.randn(8, 3, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 5
        for _ in range(3):
            optimizer.step(lambda x, y, weight=weight: cross_entropy(x @ weight.t(), y), inputs, target)
        ends.append(weight.detach())
    torch.testing.assert_close(*ends)
    assert not torch.equal(ends[0], start)
