"""What the native tier shares: lists of tensors of awkward sizes, and what "within one unit" means.

Importing it where the extension is not built skips the importing module, with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from esam_kernels.backends import native

_reason = native.unavailable(torch.device("cpu"))
if _reason is not None:
    pytest.skip(_reason, allow_module_level=True)

extension = native.extension

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# One element; less than any vector; a vector and one more; a chunk of csrc/cpu/blocks.h less one, exactly, and one
# more; and enough that a parallel region runs, ending in the middle of everything.
SIZES = (1, 3, 17, 64, 65, 1027, 8191, 8192, 8193, 40_003)


def tensors(dtype: torch.dtype, scale: float = 1.0, sizes: Sequence[int] = SIZES) -> list[Tensor]:
    return [(scale * torch.randn(size)).to(dtype) for size in sizes]


def clones(*lists: Sequence[Tensor]) -> list[list[Tensor]]:
    return [[tensor.clone() for tensor in tensors] for tensors in lists]


def misaligned(tensor: Tensor) -> Tensor:
    """A copy that begins a byte after an address that is a multiple of 16."""
    buffer = bytearray(tensor.nbytes + 64)
    start = -torch.frombuffer(buffer, dtype=torch.uint8).data_ptr() % 16 + 1
    view = torch.frombuffer(buffer, dtype=tensor.dtype, count=tensor.numel() + 1, offset=start)
    assert tensor.element_size() == 1 or view.data_ptr() % tensor.element_size() != 0
    view = view[:-1].view(tensor.shape)
    with torch.no_grad():
        view.copy_(tensor)
    return view


def offsets_of(params: Sequence[Tensor]) -> list[int]:
    """Each tensor's first element, counted over all, from a whole Philox counter on."""
    offsets, position = [], 0
    for param in params:
        offsets.append(position)
        position += (param.numel() + 3) // 4 * 4
    return offsets


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def assert_same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """NaN payloads and the signs of zeros included."""
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(bits(a), bits(b)), f"tensor {i} differs in {(bits(a) != bits(b)).sum()} of {a.numel()}"


def unit(value: Tensor, dtype: torch.dtype) -> Tensor:
    """One unit in the last place of ``dtype`` at the float64 ``value``."""
    info = torch.finfo(dtype)
    return info.eps * torch.exp2(torch.frexp(value.abs().clamp(min=info.tiny)).exponent.double() - 1)


def assert_within(units: float, actual: Sequence[Tensor], expected: Sequence[Tensor], old: Sequence[Tensor]) -> None:
    """``actual`` is ``expected`` up to ``units`` in the last place of ``|expected| + |old|``.

    That is no less than what was added to the ``old`` value, whose rounding a sum that cancels does not shed.
    """
    for i, (a, b, before) in enumerate(zip(actual, expected, old, strict=True)):
        assert a.dtype == b.dtype
        a, b, before = a.double(), b.double(), before.double()
        excess = (a - b).abs() / unit(b.abs() + before.abs(), expected[i].dtype)
        wrong = ~((a == b) | (a.isnan() & b.isnan()) | (excess <= units))
        assert not wrong.any(), f"tensor {i}: {a[wrong][0]}, not {b[wrong][0]}, {excess[wrong][0]} units off"
