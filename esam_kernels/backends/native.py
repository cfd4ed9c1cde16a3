"""C++ for the CPU (csrc/cpu): vectorised, one pass over memory a stage, on PyTorch's own threads.

Each function does what its namesake in :mod:`esam_kernels.backends.reference` does, and passes on to it what the C++
does not take: tensors that are not dense, or of a dtype other than float32, bfloat16, float16 and float64.

``ESAM_KERNELS_ISA`` picks the instruction set (avx512, avx2, portable); unset, the best that the machine has.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from esam_kernels.backends import extensions, reference
from esam_kernels.backends.reference import NUM_PARTIALS, compute_dtype

ISA_VARIABLE = "ESAM_KERNELS_ISA"

FUSES_UPDATES = True
losses_select_gather = None

_HOW_TO_BUILD = f"with torch and a C++ compiler (g++ or clang++) installed, {extensions.HOW_TO_BUILD}"


def _load() -> tuple[Any, str | None]:
    """The extension, and why it cannot be used (None if it can)."""
    native, reason = extensions.load("native")
    if native is None:
        return None, reason if extensions.is_present("native") else f"{reason}. To build it: {_HOW_TO_BUILD}"
    if extensions.is_another_torch(native.TORCH_VERSION):
        return None, extensions.another_torch(native.TORCH_VERSION)
    isa = os.environ.get(ISA_VARIABLE)
    if isa and isa not in native.available_isas():
        return None, f"{ISA_VARIABLE}={isa}, but this machine has {', '.join(native.available_isas())}"
    if isa:
        native.use_isa(isa)
    return native, None


_native, _reason = _load()
extension = _native
"""The compiled module; None where it cannot be used."""

direct = _native.direct if _native else None
"""``cross_entropy``, ``select`` and ``gather`` of plain tensors in one call each; they return None for any others."""


def unavailable(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"it serves CPU tensors only, not {device.type}"
    return _reason


# -- Stochastic Weight Perturbation (section 2.2) ----------------------------------------------------------------------


def norm_partials(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    groups: Sequence[int],
    adaptive: Sequence[bool],
    eta: float,
) -> Tensor:
    partials = torch.empty(NUM_PARTIALS, dtype=torch.float64, device="cpu")
    if _native.norm_partials(params, grads, groups, adaptive, eta, partials):
        return partials
    return reference.norm_partials(params, grads, groups, adaptive, eta)


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
    if not _native.perturb(params, grads, backups, *rest):
        reference.perturb_(params, grads, backups, *rest)


def restore_(params: Sequence[Tensor], backups: Sequence[Tensor]) -> None:
    if not _native.restore(params, backups):
        reference.restore_(params, backups)


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
    tensors = (params, backups, grads, momentum_buffers, first)
    rest = (momentum, dampening, weight_decay, nesterov, maximize)
    if not _native.restore_sgd(*tensors, lr if lr_tensor is None else lr_tensor.item(), *rest):
        reference.restore_sgd_(*tensors, lr, lr_tensor, *rest)


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
    tensors = (params, backups, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)
    rest = (beta1, beta2, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay)
    # torch divides a rate that is a tensor in the tensor's own dtype
    in_float32 = lr_tensor is not None and lr_tensor.dtype == torch.float32
    takes_rate = lr_tensor is None or in_float32 or lr_tensor.dtype == torch.float64
    rate = lr if lr_tensor is None else lr_tensor.item()
    if not (takes_rate and _native.restore_adam(*tensors, rate, in_float32, *rest)):
        reference.restore_adam_(*tensors, lr, lr_tensor, *rest)


# -- Sharpness-sensitive Data Selection (section 2.3) ------------------------------------------------------------------

_LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _takes(logits: Tensor, target: Tensor) -> bool:
    return logits.dtype in _LOGITS_DTYPES and logits.numel() > 0 and logits.device.type == target.device.type == "cpu"


def _dense(tensor: Tensor) -> Tensor:
    """The tensor, contiguous and aligned to its dtype: ``torch.frombuffer`` takes memory at any byte."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def _index_and_probability(target: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if target.dtype == torch.int64:
        return _dense(target), None
    return None, _dense(target.to(torch.float32))


def cross_entropy_forward(
    logits: Tensor, target: Tensor, label_smoothing: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    if not _takes(logits, target):
        return reference.cross_entropy_forward(logits, target, label_smoothing, ignore_index)
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device="cpu")
    normalizer = torch.empty(2, logits.shape[0], dtype=torch.float32, device="cpu")
    index, probability = _index_and_probability(target)
    rest = (label_smoothing, ignore_index, losses, normalizer)
    _native.cross_entropy_forward(_dense(logits), index, probability, *rest)
    return losses, normalizer


def cross_entropy_backward(
    grad_losses: Tensor,
    logits: Tensor,
    target: Tensor,
    normalizer: Tensor,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    if not _takes(logits, target) or normalizer.dtype != torch.float32:
        return reference.cross_entropy_backward(grad_losses, logits, target, normalizer, label_smoothing, ignore_index)
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device="cpu")
    index, probability = _index_and_probability(target)
    _native.cross_entropy_backward(
        _dense(grad_losses.to(torch.float32)),
        _dense(logits),
        index,
        probability,
        _dense(normalizer),
        label_smoothing,
        ignore_index,
        gradient,
    )
    return gradient


def select(loss_before: Tensor, loss_after: Tensor, k: int) -> Tensor:
    dtype = torch.promote_types(compute_dtype(loss_before.dtype), compute_dtype(loss_after.dtype))
    indices = torch.empty(k, dtype=torch.int64, device="cpu")
    _native.select(_dense(loss_before.to(dtype)), _dense(loss_after.to(dtype)), k, indices)
    return indices


def _empty_rows(tensor: Tensor, count: int) -> Tensor | None:
    """Room for ``count`` rows in the memory format of ``tensor``; None where its rows are not whole in memory."""
    if tensor.is_quantized:
        return None
    if tensor.is_contiguous():
        return tensor.new_empty((count, *tensor.shape[1:]))
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    if order[0] != 0:
        return None
    inverse = [order.index(dim) for dim in range(tensor.dim())]
    return tensor.new_empty((count, *(tensor.shape[dim] for dim in order[1:]))).permute(inverse)


def gather(tensors: Sequence[Tensor], indices: Tensor) -> list[Tensor]:
    rows = [_empty_rows(tensor, indices.numel()) for tensor in tensors]
    if any(row is None for row in rows) or not _native.gather(tensors, rows, _dense(indices)):
        return reference.gather(tensors, indices)
    return rows  # type: ignore[return-value]
