"""The raw operators, ``torch.ops.esam_kernels.*``: schemas, fakes, argument checks, and the way to the backends.

Every call into a backend goes through here. The schemas declare what is mutated, so the operators can stand inside
``torch.compile``d code; they carry no autograd (see :mod:`esam_kernels.selection` for what is differentiable).
``backend`` is the name of one, or "" for the default of the device (see :mod:`esam_kernels.backends`).

Lists of tensors are parallel: ``grads[i]`` belongs to ``params[i]``, has its dtype, and the same dense strides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from esam_kernels.backends import reference, resolve
from esam_kernels.backends.reference import NUM_PARTIALS, compute_dtype
from esam_kernels.tensor_lists import are_alike, increment_version

__all__ = [
    "NUM_PARTIALS",
    "compute_dtype",
    "cross_entropy",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "gather",
    "gather_rows",
    "norm_partials",
    "perturb_",
    "restore_",
    "restore_adam_",
    "restore_sgd_",
    "select",
    "select_gather",
    "select_rows",
]

_library = torch.library.Library("esam_kernels", "DEF")


def _check(condition: bool, message: Callable[[], str]) -> None:
    if not condition:
        raise ValueError(message())


def _check_parallel(name: str, tensors: list[Tensor], params: list[Tensor]) -> None:
    if are_alike(tensors, params):
        return
    _check(len(tensors) == len(params), lambda: f"{name} has {len(tensors)} tensors, params has {len(params)}")
    for i, (tensor, param) in enumerate(zip(tensors, params)):
        _check(
            are_alike([tensor], [param]),
            lambda: f"{name}[{i}] ({_lie(tensor)}) does not match params[{i}] ({_lie(param)})",
        )


def _lie(tensor: Tensor) -> str:
    """How a tensor lies in memory, for a message."""
    strides = f", strides {tensor.stride()}" if tensor.layout == torch.strided else f", {tensor.layout}"
    return f"{tensor.dtype} on {tensor.device}, shape {tuple(tensor.shape)}{strides}"


def _check_blocks(params: list[Tensor], grads: list[Tensor], groups: Sequence[int], num_groups: int) -> None:
    _check(len(params) > 0, lambda: "params is empty")
    _check(len(groups) == len(params), lambda: f"groups has {len(groups)} numbers, params has {len(params)} tensors")
    _check(min(groups) >= 0 and max(groups) < num_groups, lambda: f"groups must lie in [0, {num_groups}), got {groups}")
    _check_parallel("grads", grads, params)


def _register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    name = schema.split("(")[0]
    _library.define(schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"esam_kernels::{name}", fake, lib=_library)
    operator: Callable[..., Any] = getattr(torch.ops.esam_kernels, name).default

    @functools.wraps(implementation)
    def call(*args: Any, **kwargs: Any) -> Any:
        # The dispatcher takes about two microseconds for each tensor of a list.
        return (implementation if _nobody_looks_on() and tuple not in map(type, args) else operator)(*args, **kwargs)

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
    )


def _mutates_only(*args: Any, **kwargs: Any) -> None:
    return None


# -- Stochastic Weight Perturbation ------------------------------------------------------------------------------------


def _norm_partials(
    params: list[Tensor],
    grads: list[Tensor],
    groups: list[int],
    adaptive: list[bool],
    eta: float,
    backend: str = "",
) -> Tensor:
    _check_blocks(params, grads, groups, len(adaptive))
    partials: Tensor = resolve(backend, params[0].device).norm_partials(params, grads, groups, adaptive, eta)
    return partials


norm_partials = _register(
    "norm_partials(Tensor[] params, Tensor[] grads, int[] groups, bool[] adaptive, float eta, *, str backend='') "
    "-> Tensor",
    _norm_partials,
    lambda params, *_, **__: params[0].new_empty(NUM_PARTIALS, dtype=torch.float64),
)
"""Partial sums of ||T(w) g||^2 over all tensors, T(w) = |w| + eta in the groups that are ``adaptive``, else 1.

