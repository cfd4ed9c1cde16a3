"""Every kernel of csrc/cuda against the reference and float64, thread by thread on the CPU."""

from __future__ import annotations

import importlib
import itertools

import loss_checks
import operator_checks as checks
import pytest
import torch
import torch.nn.functional as F
from cross_entropy_checks import OFFSETS, check_gradient_at_offset, check_zero_probability_at_a_masked_logit
from walk_checks import check_perturb_walks_backwards_over_what_the_norm_has_read

from esam_kernels import ESAM, backends, cross_entropy, ops
from esam_kernels.backends import reference
from esam_kernels.backends.cuda import extension, perturbation
from esam_kernels.doctor import self_check

# Where threads of a block exchange something, they run in two orders.
in_both_orders = pytest.mark.usefixtures("order")
dtypes = pytest.mark.parametrize("dtype", checks.DTYPES)
shifts = pytest.mark.parametrize("shift", [0, 1])


@in_both_orders
@shifts
@dtypes
@pytest.mark.parametrize("adaptive", [False, True])
def test_norm(backend, device, dtype, adaptive, shift):
    checks.check_norm(backend, device, dtype, adaptive, shift)


def test_norm_of_extremes(backend, device):
    checks.check_norm_of_extremes(backend, device)
    checks.check_norm_of_what_is_not_finite(backend, device)


# Bytes of the arguments of norm (float32, not adaptive) and of SGD with momentum, with the table for 64, 192 and 448
# tensors.
NORM_BYTES, SGD_BYTES = (1432, 4248, 9880), (2944, 8704, 20224)
SIZES = [(1, [0]), (64, [0]), (65, [1]), (192, [1]), (193, [2]), (448, [2]), (449, [2, 0]), (513, [2, 1])]


@pytest.mark.parametrize(("count", "tables"), SIZES)
def test_a_launch_copies_the_smallest_table_that_holds_its_tensors(backend, emulated, count, tables):
    params, grads, buffers = ([torch.full((1,), value) for _ in range(count)] for value in (1.0, 2.0, 4.0))
    emulated.take_argument_bytes()
    partials = backend.norm_partials(params, grads, [0] * count, [False], 0.0)
    assert emulated.take_argument_bytes() == [NORM_BYTES[i] for i in tables]
    assert partials.sum() == 4.0 * count
    backend.restore_sgd_(params, params, grads, buffers, False, 0.5, None, 0.5, 0.0, 0.0, False, False)
    assert emulated.take_argument_bytes() == [SGD_BYTES[i] for i in tables]
    # b = 0.5 b + g = 4, w = w - 0.5 b
    assert all(param.item() == -1.0 for param in params)


@pytest.mark.parametrize("count", checks.TENSOR_COUNTS)
def test_norm_of_many_tensors(backend, device, count):
    checks.check_norm_of_many(backend, device, count)


@pytest.mark.parametrize("count", checks.TENSOR_COUNTS)
def test_perturbation_of_many_tensors(backend, device, count):
    checks.check_perturb_of_many(backend, device, count)


@pytest.mark.parametrize("count", [10, 460], ids=["one table", "two tables"])
def test_perturb_walks_backwards_over_what_the_norm_has_read(backend, count):
    check_perturb_walks_backwards_over_what_the_norm_has_read(backend, count)


@pytest.mark.parametrize("count", [1, 64, 65, 193, 449])
def test_steps_are_counted_of_many_tensors(emulated, count):
    counters = torch.arange(count, dtype=torch.float32)
    emulated.increment_steps((0, 0), [counter.data_ptr() for counter in counters.unbind()])
    assert torch.equal(counters, torch.arange(1, count + 1, dtype=torch.float32))


