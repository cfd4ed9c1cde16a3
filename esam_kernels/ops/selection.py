"""Operators of Sharpness-sensitive Data Selection (section 2.3): losses per sample, selection, gathering.

They carry no autograd, except for the functions ``cross_entropy``, ``gather_rows`` and ``select_rows`` made of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from esam_kernels.backends import reference, resolve
from esam_kernels.backends.reference import compute_dtype
from esam_kernels.ops.registration import check, check_memory, direct, register


def _check_devices(**tensors: Tensor) -> None:
    check(
        len({tensor.device for tensor in tensors.values()}) == 1,
        lambda: "on different devices: " + ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items()),
    )


def _check_cross_entropy(logits: Tensor, target: Tensor, ignore_index: int) -> None:
    _check_devices(logits=logits, target=target)
    check_memory(logits=logits, target=target)
    check(
        logits.dim() == 2 and logits.is_floating_point(),
        lambda: f"logits must be floating point (rows, classes), got {logits.dtype} {tuple(logits.shape)}",
    )
    expected = tuple(logits.shape) if target.is_floating_point() else tuple(logits.shape[:1])
    check(
        (target.is_floating_point() or target.dtype == torch.int64) and tuple(target.shape) == expected,
        lambda: (
            "target must be int64 (rows,) or floating point (rows, classes), got "
            f"{target.dtype} {tuple(target.shape)} for logits {tuple(logits.shape)}"
        ),
    )
    check(
        ignore_index < 0 or not target.is_floating_point(),
        lambda: (
            f"ignore_index={ignore_index} names a class, but the target holds class probabilities: leave ignore_index "
            "out, and give rows that are not to count a target of zeros"
        ),
    )


def _cross_entropy_forward(
    logits: Tensor, target: Tensor, label_smoothing: float, ignore_index: int, backend: str = ""
) -> tuple[Tensor, Tensor]:
    _check_cross_entropy(logits, target, ignore_index)
    module = resolve(backend, logits.device)
    losses, normalizer = module.cross_entropy_forward(logits, target, label_smoothing, ignore_index)
    return losses, normalizer


def _fake_cross_entropy_forward(logits: Tensor, target: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    _check_devices(logits=logits, target=target)
    rows, dtype = logits.shape[0], compute_dtype(logits.dtype)
    return logits.new_empty(rows, dtype=dtype), logits.new_empty((2, rows), dtype=dtype)


cross_entropy_forward = register(
    "cross_entropy_forward(Tensor logits, Tensor target, float label_smoothing, int ignore_index, *, "
    "str backend='') -> (Tensor, Tensor)",
    _cross_entropy_forward,
    _fake_cross_entropy_forward,
)
"""Losses (rows,) of (rows, classes) logits, and what softmax is rebuilt from: float32, or float64 for float64.

The second result, (2, rows), holds each row's maximum and log sum exp(x - maximum): softmax is exp(x - maximum - log
sum), exact to rounding whatever the rows' common offsets. NaN, or any value, where a row has no softmax.
``target`` holds class indices, int64 (rows,), or class probabilities, floating point (rows, classes).
"""


def _cross_entropy_backward(
    grad_losses: Tensor,
    logits: Tensor,
    target: Tensor,
    normalizer: Tensor,
    label_smoothing: float,
    ignore_index: int,
    backend: str = "",
) -> Tensor:
    _check_cross_entropy(logits, target, ignore_index)
    check(
        tuple(normalizer.shape) == (2, logits.shape[0]),
        lambda: f"normalizer must have shape (2, {logits.shape[0]}), got {tuple(normalizer.shape)}",
    )
    check(
        tuple(grad_losses.shape) == (logits.shape[0],),
        lambda: f"grad_losses must have shape ({logits.shape[0]},), got {tuple(grad_losses.shape)}",
    )
    check_memory(grad_losses=grad_losses, normalizer=normalizer)
    gradient: Tensor = resolve(backend, logits.device).cross_entropy_backward(
        grad_losses, logits, target, normalizer, label_smoothing, ignore_index
    )
    return gradient


cross_entropy_backward = register(
    "cross_entropy_backward(Tensor grad_losses, Tensor logits, Tensor target, Tensor normalizer, "
    "float label_smoothing, int ignore_index, *, str backend='') -> Tensor",
    _cross_entropy_backward,
    lambda grad_losses, logits, *_, **__: torch.empty_like(logits, memory_format=torch.contiguous_format),
)
"""The gradient of the losses with respect to the logits, contiguous (rows, classes), in the logits' dtype.

``normalizer`` is the second result of ``cross_entropy_forward``.
"""


def _are_batched(grads: Tensor) -> bool:
    """Whether these are many gradients at once, of ``torch.autograd.grad(..., is_grads_batched=True)``."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(grads)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(logits: Tensor, target: Tensor, label_smoothing: float, ignore_index: int) -> tuple[Tensor, Tensor]:
        losses, normalizer = cross_entropy_forward(logits, target, label_smoothing, ignore_index)
        return losses, normalizer

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        logits, target, ctx.label_smoothing, ctx.ignore_index = inputs
        ctx.save_for_backward(logits, target, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        logits, target, normalizer = ctx.saved_tensors
        arguments = (ctx.label_smoothing, ctx.ignore_index)
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active() or _are_batched(grad_losses):
            # Somebody wants a second derivative, or many first ones: the reference is made of operators that have them.
            normalizer = reference.softmax_normalizer(logits.to(normalizer.dtype))
            gradient = reference.cross_entropy_backward(grad_losses, logits, target, normalizer, *arguments)
        else:
            gradient = cross_entropy_backward(grad_losses, logits, target, normalizer, *arguments)
        return gradient, None, None, None


def cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float, ignore_index: int) -> Tensor:
    """The losses of ``cross_entropy_forward``, twice differentiable with respect to the logits."""
    arguments = (logits, target, label_smoothing, ignore_index)
    compiling = torch.compiler.is_compiling()
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        # The operators have neither batching rules nor forward derivatives; what the reference is made of has both.
        return reference.cross_entropy_forward(*arguments)[0]
    if not (torch.is_grad_enabled() and logits.requires_grad):
        losses: Tensor = cross_entropy_forward(*arguments)[0]
    elif compiling:
        losses = _CrossEntropy.apply(*arguments)[0]
    else:
        # What apply() does then, without binding the arguments to a signature first: half the time of a small batch.
        losses = super(torch.autograd.Function, _CrossEntropy).apply(*arguments)[0]
    return losses


