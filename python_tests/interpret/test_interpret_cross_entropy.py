"""cross_entropy_forward and cross_entropy_backward against the reference."""

from __future__ import annotations

import pytest
import torch
from cross_entropy_checks import OFFSETS, check_gradient_at_offset, check_zero_probability_at_a_masked_logit

from esam_kernels.backends import reference

ROWS = 5
# a tile of many rows, its last column masked or not; one row a program; a row in several blocks
CLASSES = (2, 10, 64, 1000, 5000, 20000)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-5, torch.bfloat16: 2e-5}


def compare(kernels, logits, target, label_smoothing=0.0, ignore_index=-100):
    tolerance = TOLERANCE[logits.dtype]
    expected = reference.cross_entropy_forward(logits, target, label_smoothing, ignore_index)
    actual = kernels.cross_entropy_forward(logits, target, label_smoothing, ignore_index)
    torch.testing.assert_close(actual[0], expected[0], rtol=tolerance, atol=tolerance, equal_nan=True)
    softmax = [logits.to(values.dtype) - values[0][:, None] - values[1][:, None] for _, values in (actual, expected)]
    torch.testing.assert_close(*softmax, rtol=tolerance, atol=tolerance, equal_nan=True)
    grad_losses = torch.randn(len(logits)).to(expected[0].dtype)
    arguments = grad_losses, logits, target, expected[1], label_smoothing, ignore_index
    torch.testing.assert_close(
        kernels.cross_entropy_backward(*arguments), reference.cross_entropy_backward(*arguments), equal_nan=True
    )


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_class_indices(kernels, poisoned_memory, classes, dtype):
    logits = (5 * torch.randn(ROWS, classes)).to(dtype)
    target = torch.randint(classes, (ROWS,))
    target[2] = -100
    for label_smoothing in (0.0, 0.1):
        compare(kernels, logits, target, label_smoothing)


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_class_probabilities(kernels, poisoned_memory, classes, dtype):
    logits = (5 * torch.randn(ROWS, classes)).to(dtype)
    # of their own dtype, and not summing to one
    target = 2 * torch.softmax(torch.randn(ROWS, classes), dim=1)
    for label_smoothing in (0.0, 0.1):
        compare(kernels, logits, target, label_smoothing)


def test_more_rows_than_one_tile_and_a_partial_last_one(kernels, poisoned_memory):
    compare(kernels, torch.randn(600, 10), torch.randint(10, (600,)))


@pytest.mark.parametrize("classes", [12, 20000])
def test_strided_logits_targets_and_incoming_gradients(kernels, classes):
    wide = torch.randn(ROWS, classes + 3)
    compare(kernels, wide[:, 1:-2], torch.randint(classes, (2 * ROWS,))[::2])
    compare(kernels, torch.randn(classes, ROWS).t(), torch.softmax(wide, dim=1)[:, 3:])
    logits, target = wide[:, 3:], torch.randint(classes, (ROWS,))
    _, normalizer = reference.cross_entropy_forward(logits, target, 0.0, -100)
    expanded = torch.tensor(0.2).expand(ROWS)
    torch.testing.assert_close(
        kernels.cross_entropy_backward(expanded, logits, target, normalizer, 0.0, -100),
        reference.cross_entropy_backward(expanded, logits, target, normalizer, 0.0, -100),
    )


@pytest.mark.parametrize("classes", [12, 20000])
def test_masked_classes_and_large_logits(kernels, classes):
    logits = torch.randn(ROWS, classes)
    logits[:, 3:9] = -torch.inf
    logits[1] += 3e4
    logits[2] -= 3e4
    logits[4] = -torch.inf
    compare(kernels, logits, torch.zeros(ROWS, dtype=torch.int64))
    # a class that is masked costs infinitely much
    losses, _ = kernels.cross_entropy_forward(logits, torch.full((ROWS,), 4), 0.0, -100)
    assert losses[:4].eq(torch.inf).all()


@pytest.mark.parametrize("classes", [12, 20000])
def test_nan_logits_stay_in_their_row(kernels, classes):
    logits = torch.randn(ROWS, classes)
    logits[1, classes - 1] = torch.nan
    losses, normalizer = kernels.cross_entropy_forward(logits, torch.zeros(ROWS, dtype=torch.int64), 0.0, -100)
    expected = torch.tensor([False, True, False, False, False])
    assert torch.equal(losses.isnan(), expected)
    assert torch.equal(normalizer.sum(0).isnan(), expected)


@pytest.mark.parametrize("classes", [12, 20000])
def test_an_index_outside_the_row_gives_nan_and_reads_nothing_there(kernels, classes):
    logits = torch.randn(ROWS, classes)
    target = torch.tensor([0, 2**40, -1, -7, classes])
    losses, normalizer = kernels.cross_entropy_forward(logits, target, 0.0, -7)
    assert torch.equal(losses.isnan(), torch.tensor([False, True, True, False, True]))
    assert losses[3] == 0
    gradient = kernels.cross_entropy_backward(torch.ones(ROWS), logits, target, normalizer, 0.0, -7)
    assert torch.equal(gradient.isnan().any(1), torch.tensor([False, True, True, False, True]))
    assert torch.equal(gradient[3], torch.zeros(classes))


def test_no_rows(kernels):
    logits, target = torch.empty(0, 10), torch.empty(0, dtype=torch.int64)
    losses, normalizer = kernels.cross_entropy_forward(logits, target, 0.0, -100)
    assert losses.shape == (0,)
    assert normalizer.shape == (2, 0)
    assert kernels.cross_entropy_backward(losses, logits, target, normalizer, 0.0, -100).shape == (0, 10)


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gradients_do_not_depend_on_what_the_logits_have_in_common(kernels, dtype, kind):
    for offset in OFFSETS:
        check_gradient_at_offset(kernels, offset, dtype, kind, 0.1, 33)
    check_gradient_at_offset(kernels, 1e4, dtype, kind, 0.0, 20000)
    check_gradient_at_offset(kernels, 1e8, dtype, kind, 0.1, 20000)


@pytest.mark.parametrize("classes", [3, 20000])
def test_a_probability_of_zero_at_a_masked_logit(kernels, classes):
    check_zero_probability_at_a_masked_logit(kernels, classes)
