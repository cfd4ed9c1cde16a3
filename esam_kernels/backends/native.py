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

from esam_kernels.backends import reference
from esam_kernels.backends.reference import NUM_PARTIALS

ISA_VARIABLE = "ESAM_KERNELS_ISA"

_HOW_TO_BUILD = "install a C++ compiler (g++), then `pip install --no-build-isolation .` next to the torch in use"


def _release(version: str) -> str:
    """A version without its local part: the layout of a tensor is the same in the CPU and the CUDA build."""
    return version.split("+")[0]


def _load() -> tuple[Any, str | None]:
    """The extension, and why it cannot be used (None if it can)."""
    try:
        from esam_kernels import _native  # type: ignore[attr-defined]
    except ImportError as error:
        return None, f"the C++ extension cannot be imported ({error}): {_HOW_TO_BUILD}"
    if _release(_native.TORCH_VERSION) != _release(torch.__version__):
        return None, (
            f"the C++ extension was built against torch {_native.TORCH_VERSION}, but torch {torch.__version__} is "
            f"imported: {_HOW_TO_BUILD}"
        )
    isa = os.environ.get(ISA_VARIABLE)
    if isa and isa not in _native.available_isas():
        return None, f"{ISA_VARIABLE}={isa}, but this machine has {', '.join(_native.available_isas())}"
    if isa:
        _native.use_isa(isa)
    return _native, None


_native, _reason = _load()


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
    partials = torch.empty(NUM_PARTIALS, dtype=torch.float64)
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
    if not _native.restore_adam(*tensors, lr if lr_tensor is None else lr_tensor.item(), *rest):
        reference.restore_adam_(*tensors, lr, lr_tensor, *rest)


# -- Sharpness-sensitive Data Selection (section 2.3) ------------------------------------------------------------------

cross_entropy_forward = reference.cross_entropy_forward
cross_entropy_backward = reference.cross_entropy_backward
select = reference.select
gather = reference.gather