Returns float64 (NUM_PARTIALS,), whose sum is the square of the norm. Two runs give the same bits.
"""


def _perturb(
    params: list[Tensor],
    grads: list[Tensor],
    backups: list[Tensor],
    groups: list[int],
    offsets: list[int],
    partials: Tensor,
    scale: Tensor,
    adaptive: list[bool],
    eta: float,
    norm_factor: float,
    eps: float,
    random_state: Tensor | None = None,
    backend: str = "",
) -> None:
    _check_blocks(params, grads, groups, len(adaptive))
    _check(len(offsets) == len(params), lambda: f"offsets has {len(offsets)} numbers for {len(params)} tensors")
    _check(all(offset % 4 == 0 for offset in offsets), lambda: "offsets must be multiples of 4")
    if backups:
        _check_parallel("backups", backups, params)
    resolve(backend, params[0].device).perturb_(
        params,
        grads,
        backups,
        groups,
        offsets,
        partials,
        scale,
        adaptive,
        eta,
        norm_factor,
        eps,
        random_state,
    )
    increment_version(params)
    increment_version(backups or grads)


perturb_ = _register(
    "perturb_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] backups, int[] groups, int[] offsets, "
    "Tensor partials, Tensor scale, bool[] adaptive, float eta, float norm_factor, float eps, "
    "Tensor? random_state=None, *, str backend='') -> ()",
    _perturb,
    _mutates_only,
)
"""w <- w + scale[group] m T(w)^2 g / (norm_factor ||T(w) g|| + eps), keeping the old w (Eq. 4 and 5).

The old weights go to ``backups``, or, where that list is empty, over the gradients. ``partials`` is what
``norm_partials`` returned, ``scale`` float64 (groups,) holds rho / beta. ``random_state``: None for m = 1, or int64
(seed, step, bound): element i of tensor t takes word i % 4 of the Philox4x32-10 counter (offsets[t] + i) // 4 and is
perturbed where that word is at most ``bound`` = round(beta 2^32) - 1. Where the norm is 0 or not finite, e = 0.
"""


def _restore(params: list[Tensor], backups: list[Tensor], backend: str = "") -> None:
    _check(len(params) > 0, lambda: "params is empty")
    _check_parallel("backups", backups, params)
    resolve(backend, params[0].device).restore_(params, backups)
    increment_version(params)


restore_ = _register(
    "restore_(Tensor(a!)[] params, Tensor[] backups, *, str backend='') -> ()", _restore, _mutates_only
)
"""w <- backup, bit for bit, in the same storage."""


def _restore_sgd(
    params: list[Tensor],
    backups: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    first: bool,
    lr: float,
    lr_tensor: Tensor | None,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    backend: str = "",
) -> None:
    _check(len(params) > 0, lambda: "params is empty")
    _check_parallel("backups", backups, params)
    _check_parallel("grads", grads, params)
    if momentum != 0:
        _check_parallel("momentum_buffers", momentum_buffers, params)
    resolve(backend, params[0].device).restore_sgd_(
        params,
        backups,
        grads,
        momentum_buffers,
        first,
        lr,
        lr_tensor,
        momentum,
        dampening,
        weight_decay,
        nesterov,
        maximize,
    )
    increment_version(params)
    increment_version(momentum_buffers)


restore_sgd_ = _register(
    "restore_sgd_(Tensor(a!)[] params, Tensor[] backups, Tensor[] grads, Tensor(b!)[] momentum_buffers, bool first, "
    "float lr, Tensor? lr_tensor, float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, "
    "*, str backend='') -> ()",
    _restore_sgd,
    _mutates_only,
)
"""w <- backup - lr d, with d of ``torch.optim.SGD``: restore and update in one pass over memory.

