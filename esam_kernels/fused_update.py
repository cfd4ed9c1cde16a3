"""The base optimizer's own update, computed from the saved weights: the restore then costs nothing (SGD, Adam, AdamW).

The state is kept where torch's optimizers keep it, under the same names, so that checkpoints interchange.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as torch_optimizer

from esam_kernels import ops
from esam_kernels.backends import resolve
from esam_kernels.tensor_lists import are_alike


def can_fuse(base: Optimizer, backend: str, params: Sequence[Tensor]) -> bool:
    """Whether :func:`restore_and_step` does exactly what ``restore`` and ``base.step()`` would do.

    Not where the backend has no fused update, where the optimizer is a subclass or has hooks of the user's, or where a
    gradient or a state does not lie in memory as its parameter does.
    """
    if type(base) not in _STEPS or not all(
        getattr(resolve(backend, device), "FUSES_UPDATES", False) for device in {param.device for param in params}
    ):
        return False
    hooks = (
        base._optimizer_step_pre_hooks,
        base._optimizer_step_post_hooks,
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )
    if any(hooks) or getattr(base, "found_inf", None) is not None:
        return False
    return all(_group_fits(base, group) for group in base.param_groups)


def _group_fits(base: Optimizer, group: dict[str, Any]) -> bool:
    if group["differentiable"] or any(isinstance(beta, Tensor) for beta in group.get("betas", ())):
        return False
    params = [param for param in group["params"] if param.grad is not None]
    if not are_alike([param.grad for param in params], params):
        return False
    states = [base.state.get(param, {}) for param in params]
    for name in _LIKE_PARAMETER.intersection(set().union(*states)):
        held = [state.get(name) for state in states]
        if not are_alike(held, params) and not all(
            tensor is None or are_alike([tensor], [param]) for tensor, param in zip(held, params)
        ):
            return False
    return True


_LIKE_PARAMETER = frozenset(("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"))


def restore_and_step(
    base: Optimizer,
    backups: dict[int, Tensor],
    perturbed: Sequence[Tensor],
    backend: str,
    lr_tensors: Sequence[Tensor] | None = None,
) -> None:
    """The update of ``base`` from the saved weights ``backups`` (by the ``id`` of the parameter).

    ``lr_tensors`` hold the learning rates of the groups, in place of their ``lr``.
    """
    without = [param for param in perturbed if param.grad is None]
    with torch.no_grad():
        if without:
            ops.restore_(without, [backups[id(param)] for param in without], backend=backend)
        for number, group in enumerate(base.param_groups):
            params = [param for param in group["params"] if param.grad is not None and param.numel()]
            if params:
                saved = [backups.get(id(param), param) for param in params]
                lr = group["lr"] if lr_tensors is None else lr_tensors[number]
                _STEPS[type(base)](base, {**group, "lr": lr}, params, saved, backend)
    # What torch's LR schedulers look at to warn about a missing optimizer.step().
    base._opt_called = True  # type: ignore[attr-defined]


def _learning_rate(group: dict[str, Any]) -> tuple[float, Tensor | None]:
    lr = group["lr"]
    return (0.0, lr) if isinstance(lr, Tensor) else (lr, None)


def _sgd_step(base: Optimizer, group: dict[str, Any], params: list[Tensor], saved: list[Tensor], backend: str) -> None:
    lr, lr_tensor = _learning_rate(group)
    momentum = group["momentum"]

    def update(params: list[Tensor], saved: list[Tensor], buffers: list[Tensor], first: bool) -> None:
        ops.restore_sgd_(
            params,
            saved,
            [param.grad for param in params],
            buffers,
            first,
            lr,
            lr_tensor,
            momentum,
            group["dampening"],
            group["weight_decay"],
            group["nesterov"],
            group["maximize"],
            backend=backend,
        )

    if momentum == 0:
        update(params, saved, [], first=False)
        return
    states = [base.state[param] for param in params]
    fresh = [state.get("momentum_buffer") is None for state in states]
    for state, param in zip(states, params):
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.empty_like(param)
    buffers = [state["momentum_buffer"] for state in states]
    if all(fresh) or not any(fresh):
        update(params, saved, buffers, first=fresh[0])
        return
    for first in (True, False):
        chosen = [i for i, is_fresh in enumerate(fresh) if is_fresh is first]
        update([params[i] for i in chosen], [saved[i] for i in chosen], [buffers[i] for i in chosen], first)


def _adam_step(base: Optimizer, group: dict[str, Any], params: list[Tensor], saved: list[Tensor], backend: str) -> None:
    lr, lr_tensor = _learning_rate(group)
    amsgrad = group["amsgrad"]
    for param in params:
        state = base.state[param]
        if not state:
            on_device = group["capturable"] or group["fused"]
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device if on_device else "cpu")
            for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if amsgrad else 2]:
                state[name] = torch.zeros_like(param)
    states = [base.state[param] for param in params]
    ops.restore_adam_(
        params,
        saved,
        [param.grad for param in params],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [state["max_exp_avg_sq"] for state in states] if amsgrad else [],
        [state["step"] for state in states],
        lr,
        lr_tensor,
        *group["betas"],
        group["eps"],
        group["weight_decay"],
        amsgrad,
        group["maximize"],
        group["decoupled_weight_decay"],
        backend=backend,
    )


_STEPS: dict[type[Optimizer], Callable[[Any, dict[str, Any], list[Tensor], list[Tensor], str], None]] = {
    SGD: _sgd_step,
    Adam: _adam_step,
    AdamW: _adam_step,
}
