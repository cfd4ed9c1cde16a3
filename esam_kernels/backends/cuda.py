"""CUDA C++ (csrc/cuda)."""

from __future__ import annotations

import torch


def unavailable(device: torch.device) -> str | None:
    return "the CUDA extension is not part of this version yet"
