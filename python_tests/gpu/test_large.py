"""More than 2^31 elements: every index that could overflow 32 bits does. Needs some 24 GB of memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from esam_kernels.backends import reference

ELEMENTS = 2**31 + 2**20 + 5
TAIL = 5000


@pytest.fixture(autouse=True)
def enough_memory(device):
    if device.type != "cuda":
        pytest.skip("on the device only")
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    if free < 24 << 30:
        pytest.skip(f"{free >> 30} GiB are free, 24 are needed")
    yield
    torch.cuda.empty_cache()


def test_norm_perturb_and_restore(backend, device):
    param, grad = (torch.full((ELEMENTS,), value, dtype=torch.bfloat16, device=device) for value in (1.0, 0.5))
    partials = backend.norm_partials([param], [grad], [0], [False], 0.0)
    assert abs(partials.sum().item() / (0.25 * ELEMENTS) - 1) < 1e-6
    partials.zero_()
    partials[0] = 1.0
    state = torch.tensor([5, 7, 2**31 - 1], device=device)
    scale = torch.ones(1, dtype=torch.float64, device=device)
    backend.perturb_([param], [grad], [], [0], [0], partials, scale, [False], 0.0, 1.0, 0.0, state)
    for first in (0, 2**31 - 2048, ELEMENTS - TAIL - 1):
        first = first // 4 * 4
        drawn = reference.element_mask(TAIL, first, state)[: ELEMENTS - first]
        expected = torch.where(drawn, 1.5, 1.0).to(torch.bfloat16)
        assert torch.equal(param[first : first + TAIL], expected)
    assert (grad == 1.0).all(), "the old weights are kept where the gradient was"
    backend.restore_([param], [grad])
    assert (param == 1.0).all()


def test_sgd(backend, device):
    param, saved, grad = (torch.full((ELEMENTS,), value, dtype=torch.bfloat16, device=device) for value in (0, 2, 1))
    backend.restore_sgd_([param], [saved], [grad], [], False, 0.5, None, 0.0, 0.0, 0.0, False, False)
    assert (param == 1.5).all()


def test_gather(backend, device):
    rows = torch.zeros(3, 2**30 + 8, dtype=torch.bfloat16, device=device)
    for i in range(3):
        rows[i, -TAIL:] = i + 1
    (taken,) = backend.gather([rows], torch.tensor([2], device=device))
    assert torch.equal(taken[0], rows[2])


def test_cross_entropy(backend, device):
    count, classes = 66_000, 2**15 + 8
    logits = torch.zeros(count, classes, dtype=torch.bfloat16, device=device)
    logits[-3:] = torch.randn(3, classes, device=device)
    target = torch.arange(count, device=device) % classes
    losses, normalizer = backend.cross_entropy_forward(logits, target, 0.0, -100)
    expected = F.cross_entropy(logits[-3:].double(), target[-3:], reduction="none")
    torch.testing.assert_close(losses[-3:].double(), expected, rtol=1e-5, atol=1e-5)
    gradient = backend.cross_entropy_backward(torch.ones_like(losses), logits, target, normalizer, 0.0, -100)
    softmax = logits[-3:].double().softmax(dim=1) - F.one_hot(target[-3:], classes)
    torch.testing.assert_close(gradient[-3:].double(), softmax, rtol=1e-2, atol=1e-5)
