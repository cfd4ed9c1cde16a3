"""The direct way of plain tensors: the same as the general one, and taken only where nothing is out of the ordinary."""

import pytest
import torch
import torch.nn.functional as F
from native_cases import extension
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.profiler import profile
from torch.testing._internal.two_tensor import TwoTensor

from esam_kernels import cross_entropy, gather, ops, select
from esam_kernels.backends import reference

direct = extension.direct
SAMPLES, CLASSES = 33, 10
HALF_UNITS = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def batch(dtype=torch.float32):
    logits = torch.randn(SAMPLES, CLASSES).to(dtype)
    target = torch.randint(CLASSES, (SAMPLES,))
    target[::7] = -100
    return logits, target


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("dtype", HALF_UNITS)
def test_losses_and_gradient_are_those_of_the_definition(dtype, label_smoothing):
    logits, target = batch(dtype)
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, target, reduction="none", label_smoothing=label_smoothing)
    weights = torch.rand(SAMPLES)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), exact)

    logits.requires_grad_()
    losses = direct.cross_entropy(logits, target, label_smoothing, -100)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.detach().double(), expected.detach(), rtol=2e-6, atol=2e-6)
    (gradient,) = torch.autograd.grad((losses * weights).sum(), logits)
    assert gradient.dtype == dtype
    tolerance = HALF_UNITS[dtype]
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=tolerance, atol=tolerance * 0.1)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_the_second_derivative_is_that_of_the_definition(label_smoothing):
    logits, target = batch()
    found = []
    for x, loss in (
        (logits.double().requires_grad_(), lambda x: F.cross_entropy(x, target, reduction="none", **options)),
        (logits.clone().requires_grad_(), lambda x: direct.cross_entropy(x, target, label_smoothing, -100)),
    ):
        options = {"label_smoothing": label_smoothing}
        (gradient,) = torch.autograd.grad((loss(x) * torch.arange(SAMPLES)).sum(), x, create_graph=True)
        second = torch.autograd.grad(gradient.square().sum(), x)[0]
        found.append((gradient.detach().double(), second.double()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    assert found[0][1].abs().max() > 0.1


def test_without_autograd_nothing_is_recorded():
    logits, target = batch()
    with torch.no_grad():
        assert not direct.cross_entropy(logits.requires_grad_(), target, 0.0, -100).requires_grad
    assert direct.cross_entropy(logits, target, 0.0, -100).grad_fn is not None


def test_a_class_out_of_range_is_an_error():
    logits, target = batch()
    target[3] = CLASSES
    with pytest.raises(IndexError, match="Target 10 is out of bounds: classes are 0 to "):
        direct.cross_entropy(logits, target, 0.0, -100)
    with pytest.raises(IndexError, match=r"index \d+ is out of range: tensor \d of those to gather from has \d+ rows"):
        direct.gather([logits], torch.tensor([0, SAMPLES]))


def test_selection_is_the_references():
    before, after = torch.randn(2, SAMPLES).round(decimals=1)
    after[5] = torch.nan
    for k in (1, 7, SAMPLES):
        assert torch.equal(direct.select(before, after, k), reference.select(before, after, k))


def test_rows_keep_dtype_and_format():
    indices = torch.tensor([2, 3, 30])
    images = torch.randn(SAMPLES, 3, 5, 4).contiguous(memory_format=torch.channels_last)
    tensors = [images, torch.arange(SAMPLES), torch.rand(SAMPLES, 2) > 0.5, torch.randn(SAMPLES, 0)]
    gathered = direct.gather(tensors, indices)
    for rows, tensor in zip(gathered, tensors, strict=True):
        expected = tensor[indices]
        assert rows.dtype == tensor.dtype
        assert torch.equal(rows, expected)
    assert gathered[0].stride() == reference.gather([images], indices)[0].stride()


class Subclass(torch.Tensor):
    pass


class Mode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_anything_out_of_the_ordinary_is_left_to_the_general_way():
    logits, target = batch()
    indices = torch.tensor([0, 1])
    before = torch.rand(SAMPLES)
    refused = [
        direct.cross_entropy(logits.double(), target, 0.0, -100),
        direct.cross_entropy(logits.t().contiguous().t(), target, 0.0, -100),
        direct.cross_entropy(logits, target.int(), 0.0, -100),
        direct.cross_entropy(logits, target[:-1], 0.0, -100),
        direct.cross_entropy(logits, target, 1.5, -100),
        direct.cross_entropy(logits[:0], target[:0], 0.0, -100),
        direct.cross_entropy(logits.as_subclass(Subclass), target, 0.0, -100),
        direct.cross_entropy(torch.empty_like(logits, device="meta"), target, 0.0, -100),
        direct.cross_entropy("logits", target, 0.0, -100),
        direct.select(before, before[:-1], 1),
        direct.select(before, before, 0),
        direct.select(before, before, SAMPLES + 1),
        direct.select(before.double(), before.double(), 1),
        direct.select(before[::2], before[::2], 1),
        direct.gather([logits[:, ::2]], indices),
        direct.gather([torch.tensor(1.0)], indices),
        direct.gather([logits], indices.int()),
        direct.gather([logits.clone().requires_grad_()], indices),
        direct.gather([torch.complex(logits, logits).conj()], indices),
    ]
    assert refused == [None] * len(refused)


@pytest.mark.parametrize("somebody", [FakeTensorMode, Mode, profile])
def test_nothing_is_hidden_from_who_looks_on(somebody):
    logits, target = batch()
    losses, indices = torch.rand(SAMPLES), torch.tensor([1, 2])
    with somebody():
        assert direct.cross_entropy(logits, target, 0.0, -100) is None
        assert direct.select(losses, losses, 1) is None
        assert direct.gather([logits], indices) is None
    assert direct.cross_entropy(logits, target, 0.0, -100) is not None


def test_transforms_and_compilation_still_work():
    logits, target = batch()
    target = target.clamp(min=0)
    expected = F.cross_entropy(logits, target, reduction="none")

    def losses(logits, target):
        return cross_entropy(logits, target)

    by_sample = torch.vmap(lambda x, y: losses(x[None], y[None])[0], in_dims=(0, 0))
    gradient = torch.func.grad(lambda x: losses(x, target).sum())(logits)
    torch.testing.assert_close(gradient, F.softmax(logits, 1) - F.one_hot(target, CLASSES))
    torch.testing.assert_close(torch.compile(losses, fullgraph=True, backend="aot_eager")(logits, target), expected)
    torch.testing.assert_close(by_sample(logits, target), expected)


def test_the_public_functions_go_the_direct_way(monkeypatch):
    calls = []

    class Spy:
        def __getattr__(self, name):
            calls.append(name)
            return getattr(direct, name)

    monkeypatch.setattr("esam_kernels.backends.native.direct", Spy())
    logits, target = batch()
    losses = cross_entropy(logits, target)
    indices = select(torch.zeros(SAMPLES), losses, 5)
    rows, labels = gather(indices, logits, target)
    assert calls == ["cross_entropy", "select", "gather"]
    torch.testing.assert_close(losses, F.cross_entropy(logits, target, reduction="none"))
    assert torch.equal(rows, logits[indices])
    assert torch.equal(labels, target[indices])
    assert ops.direct("reference", logits.device) is None


def test_gradients_are_right_where_hooks_lay_out_the_saved_tensors_anew():
    logits, target = batch()
    logits.requires_grad_()
    (expected,) = torch.autograd.grad(direct.cross_entropy(logits, target, 0.0, -100).sum(), logits)

    def pack(tensor):
        return tensor.t().contiguous() if tensor.dim() == 2 else tensor

    def unpack(packed):
        return packed.t() if packed.dim() == 2 else packed

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        losses = direct.cross_entropy(logits, target, 0.0, -100)
    assert torch.equal(torch.autograd.grad(losses.sum(), logits)[0], expected)


FAKE = FakeTensorMode()


@pytest.mark.parametrize("make", [TwoTensor, lambda a, b: FAKE.from_tensor(a)], ids=["two", "fake"])
def test_subclasses_take_the_dispatchers_way_without_autograd_too(make):
    logits, target = batch()
    wrapped = make(logits, logits.clone())
    losses = torch.rand(SAMPLES)
    with torch.no_grad():
        found = cross_entropy(wrapped, make(target, target.clone()))
        assert type(found) is type(wrapped)
        assert found.shape == (SAMPLES,)
        assert type(select(make(losses, losses.clone()), make(losses, losses.clone()), 3)) is type(wrapped)


def test_a_default_device_elsewhere_changes_nothing():
    logits, target = batch()
    param, grad = torch.nn.Parameter(torch.zeros(5)), torch.ones(5)
    with torch.device("meta"), torch.no_grad():
        losses = cross_entropy(logits, target)
        indices = select(torch.zeros(SAMPLES, device="cpu"), losses, 4)
        partials = ops.norm_partials([param], [grad], [0], [False], 0.0)
    torch.testing.assert_close(losses, F.cross_entropy(logits, target, reduction="none"))
    assert indices.device.type == "cpu"
    assert partials.sum() == 5.0
