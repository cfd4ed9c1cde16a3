"""restore_sgd_ and restore_adam_: in one pass what restoring and ``torch.optim`` do.

Half precision is compared at hyperparameters that it can hold: torch rounds ``add``'s alpha to the dtype on the CPU,
though not on CUDA.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from tensors import FLOATS, assert_same_bits, assert_within_one_ulp, copies, like, parameters

from esam_kernels.backends import reference

SGD = [
    # first, momentum, dampening, weight_decay, nesterov, maximize
    (False, 0.0, 0.0, 0.0, False, False),
    (False, 0.0, 0.0, 0.125, False, True),
    (True, 0.875, 0.25, 0.0, False, True),
    (False, 0.875, 0.25, 0.125, False, False),
    (False, 0.875, 0.0, 0.125, True, False),
    (True, 0.875, 0.0, 0.125, True, True),
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("options", SGD, ids=str)
def test_sgd_is_torchs_within_one_ulp(kernels, three_programs, dtype, options):
    params = parameters(dtype)
    backups, grads, buffers = like(params), like(params), like(params)
    first, momentum, *rest = options
    results = []
    for backend in (reference, kernels):
        w, state = copies(params), copies(buffers) if momentum else []
        backend.restore_sgd_(w, backups, grads, state, first, 0.0625, None, momentum, *rest)
        results.append((w, state))
    (expected_w, expected_state), (w, state) = results
    assert_within_one_ulp(w, expected_w, backups, grads, buffers)
    assert_within_one_ulp(state, expected_state, backups[: len(state)], grads[: len(state)], buffers[: len(state)])


ADAM = [
    # weight_decay, amsgrad, maximize, decoupled_weight_decay, beta1
    (0.0, False, False, False, 0.9),
    (0.125, False, True, False, 0.9),
    (0.125, True, False, True, 0.9),
    (0.0, True, True, True, 0.25),
    (0.125, False, False, True, 0.0),
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("options", ADAM, ids=str)
def test_adam_is_torchs_within_one_ulp(kernels, three_programs, dtype, options):
    params = parameters(dtype)
    lists = {name: like(params) for name in ("backups", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")}
    for tensor in itertools.chain(lists["exp_avg_sqs"], lists["max_exp_avg_sqs"]):
        tensor.abs_().add_(0.5)
    weight_decay, amsgrad, maximize, decoupled, beta1 = options
    results = []
    for backend in (reference, kernels):
        w = copies(params)
        state = [copies(lists[name]) for name in ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")]
        steps = [torch.tensor(float(i)) for i in range(len(params))]
        backend.restore_adam_(
            *(w, lists["backups"], lists["grads"], *state[:2], state[2] if amsgrad else [], steps),
            *(0.0625, None, beta1, 0.999, 1e-8, weight_decay, amsgrad, maximize, decoupled),
        )
        results.append((w, *state))
        assert [float(step) for step in steps] == [float(i + 1) for i in range(len(params))]
    for actual, expected in zip(results[1], results[0]):
        assert_within_one_ulp(actual, expected, *(lists[name] for name in ("backups", "grads", "exp_avgs")))


def test_adam_without_memory_takes_the_gradient_itself(kernels):
    grads, exp_avgs = [torch.randn(300)], [torch.full((300,), 1e8)]
    state = exp_avgs, [torch.ones(300)], [], [torch.tensor(0.0)]
    kernels.restore_adam_(
        [torch.empty(300)], [torch.zeros(300)], grads, *state, 0.1, None, 0.0, 0.9, 1e-8, 0.0, False, False, False
    )
    assert_same_bits(exp_avgs, grads)


def test_learning_rate_on_the_device_is_the_one_that_is_used(kernels):
    params, grads = [torch.randn(300)], [torch.randn(300)]
    expected, sgd, adam, expected_adam = (copies(params) for _ in range(4))
    lr = torch.tensor(0.25)
    kernels.restore_sgd_(expected, params, grads, [], False, 0.25, None, 0.0, 0.0, 0.0, False, False)
    kernels.restore_sgd_(sgd, params, grads, [], False, 99.0, lr, 0.0, 0.0, 0.0, False, False)
    assert_same_bits(sgd, expected)
    for w, number, tensor in ((expected_adam, 0.25, None), (adam, 99.0, lr)):
        state = [torch.zeros(300)], [torch.zeros(300)], [], [torch.tensor(0.0)]
        kernels.restore_adam_(w, params, grads, *state, number, tensor, 0.9, 0.999, 1e-8, 0.1, False, False, True)
    assert_same_bits(adam, expected_adam)
    assert not torch.equal(adam[0], params[0])


def test_hyperparameters_reach_float64_weights_in_float64(kernels):
    w, backups, grads = [torch.zeros(8, dtype=torch.float64)], [torch.zeros(8).double()], [torch.ones(8).double()]
    kernels.restore_sgd_(w, backups, grads, [], False, 0.1, None, 0.0, 0.0, 0.0, False, False)
    assert torch.equal(w[0], torch.full((8,), -0.1, dtype=torch.float64))


def test_the_backup_may_be_the_parameter_itself(kernels):
    params, grads = parameters(torch.float32), like(parameters(torch.float32))
    expected, buffers = copies(params), like(params)
    reference.restore_sgd_(expected, params, grads, copies(buffers), False, 0.1, None, 0.9, 0.0, 0.01, True, False)
    kernels.restore_sgd_(params, params, grads, buffers, False, 0.1, None, 0.9, 0.0, 0.01, True, False)
    assert_within_one_ulp(params, expected, grads)


def test_update_at_learning_rate_zero_keeps_every_bfloat16(kernels):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    backups = [every[every.isfinite()]]
    w = [torch.zeros_like(backups[0])]
    kernels.restore_sgd_(w, backups, [torch.ones_like(w[0])], [], False, 0.0, None, 0.0, 0.0, 0.0, False, False)
    assert_same_bits(w, [backups[0]])
