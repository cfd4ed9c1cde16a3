"""What the CUDA extension says where CUDA refuses a call, and where the arguments of a call cannot be right."""

from __future__ import annotations

import pytest
import torch

NO_KERNEL_IMAGE, ILLEGAL_ADDRESS = 209, 700
HERE = (0, 0)
REBUILD = "compiled for other GPUs, or for a newer driver. Build it again on this machine: run `pip install .*triton"
LAUNCHES = {
    "norm_partials": lambda b, w, x: b.norm_partials([w], [w], [0], [False], 0.0),
    "perturb": lambda b, w, x: b.perturb_(
        [w], [w], [w.clone()], [0], [0], torch.ones(1024).double(), torch.ones(1).double(), [False], 0, 1, 0, None
    ),
    "restore": lambda b, w, x: b.restore_([w], [w.clone()]),
    "restore_sgd": lambda b, w, x: b.restore_sgd_([w], [w], [w], [], True, 0.1, None, 0.0, 0.0, 0.0, False, False),
    "increment_steps": lambda b, w, x: adam_step(b, w),
    "cross_entropy_forward": lambda b, w, x: b.cross_entropy_forward(x, torch.tensor([0, 1]), 0.0, -100),
    "cross_entropy_backward": lambda b, w, x: b.cross_entropy_backward(
        torch.ones(2), x, torch.tensor([0, 1]), torch.zeros(2, 2), 0.0, -100
    ),
    "select": lambda b, w, x: b.select(x[0], x[1], 1),
    "gather": lambda b, w, x: b.gather([x], torch.tensor([1])),
    "losses_select_gather": lambda b, w, x: b.losses_select_gather(x[0, :2], x[1, :2], 1, [x], None, 0.0, -100),
}


def adam_step(backend, weight):
    lists = [[weight]] * 5
    backend.restore_adam_(*lists, [], [torch.zeros(())], 0.1, None, 0.9, 0.99, 0.0, 0.0, False, False, True)


@pytest.fixture
def small():
    return torch.ones(6), torch.ones(2, 3)


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_launch_that_fails_names_the_operator_and_what_cuda_says(backend, emulated, small, name):
    for error, said, remedy in (
        (ILLEGAL_ADDRESS, "cudaErrorIllegalAddress", "CUDA_LAUNCH_BLOCKING=1.*if it is this one, use backend=.triton."),
        (NO_KERNEL_IMAGE, "cudaErrorNoKernelImageForDevice", REBUILD),
    ):
        emulated.fail_next_launch(error)
        message = (
            rf"esam_kernels: the launch of {name} \(\d+ blocks of 256 threads\) failed: {said}, CUDA's own words. .*"
            + remedy
        )
        with pytest.raises(RuntimeError, match=message):
            LAUNCHES[name](backend, *small)
    assert emulated.take_error() == NO_KERNEL_IMAGE
    assert all(torch.equal(tensor, torch.ones_like(tensor)) for tensor in small)


def test_a_device_that_is_not_there_is_named(emulated):
    with pytest.raises(RuntimeError, match=r"cudaSetDevice\(7\) failed: cudaErrorInvalidDevice, .*CUDA_VISIBLE"):
        emulated.select((7, 0), 0, 0, 2, 1, 0)


WRONG = {
    "a dtype": (
        lambda e: e.norm_partials(HERE, 3, [[0], [0]], [1], [False], 0.0, 0, False),
        r"norm_partials got dtype 3, and takes 0 \(float32\), 1 \(bfloat16\) and 2 \(float16\): convert",
    ),
    "a dtype of the losses": (
        lambda e: e.cross_entropy_forward(HERE, 7, (0, 1, 1, 1, 0, 0, 0.0, -100), 0, 0),
        r"cross_entropy_forward got dtype 7, and takes 0 \(float32\)",
    ),
    "an element's size": (
        lambda e: e.restore(HERE, 1, [[0], [0]], [1]),
        "restore got elements of 1 bytes, and takes 2, 4 and 8",
    ),
    "a list too few": (
        lambda e: e.perturb(HERE, 0, [[0], [0]], [1], [0], [0], [False], 1, 0, 0, 0, 0.0, 1.0, 0.0),
        "perturb got 2 lists of addresses, and needs 3: params, grads, backups",
    ),
    "no momentum": (
        lambda e: e.restore_sgd(HERE, 0, [[0]] * 3, [1], False, 0.1, 0, False, 0.9, 0.0, 0.0, False, False),
        "restore_sgd got 3 lists of addresses, and needs 4: params, backups, grads, momentum buffers",
    ),
    "no largest squares": (
        lambda e: e.restore_adam(
            HERE, 0, [[0]] * 5, [1], [], [1.0], 0.1, 0, False, 0.9, 0.99, 0.0, 0.0, True, False, True
        ),
        "restore_adam got 5 lists of addresses, and needs 6: params, .*, max_exp_avg_sqs",
    ),
    "an address too few": (
        lambda e: e.restore(HERE, 4, [[0, 0], [0]], [1, 1]),
        "restore got 1 addresses of backups, and needs 2: one for each tensor",
    ),
    "a flag too many": (
        lambda e: e.norm_partials(HERE, 0, [[0], [0]], [1], [False, True], 0.0, 0, False),
        "norm_partials got 2 adaptive flags, and needs 1: one for each tensor",
    ),
    "a step too few": (
        lambda e: e.restore_adam(
            HERE, 0, [[0]] * 5, [1], [], [], 0.1, 0, False, 0.9, 0.99, 0.0, 0.0, False, False, True
        ),
        "restore_adam got 0 steps, and needs 1: one for each tensor",
    ),
    "groups": (
        lambda e: e.perturb(HERE, 0, [[0]] * 3, [1], [0], [0], [False], 1025, 0, 0, 0, 0.0, 1.0, 0.0),
        "perturb got 1025 parameter groups, and takes 1024 at most: call it for fewer",
    ),
    "elements": (
        lambda e: e.restore(HERE, 4, [[0], [0]], [1 << 42]),
        "restore got 2147483648 blocks of 8 KiB, and takes 1073741823 at most",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_arguments_that_cannot_be_right_are_refused_before_a_launch(emulated, case):
    call, message = WRONG[case]
    emulated.take_launches()
    with pytest.raises(ValueError, match=message):
        call(emulated)
    assert emulated.take_launches() == 0