``first``: the buffers have not been written yet (torch starts them at the gradient, without dampening).
``lr_tensor``, where given, is read on the device in place of ``lr``. ``momentum_buffers`` is empty at momentum 0.
"""


def _restore_adam(
    params: list[Tensor],
    backups: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    lr: float,
    lr_tensor: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    amsgrad: bool,
    maximize: bool,
    decoupled_weight_decay: bool,
    backend: str = "",
) -> None:
    _check(len(params) > 0, lambda: "params is empty")
    lists = {"backups": backups, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if amsgrad:
        lists["max_exp_avg_sqs"] = max_exp_avg_sqs
    for name, tensors in lists.items():
        _check_parallel(name, tensors, params)
    _check(len(steps) == len(params), lambda: f"steps has {len(steps)} tensors, params has {len(params)}")
    resolve(backend, params[0].device).restore_adam_(
        params,
        backups,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        steps,
        lr,
        lr_tensor,
        beta1,
        beta2,
        eps,
        weight_decay,
        amsgrad,
        maximize,
        decoupled_weight_decay,
    )
    for tensors in (params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs):
        increment_version(tensors)


restore_adam_ = _register(
    "restore_adam_(Tensor(a!)[] params, Tensor[] backups, Tensor[] grads, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, float lr, Tensor? lr_tensor, "
    "float beta1, float beta2, float eps, float weight_decay, bool amsgrad, bool maximize, "
    "bool decoupled_weight_decay, *, str backend='') -> ()",
    _restore_adam,
    _mutates_only,
)
"""w <- backup, then the update of ``torch.optim.Adam`` (AdamW with ``decoupled_weight_decay``), in one pass.

``steps`` are torch's own one-element float32 counters, incremented here; ``max_exp_avg_sqs`` is empty without
``amsgrad``.
"""


# -- Sharpness-sensitive Data Selection --------------------------------------------------------------------------------


def _check_cross_entropy(logits: Tensor, target: Tensor) -> None:
    _check(
        logits.dim() == 2 and logits.is_floating_point(),
        lambda: f"logits must be floating point (rows, classes), got {logits.dtype} {tuple(logits.shape)}",
    )
    expected = tuple(logits.shape) if target.is_floating_point() else tuple(logits.shape[:1])
    _check(
        (target.is_floating_point() or target.dtype == torch.int64) and tuple(target.shape) == expected,
        lambda: (
            "target must be int64 (rows,) or floating point (rows, classes), got "
            f"{target.dtype} {tuple(target.shape)} for logits {tuple(logits.shape)}"
        ),
    )


def _cross_entropy_forward(
    logits: Tensor, target: Tensor, label_smoothing: float, ignore_index: int, backend: str = ""
) -> tuple[Tensor, Tensor]:
    _check_cross_entropy(logits, target)
    losses, lse = resolve(backend, logits.device).cross_entropy_forward(logits, target, label_smoothing, ignore_index)
    return losses, lse


def _fake_cross_entropy_forward(logits: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(logits.dtype)
    return logits.new_empty(logits.shape[0], dtype=dtype), logits.new_empty(logits.shape[0], dtype=dtype)


cross_entropy_forward = _register(
    "cross_entropy_forward(Tensor logits, Tensor target, float label_smoothing, int ignore_index, *, "
    "str backend='') -> (Tensor, Tensor)",
    _cross_entropy_forward,
    _fake_cross_entropy_forward,
)
"""Per-row losses and log-sum-exp of (rows, classes) logits, float32 (float64 for float64), shape (rows,) each.

