"""Which memory is the host's, where all of it is: what of a step would wait for a GPU, and what it allocates.

Host tensors are those that are made of Python numbers, or with ``device="cpu"``, and what is computed of them alone.
Everything else counts as the device's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from esam_kernels import uploads
from esam_kernels.ops import registration

aten = torch.ops.aten
_FACTORIES = {torch.tensor, torch.arange, torch.empty, torch.zeros, torch.ones, torch.full}
_READS = {Tensor.tolist, Tensor.numpy, Tensor.cpu}
# Operators whose result the host has to know: a number, a shape.
_WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.equal.default,
}


@dataclass
class Watch:
    """What was seen. ``host`` takes tensors that are the host's from before."""

    reads: list[str] = field(default_factory=list)
    """Calls that wait for a value of the device."""
    copies: list[int] = field(default_factory=list)
    """Bytes of the copies from the host's ordinary memory to the device."""
    allocations: list[int] = field(default_factory=list)
    """Bytes of the memory of new tensors, of the host's and of the device's."""
    _host: dict[int, StorageWeakRef] = field(default_factory=dict)

    def host(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._host[storage._cdata] = StorageWeakRef(storage)

    def is_host(self, tensor: Tensor) -> bool:
        known = self._host.get(tensor.untyped_storage()._cdata)
        return known is not None and not known.expired()

    def take_out(self, tensor: Tensor) -> None:
        """The memory of ``tensor`` is pinned, or the device's from now on."""
        self._host.pop(tensor.untyped_storage()._cdata, None)

    def are_all_host(self, arguments: Any) -> bool:
        tensors = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
        return bool(tensors) and all(map(self.is_host, tensors))


class _Calls(TorchFunctionMode):
    """What Python calls, with its arguments as they are written."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, watch = kwargs or {}, self._watch
        given = self._is_of_host(func, args, kwargs)
        if func in _READS and not watch.is_host(args[0]):
            watch.reads.append(func.__name__)
        if func is Tensor.to and given and any(isinstance(a, torch.device) for a in (*args, *kwargs.values())):
            watch.copies.append(args[0].nbytes)
            given = False
        result = func(*args, **kwargs)
        if given:
            watch.host(*(leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)))
        elif func is Tensor.to:
            watch.take_out(result)
        return result

    def _is_of_host(self, func: Any, args: Any, kwargs: Any) -> bool:
        if func is torch.as_tensor and not isinstance(args[0], Tensor):  # a number, which joins other tensors
            return True
        if func in _FACTORIES:
            return kwargs.get("device") in (None, "cpu") and "out" not in kwargs
        return self._watch.are_all_host((args, kwargs))


class _Operators(TorchDispatchMode):
    """What torch runs, in its own functions as well."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, watch = kwargs or {}, self._watch
        if func in _WAITING and not watch.are_all_host((args, kwargs)):
            watch.reads.append(str(func))
        if func is aten.copy_.default and watch.is_host(args[1]) and not watch.is_host(args[0]):
            watch.copies.append(args[1].nbytes)
        result = func(*args, **kwargs)
        before = {_storage(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and _storage(leaf) not in before:
                watch.allocations.append(leaf.untyped_storage().nbytes())
        return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextlib.contextmanager
def watched(patch: Any, *host: Tensor) -> Iterator[Watch]:
    """Inside, all is seen; the tensors ``host`` are the host's. ``patch`` is pytest's ``monkeypatch``."""
    watch = Watch()
    watch.host(*host)
    staged = uploads.staged

    def pinned(values: Tensor, device: torch.device) -> Tensor:
        result = staged(values, device)
        watch.take_out(result)
        return result

    with patch.context() as inside, _Calls(watch), _Operators(watch):
        inside.setattr(uploads, "staged", pinned)
        # as in a step that is not watched: inside the dispatcher nothing would be seen
        inside.setattr(registration, "_nobody_looks_on", lambda: True)
        yield watch
