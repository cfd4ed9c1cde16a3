"""Questions about whole lists of tensors that a step asks every time: in C++ where the extension is built."""

from __future__ import annotations

import operator
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

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


def has_memory(tensor: Tensor) -> bool:
    """Whether the storage has all the bytes that shape and strides reach: it may have been freed or cut."""
    if tensor.layout != torch.strided or tensor.numel() == 0 or not torch._C._has_storage(tensor):
        return True  # none of its own: a wrapper of others
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) + tensor.storage_offset()
    return tensor.untyped_storage().nbytes() >= (last + 1) * tensor.element_size()


def _are_parallel(tensors: Sequence[Tensor | None], params: list[Tensor]) -> bool:
    """Whether they are alike, and each has the memory that its shape reaches."""
    return _are_alike(tensors, params) and all(
        tensor is not None and has_memory(tensor) and has_memory(param) for tensor, param in zip(tensors, params)
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
    """Whether each is a tensor or a parameter of torch's own, of no subclass, and holds in memory what it says."""
    return all(type(tensor) in (Tensor, torch.nn.Parameter) and not _is_lazy(tensor) for tensor in tensors)


def _are_plain(arguments: tuple[Any, ...]) -> bool:
    """Whether torch's dispatcher would hand each on as it is: exact tensors, lists of them or of numbers, numbers."""
    return all(map(_is_plain, arguments))


def _is_plain(argument: Any) -> bool:
    kind = type(argument)
    if kind is list:
        return not argument or not isinstance(argument[0], Tensor) or _are_exact(argument)
    if isinstance(argument, Tensor):
        return _are_exact([argument])
    return kind in (int, float, bool, type(None))


def _is_lazy(tensor: Tensor) -> bool:
    """Whether a bit of the tensor negates or conjugates its memory, or it has none: the dispatcher resolves that."""
    return tensor.is_neg() or tensor.is_conj() or tensor._is_zerotensor()


def _are_same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether both lists hold the same objects in the same order."""
    return len(one) == len(other) and all(map(operator.is_, one, other))


class _GradientMarks:
    """Which gradients there are, and at which version: to know later which of them are still the same.

    A gradient that is marked is not kept alive.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[weakref.ref[Tensor], int] | None] = []

    def set(self, params: list[Tensor]) -> None:
        """Mark the gradients that these parameters have now."""
        grads = _gradients(params)
        self._seen = [None if grad is None else (weakref.ref(grad), grad._version) for grad in grads]

    def are_all(self, params: list[Tensor]) -> bool:
        """Whether every gradient that there is now is a marked one, not written to since."""
        return all(since == 0 for since in self._versions_since(params))

    def any_other(self, params: list[Tensor]) -> bool:
        """Whether some gradient is none of the marked ones."""
        return any(since is None for since in self._versions_since(params))

    def any_written(self, params: list[Tensor]) -> bool:
        """Whether some marked gradient was written to since."""
        return any(since is not None and since != 0 for since in self._versions_since(params))

    def _versions_since(self, params: list[Tensor]) -> Iterator[int | None]:
        """For each gradient that there is how often it was written to since; None: it is another one."""
        for i, grad in enumerate(_gradients(params)):
            if grad is not None:
                seen = self._seen[i] if i < len(self._seen) else None
                yield grad._version - seen[1] if seen is not None and seen[0]() is grad else None


def _tensors_in(states: dict[Any, Any]) -> list[Tensor]:
    """The tensors in the values of a dict of dicts, as a torch optimizer keeps its state."""
    found = (value for values in states.values() if isinstance(values, dict) for value in values.values())
    return [value for value in found if isinstance(value, Tensor)]


class MemoryMarks:
    """Where tensors lie in memory: to know later whether one of them has moved. None of them is kept alive."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._places = [_place(tensor) for tensor in tensors]

    def are_all(self, tensors: list[Tensor]) -> bool:
        """Whether these lie where those did, in the same order, with dtypes, shapes and strides alike."""
        return [_place(tensor) for tensor in tensors] == self._places


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _hides_nothing(name: str) -> bool:
    """Functions of torch for operators and compiled graphs, and of this package: all is in their edges."""
    return name in ("CompiledFunctionBackward", "_CrossEntropyBackward") or name.startswith("GeneratedBackwardFor")


def _inspect_graph(loss: Tensor, params: list[Tensor], name: str) -> tuple[bool, bool]:
    """Whether the graph of a loss holds a ``torch.autograd.Function`` whose backward has this name, and whether a
    backward of it may compute gradients of ``params`` that its edges do not show.
    """
    seen: set[Any] = set()
    waiting = [loss.grad_fn]
    reached: set[int] = set()
    is_found = has_functions = False
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            reached.add(id(node.variable))
        elif isinstance(node, torch.autograd.function.BackwardCFunction):
            is_found = is_found or node.name() == name
            has_functions = has_functions or not _hides_nothing(node.name())
        waiting.extend(function for function, _ in node.next_functions)
    return is_found, has_functions and not all(id(param) in reached for param in params)


def _leaves(output: Tensor, known: list[Tensor]) -> list[Tensor]:
    """The tensors that a backward of ``output`` adds gradients to, but for ``known`` ones."""
    seen, waiting, found = set(), [output.grad_fn], []
    left_out = set(map(id, known))
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable") and id(node.variable) not in left_out:
            found.append(node.variable)
        waiting.extend(function for function, _ in node.next_functions)
    return found


_in_cpp = native.extension
are_same: Callable[[list[Tensor], list[Tensor]], bool] = _in_cpp.are_same if _in_cpp else _are_same
inspect_graph: Callable[[Tensor, list[Tensor], str], tuple[bool, bool]] = (
    _in_cpp.inspect_graph if _in_cpp else _inspect_graph
)
leaves: Callable[[Tensor, list[Tensor]], list[Tensor]] = _in_cpp.leaves if _in_cpp else _leaves
GradientMarks: type[_GradientMarks] = _in_cpp.GradientMarks if _in_cpp else _GradientMarks
mark_memory: Callable[[list[Tensor]], MemoryMarks] = _in_cpp.MemoryMarks if _in_cpp else MemoryMarks
tensors_in: Callable[[dict[Any, Any]], list[Tensor]] = _in_cpp.tensors_in if _in_cpp else _tensors_in
are_plain: Callable[[tuple[Any, ...]], bool] = _in_cpp.are_plain if _in_cpp else _are_plain
gradients: Callable[[list[Tensor]], list[Tensor | None]] = _in_cpp.gradients if _in_cpp else _gradients
drop_gradients: Callable[[list[Tensor]], None] = _in_cpp.drop_gradients if _in_cpp else _drop_gradients
increment_version: Callable[[list[Tensor]], None] = (
    _in_cpp.increment_version if _in_cpp else torch.autograd.graph.increment_version
)
are_alike: Callable[[Sequence[Tensor | None], list[Tensor]], bool] = _in_cpp.are_alike if _in_cpp else _are_alike
are_parallel: Callable[[Sequence[Tensor | None], list[Tensor]], bool] = (
    _in_cpp.are_parallel if _in_cpp else _are_parallel
)
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
