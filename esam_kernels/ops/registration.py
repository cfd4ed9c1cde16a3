"""How an operator comes to be: its schema, its fake, and whether a call goes by way of torch's dispatcher."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from esam_kernels.backends import reference, resolve
from esam_kernels.backends.protocol import Direct
from esam_kernels.tensor_lists import are_plain, has_memory

_library = torch.library.Library("esam_kernels", "DEF")


def check(condition: bool, message: Callable[[], str]) -> None:
    """Refuse arguments with a ValueError."""
    if not condition:
        raise ValueError(message())


def check_memory(**tensors: Tensor) -> None:
    """Refuse tensors whose storage has been freed or cut since: torch's own operators would read beyond it."""
    for name, tensor in tensors.items():
        check(has_memory(tensor), lambda: f"the memory of {name} was freed: {_storage_of(tensor)}")


def _storage_of(tensor: Tensor) -> str:
    has = tensor.untyped_storage().nbytes()
    return f"its storage has {has} bytes, too few for {tensor.dtype} of shape {tuple(tensor.shape)}; give one in use"


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define ``torch.ops.esam_kernels.*`` by its schema; returns what calls it, by way of the dispatcher or without.

    What it computes is what its namesake in the reference backend says.
    """
    name = schema.split("(")[0]
    _library.define(schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"esam_kernels::{name}", fake, lib=_library)
    operator: Callable[..., Any] = getattr(torch.ops.esam_kernels, name).default

    @functools.wraps(implementation)
    def call(*args: Any, **kwargs: Any) -> Any:
        # The dispatcher takes about two microseconds for each tensor of a list.
        if kwargs.keys() <= {"backend"} and _nobody_looks_on() and are_plain(args):
            return implementation(*args, **kwargs)
        return operator(*args, **kwargs)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = getattr(reference, name, implementation).__doc__
    return call


def _nobody_looks_on() -> bool:
    """Whether an operator may be called without torch's dispatcher: nothing traces, differentiates or profiles it."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
        or torch.autograd.forward_ad._current_level >= 0
    )


def direct(backend: str, device: torch.device) -> Direct | None:
    """The way of a backend past dispatcher and Python for plain tensors; None where it has none, or in a trace."""
    return None if torch.compiler.is_compiling() else resolve(backend, device).direct
