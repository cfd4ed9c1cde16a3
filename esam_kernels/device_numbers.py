"""Numbers that kernels read on the device, so that a captured step sees it when they change."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def is_capturing() -> bool:
    """Whether what is launched now goes into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class DeviceNumbers:
    """A small tensor that stays where it is; setting new numbers copies them there without waiting for the device."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._values: list[float] = []
        self.tensor = torch.empty(0, dtype=dtype, device="cpu")

    def set(self, values: Sequence[float], device: torch.device) -> None:
        """Make the tensor hold ``values``, on ``device``. It moves only when their number or the device changes."""
        moves = len(values) != len(self._values) or self.tensor.device != device
        if not moves and self._values == list(values):
            return
        fresh = torch.tensor(values, dtype=self.tensor.dtype, device="cpu")
        if moves:
            self.tensor = fresh.to(device, non_blocking=True)
        else:
            self.tensor.copy_(fresh, non_blocking=True)
        self._values = list(values)
