"""Triton kernels for CUDA devices (and, under ``TRITON_INTERPRET=1``, for CPU tensors)."""

from __future__ import annotations

import torch


def unavailable(device: torch.device) -> str | None:
    return "not written yet"