@shifts
@dtypes
@pytest.mark.parametrize("over_grads", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_perturb_is_bitwise(backend, device, dtype, masked, over_grads, shift):
    checks.check_perturb(backend, device, dtype, masked, over_grads, shift)


@in_both_orders
@dtypes
def test_mask_at_every_bound(backend, device, dtype):
    checks.check_mask_alone(backend, device, dtype)


@dtypes
def test_bad_norms_move_nothing(backend, device, dtype):
    checks.check_bad_norms(backend, device, dtype)


@shifts
@pytest.mark.parametrize("dtype", [*checks.DTYPES, torch.float64])
def test_restore_is_bitwise(backend, device, dtype, shift):
    checks.check_restore(backend, device, dtype, shift)


@dtypes
@pytest.mark.parametrize("variant", checks.SGD_VARIANTS)
def test_sgd(backend, device, dtype, variant):
    for first, lr_dtype, shift in ((True, None, 0), (False, torch.float64, 0), (False, torch.float32, 1)):
        checks.check_sgd(backend, device, dtype, variant, first, lr_dtype, shift)


@dtypes
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
def test_adam(backend, device, dtype, amsgrad, decoupled):
    for maximize, lr_dtype, shift in ((False, None, 0), (True, torch.float32, 1)):
        checks.check_adam(backend, device, dtype, amsgrad, decoupled, maximize, device, lr_dtype, shift)


def test_adam_with_steps_counted_on_the_host(backend, monkeypatch):
    """As on a GPU without capturable=True: the counters are elsewhere than the tensors."""
    given = []

    def count_on_host(steps, device):
        torch._foreach_add_(list(steps), 1)
        given.append(len(steps))
        return [], [step.item() for step in steps]

    monkeypatch.setattr(perturbation, "_count_steps", count_on_host)
    for dtype in checks.DTYPES:
        checks.check_adam(backend, torch.device("cpu"), dtype, False, True, False, torch.device("cpu"), None, 0)
    assert len(given) == 3


@in_both_orders
@dtypes
@pytest.mark.parametrize("kind", loss_checks.TARGETS)
@pytest.mark.parametrize("classes", loss_checks.CLASSES)
def test_cross_entropy(backend, device, dtype, kind, classes):
    loss_checks.check_cross_entropy(backend, device, dtype, kind, classes)


@dtypes
def test_cross_entropy_of_rows_anywhere(backend, device, dtype):
    loss_checks.check_cross_entropy_layouts(backend, device, dtype)


def test_cross_entropy_of_extremes(backend, device):
    loss_checks.check_cross_entropy_extremes(backend, device)


@dtypes
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_gradients_do_not_depend_on_what_the_logits_have_in_common(backend, dtype, kind):
    for offset, classes, smoothing in itertools.product(OFFSETS, (33, 2500), (0.0, 0.1)):
        check_gradient_at_offset(backend, offset, dtype, kind, smoothing, classes)


@pytest.mark.parametrize("classes", [3, 8, 2500])
def test_a_probability_of_zero_at_a_masked_logit(backend, classes):
    check_zero_probability_at_a_masked_logit(backend, classes)


@in_both_orders
@dtypes
@pytest.mark.parametrize("samples", [1, 2, 31, 256, 257, 512])
def test_select(backend, device, dtype, samples):
    loss_checks.check_select(backend, device, dtype, samples)


@in_both_orders
def test_select_of_more_samples_than_keys_are_kept(backend, device):
    loss_checks.check_select(backend, device, torch.float32, 4500)


@in_both_orders
def test_gather(backend, device):
    loss_checks.check_gather(backend, device)


def test_an_index_outside_the_batch_reads_nothing(backend):
    (rows,) = backend.gather([torch.ones(4, 3)], torch.tensor([1, 4, -1, 2**40]))
    assert rows.sum(1).tolist() == [3.0, 0.0, 0.0, 0.0]


@in_both_orders
@pytest.mark.parametrize(
    ("classes", "dtype"), [(10, torch.float32), (100, torch.bfloat16), (1001, torch.float16), (2050, torch.float32)]
)
def test_losses_select_gather(backend, device, dtype, classes):
    loss_checks.check_losses_select_gather(backend, device, dtype, classes)


@pytest.fixture
def new_device(backend, monkeypatch, emulated):
    """A device of its own: which launch of B+ one takes is remembered."""
    number = next(_DEVICES)
    monkeypatch.setattr(extension, "where", lambda device: (number, 0))
    yield number
    emulated.set_emulator(False, True, 3)


_DEVICES = itertools.count(1)


def b_plus(backend):
    """B+ from logits, every result of it compared."""
    before, target, _ = loss_checks.logits_and_target(torch.device("cpu"), torch.float32, "index", 10)
    after = before.flip(0)
    losses = [reference.cross_entropy_forward(logits, target, 0.0, -100)[0] for logits in (before, after)]
    one, other, indices, rows = backend.losses_select_gather(before, after, 5, [before, target], target)
    for found, expected in zip((one, other), losses, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(indices, reference.select(one, other, 5))
    assert torch.equal(rows[0], before[indices])
    assert torch.equal(rows[1], target[indices])


@pytest.mark.parametrize("cooperative", [True, False])
def test_losses_selection_and_gather_are_one_launch(backend, new_device, emulated, cooperative):
    """Where the device has cooperative launches; elsewhere one for each phase."""
    emulated.set_emulator(False, cooperative, 3)
    emulated.take_launches()
    b_plus(backend)
    assert emulated.take_launches() == (1 if cooperative else 4)


def test_a_cooperative_launch_that_is_refused_runs_as_four(backend, new_device, emulated):
    """MPS and green contexts: fewer multiprocessors than the device says, here none. It leaves no error."""
    emulated.set_emulator(False, True, 0)
    emulated.take_launches()
    for _ in range(2):
        b_plus(backend)
        assert emulated.take_launches() == 4
        assert emulated.take_error() == 0
    emulated.set_emulator(False, True, 3)
    b_plus(backend)
    assert emulated.take_launches() == 4, "the refusal is remembered"


# -- What users call ---------------------------------------------------------------------------------------------------


@pytest.fixture
def chosen_backend(backend, monkeypatch):
    """backend="cuda" is this one, on CPU tensors."""
    monkeypatch.setitem(backends._resolved, ("cuda", "cpu"), backend)
    return "cuda"


def training(backend, gamma=0.5):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5))
    return model, ESAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, gamma=gamma, backend=backend)


