"""CUDA C++ (csrc/cuda): one launch a stage, over tables of addresses that travel as the kernels' arguments.

Each function does what its namesake in :mod:`esam_kernels.backends.reference` does, and passes on to it what the
kernels do not take: float64, tensors that are not dense, and tensors spread over several devices.

Beyond the operators, :func:`losses_select_gather` goes from logits to B+ in one cooperative launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from esam_kernels.backends import extensions, reference
from esam_kernels.backends.reference import NUM_PARTIALS

FUSES_UPDATES = True
direct = None

_HOW_TO_BUILD = f"with nvcc (CUDA 12.1 or newer) and a C++ compiler, {extensions.HOW_TO_BUILD} with ESAM_KERNELS_CUDA=1"


def _load() -> tuple[Any, str | None]:
    """The extension, and why it cannot be used (None if it can)."""
    cuda, reason = extensions.load("cuda")
    return cuda, reason if reason is None or extensions.is_present(
        "cuda"
    ) else f"{reason}. To build it: {_HOW_TO_BUILD}"


_cuda, _reason = _load()


def unavailable(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it serves CUDA devices, not {device.type}"
    if torch.version.hip is not None:
        return "it is written for NVIDIA GPUs"
    return _reason


# -- What the kernels take ---------------------------------------------------------------------------------------------

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ELEMENT_SIZES = (2, 4, 8)


def _where(device: torch.device) -> tuple[int, int]:
    """The device's number and its current stream, as the extension takes them."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    return index, torch.cuda.current_stream(device).cuda_stream


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a piece of memory without gaps or overlaps."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _is_served(*lists: Sequence[Tensor]) -> bool:
    """Whether all tensors are dense, on one device."""
    device = lists[0][0].device
    return all(tensor.device == device and _is_dense(tensor) for tensors in lists for tensor in tensors)


def _by_dtype(params: Sequence[Tensor]) -> list[tuple[torch.dtype, list[int]]]:
    """The positions of the tensors of each dtype, in the order in which these first appear."""
    positions: dict[torch.dtype, list[int]] = {}
    for i, param in enumerate(params):
        positions.setdefault(param.dtype, []).append(i)
    return list(positions.items())


def _floating(params: Sequence[Tensor]) -> bool:
    return all(param.dtype in _DTYPES for param in params)


def _pick(values: Sequence[Any], indices: Sequence[int]) -> list[Any]:
    return [values[i] for i in indices]


def _table(lists: Sequence[Sequence[Tensor]], indices: Sequence[int]) -> tuple[list[list[int]], list[int]]:
    """The addresses of parallel lists of tensors, and how many elements each tensor has."""
    return [[tensors[i].data_ptr() for i in indices] for tensors in lists], [lists[0][i].numel() for i in indices]


def _number(value: float, tensor: Tensor | None, device: torch.device) -> tuple[float, int, bool] | None:
    """A learning rate: its value, or where it is on the device and whether as float64. None where it is neither."""
    if tensor is None:
        return value, 0, False
    if tensor.device.type == "cpu":
        return tensor.item(), 0, False
    if tensor.device != device or tensor.dtype not in (torch.float32, torch.float64):
        return None
    return 0.0, tensor.data_ptr(), tensor.dtype == torch.float64


# -- Stochastic Weight Perturbation (section 2.2) ----------------------------------------------------------------------


def norm_partials(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    groups: Sequence[int],
    adaptive: Sequence[bool],
    eta: float,
) -> Tensor:
    if not (_floating(params) and _is_served(params, grads)):
        return reference.norm_partials(params, grads, groups, adaptive, eta)
    device = params[0].device
    partials = torch.empty(NUM_PARTIALS, dtype=torch.float64, device=device)
    for number, (dtype, indices) in enumerate(_by_dtype(params)):
        flags = [bool(adaptive[groups[i]]) for i in indices]
        table = _table([grads, params], indices)
        _cuda.norm_partials(_where(device), _DTYPES[dtype], *table, flags, eta, partials.data_ptr(), number > 0)
    return partials


def perturb_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    backups: Sequence[Tensor],
    groups: Sequence[int],
    offsets: Sequence[int],
    partials: Tensor,
    scale: Tensor,
    adaptive: Sequence[bool],
    eta: float,
    norm_factor: float,
    eps: float,
    random_state: Tensor | None,
) -> None:
    rest = (groups, offsets, partials, scale, adaptive, eta, norm_factor, eps, random_state)
    saved = backups or grads
    if not (_floating(params) and _is_served(params, grads, saved) and len(adaptive) <= _cuda.MAX_GROUPS):
        return reference.perturb_(params, grads, backups, *rest)
    device = params[0].device
    numbers = [tensor.to(device, non_blocking=True).contiguous() for tensor in (partials, scale)]
    state = None if random_state is None else random_state.to(device, non_blocking=True).contiguous()
    for dtype, indices in _by_dtype(params):
        _cuda.perturb(
            _where(device),
            _DTYPES[dtype],
            *_table([params, grads, saved], indices),
            _pick(groups, indices),
            _pick(offsets, indices),
            [bool(adaptive[groups[i]]) for i in indices],
            len(adaptive),
            *(tensor.data_ptr() for tensor in numbers),
            0 if state is None else state.data_ptr(),
            eta,
            norm_factor,
            eps,
        )
    return None


