"""Lists of tensors that take every path of a streaming kernel, and how results are compared."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def parameters(dtype: torch.dtype) -> list[Tensor]:
    """Full blocks, tails, less than one block, one element, none, a misaligned view, and a channels_last weight."""
    block = 8192 // dtype.itemsize
    return [
        torch.randn(2, block).to(dtype),
        torch.randn(block + 3).to(dtype),
        torch.randn(7, 5).to(dtype),
        torch.randn(()).to(dtype),
        torch.empty(0, dtype=dtype),
        torch.randn(block + 2).to(dtype)[1:],
        torch.randn(3, 4, 5, 5).to(dtype).to(memory_format=torch.channels_last),
    ]


def like(tensors: list[Tensor]) -> list[Tensor]:
    """Random tensors of the same shapes, strides and misalignment."""
    return [copy.copy_(torch.randn(copy.shape)) for copy in copies(tensors)]


def copies(tensors: list[Tensor]) -> list[Tensor]:
    """Copies with the same strides, and with the same offset from a 16-byte boundary."""
    out = []
    for tensor in tensors:
        skipped = tensor.data_ptr() % 16 // tensor.itemsize
        memory = torch.empty(tensor.numel() + skipped, dtype=tensor.dtype)[skipped:]
        copy = memory.as_strided(tensor.shape, tensor.stride())
        out.append(copy.copy_(tensor))
    return out


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        kind = integers[a.itemsize]
        assert a.dtype == e.dtype
        assert a.stride() == e.stride()
        assert torch.equal(a.view(kind), e.view(kind)), f"tensor {i} differs in {int((a != e).sum())} elements"


def ulp_error(actual: Tensor, expected: Tensor, *terms: Tensor) -> float:
    """The largest error, in units in the last place of the expected value or of the larger of the ``terms`` it sums."""
    if expected.numel() == 0:
        return 0.0
    assert torch.equal(actual.isfinite(), expected.isfinite())
    assert torch.equal(actual.isnan(), expected.isnan())
    finite = expected.isfinite()
    largest = torch.stack([term.double().abs() for term in (expected, *terms)]).amax(0)
    kind = torch.finfo(expected.dtype)
    ulp = kind.eps * 2.0 ** (torch.frexp(largest).exponent - 1)
    error = (actual.double() - expected.double()).abs() / ulp.clamp(min=kind.smallest_normal * kind.eps)
    return float(error[finite].max()) if finite.any() else 0.0


def assert_within_one_ulp(actual: list[Tensor], expected: list[Tensor], *terms: list[Tensor]) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        error = ulp_error(a, e, *(term[i] for term in terms))
        assert error <= 1, f"tensor {i} is {error} ulp away"