@in_both_orders
def test_select_of_the_optimizer_is_one_launch(chosen_backend, emulated):
    _, optimizer = training(chosen_backend)
    before, after = loss_checks.tied_losses(torch.device("cpu"), 33)
    inputs, target = torch.randn(33, 3, 4, 4), torch.arange(33)
    expected = reference.select(before, after, 16)
    emulated.take_launches()
    rows, labels = optimizer.select(before, after, inputs, target)
    assert emulated.take_launches() == 1
    assert torch.equal(rows, inputs[expected])
    assert torch.equal(labels, target[expected])


@in_both_orders
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_select_from_logits_is_one_launch(chosen_backend, emulated, kind, label_smoothing, dtype):
    _, optimizer = training(chosen_backend)
    logits, target, _ = loss_checks.logits_and_target(torch.device("cpu"), dtype, kind, 10, 21)
    if kind == "index":
        target[target == -100] = 3
    losses = F.cross_entropy(
        logits.double(),
        target if kind == "index" else target.double(),
        reduction="none",
        label_smoothing=label_smoothing,
        ignore_index=3 if kind == "index" else -100,
    )
    rises = torch.randperm(21) / 100  # small beside what the options change
    before, expected = (losses - rises).float(), rises.topk(10).indices.sort().values
    emulated.take_launches()
    rows = optimizer.select_from_logits(
        before, logits, target, logits, label_smoothing=label_smoothing, ignore_index=3 if kind == "index" else -100
    )
    assert emulated.take_launches() == 1
    assert torch.equal(rows, logits[expected])


