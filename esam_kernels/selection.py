"""Sharpness-sensitive Data Selection (section 2.3): losses per sample, the choice of B+, and its gathering."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from esam_kernels import ops
from esam_kernels.batches import batch_size, check_parts

__all__ = ["cross_entropy", "gather", "num_selected", "select"]

_T = TypeVar("_T")
_T1 = TypeVar("_T1")
_T2 = TypeVar("_T2")


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    class_dim: int | None = None,
) -> Tensor:
    r"""Cross-entropy of each sample, as ``torch.nn.functional.cross_entropy(..., reduction="none")`` defines it.

    >>> losses = cross_entropy(torch.randn(4, 10), torch.tensor([1, 0, 9, 3]))
    >>> losses.shape
    torch.Size([4])

    .. math:: \ell_i = -\sum_c q_{ic} \log \mathrm{softmax}(x_i)_c, \qquad q = (1 - \epsilon)\, p + \epsilon / C

    Args:
        logits: floating point, in one of the layouts

            * (b, C): one prediction a sample;
            * (b, C, d1, ...): torch's layout, with target (b, d1, ...);
            * (b, T, ..., C): classes last, with target (b, T, ...). ``class_dim=-1`` says so.
        target: class indices, any integer dtype; or class probabilities, floating point, of the shape and the layout of
            ``logits``. p are these probabilities, or 1 at the index and 0 elsewhere.
        label_smoothing: epsilon, in [0, 1].
        ignore_index: positions with this target count neither in the loss nor in the gradient. Of class indices only:
            with class probabilities it has to be negative.
        class_dim: the dimension of ``logits`` that holds the classes, any but the batch's, 0. None: what the shapes
            say. Where torch's layout and classes last both fit (T equal to C, or class probabilities of three
            dimensions and more), torch's is taken, with one warning for each shape.

    Returns:
        losses, shape (b,), float32 (float64 for float64 logits). Of a sample with several positions it is the mean over
        those that are not ignored, and 0 where all are.

    Raises:
        TypeError: logits or target that are no tensors, or an ignore_index that is no integer.
        ValueError: shapes or dtypes that fit none of the layouts, or not ``class_dim``; label_smoothing outside [0, 1];
            class probabilities with an ``ignore_index`` of 0 or more.
        IndexError: a class index out of range, on the CPU. On other devices such a sample's loss is NaN.

    Differentiable with respect to ``logits``, twice. Losses and gradients depend on differences of logits only, so
    they are exact to float32 rounding whatever the logits have in common.
    """
    if not (isinstance(logits, Tensor) and isinstance(target, Tensor) and isinstance(ignore_index, int)):
        _check_kinds(logits, target, ignore_index)
    # The shortcut takes logits (b, C) only.
    shortcut = ops.direct("", logits.device) if class_dim is None else None
    if shortcut and (losses := shortcut.cross_entropy(logits, target, label_smoothing, ignore_index)) is not None:
        return losses  # type: ignore[no-any-return]
    dim = check_logits(logits, target, label_smoothing, ignore_index, class_dim)
    positions = list(logits.shape)
    classes = positions.pop(dim)
    labels = target if target.is_floating_point() else target.to(torch.int64)
    if logits.dim() == 2:
        return ops.cross_entropy(logits, labels, label_smoothing, ignore_index)
    rows = logits.movedim(dim, -1).reshape(-1, classes)
    labels = labels.movedim(dim, -1).reshape(-1, classes) if labels.is_floating_point() else labels.reshape(-1)
    losses = ops.cross_entropy(rows, labels, label_smoothing, ignore_index)
    losses = losses.reshape(positions).flatten(1)
    if target.is_floating_point():
        return losses.mean(dim=1)
    counted = (labels != ignore_index).reshape(positions).flatten(1).sum(dim=1)
    return losses.sum(dim=1) / counted.clamp(min=1)


def _check_kinds(logits: Any, target: Any, ignore_index: Any) -> None:
    _check_tensors(logits=logits, target=target)
    _check_integer("ignore_index", ignore_index)


def _check_tensors(**given: Any) -> None:
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def _check_integer(name: str, value: Any) -> None:
    """Integers of other libraries, numpy's for one, are integers."""
    if not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r}")


