"""Per-sample cross-entropy against torch's, in every layout; derivatives; half precision; refusals."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_checks import OFFSETS, check_gradient_at_offset, check_zero_probability_at_a_masked_logit
from torch.autograd import forward_ad

from esam_kernels import cross_entropy, ops, select, selection
from esam_kernels.backends import reference

CLASSES = 5


def logits_and_target(shape, dtype=torch.float64, scale=3.0):
    """Logits (b, C, ...) with some extreme rows, and class indices."""
    logits = (torch.randn(shape, dtype=torch.float64) * scale).to(dtype)
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    return logits, target


def torchs(logits, target, **kwargs):
    return F.cross_entropy(logits, target, reduction="none", **kwargs)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [1, 2, 5, 1000])
def test_losses_of_one_prediction_a_sample_are_torchs(classes, dtype, smoothing):
    logits, target = logits_and_target((9, classes), dtype)
    losses = cross_entropy(logits, target, label_smoothing=smoothing)
    torch.testing.assert_close(losses, torchs(logits, target, label_smoothing=smoothing))
    assert losses.shape == (9,)
    assert losses.dtype == dtype


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("shape", [(4, CLASSES, 7), (4, CLASSES, 3, 2), (2, CLASSES, 2, 3, 2)])
def test_losses_of_several_positions_are_the_mean_over_them(shape, smoothing):
    logits, target = logits_and_target(shape)
    expected = torchs(logits, target, label_smoothing=smoothing).flatten(1).mean(dim=1)
    torch.testing.assert_close(cross_entropy(logits, target, label_smoothing=smoothing), expected)


@pytest.mark.parametrize("shape", [(4, 7, CLASSES), (4, 3, 2, CLASSES)])
def test_classes_may_be_last_as_language_models_have_them(shape):
    logits = torch.randn(shape, dtype=torch.float64)
    target = torch.randint(0, CLASSES, shape[:-1])
    expected = torchs(logits.movedim(-1, 1), target).flatten(1).mean(dim=1)
    torch.testing.assert_close(cross_entropy(logits, target), expected)


@pytest.fixture
def unwarned(monkeypatch):
    """As in a new process, in which no warning was given yet."""
    monkeypatch.setattr(selection, "_WARNED", set())


@pytest.fixture
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.usefixtures("unwarned")
def test_where_both_layouts_fit_torchs_is_taken_with_one_warning_a_shape():
    logits = torch.randn(4, CLASSES, CLASSES, dtype=torch.float64)
    target = torch.randint(0, CLASSES, (4, CLASSES))
    expected = torchs(logits, target).mean(dim=1)
    with pytest.warns(UserWarning, match=r"logits of shape \(4, 5, 5\).*class_dim=1 or class_dim=-1") as given:
        losses = [cross_entropy(logits[:samples], target[:samples]) for samples in (4, 4, 3)]
    for samples, found in zip((4, 4, 3), losses):
        torch.testing.assert_close(found, expected[:samples])
    assert [warning.filename for warning in given] == [__file__]
    with pytest.warns(UserWarning, match=r"logits of shape \(2, 3, 3\)"):
        cross_entropy(torch.randn(2, 3, 3), torch.zeros(2, 3, dtype=torch.int64))
    with pytest.warns(UserWarning, match=r"target of shape \(4, 5, 5\)"):
        cross_entropy(logits, logits.softmax(dim=1))


@pytest.mark.usefixtures("unwarned", "no_warning")
@pytest.mark.parametrize("class_dim", [1, 2, -1, -2, 3])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_class_dim_says_where_the_classes_are(class_dim, kind):
    shape = (4, CLASSES, CLASSES, CLASSES) if class_dim == 3 else (4, CLASSES, CLASSES)
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    if kind == "indices":
        given = in_torchs_layout = torch.randint(0, CLASSES, shape[:-1])
    else:
        given = torch.randn(shape, dtype=torch.float64).softmax(dim=class_dim)
        in_torchs_layout = given.movedim(class_dim, 1)
    expected = torchs(logits.movedim(class_dim, 1), in_torchs_layout, label_smoothing=0.1).flatten(1).mean(dim=1)
    losses = cross_entropy(logits, given, label_smoothing=0.1, class_dim=class_dim)
    torch.testing.assert_close(losses, expected)
    weights = torch.randn(4, dtype=torch.float64)
    got, wanted = (torch.autograd.grad((values * weights).sum(), logits)[0] for values in (losses, expected))
    torch.testing.assert_close(got, wanted)


@pytest.mark.usefixtures("unwarned", "no_warning")
@pytest.mark.parametrize("class_dim", [None, 1, -1])
def test_one_prediction_a_sample_has_one_layout(class_dim):
    logits, target = logits_and_target((CLASSES, CLASSES), torch.float32)
    torch.testing.assert_close(cross_entropy(logits, target, class_dim=class_dim), torchs(logits, target))


@pytest.mark.parametrize(
    ("shape", "target", "class_dim", "error", "message"),
    [
        ((4, 5), (4,), 0, ValueError, "other than the batch's, 0, so 1 to 1 or -1 to -1, got 0"),
        ((4, 5), (4,), 2, ValueError, "class_dim must be a dimension .*got 2"),
        ((4, 5, 3), (4, 3), -3, ValueError, "so 1 to 2 or -2 to -1, got -3"),
        ((4, 5), (4,), True, ValueError, "got True"),
        ((4, 5), (4,), "last", TypeError, "class_dim must be an integer, got 'last'"),
        ((4, 5, 3), (4, 3), -1, ValueError, r"must hold class indices of shape \(4, 5\), or class probabilities"),
        ((4, 5, 3), (4, 5), 1, ValueError, r"must hold class indices of shape \(4, 3\), or class probabilities"),
    ],
)
def test_a_class_dim_that_does_not_fit_is_refused(shape, target, class_dim, error, message):
    with pytest.raises(error, match=message):
        cross_entropy(torch.randn(shape), torch.zeros(target, dtype=torch.int64), class_dim=class_dim)


def test_b_plus_from_logits_is_ranked_in_the_layout_that_class_dim_says():
    before, logits = torch.zeros(64), torch.randn(64, CLASSES, CLASSES)
    target = torch.randint(0, CLASSES, (64, CLASSES))
    after = torchs(logits.movedim(-1, 1), target).mean(dim=1)
    got = selection.selected_from_logits_on(
        "", 16, before, logits, target, torch.arange(64), label_smoothing=0.0, ignore_index=-100, class_dim=-1
    )
    assert got.tolist() == after.topk(16).indices.sort().values.tolist()


@pytest.mark.parametrize("ignored", [-100, 2])
def test_ignored_positions_count_neither_in_the_loss_nor_in_the_mean_nor_in_the_gradient(ignored):
    logits, target = logits_and_target((6, CLASSES, 4))
    target[0, 1] = target[1] = target[2, :3] = ignored
    logits.requires_grad_()
    losses = cross_entropy(logits, target, ignore_index=ignored)
    kept = (target != ignored).sum(dim=1)
    expected = torchs(logits, target, ignore_index=ignored).sum(dim=1) / kept.clamp(min=1)
    torch.testing.assert_close(losses, expected)
    assert losses[1] == 0
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), logits)[0])
    assert not gradient.movedim(1, -1)[target == ignored].any()


def test_an_ignored_sample_of_one_prediction_has_no_loss():
    logits, target = logits_and_target((4, CLASSES))
    target[2] = -100
    losses = cross_entropy(logits, target, label_smoothing=0.1)
    torch.testing.assert_close(losses, torchs(logits, target, label_smoothing=0.1))
    assert losses[2] == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(6, CLASSES), (4, CLASSES, 3)])
def test_class_probabilities_as_target_are_torchs(shape, smoothing):
    logits, _ = logits_and_target(shape)
    target = torch.softmax(torch.randn(shape, dtype=torch.float64), dim=1)
    expected = torchs(logits, target, label_smoothing=smoothing).reshape(shape[0], -1).mean(dim=1)
    torch.testing.assert_close(cross_entropy(logits, target, label_smoothing=smoothing), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_class_indices_may_have_any_integer_dtype(dtype):
    logits, target = logits_and_target((9, CLASSES))
    torch.testing.assert_close(cross_entropy(logits, target.to(dtype)), torchs(logits, target))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_give_float32_losses_and_gradients_in_their_own_dtype(dtype):
    logits, target = logits_and_target((9, CLASSES), dtype)
    logits.requires_grad_()
    losses = cross_entropy(logits, target)
    exact = logits.detach().double().requires_grad_()
    expected = torchs(exact, target)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)
    losses.sum().backward()
    expected.sum().backward()
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_large_logits_neither_overflow_nor_lose_the_loss():
    logits = torch.tensor([[1e4, -1e4, 0.0], [6e4, 6e4, 6e4], [-1e30, 0.0, 1e30]])
    losses = cross_entropy(logits, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(losses, torch.tensor([0.0, math.log(3), 0.0]))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["indices", "ignored", "probabilities", "positions"])
def test_first_and_second_derivatives(kind, smoothing):
    shape = (3, 4, 2) if kind == "positions" else (4, 4)
    logits, target = logits_and_target(shape, scale=1.0)
    if kind == "ignored":
        target[1] = -100
    if kind == "probabilities":
        target = torch.softmax(torch.randn(shape, dtype=torch.float64), dim=1) * 1.3  # need not sum to 1
    logits.requires_grad_()

    def losses(x):
        return cross_entropy(x, target, label_smoothing=smoothing)

    assert torch.autograd.gradcheck(losses, logits)
    assert torch.autograd.gradgradcheck(losses, logits)


def test_logits_need_not_be_contiguous():
    logits = torch.randn(CLASSES, 6, dtype=torch.float64).t()
    target = torch.randint(0, CLASSES, (6,))
    torch.testing.assert_close(cross_entropy(logits, target), torchs(logits, target))


def test_an_empty_batch_has_no_losses():
    assert cross_entropy(torch.empty(0, CLASSES), torch.empty(0, dtype=torch.int64)).shape == (0,)
    sequences = torch.empty(0, CLASSES, 3, requires_grad=True)
    for target in (torch.empty(0, 3, dtype=torch.int64), torch.empty(0, CLASSES, 3)):
        losses = cross_entropy(sequences, target, class_dim=1)
        assert losses.shape == (0,)
        losses.sum().backward()
    assert sequences.grad.shape == sequences.shape


def test_float32_losses_under_autocast():
    logits, target = logits_and_target((9, CLASSES), torch.float32)
    weight = torch.randn(CLASSES, CLASSES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = logits @ weight
        losses = cross_entropy(rounded, target)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(losses, torchs(rounded.float(), target))


@pytest.mark.parametrize(
    ("shape", "target", "message"),
    [
        ((4, 5), torch.zeros(3, dtype=torch.int64), r"shape \(3,\).*does not fit logits of shape \(4, 5\)"),
        ((4, 5), torch.zeros(4, 1, dtype=torch.int64), r"shape \(4, 1\)"),
        ((4, 5), torch.zeros(4), r"torch.float32, shape \(4,\)"),
        ((4, 5), torch.zeros(4, dtype=torch.bool), "torch.bool"),
        ((4, 5), torch.zeros(4, dtype=torch.complex64), "torch.complex64"),
        ((4, 5, 2), torch.zeros(4, 3, dtype=torch.int64), r"\(4, 2\) or \(4, 5\)"),
        ((4, 0), torch.zeros(4, dtype=torch.int64), "no classes"),
        ((5,), torch.zeros((), dtype=torch.int64), r"\(b, C, ...\).*\(5,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shape, target, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(torch.randn(shape), target)


def test_integer_logits_are_refused():
    with pytest.raises(ValueError, match=r"floating point.*int64"):
        cross_entropy(torch.zeros(4, 5, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("smoothing", [-0.1, 1.1, math.nan])
def test_label_smoothing_outside_its_range_is_refused(smoothing):
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1\]"):
        cross_entropy(torch.randn(4, 5), torch.zeros(4, dtype=torch.int64), label_smoothing=smoothing)


def test_a_target_that_requires_grad_is_refused():
    with pytest.raises(ValueError, match="target requires grad"):
        cross_entropy(torch.randn(4, 5), torch.full((4, 5), 0.2, requires_grad=True))


@pytest.mark.parametrize("index", [5, -1, 10**6])
def test_a_class_index_out_of_range_is_an_error_on_the_cpu(index):
    with pytest.raises(IndexError):
        cross_entropy(torch.randn(4, 5), torch.full((4,), index))


@pytest.mark.parametrize("backend", ["reference", None])
def test_forward_derivatives_and_batched_gradients_are_torchs(backend, monkeypatch):
    if backend is None:
        monkeypatch.delenv("ESAM_KERNELS_BACKEND", raising=False)
    logits, direction, target = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 2, 1, 1])

    def theirs(x):
        return F.cross_entropy(x, target, reduction="none")

    def ours(x):
        return cross_entropy(x, target)

    expected = torch.func.jvp(theirs, (logits,), (direction,))[1]
    torch.testing.assert_close(torch.func.jvp(ours, (logits,), (direction,))[1], expected)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(ours(forward_ad.make_dual(logits, direction))).tangent
    torch.testing.assert_close(found, expected)
    jacobian = torch.autograd.functional.jacobian(theirs, logits)
    torch.testing.assert_close(torch.autograd.functional.jacobian(ours, logits, vectorize=True), jacobian)
    torch.testing.assert_close(torch.func.jacrev(ours)(logits), jacobian)


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("kind", ["probabilities", "positions"])
def test_many_gradients_at_once_are_torchs(backend, kind, monkeypatch):
    """``is_grads_batched``, by which ``jacobian(..., vectorize=True)`` goes too."""
    if backend is None:
        monkeypatch.delenv("ESAM_KERNELS_BACKEND", raising=False)
    logits, target = torch.randn(4, 3), torch.rand(4, 3)
    if kind == "positions":
        logits, target = torch.randn(4, 3, 2), torch.randint(0, 3, (4, 2))

    def theirs(x):
        return F.cross_entropy(x, target, reduction="none").reshape(4, -1).mean(dim=1)

    expected = torch.autograd.functional.jacobian(theirs, logits)
    found = torch.autograd.functional.jacobian(lambda x: cross_entropy(x, target), logits, vectorize=True)
    torch.testing.assert_close(found, expected)


def test_an_ignored_sample_has_no_gradient_whatever_its_logits_are():
    logits = torch.randn(3, 4, dtype=torch.float64)
    logits[1] = torch.nan
    target = torch.tensor([0, -100, 2])
    for create_graph in (False, True):
        x = logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(x, target).sum(), x, create_graph=create_graph)
        assert (gradient[1] == 0).all()
        torch.testing.assert_close(gradient[0].detach(), torch.softmax(logits[0], 0) - F.one_hot(target[0], 4))


def test_tensors_on_different_devices_are_refused():
    logits, target = torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="different devices: logits on cpu, target on meta"):
        cross_entropy(logits, target.to("meta"))
    with pytest.raises(ValueError, match="different devices: loss_before on cpu, loss_after on meta"):
        select(logits[:, 0], logits[:, 0].to("meta"), 2)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gradients_do_not_depend_on_what_the_logits_have_in_common(dtype, kind, label_smoothing):
    for offset in OFFSETS:
        check_gradient_at_offset(reference, offset, dtype, kind, label_smoothing, 33)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_by_way_of_autograd_at_an_offset(offset, create_graph):
    logits, target = logits_and_target((6, CLASSES), torch.float32)
    x = (logits + offset).requires_grad_()
    exact = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(torchs(exact, target).sum(), exact)
    (gradient,) = torch.autograd.grad(cross_entropy(x, target).sum(), x, create_graph=create_graph)
    torch.testing.assert_close(gradient.detach().double(), expected, rtol=2e-6, atol=4e-7)


def test_a_probability_of_zero_at_a_masked_logit():
    check_zero_probability_at_a_masked_logit(reference, classes=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_class_probabilities_have_no_class_to_ignore(dtype):
    logits, target = torch.randn(4, 3, dtype=dtype), torch.randn(4, 3, dtype=dtype).softmax(dim=1)
    with pytest.raises(RuntimeError, match="ignore_index"):
        torchs(logits, target, ignore_index=1)
    with pytest.raises(ValueError, match="ignore_index=1 names a class, but the target holds class probabilities"):
        cross_entropy(logits, target, ignore_index=1)
    with pytest.raises(ValueError, match="ignore_index=0 names a class"):
        ops.cross_entropy_forward(logits, target, 0.0, 0)
    with pytest.raises(ValueError, match="ignore_index=2 names a class"):
        ops.select_gather(logits, logits, [logits], 2, target, 0.0, 2)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignored", [-100, 2])
def test_on_a_gpu_a_class_out_of_range_makes_its_own_row_nan_and_asserts_nothing(monkeypatch, smoothing, ignored):
    """The reference serves a GPU too, and second derivatives on every backend."""
    logits = torch.randn(6, CLASSES, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, CLASSES, 4, -1, 2, 2**40])
    named = torch.tensor([True, False, True, False, True, False])
    options = {"label_smoothing": smoothing, "ignore_index": ignored}
    expected = torchs(logits[named], target[named], **options)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), logits)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True), raising=False)
    losses, normalizer = reference.cross_entropy_forward(logits, target, smoothing, ignored)
    torch.testing.assert_close(losses[named], expected)
    assert losses[~named].isnan().all()
    gradient = reference.cross_entropy_backward(torch.ones(6), logits, target, normalizer, smoothing, ignored)
    torch.testing.assert_close(gradient[named], expected_gradient[named])
    assert gradient[~named].isnan().all()
