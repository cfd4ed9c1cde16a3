"""The extension ``_cuda``, and the devices, streams and dtypes as it takes them."""

from __future__ import annotations

from typing import Any

import torch

from esam_kernels.backends import extensions

_HOW_TO_BUILD = f"with nvcc (CUDA 12.1 or newer) and a C++ compiler, {extensions.HOW_TO_BUILD} with ESAM_KERNELS_CUDA=1"


def _load() -> tuple[Any, str | None]:
    """The extension, and why it cannot be used (None if it can)."""
    cuda, reason = extensions.load("cuda")
    if reason is not None and not extensions.is_present("cuda"):
        reason = f"{reason}. To build it: {_HOW_TO_BUILD}"
    return cuda, reason


kernels, reason = _load()


DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def where(device: torch.device) -> tuple[int, int]:
    """The device's number and its current stream, as the extension takes them."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    return index, torch.cuda.current_stream(device).cuda_stream


def capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()
