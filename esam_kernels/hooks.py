"""The hooks that torch.optim.Optimizer lets users register, and the names that a profiler shows, as torch has them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def label(optimizer: Any, method: str) -> AbstractContextManager[Any]:
    """What a profiler shows while the method runs: "Optimizer.step#SGD.step". Without a profiler nothing is done."""
    if not torch.autograd._profiler_enabled():
        return contextlib.nullcontext()
    return torch.autograd.profiler.record_function(f"Optimizer.{method}#{type(optimizer).__name__}.{method}")


def around_step(step: _Function) -> _Function:
    """Run the step hooks of the optimizer around this method: once, where one such method calls another.

    A hook is called with the optimizer, its arguments (the optimizer comes first) and its keyword arguments. Hooks on
    the base optimizer, and torch's global ones, run in the base optimizer's own step. Where a GradScaler skips the
    update, no hook runs.
    """

    @functools.wraps(step)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run_step(self, step, args, kwargs)

    wrapper.hooked = True  # type: ignore[attr-defined]  # torch does not have to wrap it once more
    return wrapper  # type: ignore[return-value]


def run_step(optimizer: Any, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``step(optimizer, *args, **kwargs)``, as :func:`around_step` runs it."""
    if optimizer._is_in_step:
        return step(optimizer, *args, **kwargs)
    if "found_inf" in optimizer.__dict__ and optimizer._is_skipped_by_scaler():
        return None
    optimizer._is_in_step = True
    try:
        if torch.autograd._profiler_enabled():
            with label(optimizer, "step"):
                return _between_hooks(optimizer, step, (optimizer, *args), kwargs)
        return _between_hooks(optimizer, step, (optimizer, *args), kwargs)
    finally:
        optimizer._is_in_step = False


def _between_hooks(self: Any, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    for pre_hook in self._optimizer_step_pre_hooks.values():
        changed = pre_hook(self, args, kwargs)
        if changed is not None:
            if not (isinstance(changed, tuple) and len(changed) == 2):
                raise RuntimeError(
                    f"a step pre-hook must return None or a tuple of (arguments, keyword arguments), got {changed!r}"
                )
            args, kwargs = changed
    result = step(*args, **kwargs)
    for post_hook in self._optimizer_step_post_hooks.values():
        post_hook(self, args, kwargs)
    return result


def saved_between_hooks(optimizer: Any, save: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The state that ``save`` returns, between the optimizer's hooks for ``state_dict``."""
    for pre_hook in optimizer._optimizer_state_dict_pre_hooks.values():
        pre_hook(optimizer)
    saved = save()
    for post_hook in optimizer._optimizer_state_dict_post_hooks.values():
        given = post_hook(optimizer, saved)
        saved = saved if given is None else given
    return saved


def load_between_hooks(optimizer: Any, state: dict[str, Any], load: Callable[[dict[str, Any]], None]) -> None:
    """``load(state)`` between the optimizer's hooks for ``load_state_dict``."""
    state = dict(state)
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        given = pre_hook(optimizer, state)
        state = state if given is None else given
    load(state)
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)
