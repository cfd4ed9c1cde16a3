"""What every backend's cross-entropy has to give where a naive softmax loses its digits, against float64."""

from __future__ import annotations

import math
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

# What the logits of a batch may have in common; the last is beyond what float16 holds.
OFFSETS = (0.0, 64.0, 1e4, 1e8)
ROWS, IGNORED = 6, 2


def shifted_case(
    offset: float, dtype: torch.dtype, kind: str, classes: int, device: torch.device | str
) -> tuple[Tensor, Tensor, int]:
    """Logits around ``offset``, a target, and ``ignore_index``."""
    offset = min(offset, 32768.0) if dtype == torch.float16 else offset
    logits = (offset + 3 * torch.randn(ROWS, classes, dtype=torch.float64)).to(device, dtype)
    if kind == "probability":
        return logits, torch.rand(ROWS, classes).div(classes / 2).to(device), -100  # need not sum to one
    target = torch.randint(classes, (ROWS,))
    target[3] = IGNORED
    return logits, target.to(device), IGNORED


def check_gradient_at_offset(
    backend: ModuleType,
    offset: float,
    dtype: torch.dtype,
    kind: str,
    label_smoothing: float,
    classes: int,
    device: torch.device | str = "cpu",
) -> None:
    """Losses and gradients are those of float64 over the same logits, up to float32's rounding."""
    logits, target, ignored = shifted_case(offset, dtype, kind, classes, device)
    exact, probabilities = logits.double(), target.double()
    kept = torch.ones(ROWS, dtype=torch.bool, device=device)
    if kind == "index":
        kept = target != ignored
        probabilities = F.one_hot(target, classes).double()
    q = (1 - label_smoothing) * probabilities + label_smoothing / classes
    expected = torch.where(kept, -(q * exact.log_softmax(dim=1)).sum(dim=1), 0.0)
    losses, normalizer = backend.cross_entropy_forward(logits, target, label_smoothing, ignored)
    assert normalizer.shape == (2, ROWS)
    eps = torch.finfo(losses.dtype).eps
    torch.testing.assert_close(losses.double(), expected, rtol=16 * eps, atol=16 * eps)

    weights = torch.linspace(-1, 2, ROWS, dtype=losses.dtype, device=device)
    # written out: what autograd sums of many classes is not exact enough for float64
    expected_gradient = (exact.softmax(dim=1) * q.sum(dim=1, keepdim=True) - q) * (weights * kept).double()[:, None]
    gradient = backend.cross_entropy_backward(weights, logits, target, normalizer, label_smoothing, ignored)
    assert gradient.dtype == dtype
    # softmax and target cancel: what float32 rounds of the two stays, and the rounding of the result's own dtype
    tolerance = {"rtol": 16 * eps + torch.finfo(dtype).eps / 2, "atol": 4 * eps}
    if dtype == torch.float16:
        tolerance["atol"] += 2.0**-25  # half the smallest number
    torch.testing.assert_close(gradient.double(), expected_gradient, **tolerance)


def check_zero_probability_at_a_masked_logit(
    backend: ModuleType, classes: int, device: torch.device | str = "cpu"
) -> None:
    """A logit of -inf: smoothing makes its probability positive and the loss infinite; without, 0 times inf is NaN."""
    logits = torch.linspace(-1, 1, classes, device=device).repeat(2, 1)
    logits[0, classes // 2] = -math.inf
    target = torch.full((2, classes), 1 / classes, device=device)
    target[:, classes // 2] = 0
    for label_smoothing in (0.0, 0.1, 1.0):
        expected = F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)
        assert expected[0].isnan() if label_smoothing == 0 else expected[0] == math.inf
        losses, normalizer = backend.cross_entropy_forward(logits, target, label_smoothing, -100)
        torch.testing.assert_close(losses, expected, equal_nan=True, rtol=2e-6, atol=0)
        exact = logits.double().requires_grad_()
        F.cross_entropy(exact, target.double(), label_smoothing=label_smoothing, reduction="sum").backward()
        ones = torch.ones(2, device=device)
        gradient = backend.cross_entropy_backward(ones, logits, target, normalizer, label_smoothing, -100)
        torch.testing.assert_close(gradient.double(), exact.grad, rtol=2e-6, atol=4e-7)
