"""Triton kernels for CUDA devices (and, under ``TRITON_INTERPRET=1``, for CPU tensors).

The kernels are imported when the first operator is asked for: this module can be imported without Triton.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from esam_kernels.backends.triton.adam import restore_adam_ as restore_adam_
    from esam_kernels.backends.triton.cross_entropy import cross_entropy_backward as cross_entropy_backward
    from esam_kernels.backends.triton.cross_entropy import cross_entropy_forward as cross_entropy_forward
    from esam_kernels.backends.triton.norm import norm_partials as norm_partials
    from esam_kernels.backends.triton.perturb import perturb_ as perturb_
    from esam_kernels.backends.triton.select_gather import gather as gather
    from esam_kernels.backends.triton.select_gather import select as select
    from esam_kernels.backends.triton.update import restore_ as restore_
    from esam_kernels.backends.triton.update import restore_sgd_ as restore_sgd_

# The oldest version that the kernels were compiled with.
_LEAST_TRITON = (3, 6)

FUSES_UPDATES = True
direct = None
losses_select_gather = None

_MODULE_OF_OPERATOR = {
    "norm_partials": "norm",
    "perturb_": "perturb",
    "restore_": "update",
    "restore_sgd_": "update",
    "restore_adam_": "adam",
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


def __dir__() -> list[str]:
    return [*globals(), *_MODULE_OF_OPERATOR]


@functools.cache
def _interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter: settled for good when they are decorated."""
    from esam_kernels.backends.triton import blocks

    return bool(blocks.INTERPRETED.value)


def _too_old() -> str | None:
    import triton

    if tuple(map(int, re.findall(r"\d+", triton.__version__)[:2])) >= _LEAST_TRITON:
        return None
    least = ".".join(map(str, _LEAST_TRITON))
    return f"Triton {triton.__version__} is installed, the kernels need {least} or newer: a newer torch brings it"


def unavailable(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if (old := _too_old()) is not None:
        return old
    if device.type == "cuda":
        if _interpreted():
            return "TRITON_INTERPRET=1 serves CPU tensors only: unset it"
        from esam_kernels.backends.triton import driver

        return driver.why_not()
    if device.type == "cpu":
        if _interpreted():
            return None
        return "Triton runs on the CPU in its interpreter only: set TRITON_INTERPRET=1 before Python starts"
    return f"it serves CUDA devices, not {device.type}"