``target`` holds class indices, int64 (rows,), or class probabilities, floating point (rows, classes).
"""


def _cross_entropy_backward(
    grad_losses: Tensor,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    label_smoothing: float,
    ignore_index: int,
    backend: str = "",
) -> Tensor:
    _check_cross_entropy(logits, target)
    gradient: Tensor = resolve(backend, logits.device).cross_entropy_backward(
        grad_losses, logits, target, lse, label_smoothing, ignore_index
    )
    return gradient


cross_entropy_backward = _register(
    "cross_entropy_backward(Tensor grad_losses, Tensor logits, Tensor target, Tensor lse, float label_smoothing, "
    "int ignore_index, *, str backend='') -> Tensor",
    _cross_entropy_backward,
    lambda grad_losses, logits, *_, **__: torch.empty_like(logits, memory_format=torch.contiguous_format),
)
"""The gradient of the losses with respect to the logits, contiguous (rows, classes), in the logits' dtype."""


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(logits: Tensor, target: Tensor, label_smoothing: float, ignore_index: int) -> tuple[Tensor, Tensor]:
        losses, lse = cross_entropy_forward(logits, target, label_smoothing, ignore_index)
        return losses, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        logits, target, ctx.label_smoothing, ctx.ignore_index = inputs
        ctx.save_for_backward(logits, target, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        logits, target, lse = ctx.saved_tensors
        arguments = (ctx.label_smoothing, ctx.ignore_index)
        if torch.is_grad_enabled():
            # Somebody wants a second derivative: the reference is made of operators that have one.
            lse = torch.logsumexp(logits.to(lse.dtype), dim=1)
            gradient = reference.cross_entropy_backward(grad_losses, logits, target, lse, *arguments)
        else:
            gradient = cross_entropy_backward(grad_losses, logits, target, lse, *arguments)
        return gradient, None, None, None


def direct(backend: str, device: torch.device) -> Any:
    """The way of a backend past dispatcher and Python for plain tensors; None where it has none, or in a trace."""
    return None if torch.compiler.is_compiling() else getattr(resolve(backend, device), "direct", None)


def cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float, ignore_index: int) -> Tensor:
    """The losses of ``cross_entropy_forward``, twice differentiable with respect to the logits."""
    arguments = (logits, target, label_smoothing, ignore_index)
    if not (torch.is_grad_enabled() and logits.requires_grad):
        losses: Tensor = cross_entropy_forward(*arguments)[0]
    elif torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        losses = _CrossEntropy.apply(*arguments)[0]
    else:
        # What apply() does then, without binding the arguments to a signature first: half the time of a small batch.
        losses = super(torch.autograd.Function, _CrossEntropy).apply(*arguments)[0]
    return losses


def _select(loss_before: Tensor, loss_after: Tensor, k: int, backend: str = "") -> Tensor:
    for name, losses in (("loss_before", loss_before), ("loss_after", loss_after)):
        _check(
            losses.dim() == 1 and losses.is_floating_point(),
            lambda: f"{name} must hold one loss per sample, shape (b,), got {losses.dtype} {tuple(losses.shape)}",
        )
    _check(
        loss_before.shape == loss_after.shape,
        lambda: f"loss_before has {loss_before.shape[0]} samples, loss_after has {loss_after.shape[0]}",
    )
    _check(1 <= k <= loss_before.shape[0], lambda: f"k must lie in [1, {loss_before.shape[0]}], got {k}")
    indices: Tensor = resolve(backend, loss_before.device).select(loss_before, loss_after, k)
    return indices


select = _register(
    "select(Tensor loss_before, Tensor loss_after, int k, *, str backend='') -> Tensor",
    _select,
    lambda loss_before, loss_after, k, backend="": loss_before.new_empty(k, dtype=torch.int64),
)
"""The k samples with the largest loss_after - loss_before (Eq. 6): ascending int64 indices (k,).

Ties go to the lower index, NaN ranks last, -0.0 equals 0.0. Nothing waits for the device.
"""


def _gather(tensors: list[Tensor], indices: Tensor, backend: str = "") -> list[Tensor]:
    _check(
        indices.dim() == 1 and indices.dtype == torch.int64,
        lambda: f"indices must be int64 (k,), got {indices.dtype} {tuple(indices.shape)}",
    )
    for i, tensor in enumerate(tensors):
        _check(tensor.dim() >= 1, lambda: f"tensors[{i}] has no batch dimension")
    rows: list[Tensor] = resolve(backend, indices.device).gather(tensors, indices)
    return rows


def _fake_gather(tensors: list[Tensor], indices: Tensor, backend: str = "") -> list[Tensor]:
    return reference.gather(tensors, indices)