def check_logits(
    logits: Tensor, target: Tensor, label_smoothing: float, ignore_index: int, class_dim: int | None = None
) -> int:
    """The dimension of the classes."""
    _check_kinds(logits, target, ignore_index)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
    if not logits.is_floating_point() or logits.dim() < 2:
        raise ValueError(f"logits must be floating point (b, C, ...), got {logits.dtype} {tuple(logits.shape)}")
    if target.requires_grad:
        raise ValueError("target requires grad: only the logits are differentiated; detach the target")
    dim = _class_dimension(logits, target, class_dim)
    if logits.shape[dim] == 0:
        raise ValueError(f"logits {tuple(logits.shape)} have no classes")
    return dim


def _class_dimension(logits: Tensor, target: Tensor, class_dim: int | None) -> int:
    last = logits.dim() - 1
    if class_dim is not None:
        _check_integer("class_dim", class_dim)
        dims = [range(last + 1)[class_dim]] if -last <= class_dim <= last and class_dim != 0 else []
        if not dims or isinstance(class_dim, bool):
            raise ValueError(
                f"class_dim must be a dimension of the logits {tuple(logits.shape)} other than the batch's, 0, "
                f"so 1 to {last} or -{last} to -1, got {class_dim}"
            )
    else:
        dims = [1] if last == 1 else [1, last]
    fitting = [dim for dim in dims if _fits(logits, target, dim)]
    if not fitting:
        raise ValueError(_misfit(logits, target, dims))
    if len(fitting) > 1:
        _warn_of_two_layouts(tuple(logits.shape), tuple(target.shape))
    return fitting[0]


def _fits(logits: Tensor, target: Tensor, dim: int) -> bool:
    if target.is_floating_point():
        return target.shape == logits.shape
    shape = tuple(logits.shape)
    is_integer = not (target.is_complex() or target.dtype == torch.bool)
    return is_integer and tuple(target.shape) == shape[:dim] + shape[dim + 1 :]


def _misfit(logits: Tensor, target: Tensor, dims: list[int]) -> str:
    shape = tuple(logits.shape)
    indices = " or ".join(str(shape[:dim] + shape[dim + 1 :]) for dim in dims)
    return (
        f"target ({target.dtype}, shape {tuple(target.shape)}) does not fit logits of shape {shape}: it must "
        f"hold class indices of shape {indices}, or class probabilities of shape {shape}"
    )


# The shapes of logits and targets, without the batch, that a warning was given for.
_WARNED: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()


def _warn_of_two_layouts(logits: tuple[int, ...], target: tuple[int, ...]) -> None:
    if torch.compiler.is_compiling() or (logits[1:], target[1:]) in _WARNED:
        return
    _WARNED.add((logits[1:], target[1:]))
    warnings.warn(
        f"cross_entropy: logits of shape {logits} with a target of shape {target} may have their classes in dimension "
        f"1, as torch has them, or in the last one. Dimension 1 is taken; class_dim=1 or class_dim=-1 says which is "
        "meant",
        stacklevel=5,
    )


def num_selected(gamma: float, samples: int) -> int:
    """k = max(1, round(gamma b)), the size of B+. Known before any kernel runs."""
    return max(1, round(gamma * samples))


def select(loss_before: Tensor, loss_after: Tensor, k: int) -> Tensor:
    """The k samples whose loss rises most under the perturbation: B+ of Eq. 6.

    >>> select(torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([1.1, 1.5, 1.0, 1.3]), k=2)
    tensor([1, 3])

    Args:
        loss_before: the loss of each sample at w, floating point, shape (b,).
        loss_after: the loss of each sample at w + e, floating point, shape (b,).
        k: how many, 1 to b.

    Returns:
        int64 indices, shape (k,), ascending. Ties go to the lower index, NaN ranks last, -0.0 equals 0.0. Nothing waits
        for the device.

    Raises:
        TypeError: losses that are no tensors, or a k that is no integer.
        ValueError: losses of other shapes, of different sizes, or a k outside [1, b].
    """
    if not (isinstance(loss_before, Tensor) and isinstance(loss_after, Tensor) and isinstance(k, int)):
        _check_tensors(loss_before=loss_before, loss_after=loss_after)
        _check_integer("k", k)
    shortcut = ops.direct("", loss_before.device)
    if shortcut and (indices := shortcut.select(loss_before, loss_after, k)) is not None:
        return indices  # type: ignore[no-any-return]
    return ops.select(loss_before.detach(), loss_after.detach(), k)  # type: ignore[no-any-return]


