"""What the extension is given is checked once, at its door: nothing is read or written out of bounds."""

import pytest
import torch
import torch.nn.functional as F
from native_cases import extension

from esam_kernels import cross_entropy, gather, ops, select
from esam_kernels.backends import native, reference

BACKENDS = pytest.mark.parametrize("backend", ["native", "reference"])


def freed(*shape, dtype=torch.float32):
    tensor = torch.zeros(*shape, dtype=dtype)
    tensor.untyped_storage().resize_(0)
    return tensor


@BACKENDS
def test_rows_of_freed_memory_are_refused(backend):
    indices = torch.tensor([0, 2])
    with pytest.raises(ValueError, match=r"memory of tensors\[1\] was freed"):
        ops.gather([torch.randn(4, 3), freed(4, 3)], indices, backend=backend)
    with pytest.raises(ValueError, match=r"memory of tensors\[0\] was freed"):
        gather(indices, freed(4, 3))


@BACKENDS
def test_a_storage_that_is_too_short_is_refused(backend):
    tensor = torch.randn(4, 3)
    tensor.untyped_storage().resize_(24)
    message = r"sources\[0\] has no memory: it is a Float tensor of shape \[4, 3\] on cpu, and its storage has 24 bytes"
    with pytest.raises(ValueError, match=message):
        native.gather([tensor], torch.tensor([3]))
    with pytest.raises(ValueError, match="24 bytes, too few"):
        ops.gather([tensor], torch.tensor([3]), backend=backend)


@BACKENDS
def test_losses_of_freed_memory_are_refused(backend):
    x, target, losses, normalizer = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]), torch.ones(4), torch.zeros(2, 4)
    rest, indices = (0.0, -100), freed(4, dtype=torch.int64)
    for name, logits, labels in (
        ("logits", freed(4, 3), target),
        ("target", x, indices),
        ("target", x, freed(4, 3)),
    ):
        with pytest.raises(ValueError, match=f"memory of {name} was freed"):
            ops.cross_entropy_forward(logits, labels, *rest, backend=backend)
        with pytest.raises(ValueError, match=f"memory of {name} was freed"):
            ops.cross_entropy_backward(losses, logits, labels, normalizer, *rest, backend=backend)
        with pytest.raises(ValueError, match=f"memory of {name} was freed"):
            cross_entropy(logits, labels)
    with pytest.raises(ValueError, match="memory of grad_losses was freed"):
        ops.cross_entropy_backward(freed(4), x, target, normalizer, *rest, backend=backend)
    with pytest.raises(ValueError, match="memory of normalizer was freed"):
        ops.cross_entropy_backward(losses, x, target, freed(2, 4), *rest, backend=backend)
    with pytest.raises(ValueError, match="memory of loss_before was freed"):
        ops.select(freed(4), losses, 2, backend=backend)
    with pytest.raises(ValueError, match="memory of loss_after was freed"):
        select(losses, freed(4), 2)
    for before, after, labels in ((freed(4), losses, None), (freed(4, 3), losses, target)):
        with pytest.raises(ValueError, match=r"memory of (before|logits) was freed"):
            ops.select_gather(before, after, [x], 2, labels, backend=backend)


@BACKENDS
@pytest.mark.parametrize("name", ["params", "grads", "backups", "momentum_buffers"])
def test_weights_and_gradients_of_freed_memory_are_refused(backend, name):
    given = {key: [torch.ones(3), torch.ones(5)] for key in ("params", "grads", "backups", "momentum_buffers")}
    given[name][1] = freed(5)
    w, g, b, m = given.values()
    message = rf"memory of {name}\[1\] was freed"
    partials, scale = torch.ones(reference.NUM_PARTIALS, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    with torch.no_grad():
        if name in ("params", "grads"):
            with pytest.raises(ValueError, match=message):
                ops.norm_partials(w, g, [0, 0], [False], 0.0, backend=backend)
        if name != "momentum_buffers":
            with pytest.raises(ValueError, match=message):
                ops.perturb_(w, g, b, [0, 0], [0, 4], partials, scale, [False], 0.0, 1.0, 0.0, backend=backend)
        with pytest.raises(ValueError, match=message):
            ops.restore_sgd_(w, b, g, m, False, 0.1, None, 0.9, 0.0, 0.0, False, False, backend=backend)
        if name in ("params", "backups"):
            with pytest.raises(ValueError, match=message):
                ops.restore_(w, b, backend=backend)
    assert all(torch.equal(tensors[0], torch.ones(3)) for tensors in given.values())


@pytest.mark.parametrize(
    "logits",
    [
        torch.zeros(2, 4).t(),
        torch.zeros(4, 2, dtype=torch.float64),
        torch.zeros(4, 2, dtype=torch.int32),
        torch.zeros(4, 2, 1),
        freed(4, 2),
    ],
    ids=["transposed", "float64", "int32", "three dimensions", "freed"],
)
def test_logits_that_the_kernels_do_not_take_are_refused(logits):
    index, losses, normalizer = torch.zeros(4, dtype=torch.int64), torch.zeros(4), torch.zeros(2, 4)
    message = r"^logits (must be a contiguous Float, .* got a|has no memory: it is a) \w+ tensor of shape \[.*\] on cpu"
    with pytest.raises(ValueError, match=message):
        extension.cross_entropy_forward(logits, index, None, 0.0, -100, losses, normalizer)
    with pytest.raises(ValueError, match=message):
        extension.cross_entropy_backward(losses, logits, index, None, normalizer, 0.0, -100, torch.zeros(4, 2))


def test_results_of_another_size_or_dtype_are_refused():
    logits, index, losses = torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64), torch.zeros(4)
    message = r"normalizer must be a contiguous Float tensor on the CPU of 8 elements or more, got a Float tensor"
    with pytest.raises(ValueError, match=message + r" of shape \[4\] on cpu$"):
        extension.cross_entropy_forward(logits, index, None, 0.0, -100, losses, torch.zeros(4))
    with pytest.raises(ValueError, match=r"losses must be .* got a Double tensor of shape \[4\]"):
        extension.cross_entropy_forward(logits, index, None, 0.0, -100, losses.double(), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"index must be a contiguous Long .* got a Int tensor of shape \[4\]"):
        extension.cross_entropy_forward(logits, index.int(), None, 0.0, -100, losses, torch.zeros(2, 4))
    with pytest.raises(TypeError, match=r"losses must be a torch.Tensor, got list"):
        extension.cross_entropy_forward(logits, index, None, 0.0, -100, [1.0] * 4, torch.zeros(2, 4))
    for gradient in (torch.zeros(4, 1), torch.zeros(4, 2).half(), torch.zeros(2, 4).t()):
        with pytest.raises(ValueError, match=r"grad_logits must be contiguous .* \[4, 2\] on cpu, got a"):
            extension.cross_entropy_backward(losses, logits, index, None, torch.zeros(2, 4), 0.0, -100, gradient)
    for given, found in ((None, "both None"), (torch.zeros(4, 2), "both given")):
        with pytest.raises(ValueError, match=f"index and probability are {found}: give one of them"):
            extension.cross_entropy_forward(
                logits, None if given is None else index, given, 0.0, -100, losses, torch.zeros(2, 4)
            )