gather = _register("gather(Tensor[] tensors, Tensor indices, *, str backend='') -> Tensor[]", _gather, _fake_gather)
"""The rows ``indices`` of each tensor: any dtype, batch in front, memory format kept."""


def gather_rows(tensors: list[Tensor], indices: Tensor, backend: str = "") -> list[Tensor]:
    """The rows ``indices`` of each tensor, differentiable with respect to the tensors."""
    shortcut = direct(backend, indices.device)
    if shortcut and (gathered := shortcut.gather(tensors, indices)) is not None:
        return gathered  # type: ignore[no-any-return]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return reference.gather(tensors, indices)
    rows: list[Tensor] = gather(tensors, indices, backend=backend)
    return rows


def _check_looks(before: Tensor, after: Tensor, target: Tensor | None, k: int) -> None:
    """Losses (b,), or beside a target logits (b, C), of the weights before and after."""
    for name, values in (("before", before), ("after", after)):
        if target is not None and values.dim() == 2:
            _check_cross_entropy(values, target)
            continue
        _check(
            values.dim() == 1 and values.is_floating_point(),
            lambda: (
                f"{name} must hold one loss per sample, shape (b,), or with a target logits (b, classes), "
                f"got {values.dtype} {tuple(values.shape)}"
            ),
        )
    samples = before.shape[0]
    _check(after.shape[0] == samples, lambda: f"before has {samples} samples, after has {after.shape[0]}")
    _check(1 <= k <= samples, lambda: f"k must lie in [1, {samples}], got {k}")


def _select_gather(
    before: Tensor,
    after: Tensor,
    tensors: list[Tensor],
    k: int,
    target: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    backend: str = "",
) -> tuple[Tensor, list[Tensor]]:
    _check_looks(before, after, target, k)
    for i, tensor in enumerate(tensors):
        _check(tensor.dim() >= 1, lambda: f"tensors[{i}] has no batch dimension")
    module = resolve(backend, after.device)
    in_one_launch = getattr(module, "losses_select_gather", None)
    if in_one_launch is not None:
        _, _, indices, rows = in_one_launch(before, after, k, tensors, target, label_smoothing, ignore_index)
        return indices, rows
    losses = [
        module.cross_entropy_forward(values, target, label_smoothing, ignore_index)[0] if values.dim() == 2 else values
        for values in (before, after)
    ]
    indices = module.select(*losses, k)
    return indices, module.gather(tensors, indices)


def _fake_select_gather(
    before: Tensor, after: Tensor, tensors: list[Tensor], k: int, *_: Any, **__: Any
) -> tuple[Tensor, list[Tensor]]:
    indices = after.new_empty(k, dtype=torch.int64)
    return indices, reference.gather(tensors, indices)


select_gather = _register(
    "select_gather(Tensor before, Tensor after, Tensor[] tensors, int k, Tensor? target=None, "
    "float label_smoothing=0.0, int ignore_index=-100, *, str backend='') -> (Tensor, Tensor[])",
    _select_gather,
    _fake_select_gather,
)
"""What ``select`` returns for the losses ``before`` and ``after``, (b,), and the rows of ``tensors`` that it names.

With ``target`` either may be logits (b, C) in place of losses. One launch where the backend has one (cuda).
"""


def select_rows(
    before: Tensor,
    after: Tensor,
    tensors: list[Tensor],
    k: int,
    target: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    backend: str = "",
) -> list[Tensor]:
    """The rows that ``select_gather`` returns, differentiable with respect to the tensors."""
    shortcut = direct(backend, after.device) if target is None else None
    if shortcut and (indices := shortcut.select(before, after, k)) is not None:
        return gather_rows(tensors, indices, backend)
    arguments = (k, target, label_smoothing, ignore_index)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        indices, _ = select_gather(before, after, [], *arguments, backend=backend)
        return reference.gather(tensors, indices)
    rows: list[Tensor] = select_gather(before, after, tensors, *arguments, backend=backend)[1]
    return rows
