"""Contract point 7: B+, exactly k samples, in a defined order; and gather."""

import math
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F

from esam_kernels import ESAM, cross_entropy, gather, select
from esam_kernels.backends import unavailable
from esam_kernels.selection import num_selected

NAN, INF = math.nan, math.inf
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize(
    ("gamma", "samples", "k"),
    [(0.5, 32, 16), (0.5, 1, 1), (0.01, 8, 1), (1.0, 7, 7), (0.6, 128, 77), (0.3, 10, 3), (0.99, 3, 3), (0.5, 128, 64)],
)
def test_k_is_the_rounded_share_and_at_least_one(gamma, samples, k):
    assert num_selected(gamma, samples) == k


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rises", "k", "expected"),
    [
        ([1.0, 3.0, 2.0, 0.0], 2, [1, 2]),
        ([0.0] * 6, 3, [0, 1, 2]),
        ([1.0, 2.0, 2.0, 2.0, 1.0], 2, [1, 2]),
        ([1.0, 2.0, 1.0, 2.0, 1.0], 3, [0, 1, 3]),
        ([0.0, -0.0, 0.0, -0.0], 2, [0, 1]),
        ([-0.0, 0.0, -0.0, 0.0], 3, [0, 1, 2]),
        ([NAN, 1.0, NAN, -1.0], 2, [1, 3]),
        ([NAN, 1.0, NAN, -1.0], 3, [0, 1, 3]),
        ([NAN, NAN, NAN], 2, [0, 1]),
        ([NAN, -INF, INF, 0.0], 3, [1, 2, 3]),
        ([-INF, INF, NAN], 1, [1]),
        ([5.0], 1, [0]),
    ],
)
def test_selection_is_exact(rises, k, expected, dtype):
    after = torch.tensor(rises, dtype=dtype)
    before = torch.zeros(len(rises), dtype=dtype)
    indices = select(before, after, k)
    assert indices.tolist() == expected
    assert indices.dtype == torch.int64
    assert oracles.ranked(before.tolist(), rises, k) == expected


def test_inf_minus_inf_ranks_last():
    assert select(torch.tensor([INF, 0.0, 0.0]), torch.tensor([INF, -5.0, NAN]), 2).tolist() == [0, 1]
    assert select(torch.tensor([INF, 0.0, 0.0]), torch.tensor([INF, -5.0, 1.0]), 2).tolist() == [1, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_differences_of_half_precision_losses_are_taken_in_float32(dtype):
    before = torch.tensor([1.0, 1.0, 1.0], dtype=dtype)
    after = torch.tensor([1e-3, 1.5e-3, 0.5e-3], dtype=dtype)
    assert select(before, after, 1).tolist() == [1]


def test_losses_of_different_dtypes_are_compared_in_the_wider():
    before = torch.tensor([1.0, 1.0], dtype=torch.float64)
    after = torch.tensor([1.0, 1.0 + 2**-20])
    assert select(before + torch.tensor([0.0, 2**-40], dtype=torch.float64), after, 1).tolist() == [1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_selection_of_a_large_batch_is_the_oracles(dtype):
    generator = torch.Generator().manual_seed(1)
    before, after = (torch.randn(3000, generator=generator).to(dtype) for _ in range(2))
    wide = torch.promote_types(dtype, torch.float32)
    rises = (after.to(wide) - before.to(wide)).tolist()
    assert select(before, after, 700).tolist() == oracles.ranked([0.0] * 3000, rises, 700)


def test_selection_needs_no_gradient_of_the_losses():
    before = torch.tensor([1.0, 2.0], requires_grad=True)
    assert not select(before * 2, before * 3, 1).requires_grad


@pytest.mark.parametrize("gamma", [1.0, 0.99])
def test_without_a_sample_to_drop_there_is_no_second_forward(gamma):
    model = oracles.mlp()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, gamma=gamma)
    calls = []

    def losses(inputs, target):
        calls.append(torch.is_grad_enabled())
        return cross_entropy(model(inputs), target)

    optimizer.step(losses, *oracles.batch(5))
    assert calls == [True, True]


def test_a_batch_of_one_sample_is_trained_on():
    model = oracles.mlp()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, gamma=0.5)
    before = oracles.weights_of(model)
    optimizer.step(oracles.losses_of(model), *oracles.batch(1))
    assert not oracles.same_bits(before, oracles.weights_of(model))