@pytest.mark.parametrize("k", [0, -1, 5])
def test_a_k_outside_the_batch_is_refused(k):
    with pytest.raises(ValueError, match=rf"k must lie in \[1, 4\], the number of samples, got {k}"):
        extension.select(torch.zeros(4), torch.zeros(4), k, torch.zeros(8, dtype=torch.int64))


def test_destinations_that_are_too_small_are_refused():
    source, indices = torch.zeros(4, 2), torch.tensor([0, 1])
    for destination in (torch.zeros(1, 2), torch.zeros(2, 2).half(), freed(2, 2)):
        with pytest.raises(ValueError, match=r"destinations\[0\] must be a dense Float tensor of 4 elements, .* got a"):
            extension.gather([source], [destination], indices)
    with pytest.raises(ValueError, match="gather got 0 destinations for 1 sources: as many destinations"):
        extension.gather([source], [], indices)


def test_a_target_changed_behind_autograd_writes_nothing_out_of_bounds():
    logits, target = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 0])
    losses = cross_entropy(logits, target)
    target.data[2] = 2**40
    with pytest.raises(IndexError, match=f"Target {2**40} is out of bounds: classes are 0 to 2, and -100 is ignored"):
        losses.sum().backward()


def test_a_quantized_tensor_keeps_its_quantizer():
    values = torch.quantize_per_tensor(torch.arange(12.0).view(4, 3), 0.5, 3, torch.quint8)
    indices = torch.tensor([2, 0])
    for rows in (
        gather(indices, values),
        *(ops.gather([values], indices, backend=b)[0] for b in ("native", "reference")),
    ):
        assert rows.q_scale() == 0.5
        assert torch.equal(rows.dequantize(), torch.arange(12.0).view(4, 3)[indices])


@torch.no_grad()
def test_negative_and_conjugate_bits_are_honoured_without_the_dispatcher():
    conjugated = torch.randn(4, 3, dtype=torch.complex64).conj()
    negated = torch._neg_view(torch.randn(4, 3))  # contiguous, so that nothing copies it on the way
    target, indices = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 3])
    losses, _ = ops.cross_entropy_forward(negated, target, 0.0, -100, backend="native")
    torch.testing.assert_close(losses, F.cross_entropy(negated.resolve_neg().clone(), target, reduction="none"))
    torch.testing.assert_close(cross_entropy(negated, target), losses)
    before, after = torch.zeros(4), torch._neg_view(torch.randn(4))
    chosen = ops.select(before, after, 2, backend="native")
    assert torch.equal(chosen, reference.select(before, after.resolve_neg().clone(), 2))
    for backend in ("native", "reference"):
        rows = ops.gather([conjugated, negated], indices, backend=backend)
        assert torch.equal(rows[0].resolve_conj(), conjugated.resolve_conj()[indices])
        assert torch.equal(rows[1].resolve_neg(), negated.resolve_neg()[indices])


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_adam_in_float64_takes_a_rate_in_its_own_dtype(lr_dtype, decoupled):
    start = [torch.randn(65, dtype=torch.float64) for _ in range(5)]
    results = []
    for backend in (native, reference):
        w, backup, grad, mean, square = ([t.clone()] for t in start)
        square[0].abs_()
        rest = (0.9, 0.99, 1e-8, 0.3, False, False, decoupled)
        rate = torch.tensor(0.1, dtype=lr_dtype)
        backend.restore_adam_(w, backup, grad, mean, square, [], [torch.tensor(2.0)], 0.0, rate, *rest)
        results.append(w[0])
    torch.testing.assert_close(*results, rtol=4e-16, atol=4e-16)


@pytest.mark.parametrize("offset", [-4, -400, -(2**40)])
def test_negative_offsets_draw_the_references_mask(isa, offset):
    state = torch.tensor([5, 7, 2**31])
    params, grads = [torch.zeros(1027)], [torch.ones(1027)]
    partials = reference.norm_partials(params, grads, [0], [False], 0.0)
    scale = torch.ones(1, dtype=torch.float64)
    native.perturb_(params, grads, [], [0], [offset], partials, scale, [False], 0.0, 1.0, 1e-12, state)
    assert torch.equal(params[0] != 0, reference.element_mask(1027, offset, state))
