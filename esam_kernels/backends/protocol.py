"""What a backend declares: its operators, and what else the package may use of it.

A backend is a module. mypy compares each with :class:`Backend`, and :func:`check` does so once more when one is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from esam_kernels.backends import cuda, native, reference, triton


class Direct(Protocol):
    """Operators of plain tensors in one call each, past dispatcher and Python. None where they do not take the tensors.

    Differentiable as :func:`esam_kernels.cross_entropy` and :func:`esam_kernels.gather` are.
    """

    def cross_entropy(
        self, logits: Tensor, target: Tensor, label_smoothing: float, ignore_index: int, /
    ) -> Tensor | None: ...

    def select(self, loss_before: Tensor, loss_after: Tensor, k: int, /) -> Tensor | None: ...

    def gather(self, tensors: list[Tensor], indices: Tensor, /) -> list[Tensor] | None: ...


class LossesSelectGather(Protocol):
    """Losses, selection and gathering in one launch: losses before and after, indices, rows."""

    def __call__(
        self,
        before: Tensor,
        after: Tensor,
        k: int,
        tensors: Sequence[Tensor],
        target: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]: ...


class Backend(Protocol):
    """The operators of :mod:`esam_kernels.ops`, and what else there is to know of a backend.

    Each operator computes what its namesake in :mod:`esam_kernels.backends.reference` does.
    """

    @property
    def __name__(self) -> str: ...

    @property
    def FUSES_UPDATES(self) -> bool:
        """Whether ``restore_sgd_`` and ``restore_adam_`` take one pass over memory, so that the optimizer uses them."""

    @property
    def direct(self) -> Direct | None:
        """A faster way for plain tensors; None where there is none."""

    @property
    def losses_select_gather(self) -> LossesSelectGather | None:
        """From logits to B+ in one launch; None where there is no such launch."""

    def unavailable(self, device: torch.device) -> str | None:
        """Why the backend cannot serve a device, and how to get it; None if it can."""

    def norm_partials(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        groups: Sequence[int],
        adaptive: Sequence[bool],
        eta: float,
    ) -> Tensor: ...

    def perturb_(
        self,
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
    ) -> None: ...

    def restore_(self, params: Sequence[Tensor], backups: Sequence[Tensor]) -> None: ...

    def restore_sgd_(
        self,
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
    ) -> None: ...

    def restore_adam_(
        self,
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
    ) -> None: ...

    def cross_entropy_forward(
        self, logits: Tensor, target: Tensor, label_smoothing: float, ignore_index: int
    ) -> tuple[Tensor, Tensor]: ...

    def cross_entropy_backward(
        self,
        grad_losses: Tensor,
        logits: Tensor,
        target: Tensor,
        normalizer: Tensor,
        label_smoothing: float,
        ignore_index: int,
    ) -> Tensor: ...

    def select(self, loss_before: Tensor, loss_after: Tensor, k: int) -> Tensor: ...

    def gather(self, tensors: Sequence[Tensor], indices: Tensor) -> list[Tensor]: ...


if TYPE_CHECKING:
    _reference: Backend = reference
    _native: Backend = native
    _triton: Backend = triton
    _cuda: Backend = cuda

_FACTS = ("FUSES_UPDATES", "direct", "losses_select_gather")
_DECLARED = tuple(name for name in vars(Backend) if not name.startswith("_"))
OPERATORS = tuple(name for name in _DECLARED if name not in (*_FACTS, "unavailable"))


def check(module: ModuleType) -> Backend:
    """The module as a backend.

    Raises:
        TypeError: it does not declare all that :class:`Backend` lists, or something that is of another kind.
    """
    missing = sorted(set(_DECLARED).difference(dir(module)))
    if missing:
        raise TypeError(
            f"the backend {module.__name__} does not declare {', '.join(missing)}: a backend has to declare all that "
            "esam_kernels.backends.protocol.Backend lists"
        )
    # A function that is imported when it is first asked for is not there yet.
    for name, value in ((name, vars(module)[name]) for name in _DECLARED if name in vars(module)):
        if name == "FUSES_UPDATES" and not isinstance(value, bool):
            raise TypeError(f"FUSES_UPDATES of the backend {module.__name__} must be True or False, got {value!r}")
        if name not in _FACTS and not callable(value):
            raise TypeError(f"{name} of the backend {module.__name__} must be a function, got {value!r}")
    return cast(Backend, module)
