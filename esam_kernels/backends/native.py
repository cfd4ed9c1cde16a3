"""C++ for the CPU (csrc/cpu)."""

from __future__ import annotations

import torch


def unavailable(device: torch.device) -> str | None:
    return "the C++ extension is not part of this version yet"
