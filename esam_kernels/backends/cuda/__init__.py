"""CUDA C++ (csrc/cuda): one launch a stage, over tables of addresses that travel as the kernels' arguments.

Each function does what its namesake in :mod:`esam_kernels.backends.reference` does, and passes on to it what the
kernels do not take: float64, tensors that are not dense, and tensors spread over several devices.

Beyond the operators, :func:`losses_select_gather` goes from logits to B+ in one cooperative launch.
"""

from __future__ import annotations

import torch

from esam_kernels.backends.cuda import extension
from esam_kernels.backends.cuda.perturbation import norm_partials, perturb_, restore_, restore_adam_, restore_sgd_
from esam_kernels.backends.cuda.selection import (
    cross_entropy_backward,
    cross_entropy_forward,
    gather,
    losses_select_gather,
    select,
)

__all__ = [
    "FUSES_UPDATES",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "direct",
    "gather",
    "losses_select_gather",
    "norm_partials",
    "perturb_",
    "restore_",
    "restore_adam_",
    "restore_sgd_",
    "select",
    "unavailable",
]

FUSES_UPDATES = True
direct = None


def unavailable(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it serves CUDA devices, not {device.type}"
    if torch.version.hip is not None:
        return "it is written for NVIDIA GPUs"
    return extension.reason