@overload
def gather(indices: Tensor, tensor: _T, /) -> _T: ...


@overload
def gather(indices: Tensor, x: _T1, y: _T2, /) -> tuple[_T1, _T2]: ...


@overload
def gather(indices: Tensor, *tensors: Any) -> tuple[Any, ...]: ...


def gather(indices: Tensor, *tensors: Any) -> Any:
    """The samples ``indices`` of each of ``tensors``.

    >>> images, labels = torch.randn(4, 3, 8, 8), torch.tensor([5, 6, 7, 8])
    >>> images, labels = gather(torch.tensor([1, 3]), images, labels)
    >>> labels
    tensor([6, 8])

    Args:
        indices: int64, shape (k,).
        tensors: tensors of any dtype whose first dimension counts the samples, or dicts, lists and tuples of such.
            Numbers, strings and None inside them stay as they are.

    Returns:
        As many as were given, as a tuple; one is returned as it is, not in a tuple. Memory formats are kept
        (channels_last, for one). Differentiable with respect to the tensors.

    Raises:
        ValueError: tensors with different numbers of samples, without a batch dimension, or in a layout other than
            ``torch.strided`` and ``torch.sparse_coo``.
        TypeError: indices that are no tensor, or something else that cannot be indexed by sample.
    """
    return gather_on("", indices, *tensors)


def gather_on(backend: str, indices: Tensor, *tensors: Any) -> Any:
    """:func:`gather` on a backend of that name, "" for the default of the device."""
    if not isinstance(indices, Tensor):
        _check_tensors(indices=indices)
    batch_size(tensors)
    return _with_rows(tensors, lambda given: ops.gather_rows(given, indices, backend))


def _with_rows(tensors: tuple[Any, ...], rows_of: Callable[[list[Tensor]], list[Tensor]]) -> Any:
    """The pytrees with rows of their tensors in the tensors' places; a single one as it is, not in a tuple."""
    check_parts(tensors)
    if all(isinstance(tensor, Tensor) for tensor in tensors):
        found = rows_of(list(tensors))
        return found[0] if len(found) == 1 else tuple(found)
    leaves, structure = pytree.tree_flatten(tensors)
    positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    for i, rows in zip(positions, rows_of([leaves[i] for i in positions])):
        leaves[i] = rows
    gathered = pytree.tree_unflatten(leaves, structure)
    return gathered[0] if len(gathered) == 1 else gathered


def selected_on(backend: str, k: int, loss_before: Tensor, loss_after: Tensor, *tensors: Any) -> Any:
    """B+ out of ``tensors``: :func:`select` and :func:`gather`, in one launch where the backend has one."""
    before, after = loss_before.detach(), loss_after.detach()
    return _with_rows(tensors, lambda given: ops.select_rows(before, after, given, k, backend=backend))


def selected_from_logits_on(
    backend: str,
    k: int,
    loss_before: Tensor,
    logits_after: Tensor,
    target: Tensor,
    *tensors: Any,
    label_smoothing: float,
    ignore_index: int,
    class_dim: int | None = None,
) -> Any:
    """:func:`selected_on` where the losses after are the :func:`cross_entropy` of these logits."""
    before, logits = loss_before.detach(), logits_after.detach()
    if logits.dim() != 2:
        after = cross_entropy(
            logits, target, label_smoothing=label_smoothing, ignore_index=ignore_index, class_dim=class_dim
        )
        return selected_on(backend, k, before, after, *tensors)
    labels = target if target.is_floating_point() else target.to(torch.int64)
    rest = (k, labels, label_smoothing, ignore_index, backend)
    return _with_rows(tensors, lambda given: ops.select_rows(before, logits, given, *rest))
