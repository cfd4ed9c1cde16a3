"""Every kernel of every backend of the device, in every dtype, against float64 or the reference."""

from __future__ import annotations

import itertools

import loss_checks
import operator_checks as checks
import pytest
import torch
from cross_entropy_checks import OFFSETS, check_gradient_at_offset, check_zero_probability_at_a_masked_logit

from esam_kernels.doctor import self_check

pytestmark = pytest.mark.usefixtures("poisoned")

dtypes = pytest.mark.parametrize("dtype", checks.DTYPES)
shifts = pytest.mark.parametrize("shift", [0, 1])


@shifts
@dtypes
@pytest.mark.parametrize("adaptive", [False, True])
def test_norm(backend, device, dtype, adaptive, shift):
    checks.check_norm(backend, device, dtype, adaptive, shift)


def test_norm_of_what_is_not_finite(backend, device):
    checks.check_norm_of_what_is_not_finite(backend, device)


def test_norm_of_extremes(backend, backend_name, device):
    if backend_name == "triton":
        pytest.skip("its lanes are float32: such a gradient is one without a finite norm")
    checks.check_norm_of_extremes(backend, device)


@pytest.mark.parametrize("count", checks.TENSOR_COUNTS)
def test_norm_and_perturbation_of_many_tensors(backend, device, count):
    checks.check_norm_of_many(backend, device, count)
    checks.check_perturb_of_many(backend, device, count)


@shifts
@dtypes
@pytest.mark.parametrize("over_grads", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_perturb_is_bitwise(backend, device, dtype, masked, over_grads, shift):
    checks.check_perturb(backend, device, dtype, masked, over_grads, shift)


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
    host = torch.device("cpu")
    for steps_on, (lr_dtype, shift) in itertools.product((device, host), ((None, 0), (torch.float32, 1))):
        checks.check_adam(backend, device, dtype, amsgrad, decoupled, shift == 1, steps_on, lr_dtype, shift)


@dtypes
@pytest.mark.parametrize("kind", loss_checks.TARGETS)
@pytest.mark.parametrize("classes", [*loss_checks.CLASSES, 128_256])
def test_cross_entropy(backend, device, dtype, kind, classes):
    loss_checks.check_cross_entropy(backend, device, dtype, kind, classes)


@dtypes
def test_cross_entropy_of_rows_anywhere(backend, device, dtype):
    loss_checks.check_cross_entropy_layouts(backend, device, dtype)


def test_cross_entropy_of_extremes(backend, backend_name, device):
    if backend_name == "reference":
        pytest.skip("it refuses classes out of range on the CPU")
    loss_checks.check_cross_entropy_extremes(backend, device)


@dtypes
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("classes", [33, 2500, 20_000])
def test_gradients_do_not_depend_on_what_the_logits_have_in_common(backend, device, dtype, kind, classes):
    for offset, smoothing in itertools.product(OFFSETS, (0.0, 0.1)):
        check_gradient_at_offset(backend, offset, dtype, kind, smoothing, classes, device)


@pytest.mark.parametrize("classes", [3, 8, 2500, 20_000])
def test_a_probability_of_zero_at_a_masked_logit(backend, device, classes):
    check_zero_probability_at_a_masked_logit(backend, classes, device)


@dtypes
@pytest.mark.parametrize("samples", [1, 2, 31, 256, 257, 512, 4096, 4500, 16_384])
def test_select(backend, device, dtype, samples):
    loss_checks.check_select(backend, device, dtype, samples)


def test_gather(backend, device):
    loss_checks.check_gather(backend, device)


@dtypes
@pytest.mark.parametrize("classes", [10, 1000, 2050, 50_257])
def test_losses_select_gather(backend, device, dtype, classes):
    if backend.losses_select_gather is None:
        pytest.skip("only the CUDA backend has one launch for all three")
    loss_checks.check_losses_select_gather(backend, device, dtype, classes)


def test_self_check_of_the_doctor(backend, device):
    assert self_check(backend, device) == []
