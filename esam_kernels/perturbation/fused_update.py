"""The base optimizer's own update, computed from the saved weights: the restore then costs nothing (SGD, Adam, AdamW).

The state is kept where torch's optimizers keep it, under the same names, so that checkpoints interchange.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as torch_optimizer

from esam_kernels import ops
from esam_kernels.backends import resolve
from esam_kernels.hooks import label
from esam_kernels.tensor_lists import are_alike, gradients


@dataclass
class _Group:
    """The parameters of a group that have a gradient, with what the update reads and writes."""

    options: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Any]]


Plan = list[_Group]


class NotFused(Exception):
    """Why the update is not part of the restore, in a few words."""


def check_rates(base: Optimizer) -> None:
    """Refuse a learning rate that torch's SGD, Adam or AdamW would stumble over with some groups updated already.

    Raises:
        TypeError: a group's lr is neither a number nor a tensor. Nothing is changed then.
    """
    if type(base) in _STEPS:
        for number, group in enumerate(base.param_groups):
            if not isinstance(group["lr"], (float, Tensor, Real)):
                raise TypeError(f"the lr of parameter group {number} must be a number or a tensor, got {group['lr']!r}")


def waits_for_its_rate(base: Optimizer) -> bool:
    """Whether ``base.step()`` reads a learning rate back from the device, and a fused update gives the same bits."""
    return type(base) is SGD and any(
        isinstance(group["lr"], Tensor) and group["lr"].is_cuda and not group["fused"] for group in base.param_groups
    )


def has_hooks(base: Optimizer) -> bool:
    """Whether the user has hooks that are called around ``base.step()``."""
    return any(
        (
            base._optimizer_step_pre_hooks,
            base._optimizer_step_post_hooks,
            torch_optimizer._global_optimizer_pre_hooks,
            torch_optimizer._global_optimizer_post_hooks,
        )
    )


def _has_own_step(base: Optimizer) -> bool:
    """Whether the user has put a ``step`` in the place of torch's; an LR scheduler's, which counts, is none."""
    step = vars(base).get("step")
    if step is not None and hasattr(step, "_wrapped_by_lr_sched"):
        step = step.__wrapped__
    is_replaced = step is not None and getattr(step, "__func__", step) is not type(base).step
    return is_replaced or not _is_torchs(type(base).step)


@functools.lru_cache(maxsize=8)  # asked at every step
def _is_torchs(step: Callable[..., Any] | None) -> bool:
    """Whether the ``step`` of a class, and all that it wraps, is code of torch.optim."""
    while step is not None:
        if not getattr(step, "__globals__", {}).get("__name__", "").startswith("torch.optim."):
            return False
        step = getattr(step, "__wrapped__", None)
    return True


def why_not_fused(base: Optimizer, backend: str, params: Sequence[Tensor]) -> str | None:
    """Why :func:`restore_and_step` cannot take the place of ``base.step()``, whatever the gradients; None if it can."""
    if type(base) not in _STEPS:
        return f"{type(base).__name__} is neither SGD nor Adam nor AdamW of torch.optim itself"
    devices = {param.device for param in params}
    if len({device.type for device in devices}) > 1:
        return "some parameters are on a GPU and some on the CPU"
    for device in devices:
        chosen = resolve(backend, device)
        if not chosen.FUSES_UPDATES:
            return f"the backend {chosen.__name__.rpartition('.')[2]!r} does not fuse updates"
    if has_hooks(base):
        return "there are step hooks on the base optimizer, or on all optimizers"
    if _has_own_step(base):
        return "base_optimizer.step has been replaced"
    if getattr(base, "found_inf", None) is not None:
        return "a GradScaler is taking the step"
    for options in base.param_groups:
        if options["differentiable"] or any(isinstance(beta, Tensor) for beta in options.get("betas", ())):
            return "a group is differentiable, or its betas are tensors"
    return None


def plan_update(base: Optimizer, backend: str, params: Sequence[Tensor], align: bool = False) -> Plan:
    """What :func:`restore_and_step` has to do.

    With ``align`` a gradient that does not lie in memory as its parameter does is copied, and is no reason to refuse.

    Raises:
        NotFused: it would not be what ``restore`` and ``base.step()`` do: :func:`why_not_fused` says so, or a gradient
            or a state does not lie in memory as its parameter does.
    """
    reason = why_not_fused(base, backend, params)
    if reason is not None:
        raise NotFused(reason)
    return [_plan_group(base, options, align) for options in base.param_groups]


def _plan_group(base: Optimizer, options: dict[str, Any], align: bool) -> _Group:
    held = list(options["params"])
    given = zip(held, gradients(held))
    pairs = [(param, grad) for param, grad in given if grad is not None and param.numel()]
    params, grads = [param for param, _ in pairs], [grad for _, grad in pairs]
    if not are_alike(grads, params):
        if not align:
            raise NotFused("a gradient does not lie in memory as its parameter does, or is of another dtype")
        grads = [torch.empty_like(param).copy_(grad.detach()) for param, grad in pairs]
    # SGD without momentum keeps none.
    states = [base.state[param] for param in params] if options.get("momentum", 1.0) != 0.0 else []
    if odd := state_unlike_its_parameter(params, states):
        raise NotFused(f"the state {odd!r} does not lie in memory as its parameter does, or is of another dtype")
    return _Group(options, params, grads, states)


def state_unlike_its_parameter(params: list[Tensor], states: Sequence[dict[str, Any]]) -> str | None:
    """The name of a state that does not lie in memory as its parameter does; None if all do."""
    for name in _LIKE_PARAMETER.intersection(set().union(*states)):
        held = [state.get(name) for state in states]
        if not are_alike(held, params) and not all(
            tensor is None or are_alike([tensor], [param]) for tensor, param in zip(held, params)
        ):
            return name
    return None


_LIKE_PARAMETER = frozenset(("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"))


def restore_and_step(
    base: Optimizer,
    plan: Plan,
    backups: dict[int, Tensor],
    perturbed: Sequence[Tensor],
    backend: str,
    lr_tensors: Sequence[Tensor] | None = None,
) -> None:
    """The update of ``base`` from the saved weights ``backups`` (by the ``id`` of the parameter).

    ``lr_tensors`` hold the learning rates of the groups, in place of their ``lr``.
    """
    updated = {id(param) for group in plan for param in group.params}
    without = [param for param in perturbed if id(param) not in updated]
    with torch.no_grad(), label(base, "step"):
        if without:
            ops.restore_(without, [backups[id(param)] for param in without], backend=backend)
        for number, group in enumerate(plan):
            if group.params:
                saved = [backups.get(id(param), param) for param in group.params]
                lr = group.options["lr"] if lr_tensors is None else lr_tensors[number]
                _STEPS[type(base)](group, lr, saved, backend)
    # What torch's LR schedulers look at to warn about a missing optimizer.step().
    base._opt_called = True  # type: ignore[attr-defined]


def _number_and_tensor(lr: float | Tensor) -> tuple[float, Tensor | None]:
    return (0.0, lr) if isinstance(lr, Tensor) else (lr, None)


def _sgd_step(group: _Group, lr: float | Tensor, saved: list[Tensor], backend: str) -> None:
    options = group.options

    def update(
        params: list[Tensor], saved: list[Tensor], grads: list[Tensor], buffers: list[Tensor], first: bool
    ) -> None:
        ops.restore_sgd_(
            params,
            saved,
            grads,
            buffers,
            first,
            *_number_and_tensor(lr),
            options["momentum"],
            options["dampening"],
            options["weight_decay"],
            options["nesterov"],
            options["maximize"],
            backend=backend,
        )

    if options["momentum"] == 0:
        update(group.params, saved, group.grads, [], first=False)
        return
    fresh = [state.get("momentum_buffer") is None for state in group.states]
    buffers = [
        torch.empty_like(param) if is_fresh else state["momentum_buffer"]
        for param, state, is_fresh in zip(group.params, group.states, fresh)
    ]
    if all(fresh) or not any(fresh):
        update(group.params, saved, group.grads, buffers, fresh[0])
    else:
        for first in (True, False):
            lists = (group.params, saved, group.grads, buffers)
            w, backups, grads, velocities = ([t for t, f in zip(tensors, fresh) if f is first] for tensors in lists)
            update(w, backups, grads, velocities, first)
    if any(fresh):  # only now: after an update that raises, memory that was never written would count as momentum
        for state, buffer in zip(group.states, buffers):
            state["momentum_buffer"] = buffer


def _adam_step(group: _Group, lr: float | Tensor, saved: list[Tensor], backend: str) -> None:
    options, states = group.options, group.states
    amsgrad = options["amsgrad"]
    for param, state in zip(group.params, states):
        if not state:
            on_device = options["capturable"] or options["fused"]
            step = torch.zeros((), dtype=torch.float32, device=param.device if on_device else "cpu")
            names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if amsgrad else 2]
            state.update({"step": step, **{name: torch.zeros_like(param) for name in names}})  # all of it, or nothing
    ops.restore_adam_(
        group.params,
        saved,
        group.grads,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [state["max_exp_avg_sq"] for state in states] if amsgrad else [],
        [state["step"] for state in states],
        *_number_and_tensor(lr),
        *options["betas"],
        options["eps"],
        options["weight_decay"],
        amsgrad,
        options["maximize"],
        options["decoupled_weight_decay"],
        backend=backend,
    )


_STEPS: dict[type[Optimizer], Callable[[_Group, float | Tensor, list[Tensor], str], None]] = {
    SGD: _sgd_step,
    Adam: _adam_step,
    AdamW: _adam_step,
}