def test_ties_of_all_samples_select_the_first_half():
    """rho is too small to move a weight: every rise is 0."""
    model = oracles.mlp()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=1e-30, gamma=0.5)
    sizes = []

    def losses(inputs, target):
        sizes.append(inputs)
        return cross_entropy(model(inputs), target)

    inputs, target = oracles.batch(32)
    loss = optimizer.step(losses, inputs, target)
    assert torch.isfinite(loss)
    assert torch.equal(sizes[-1], inputs[:16])


def test_select_of_the_optimizer_gathers_each_tensor():
    optimizer = ESAM(oracles.mlp().parameters(), torch.optim.SGD, lr=0.1, gamma=0.5)
    before, after = torch.zeros(4), torch.tensor([1.0, 4.0, 2.0, 3.0])
    inputs, target = torch.arange(8).reshape(4, 2), torch.arange(4)
    chosen = optimizer.select(before, after, inputs, target)
    assert isinstance(chosen, tuple)
    assert torch.equal(chosen[0], inputs[[1, 3]])
    assert torch.equal(chosen[1], target[[1, 3]])
    assert torch.equal(optimizer.select(before, after, inputs), inputs[[1, 3]])
    optimizer.gamma = 1.0
    assert optimizer.select(before, after, inputs) is inputs


def optimizer_on(backend, gamma=0.5):
    reason = unavailable(backend, torch.device("cpu"))
    if reason is not None:
        pytest.skip(reason)
    return ESAM(oracles.mlp().parameters(), torch.optim.SGD, lr=0.1, gamma=gamma, backend=backend)


# Layouts that cross_entropy takes: shapes of logits and of class indices.
LOGITS = [((9, 5), (9,)), ((9, 5, 4), (9, 4)), ((9, 4, 5), (9, 4)), ((9, 5, 2, 3), (9, 2, 3))]


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize(("shape", "target_shape"), LOGITS)
def test_selection_from_logits_is_that_from_their_losses(backend, label_smoothing, shape, target_shape):
    """The losses before are chosen such that the rises are known, and small beside what the options change."""
    optimizer = optimizer_on(backend)
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(5, target_shape, generator=generator, dtype=torch.int32)
    target[[1, 4]] = 2
    after = 3 * torch.randn(shape, generator=generator)
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "ignore_index": 2}
    exact = after.double().movedim(1 if shape[1] == 5 else -1, -1)
    losses = F.cross_entropy(exact.reshape(-1, 5), target.long().flatten(), reduction="none", **options)
    counted = (target.reshape(9, -1) != 2).sum(1).clamp(min=1)
    rises = torch.randperm(9, generator=generator) / 100
    before = (losses.reshape(9, -1).sum(1) / counted - rises).float()
    expected = rises.topk(4).indices.sort().values
    rows, chosen = optimizer.select_from_logits(before, after, target, {"x": after}, target, **options)
    assert torch.equal(rows["x"], after[expected])
    assert torch.equal(chosen, target[expected])
    single = optimizer.select_from_logits(before, after, target, before, **options)
    assert torch.equal(single, before[expected])


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_selection_from_logits_and_class_probabilities(backend):
    optimizer = optimizer_on(backend)
    after, target = torch.randn(6, 5), torch.rand(6, 5).softmax(dim=1)
    before = torch.zeros(6)
    expected = F.cross_entropy(after.double(), target.double(), reduction="none").topk(3).indices.sort().values
    assert torch.equal(optimizer.select_from_logits(before, after, target, target), target[expected])