def test_smoothed_logits_before_and_losses_after(chosen_backend):
    """The kernel is chosen by the logits that are there."""
    logits, target, _ = loss_checks.logits_and_target(torch.device("cpu"), torch.float32, "index", 2500, 9)
    losses = F.cross_entropy(logits.double(), target, reduction="none", label_smoothing=0.5)
    rises = torch.randperm(9) / 100
    after, expected = (losses + rises).float(), rises.topk(4).indices.sort().values
    indices, (rows,) = ops.select_gather(logits, after, [target], 4, target, 0.5, backend=chosen_backend)
    assert torch.equal(indices, expected)
    assert torch.equal(rows, target[expected])


def test_whole_steps_are_the_references(chosen_backend, emulated):
    """Four launches: norm, perturb, B+, restore and update. The losses run on the device's default backend."""
    runs = [training(name) for name in (chosen_backend, "reference")]
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        inputs, target = torch.randn(16, 6, generator=generator), torch.randint(5, (16,), generator=generator)
        for model, optimizer in runs:
            emulated.take_launches()
            optimizer.step(lambda x, y, model=model: cross_entropy(model(x), y), inputs, target)
            launches = emulated.take_launches()
            assert launches == (4 if optimizer is runs[0][1] else 0)
        for ours, theirs in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_each_stage_is_one_launch(backend, device, emulated):
    params, grads = (checks.random_values(seed, torch.float32) for seed in range(2))
    groups = [0] * len(params)
    offsets = [4 * i for i in range(len(params))]
    emulated.take_launches()
    partials = backend.norm_partials(params, grads, groups, [False], 0.0)
    assert emulated.take_launches() == 1
    scale = torch.ones(1, dtype=torch.float64)
    backend.perturb_(params, grads, [], groups, offsets, partials, scale, [False], 0.0, 1.0, 1e-12, None)
    assert emulated.take_launches() == 1
    backend.restore_sgd_(params, grads, grads, params, False, 0.1, None, 0.9, 0.0, 0.0, False, False)
    assert emulated.take_launches() == 1
    backend.gather([*params[:4]], torch.zeros(1, dtype=torch.int64))
    assert emulated.take_launches() == 1


def test_self_check_of_the_doctor(backend, device):
    assert self_check(backend, device) == []


def test_self_check_of_the_doctor_where_the_reference_computes_as_on_a_gpu(backend, device, monkeypatch):
    """Counters on a GPU: torch's Adam then divides by the step size before it adds eps, in the dtype of the weights."""
    single_tensor_adam = reference.adam
    monkeypatch.setattr(
        importlib.import_module("torch.optim.adam"), "_get_capturable_supported_devices", lambda: ["cpu"]
    )
    monkeypatch.setattr(
        reference, "adam", lambda *lists, **options: single_tensor_adam(*lists, **{**options, "capturable": True})
    )
    assert self_check(backend, device) == []


@pytest.mark.parametrize("dtype", [torch.float64])
def test_what_the_kernels_do_not_take_goes_to_the_reference(backend, device, emulated, dtype):
    """float64, and tensors that are not dense."""
    params, grads = (checks.random_values(seed, dtype) for seed in range(2))
    emulated.take_launches()
    partials = backend.norm_partials(params, grads, [0] * len(params), [False], 0.0)
    assert torch.equal(partials, reference.norm_partials(params, grads, [0] * len(params), [False], 0.0))
    gaps = torch.zeros(20, 4)[:, :2]
    backend.restore_([gaps], [torch.ones(20, 4)[:, :2]])
    assert (gaps == 1).all()
    losses = torch.randn(9, dtype=dtype)
    assert torch.equal(backend.select(losses, losses.flip(0), 4), reference.select(losses, losses.flip(0), 4))
    assert emulated.take_launches() == 0
