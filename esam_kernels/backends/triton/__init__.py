"""Triton kernels for CUDA devices (and, under ``TRITON_INTERPRET=1``, for CPU tensors).

The kernels are imported when the first operator is asked for: this module can be imported without Triton.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

_MODULE_OF_OPERATOR = {
    "norm_partials": "norm",
    "perturb_": "perturb",
    "restore_": "update",
    "restore_sgd_": "update",
    "restore_adam_": "update",
    "cross_entropy_forward": "cross_entropy",
    "cross_entropy_backward": "cross_entropy",
    "select": "select_gather",
    "gather": "select_gather",
}


def __getattr__(name: str) -> Callable[..., Any]:
    if name not in _MODULE_OF_OPERATOR:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    operator = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF_OPERATOR[name]}"), name)
    globals()[name] = operator
    return operator


@functools.cache
def _interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter: settled for good when they are decorated."""
    from esam_kernels.backends.triton import blocks

    return bool(blocks.INTERPRETED.value)


def unavailable(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if device.type == "cuda":
        return "TRITON_INTERPRET=1 serves CPU tensors only: unset it" if _interpreted() else None
    if device.type == "cpu":
        if _interpreted():
            return None
        return "Triton runs on the CPU in its interpreter only: set TRITON_INTERPRET=1 before Python starts"
    return f"it serves CUDA devices, not {device.type}"