def _select(loss_before: Tensor, loss_after: Tensor, k: int, backend: str = "") -> Tensor:
    for name, losses in (("loss_before", loss_before), ("loss_after", loss_after)):
        check(
            losses.dim() == 1 and losses.is_floating_point(),
            lambda: f"{name} must hold one loss per sample, shape (b,), got {losses.dtype} {tuple(losses.shape)}",
        )
    check(
        loss_before.shape == loss_after.shape,
        lambda: f"loss_before has {loss_before.shape[0]} samples, loss_after has {loss_after.shape[0]}",
    )
    _check_devices(loss_before=loss_before, loss_after=loss_after)
    check_memory(loss_before=loss_before, loss_after=loss_after)
    check(1 <= k <= loss_before.shape[0], lambda: f"k must lie in [1, {loss_before.shape[0]}], got {k}")
    indices: Tensor = resolve(backend, loss_before.device).select(loss_before, loss_after, k)
    return indices


def _fake_select(loss_before: Tensor, loss_after: Tensor, k: int, backend: str = "") -> Tensor:
    _check_devices(loss_before=loss_before, loss_after=loss_after)
    return loss_before.new_empty(k, dtype=torch.int64)


select = register(
    "select(Tensor loss_before, Tensor loss_after, int k, *, str backend='') -> Tensor",
    _select,
    _fake_select,
)
"""The k samples with the largest loss_after - loss_before (Eq. 6): ascending int64 indices (k,).

Ties go to the lower index, NaN ranks last, -0.0 equals 0.0. Nothing waits for the device.
"""


def _check_rows(tensors: list[Tensor]) -> None:
    for i, tensor in enumerate(tensors):
        check(tensor.dim() >= 1, lambda: f"tensors[{i}] has no batch dimension")
        check_memory(**{f"tensors[{i}]": tensor})


def _gather(tensors: list[Tensor], indices: Tensor, backend: str = "") -> list[Tensor]:
    check(
        indices.dim() == 1 and indices.dtype == torch.int64,
        lambda: f"indices must be int64 (k,), got {indices.dtype} {tuple(indices.shape)}",
    )
    _check_rows(tensors)
    rows: list[Tensor] = resolve(backend, indices.device).gather(tensors, indices)
    return rows


def _fake_gather(tensors: list[Tensor], indices: Tensor, backend: str = "") -> list[Tensor]:
    return reference.gather(tensors, indices)


gather = register("gather(Tensor[] tensors, Tensor indices, *, str backend='') -> Tensor[]", _gather, _fake_gather)
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


def _check_losses(before: Tensor, after: Tensor, target: Tensor | None, k: int, ignore_index: int) -> None:
    """Losses (b,), or beside a target logits (b, C), of the weights before and after."""
    for name, values in (("before", before), ("after", after)):
        if target is not None and values.dim() == 2:
            _check_cross_entropy(values, target, ignore_index)
            continue
        check(
            values.dim() == 1 and values.is_floating_point(),
            lambda: (
                f"{name} must hold one loss per sample, shape (b,), or with a target logits (b, classes), "
                f"got {values.dtype} {tuple(values.shape)}"
            ),
        )
    samples = before.shape[0]
    _check_devices(before=before, after=after)
    check_memory(before=before, after=after)
    check(after.shape[0] == samples, lambda: f"before has {samples} samples, after has {after.shape[0]}")
    check(1 <= k <= samples, lambda: f"k must lie in [1, {samples}], got {k}")


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
    """The k samples whose loss rises most, and these rows of each tensor: ``select`` and ``gather`` in one call.

    ``before`` are losses, shape (b,). ``after`` are losses too, or with a ``target`` the logits (b, C) at w + e.
    """
    _check_losses(before, after, target, k, ignore_index)
    _check_rows(tensors)
    module = resolve(backend, after.device)
    if module.losses_select_gather is not None:
        arguments = (before, after, k, tensors, target, label_smoothing, ignore_index)
        _, _, indices, rows = module.losses_select_gather(*arguments)
        return indices, rows

    def losses_of(values: Tensor) -> Tensor:
        if target is None or values.dim() == 1:
            return values
        return module.cross_entropy_forward(values, target, label_smoothing, ignore_index)[0]

    indices = module.select(losses_of(before), losses_of(after), k)
    return indices, module.gather(tensors, indices)


def _fake_select_gather(
    before: Tensor, after: Tensor, tensors: list[Tensor], k: int, *_: Any, **__: Any
) -> tuple[Tensor, list[Tensor]]:
    indices = after.new_empty(k, dtype=torch.int64)
    return indices, reference.gather(tensors, indices)


select_gather = register(
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
