"""What every fast backend promises of the losses, the selection and the gathering: see operator_checks."""

from __future__ import annotations

import itertools
import math
from types import ModuleType

import torch
import torch.nn.functional as F
from operator_checks import assert_close, assert_same_bits
from torch import Tensor

from esam_kernels.backends import reference

TARGETS = ("index", "smoothed", "probability")
# A class, a few, an access and more, odd, around where a row passes from a warp to a block, and many.
CLASSES = (1, 10, 100, 1000, 1001, 2049, 5000)


def logits_and_target(
    device: torch.device, dtype: torch.dtype, kind: str, classes: int, rows: int = 13
) -> tuple[Tensor, Tensor, float]:
    generator = torch.Generator().manual_seed(classes)
    logits = (3 * torch.randn(rows, classes, generator=generator)).to(device, dtype)
    if kind == "probability":
        target = torch.rand(rows, classes, generator=generator).to(device)
        return logits, target / target.sum(dim=1, keepdim=True), 0.1
    target = torch.randint(classes, (rows,), generator=generator).to(device)
    target[3] = -100
    return logits, target, 0.1 if kind == "smoothed" else 0.0


def check_cross_entropy(backend: ModuleType, device: torch.device, dtype: torch.dtype, kind: str, classes: int) -> None:
    logits, target, smoothing = logits_and_target(device, dtype, kind, classes)
    losses, normalizer = backend.cross_entropy_forward(logits, target, smoothing, -100)
    exact = logits.double().requires_grad_()
    exact_target = target.double() if kind == "probability" else target
    expected = F.cross_entropy(exact, exact_target, reduction="none", label_smoothing=smoothing)
    assert losses.dtype == normalizer.dtype == torch.float32
    assert_close(losses, expected.detach(), ulps=16)
    assert_close(normalizer.sum(0), torch.logsumexp(exact.detach(), dim=1), ulps=8)
    grad_losses = torch.linspace(-1, 2, len(logits), device=device)
    (expected_gradient,) = torch.autograd.grad(expected, exact, grad_losses.double())
    gradient = backend.cross_entropy_backward(grad_losses, logits, target, normalizer, smoothing, -100)
    assert gradient.dtype == dtype
    assert gradient.is_contiguous()
    assert_close(gradient, expected_gradient, ulps=1 if dtype != torch.float32 else 16, scale=0.25)


