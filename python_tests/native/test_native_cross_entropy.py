import math

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_checks import OFFSETS, check_gradient_at_offset, check_zero_probability_at_a_masked_logit
from native_cases import assert_same_bits, extension

from esam_kernels.backends import native, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One class; less than a vector; a block of csrc/cpu/cross_entropy.inl exactly; several and a rest; enough for threads.
SHAPES = ((1, 1), (7, 10), (5, 1024), (3, 4099), (64, 1000))
IGNORED = -100


def case(rows, classes, dtype, kind, requires=None):
    logits = (5 * torch.randn(rows, classes)).to(dtype)
    if kind == "probability":
        return logits, torch.randn(rows, classes).softmax(dim=1)
    target = torch.randint(classes, (rows,))
    if rows > 1:
        target[rows // 2] = IGNORED
    return logits, target


def oracle(logits, target, label_smoothing):
    """Losses, log-sum-exp, and the gradient of sum(losses * weights), in float64 and by autograd."""
    x = logits.double().requires_grad_()
    losses = F.cross_entropy(
        x,
        target.double() if target.is_floating_point() else target,
        reduction="none",
        label_smoothing=label_smoothing,
        ignore_index=IGNORED,
    )
    return x, losses, torch.logsumexp(x, dim=1)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_losses_and_gradients_match_float64(isa, shape, dtype, kind, label_smoothing):
    logits, target = case(*shape, dtype, kind)
    losses, normalizer = native.cross_entropy_forward(logits, target, label_smoothing, IGNORED)
    x, expected_losses, expected_lse = oracle(logits, target, label_smoothing)
    torch.testing.assert_close(losses.double(), expected_losses, rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(normalizer.double().sum(0), expected_lse, rtol=1e-6, atol=1e-30)

    weights = torch.rand(shape[0])
    gradient = native.cross_entropy_backward(weights, logits, target, normalizer, label_smoothing, IGNORED)
    (expected,) = torch.autograd.grad((expected_losses * weights).sum(), x)
    assert gradient.dtype == dtype
    # softmax and target cancel: their error, two units of float32 at most 1, stays; the rest is the output's rounding
    tolerance = {"rtol": 2e-6 + torch.finfo(dtype).eps / 2, "atol": 3e-7}
    torch.testing.assert_close(gradient.double(), expected, **tolerance)


@pytest.mark.parametrize("kind", ["index", "probability"])
def test_results_have_the_same_bits_on_every_isa_and_thread_count(kind):
    logits, target = case(64, 1000, torch.float32, kind)
    weights, results = torch.rand(64), []
    before = extension.isa(), torch.get_num_threads()
    for name in extension.available_isas():
        for threads in (1, 2):
            extension.use_isa(name)
            torch.set_num_threads(threads)
            losses, normalizer = native.cross_entropy_forward(logits, target, 0.1, IGNORED)
            results.append(
                (losses, normalizer, native.cross_entropy_backward(weights, logits, target, normalizer, 0.1, IGNORED))
            )
    extension.use_isa(before[0])
    torch.set_num_threads(before[1])
    for result in results:
        assert_same_bits(result, results[0])


def test_ignored_rows_lose_nothing_and_pull_at_nothing_even_where_not_finite(isa):
    logits = torch.tensor([[1.0, 2.0, 3.0], [math.nan, math.inf, 0.0]])
    target = torch.tensor([2, IGNORED])
    losses, normalizer = native.cross_entropy_forward(logits, target, 0.0, IGNORED)
    gradient = native.cross_entropy_backward(torch.ones(2), logits, target, normalizer, 0.0, IGNORED)
    assert losses[1] == 0
    assert torch.equal(gradient[1], torch.zeros(3))


def test_infinite_and_undefined_logits_give_what_torch_gives(isa):
    inf, nan = math.inf, math.nan
    logits = torch.tensor(
        [[inf, 1, 2], [-inf, -inf, -inf], [nan, 1, 2], [-inf, 1, 2], [nan, inf, 0], [-inf, 1, 2], [nan, nan, nan]]
    )
    target = torch.tensor([1, 1, 1, 0, 2, 1, 0])
    for label_smoothing in (0.0, 0.1):
        results = []
        for backend in (native, reference):
            losses, normalizer = backend.cross_entropy_forward(logits, target, label_smoothing, IGNORED)
            arguments = (torch.ones(7), logits, target, normalizer, label_smoothing, IGNORED)
            results.append((losses, backend.cross_entropy_backward(*arguments)))
        torch.testing.assert_close(*results, equal_nan=True)


def test_widely_spread_logits_neither_overflow_nor_lose_the_small_loss(isa):
    logits = torch.tensor([[1e4, 0.0, -1e4], [12.0, 0.0, -3.0], [-1e30, 1e30, 0.0]])
    target = torch.tensor([0, 0, 0])
    losses, normalizer = native.cross_entropy_forward(logits, target, 0.0, IGNORED)
    _, expected, expected_lse = oracle(logits, target, 0.0)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(normalizer.double().sum(0), expected_lse.detach(), rtol=1e-6, atol=0)


def test_rows_of_several_blocks_whose_maximum_moves(isa):
    inf, nan = math.inf, math.nan
    block, classes = 1024, 4099
    rows = torch.randn(8, classes)
    rows[1] += torch.arange(classes) / 10  # a larger maximum in every block
    rows[2] -= torch.arange(classes) / 10
    rows[3, :block] = -inf  # nothing in the first block
    rows[4, block:] = -inf
    rows[5] = -inf
    rows[5, -1] = 3.0
    rows[6, : 2 * block] = -inf
    rows[6, 7] = nan  # hidden among them
    rows[7, 3 * block + 5] = inf
    target = torch.full((8,), classes - 1)
    losses, normalizer = native.cross_entropy_forward(rows, target, 0.0, IGNORED)
    expected, exact = reference.cross_entropy_forward(rows.double(), target, 0.0, IGNORED)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-30, equal_nan=True)
    torch.testing.assert_close(normalizer.double().sum(0), exact.sum(0), rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [-1, 10, 2**40])
def test_a_class_that_is_not_there_is_an_index_error(bad):
    logits, target = torch.randn(4, 10), torch.tensor([1, 2, bad, 3])
    with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
        native.cross_entropy_forward(logits, target, 0.0, IGNORED)
    with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
        native.cross_entropy_backward(torch.ones(4), logits, target, torch.zeros(2, 4), 0.0, IGNORED)


def test_strided_inputs_are_read_by_their_strides(isa):
    logits, target = torch.randn(10, 6).t(), torch.randint(10, (12,))[::2]
    weights = torch.tensor(1 / 6).expand(6)
    losses, normalizer = native.cross_entropy_forward(logits, target, 0.0, IGNORED)
    torch.testing.assert_close(losses, F.cross_entropy(logits, target, reduction="none"))
    gradient = native.cross_entropy_backward(weights, logits, target, normalizer, 0.0, IGNORED)
    expected = reference.cross_entropy_backward(weights, logits, target, normalizer, 0.0, IGNORED)
    torch.testing.assert_close(gradient, expected)
    assert gradient.is_contiguous()


def test_float64_and_empty_logits_go_to_the_reference():
    logits, target = torch.randn(4, 10, dtype=torch.float64), torch.randint(10, (4,))
    actual = native.cross_entropy_forward(logits, target, 0.1, IGNORED)
    assert_same_bits(actual, reference.cross_entropy_forward(logits, target, 0.1, IGNORED))
    losses, normalizer = native.cross_entropy_forward(
        torch.empty(0, 10), torch.empty(0, dtype=torch.int64), 0.0, IGNORED
    )
    assert losses.shape == (0,)
    assert normalizer.shape == (2, 0)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", OFFSETS)
def test_gradients_do_not_depend_on_what_the_logits_have_in_common(isa, offset, dtype, kind, label_smoothing):
    for classes in (10, 33, 4099):
        check_gradient_at_offset(native, offset, dtype, kind, label_smoothing, classes)


def test_a_probability_of_zero_at_a_masked_logit(isa):
    check_zero_probability_at_a_masked_logit(native, classes=3)
    check_zero_probability_at_a_masked_logit(native, classes=4099)