def restore_(params: Sequence[Tensor], backups: Sequence[Tensor]) -> None:
    if not (_is_served(params, backups) and all(param.dtype.itemsize in _ELEMENT_SIZES for param in params)):
        return reference.restore_(params, backups)
    for dtype, indices in _by_dtype(params):
        _cuda.restore(_where(params[0].device), dtype.itemsize, *_table([params, backups], indices))
    return None


def restore_sgd_(
    params: Sequence[Tensor],
    backups: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    first: bool,
    lr: float,
    lr_tensor: Tensor | None,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    device = params[0].device
    lists = [params, backups, grads, momentum_buffers] if momentum != 0 else [params, backups, grads]
    rest = (momentum, dampening, weight_decay, nesterov, maximize)
    rate = _number(lr, lr_tensor, device)
    if rate is None or not (_floating(params) and _is_served(*lists)):
        return reference.restore_sgd_(params, backups, grads, momentum_buffers, first, lr, lr_tensor, *rest)
    for dtype, indices in _by_dtype(params):
        _cuda.restore_sgd(_where(device), _DTYPES[dtype], *_table(lists, indices), first, *rate, *rest)
    return None


def restore_adam_(
    params: Sequence[Tensor],
    backups: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: float,
    lr_tensor: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    amsgrad: bool,
    maximize: bool,
    decoupled_weight_decay: bool,
) -> None:
    device = params[0].device
    states = (params, backups, grads, exp_avgs, exp_avg_sqs)
    lists = [*states, *([max_exp_avg_sqs] if amsgrad else [])]
    rest = (beta1, beta2, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay)
    rate = _number(lr, lr_tensor, device)
    if rate is None or not (_floating(params) and _is_served(*lists) and all(map(_is_counter, steps))):
        return reference.restore_adam_(*states, max_exp_avg_sqs, steps, lr, lr_tensor, *rest)  # type: ignore[arg-type]
    counters, taken = _count_steps(steps, device)
    for dtype, indices in _by_dtype(params):
        _cuda.restore_adam(
            _where(device),
            _DTYPES[dtype],
            *_table(lists, indices),
            _pick(counters, indices) if counters else [],
            _pick(taken, indices) if taken else [],
            *rate,
            *rest,
        )
    return None


def _is_counter(step: Tensor) -> bool:
    return step.dtype == torch.float32 and step.numel() == 1


def _count_steps(steps: Sequence[Tensor], device: torch.device) -> tuple[list[int], list[float]]:
    """Increment torch's step counters. Returns where they are on the device, or else the new numbers of steps."""
    if all(step.device == device for step in steps):
        counters = [step.data_ptr() for step in steps]
        _cuda.increment_steps(_where(device), counters)
        return counters, []
    if device.type == "cuda" and _capturing():
        raise RuntimeError("Adam's step counters are not on the device: a CUDA graph needs capturable=True")
    torch._foreach_add_(list(steps), 1)
    return [], torch.stack([step.reshape(()) for step in steps]).tolist()


# -- Sharpness-sensitive Data Selection (section 2.3) ------------------------------------------------------------------


def _logit_rows(
    logits: Tensor, target: Tensor, label_smoothing: float, ignore_index: int
) -> tuple[tuple[Any, ...], Tensor]:
    """Logits and targets as the extension takes them, and the target that has to stay alive until it has returned."""
    rows, classes = logits.shape
    is_index = target.dtype == torch.int64
    target = target.contiguous() if is_index else target.to(torch.float32).contiguous()
    index, probability = (target.data_ptr(), 0) if is_index else (0, target.data_ptr())
    inputs = (logits.data_ptr(), rows, classes, logits.stride(0), index, probability, label_smoothing, ignore_index)
    return inputs, target


def _are_rows(logits: Tensor, target: Tensor) -> bool:
    """Whether the kernels take these logits: a row of them has to lie without gaps."""
    return (
        logits.dtype in _DTYPES
        and logits.device == target.device
        and logits.shape[1] > 0
        and (logits.stride(1) == 1 or logits.shape[1] == 1)
    )


def cross_entropy_forward(
    logits: Tensor, target: Tensor, label_smoothing: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    if not _are_rows(logits, target):
        return reference.cross_entropy_forward(logits, target, label_smoothing, ignore_index)
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    normalizer = torch.empty(2, logits.shape[0], dtype=torch.float32, device=logits.device)
    inputs, _kept = _logit_rows(logits, target, label_smoothing, ignore_index)
    where = _where(logits.device)
    _cuda.cross_entropy_forward(where, _DTYPES[logits.dtype], inputs, losses.data_ptr(), normalizer.data_ptr())
    return losses, normalizer


def cross_entropy_backward(
    grad_losses: Tensor,
    logits: Tensor,
    target: Tensor,
    normalizer: Tensor,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    if not _are_rows(logits, target):
        return reference.cross_entropy_backward(grad_losses, logits, target, normalizer, label_smoothing, ignore_index)
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    inputs, _kept = _logit_rows(logits, target, label_smoothing, ignore_index)
    numbers = [tensor.to(torch.float32).contiguous() for tensor in (grad_losses, normalizer)]
    addresses = (*(tensor.data_ptr() for tensor in numbers), gradient.data_ptr())
    _cuda.cross_entropy_backward(_where(logits.device), _DTYPES[logits.dtype], inputs, *addresses)
    return gradient


def select(loss_before: Tensor, loss_after: Tensor, k: int) -> Tensor:
    if not (loss_before.dtype in _DTYPES and loss_after.dtype in _DTYPES and loss_before.device == loss_after.device):
        return reference.select(loss_before, loss_after, k)
    losses = [loss.to(torch.float32).contiguous() for loss in (loss_before, loss_after)]
    indices = torch.empty(k, dtype=torch.int64, device=loss_before.device)
    addresses = [loss.data_ptr() for loss in losses]
    _cuda.select(_where(loss_before.device), *addresses, len(loss_before), k, indices.data_ptr())
    return indices


def gather(tensors: Sequence[Tensor], indices: Tensor) -> list[Tensor]:
    indices = indices.contiguous()
    k, address = len(indices), indices.data_ptr()
    return _gather(tensors, indices, k, lambda rows: _cuda.gather(_where(indices.device), rows, address, k))


def _gather(
    tensors: Sequence[Tensor], indices: Tensor, k: int, launch: Callable[[list[tuple[int, int, int]]], None]
) -> list[Tensor]:
    """The rows of each tensor: of those whose rows lie one after the other by ``launch``, of others as always."""
    gathered: list[Tensor | None] = [None] * len(tensors)
    rows = []
    for i, tensor in enumerate(tensors):
        if tensor.device == indices.device and not tensor.is_quantized and _rows_are_dense(tensor):
            taken = torch.empty_strided(
                (k, *tensor.shape[1:]), tensor.stride(), dtype=tensor.dtype, device=tensor.device
            )
            rows.append((tensor.data_ptr(), taken.data_ptr(), tensor.stride(0) * tensor.element_size()))
            gathered[i] = taken
    launch(rows)
    return [reference.gather([tensor], indices)[0] if row is None else row for tensor, row in zip(tensors, gathered)]


def _rows_are_dense(tensor: Tensor) -> bool:
    """Whether the samples lie one after the other, each without gaps."""
    samples = tensor.shape[0]
    return samples > 0 and tensor.stride(0) * samples == tensor.numel() > 0 and _is_dense(tensor[0])


def losses_select_gather(
    before: Tensor,
    after: Tensor,
    k: int,
    tensors: Sequence[Tensor],
    target: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The losses, the k samples whose loss rises most, and their rows, in one cooperative launch.

    Args:
        before: losses (b,), or logits (b, C) where ``target`` is given.
        after: losses (b,), or with ``target`` logits (b, C), of the dtype of the logits in ``before``.
        k: the size of B+.
        tensors: what is gathered, samples in front.
        target: as :func:`cross_entropy_forward` takes it.

    Returns:
        Losses before and after, float32 (b,), indices (k,) and the rows of each tensor.
    """
    device = after.device
    given = [values for values in (before, after) if values.dim() == 2]
    fits = before.device == device and all(losses.dtype in _DTYPES for losses in (before, after))
    fits = fits and all(target is not None and _are_rows(logits, target) for logits in given)
    if not fits or len({logits.dtype for logits in given}) > 1:
        one, other = (_reference_losses(values, target, label_smoothing, ignore_index) for values in (before, after))
        indices = reference.select(one, other, k)
        return one, other, indices, reference.gather(tensors, indices)
    inputs: list[tuple[Any, ...] | None] = []
    losses, kept = [], []
    for values in (before, after):
        if values.dim() == 2 and target is not None:
            rows, alive = _logit_rows(values, target, label_smoothing, ignore_index)
            inputs.append(rows)
            kept.append(alive)
            losses.append(torch.empty(len(values), dtype=torch.float32, device=device))
        else:
            inputs.append(None)
            losses.append(values.to(torch.float32).contiguous())
    indices = torch.empty(k, dtype=torch.int64, device=device)
    dtype = _DTYPES[given[0].dtype] if given else 0
    addresses = (losses[0].data_ptr(), losses[1].data_ptr(), len(after), k, indices.data_ptr())
    where = _where(device)
    gathered = _gather(
        tensors, indices, k, lambda rows: _cuda.losses_select_gather(where, dtype, *inputs, *addresses, rows)
    )
    return losses[0], losses[1], indices, gathered


def _reference_losses(values: Tensor, target: Tensor | None, label_smoothing: float, ignore_index: int) -> Tensor:
    if values.dim() == 1:
        return values
    if target is None:
        raise ValueError("logits need a target")
    return reference.cross_entropy_forward(values, target, label_smoothing, ignore_index)[0]