def test_selection_from_logits_without_a_sample_to_drop_gives_the_batch_itself():
    optimizer, inputs = optimizer_on("reference", gamma=1.0), torch.randn(4, 3)
    assert optimizer.select_from_logits(torch.rand(4), torch.randn(4, 5), torch.arange(4), inputs) is inputs


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.ones(4), torch.ones(3, 5), torch.arange(3)), {}, "different numbers of samples"),
        ((torch.ones(3), torch.ones(4, 5), torch.arange(4)), {}, "loss_before hold 3 samples, the batch 4"),
        ((torch.ones(4), torch.ones(4, 5), torch.arange(3)), {}, "does not fit logits"),
        ((torch.ones(4), torch.ones(4), torch.arange(4)), {}, "logits must be floating point"),
        ((torch.ones(4), torch.ones(4, 5), torch.arange(4)), {"label_smoothing": 1.5}, "label_smoothing must lie in"),
    ],
)
def test_selection_from_logits_refuses_what_does_not_fit(arguments, options, message):
    for gamma in (0.5, 1.0):
        with pytest.raises(ValueError, match=message):
            optimizer_on("reference", gamma).select_from_logits(*arguments, torch.ones(4, 2), **options)


def test_gradients_flow_through_the_optimizers_selection():
    rows = torch.randn(4, 3, requires_grad=True)
    optimizer_on("reference").select(torch.zeros(4), torch.tensor([1.0, 4.0, 2.0, 3.0]), rows).sum().backward()
    assert rows.grad.tolist() == [[0.0] * 3, [1.0] * 3, [0.0] * 3, [1.0] * 3]


# -- gather ------------------------------------------------------------------------------------------------------------

INDICES = torch.tensor([0, 2, 3])


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.complex64,
        torch.complex128,
        *DTYPES,
    ],
)
@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 3, 4), (5, 0), (5, 1, 1)])
def test_gather_takes_rows_of_any_dtype_bit_for_bit(dtype, shape):
    tensor = torch.randint(0, 2, shape).to(dtype) if dtype == torch.bool else (torch.randn(shape) * 50).to(dtype)
    rows = gather(INDICES, tensor)
    assert rows.dtype == dtype
    assert torch.equal(rows, tensor[[0, 2, 3]])


def test_gather_keeps_nan_and_signed_zero():
    tensor = torch.tensor([-0.0, 1.0, NAN, 0.0])
    assert torch.equal(oracles.bits(gather(INDICES, tensor)), oracles.bits(tensor[[0, 2, 3]]))


def test_gather_keeps_the_structure_of_a_pytree():
    batch = {"ids": torch.arange(5), "nested": [torch.randn(5, 2), (torch.ones(5, dtype=torch.bool), None)], "n": 3}
    (rows, name), other = gather(INDICES, (batch, "name"), torch.arange(10).reshape(5, 2))
    assert name == "name"
    assert rows["n"] == 3
    assert rows["nested"][1][1] is None
    assert rows["ids"].tolist() == [0, 2, 3]
    assert isinstance(rows["nested"], list)
    assert isinstance(rows["nested"][1], tuple)
    assert torch.equal(rows["nested"][0], batch["nested"][0][[0, 2, 3]])
    assert torch.equal(other, torch.tensor([[0, 1], [4, 5], [6, 7]]))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gather_keeps_the_memory_format(memory_format):
    images = torch.randn(5, 3, 4, 4).to(memory_format=memory_format)
    rows = gather(INDICES, images)
    assert rows.is_contiguous(memory_format=memory_format)
    assert torch.equal(rows, images[[0, 2, 3]])


@pytest.mark.parametrize("make", [lambda: torch.randn(3, 5).t(), lambda: torch.randn(1, 3).expand(5, 3)])
def test_gather_takes_rows_of_strided_tensors(make):
    tensor = make()
    assert torch.equal(gather(INDICES, tensor), tensor[[0, 2, 3]])


def test_gradients_flow_through_gather():
    tensor = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: gather(INDICES, t), tensor)
    gather(torch.tensor([1, 1]), tensor).sum().backward()
    assert tensor.grad.sum(dim=1).tolist() == [0, 6, 0, 0, 0]


def test_step_takes_a_dictionary_as_batch():
    model = oracles.mlp()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1)
    inputs, target = oracles.batch(8)

    def losses(data):
        return cross_entropy(model(data["inputs"]), data["target"])

    loss = optimizer.step(losses, {"inputs": inputs, "target": target, "name": "train"})
    assert loss.item() == pytest.approx(cross_entropy(oracles.mlp()(inputs), target).mean().item(), rel=1e-6)
