"""Questions about whole lists of tensors that a step asks every time: in C++ where the extension is built."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from esam_kernels.backends import native


def _are_alike(tensors: Sequence[Tensor | None], params: list[Tensor]) -> bool:
    """Whether each tensor (none is None) lies in memory as its parameter does: device, dtype, shape and strides."""
    return len(tensors) == len(params) and all(
        tensor is not None
        and tensor.layout == param.layout == torch.strided
        and tensor.dtype == param.dtype
        and tensor.device == param.device
        and tensor.shape == param.shape
        and tensor.stride() == param.stride()
        for tensor, param in zip(tensors, params)
    )


def _are_plainly_alike(tensors: Sequence[Tensor | None], params: list[Tensor]) -> bool:
    """Whether they are alike, and none is empty or needs a gradient itself."""
    return _are_alike(tensors, params) and not any(
        tensor is None or tensor.numel() == 0 or tensor.requires_grad for tensor in tensors
    )


def _trained(params: list[Tensor]) -> list[int]:
    """The numbers of the floating-point tensors that need a gradient."""
    return [i for i, param in enumerate(params) if param.requires_grad and param.is_floating_point()]


def _addresses(tensors: list[Tensor]) -> list[int]:
    """Where the memory of each begins."""
    return [tensor.data_ptr() for tensor in tensors]


def _holders(tensors: list[Tensor], i: int) -> tuple[int, int]:
    """How many hold the tensor in Python (the list is one of them), and how many its memory."""
    storage = tensors[i].untyped_storage()
    return sys.getrefcount(tensors[i]), torch._C._storage_Use_Count(storage._cdata)


def _are_held_alone(tensors: list[Tensor], objects: int, storage: int) -> list[bool]:
    """For each tensor, whether it has so many holders, needs no gradient and fills its storage."""
    return [
        _holders(tensors, i) == (objects, storage)
        and not tensors[i].requires_grad
        and tensors[i].untyped_storage().nbytes() == tensors[i].nbytes
        for i in range(len(tensors))
    ]


def _gradients(params: list[Tensor]) -> list[Tensor | None]:
    """The ``.grad`` of each."""
    return [param.grad for param in params]


def _drop_gradients(params: list[Tensor]) -> None:
    """Set the ``.grad`` of each to None."""
    for param in params:
        param.grad = None


def _are_exact(tensors: list[Tensor]) -> bool:
    """Whether each is a tensor or a parameter of torch's own, of no subclass."""
    return all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)


_in_cpp = native.extension
are_exact: Callable[[list[Tensor]], bool] = _in_cpp.are_exact if _in_cpp else _are_exact
gradients: Callable[[list[Tensor]], list[Tensor | None]] = _in_cpp.gradients if _in_cpp else _gradients
drop_gradients: Callable[[list[Tensor]], None] = _in_cpp.drop_gradients if _in_cpp else _drop_gradients
increment_version: Callable[[list[Tensor]], None] = (
    _in_cpp.increment_version if _in_cpp else torch.autograd.graph.increment_version
)
are_alike: Callable[[Sequence[Tensor | None], list[Tensor]], bool] = _in_cpp.are_alike if _in_cpp else _are_alike
are_plainly_alike: Callable[[Sequence[Tensor | None], list[Tensor]], bool] = (
    _in_cpp.are_plainly_alike if _in_cpp else _are_plainly_alike
)
trained: Callable[[list[Tensor]], list[int]] = _in_cpp.trained if _in_cpp else _trained
addresses: Callable[[list[Tensor]], list[int]] = _in_cpp.addresses if _in_cpp else _addresses
_count_holders: Callable[[list[Tensor], int], tuple[int, int]] = _in_cpp.holders if _in_cpp else _holders
_compare_holders: Callable[[list[Tensor], int, int], list[bool]] = (
    _in_cpp.are_held_alone if _in_cpp else _are_held_alone
)


def are_unshared(grads: list[Tensor]) -> list[bool]:
    """For each gradient, whether nobody but its parameter (and this list) holds it, so that its memory may be reused.

    No: the views that DistributedDataParallel makes into its buckets, and gradients that the user has kept.
    """
    return _compare_holders(grads, *_HOLDERS_OF_A_FRESH_GRADIENT)


def _holders_of_a_fresh_gradient() -> tuple[int, int]:
    # Counted, not known: how many references Python and torch hold themselves differs from version to version.
    with torch.enable_grad(), torch.inference_mode(False):
        param = torch.zeros(1, requires_grad=True, device="cpu")
        (param * 2.0).sum().backward()
    return _count_holders([grad for grad in (param.grad,) if grad is not None], 0)


_HOLDERS_OF_A_FRESH_GRADIENT = _holders_of_a_fresh_gradient()


def holders_of_memory(tensors: Sequence[Tensor]) -> list[int]:
    """For each tensor how many tensors hold its storage: 1 for a parameter whose memory nobody shares.

    Detached tensors, views, ``.data`` of a twin and the arrays of numpy made from it count; copies do not.
    """
    return [_holders_of_storage(tensor) - _HOLDERS_OF_A_FRESH_STORAGE + 1 for tensor in tensors]


def _holders_of_storage(tensor: Tensor) -> int:
    storage = tensor.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata))


def _holders_of_a_fresh_storage() -> int:
    # Counted, as above: Python's own object of a storage is a holder in some versions and in others not.
    with torch.inference_mode(False):
        return _holders_of_storage(torch.nn.Parameter(torch.zeros(1, device="cpu")))


_HOLDERS_OF_A_FRESH_STORAGE = _holders_of_a_fresh_storage()
