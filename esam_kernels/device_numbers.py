"""Numbers that kernels read on the device, so that a captured step sees it when they change."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from esam_kernels import uploads

# So many numbers are written by a launch each, with the number as its argument; more are cheaper as one copy.
MOST_FILLS = 8


def is_capturing() -> bool:
    """Whether what is launched now goes into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class DeviceNumbers:
    """A small tensor that stays where it is; setting new numbers writes them there without waiting for the device."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._values: list[float] = []
        self.tensor = torch.empty(0, dtype=dtype, device="cpu")

    def set(self, values: Sequence[float], device: torch.device) -> None:
        """Make the tensor hold ``values``, on ``device``. It moves only when their number or the device changes."""
        values = list(values)
        moves = len(values) != len(self._values) or self.tensor.device != device
        if not moves and self._values == values:
            return
        changed = [i for i, (old, new) in enumerate(zip(self._values, values)) if old != new]
        if not moves and len(set(values)) == 1:
            self.tensor.fill_(values[0])
        elif not moves and len(changed) <= MOST_FILLS:
            for i in changed:
                self.tensor[i].fill_(values[i])
        else:
            fresh = uploads.staged(torch.tensor(values, dtype=self.tensor.dtype, device="cpu"), device)
            if moves:
                self.tensor = fresh.to(device, non_blocking=True)
            else:
                self.tensor.copy_(fresh, non_blocking=True)
        self._values = values