def check_cross_entropy_layouts(backend: ModuleType, device: torch.device, dtype: torch.dtype) -> None:
    """Rows with a stride, rows that start anywhere, and more rows than one round of a grid."""
    for classes in (10, 64):
        wide = torch.randn(300, classes + 3, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        target = torch.arange(300, device=device) % classes
        expected = F.cross_entropy(wide[:, 1 : classes + 1].double(), target, reduction="none")
        losses, _ = backend.cross_entropy_forward(wide[:, 1 : classes + 1], target, 0.0, -100)
        assert_close(losses, expected, ulps=16)
        column_major = wide[:, :classes].t().contiguous().t()
        losses, _ = backend.cross_entropy_forward(column_major, target, 0.0, -100)
        assert_close(losses, F.cross_entropy(column_major.double(), target, reduction="none"), ulps=16)


def check_cross_entropy_extremes(backend: ModuleType, device: torch.device) -> None:
    """Large logits, -inf among them, NaN, and classes that do not exist."""
    target = torch.tensor([0, 1, 0, 2, -100], device=device)
    for classes in (4, 6, 4096):
        logits = torch.zeros(5, classes, device=device)
        logits[0, 1], logits[1, 1], logits[2, 3] = 3e4, 3e4, -math.inf
        logits[3, 0] = math.nan
        logits[4] = math.nan
        losses, normalizer = backend.cross_entropy_forward(logits, target, 0.0, -100)
        expected = F.cross_entropy(logits.double(), target, reduction="none")
        assert torch.allclose(losses.double(), expected, rtol=1e-6, equal_nan=True)
        assert torch.allclose(normalizer[:, :3].double().sum(0), torch.logsumexp(logits[:3].double(), dim=1), rtol=1e-6)
        losses, _ = backend.cross_entropy_forward(
            torch.zeros(2, classes, device=device), torch.tensor([classes, -1], device=device), 0.0, -100
        )
        assert losses.isnan().all()


def tied_losses(device: torch.device, samples: int) -> tuple[Tensor, Tensor]:
    """Integers, so that many tie; both zeros, infinities and NaN."""
    generator = torch.Generator().manual_seed(samples)
    before = torch.randint(0, 4, (samples,), generator=generator).float()
    after = torch.randint(0, 4, (samples,), generator=generator).float()
    after[::7] = before[::7] * -0.0 + before[::7]
    after[::11] = math.nan
    after[3::13] = math.inf
    after[5::17] = -math.inf
    return before.to(device), after.to(device)


def check_select(backend: ModuleType, device: torch.device, dtype: torch.dtype, samples: int) -> None:
    before, after = (losses.to(dtype) for losses in tied_losses(device, samples))
    for k in sorted({1, 2, samples // 3, samples // 2, samples - 1, samples} & set(range(1, samples + 1))):
        indices = backend.select(before, after, k)
        assert indices.dtype == torch.int64
        assert torch.equal(indices, reference.select(before, after, k)), k


GATHERED = (torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float64)


def batches(device: torch.device, samples: int) -> list[Tensor]:
    """Rows of every width and layout, of any dtype."""
    generator = torch.Generator().manual_seed(samples)
    shapes = [(), (1,), (3,), (16,), (3, 5, 7), (3, 8, 8), (4099,), (40000,)]
    found = []
    for i, (shape, dtype) in enumerate(itertools.product(shapes, GATHERED)):
        if math.prod(shape) > 5000 and i % 3:
            continue
        values = torch.randint(0, 256, (samples, *shape), generator=generator).to(dtype).to(device)
        found.append(values)
    image = torch.randn(samples, 3, 8, 9, generator=generator).to(device)
    found.append(image.to(memory_format=torch.channels_last))
    found.append(image[:, :, :, 1:])  # gaps in a row
    found.append(image.flatten()[1 : 1 + samples * 27].view(samples, 27))  # misaligned
    found.append(torch.randn(3, samples, 4, generator=generator).to(device).transpose(0, 1))  # not the outermost
    found.append(torch.zeros(samples, 0, device=device))
    found.append(torch.ones(1, 4, device=device).expand(samples, 4))
    return found


def check_gather(backend: ModuleType, device: torch.device) -> None:
    samples = 9
    given = batches(device, samples)
    for chosen in ([0, 2, 3, 8], [5], list(range(samples))):
        indices = torch.tensor(chosen, device=device)
        for found, expected in zip(backend.gather(given, indices), reference.gather(given, indices), strict=True):
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)
            assert found.numel() == 0 or found.stride() == expected.stride()
    strided = torch.arange(8, device=device)[::2]
    assert torch.equal(backend.gather(given[:1], strided)[0], given[0][strided])


def check_losses_select_gather(backend: ModuleType, device: torch.device, dtype: torch.dtype, classes: int) -> None:
    """One launch gives what losses, selection and gathering give one after the other."""
    samples, k = 37, 17
    before, target, _ = logits_and_target(device, dtype, "index", classes, samples)
    after = torch.roll(before, 1, 0)
    given = batches(device, samples)[-6:]
    for smoothing in (0.0, 0.1):
        expected = [backend.cross_entropy_forward(logits, target, smoothing, -100)[0] for logits in (before, after)]
        indices = reference.select(*expected, k)
        rows = reference.gather(given, indices)
        for first in (before, expected[0]):
            found = backend.losses_select_gather(first, after, k, given, target, smoothing)
            assert_same_bits(found[:2], expected)
            assert torch.equal(found[2], indices)
            assert all(map(torch.equal, found[3], rows))
    found = backend.losses_select_gather(*expected, k, given)
    assert torch.equal(found[2], indices)
    assert all(map(torch.equal, found[3], rows))
