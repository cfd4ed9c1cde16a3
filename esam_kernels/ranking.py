"""How B+ is ranked: a score for each sample of the batch, of which the k largest are taken (section 2.3).

A ranking is a class with one method, :meth:`Ranking.scores`, and a line in :data:`RANKINGS`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esam_kernels.backends import reference
from esam_kernels.backends.reference import compute_dtype
from esam_kernels.device_numbers import DeviceNumbers
from esam_kernels.distributed import is_sharded


@dataclass(frozen=True)
class Head:
    """What pass 1 left at the head, the network's last linear layer."""

    input: Tensor
    """What it was given, shape (b, ..., D), detached."""
    output_grad: Tensor
    """The gradient of the mean loss with respect to its output, shape (b, ..., C). A GradScaler's factor is in it."""
    has_bias: bool = True
    transform: tuple[Tensor, Tensor | None] | None = None
    """T_w^2 of its weight and its bias where its group is ``adaptive``; None: 1."""


@dataclass(frozen=True)
class RankingContext:
    """What is known of a batch when its B+ is chosen: what a ``ranking`` of your own is called with."""

    losses: Tensor
    """The loss of each sample at w, shape (b,), detached."""
    batch: tuple[Any, ...]
    """The tensors or pytrees of tensors that ``step`` or ``select`` was given."""
    head: Head | None
    """None where the optimizer has no head."""
    seed: int
    """The optimizer's, for rankings that draw."""
    step: int
    """How many steps the optimizer has taken."""


class Ranking:
    """Scores from pass 1 alone."""

    #: Whether the losses at w + e are measured, in a forward of their own.
    looks_again = False
    #: Whether the head's input and output gradient are recorded in pass 1, where there is a head.
    records_head = False
    #: Whether there has to be one.
    needs_head = False

    def scores(self, context: RankingContext) -> Tensor:
        """A score for each sample, shape (b,), floating point, on the device of the losses."""
        raise NotImplementedError

    def upload(self, seed: int, step: int, samples: int, device: torch.device) -> None:
        """Bring up to date what a captured step reads on the device."""


class Rise(Ranking):
    """The paper's: the loss at w + e minus that at w, measured by a forward (Eq. 6)."""

    looks_again = True


class FirstOrder(Ranking):
    r"""The first-order term of the rise (appendix A.2), over the weights of the network's last linear layer, the head.

    With h_i the head's input of sample i and delta_i the gradient of the mean loss with respect to its output,

    .. math:: s_i = \delta_i \cdot (G h_i + g), \qquad G = \sum_j \delta_j h_j^T, \quad g = \sum_j \delta_j

    (G and g times T_w^2 where the head's group is ``adaptive``), summed over the positions of a sequence. Both h and
    delta exist after pass 1: no forward at w + e is needed.
    """

    records_head = needs_head = True

    def scores(self, context: RankingContext) -> Tensor:
        """s_i of the equation above, in float32 (float64 where the head works in float64)."""
        assert context.head is not None
        return first_order_scores(
            context.head.input,
            context.head.output_grad,
            has_bias=context.head.has_bias,
            transform=context.head.transform,
        )


def first_order_scores(
    inputs: Tensor,
    output_grads: Tensor,
    *,
    has_bias: bool = True,
    transform: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor:
    """The scores of :class:`FirstOrder`.

    Args:
        inputs: of a linear layer, shape (b, ..., D).
        output_grads: of its output, shape (b, ..., C).
        has_bias: whether the layer has a bias, whose gradient is g.
        transform: T_w^2 of its weight, shape (C, D), and of its bias, shape (C,), or None.

    Returns:
        Scores, shape (b,), float32, or float64 where the inputs are.
    """
    dtype = compute_dtype(inputs.dtype)
    with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
        h = inputs.reshape(-1, inputs.shape[-1]).to(dtype)
        delta = output_grads.reshape(-1, output_grads.shape[-1]).to(dtype)
        weight_grad = delta.T @ h
        if transform is not None:
            weight_grad = weight_grad * transform[0]
        moved = h @ weight_grad.T
        if has_bias:
            bias_grad = delta.sum(dim=0)
            if transform is not None and transform[1] is not None:
                bias_grad = bias_grad * transform[1]
            moved = moved + bias_grad
        return (moved * delta).sum(dim=1).reshape(inputs.shape[0], -1).sum(dim=1)


class Random(Ranking):
    """A B+ drawn from the seed and the step, every one as likely: the expected second gradient is SAM's."""

    # Samples count in a part of the Philox space that neither elements nor tensors reach.
    _STREAM = 3 << 61

    def __init__(self) -> None:
        self._words = DeviceNumbers(torch.float64)

    def scores(self, context: RankingContext) -> Tensor:
        """A random number for each sample: the same on every device and backend."""
        losses = context.losses
        if not _is_capturing(losses.device):
            self.upload(context.seed, context.step, len(losses), losses.device)
        return self._words.tensor

    def upload(self, seed: int, step: int, samples: int, device: torch.device) -> None:
        """The words of this step."""
        counters = torch.arange(-(-samples // 4), device="cpu") + self._STREAM
        words = torch.stack(reference.philox(counters, step, seed), dim=-1).flatten()[:samples]
        self._words.set(words.tolist(), device)


class Custom(Ranking):
    """A function of the user's: ``scores = ranking(context)``."""

    records_head = True

    def __init__(self, function: Callable[[RankingContext], Tensor]) -> None:
        self._function = function

    def scores(self, context: RankingContext) -> Tensor:
        """What the function returns, checked.

        Raises:
            ValueError: it is not one floating-point number a sample, on the device of the losses.
        """
        with torch.no_grad():
            scores = self._function(context)
        losses = context.losses
        fits = isinstance(scores, Tensor) and scores.is_floating_point() and scores.shape == losses.shape
        if not fits or scores.device != losses.device:
            got = f"{scores.dtype} {tuple(scores.shape)} on {scores.device}" if isinstance(scores, Tensor) else scores
            raise ValueError(
                f"the ranking must return one floating-point score per sample, shape ({len(losses)},) on "
                f"{losses.device}, got {got!r}"
            )
        return scores


RANKINGS: dict[str, type[Ranking]] = {"rise": Rise, "first_order": FirstOrder, "random": Random}


def make(ranking: str | Callable[[RankingContext], Tensor]) -> Ranking:
    """The ranking of this name, or of this function."""
    return RANKINGS[ranking]() if isinstance(ranking, str) else Custom(ranking)


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


# -- the head ----------------------------------------------------------------------------------------------------------

_NAME_ONE = "name the network's last linear layer: ESAM(..., head=model.fc)"


def find_head(head: nn.Module | None, model: nn.Module | None, *, needed: bool) -> nn.Linear | None:
    """The head that is given, or the last ``nn.Linear`` of the model.

    Raises:
        TypeError: what is given is no ``nn.Linear``.
        ValueError: it is needed, and there is none.
    """
    if head is not None:
        if not isinstance(head, nn.Linear):
            raise TypeError(f"head must be a torch.nn.Linear, got {type(head).__name__}: {_NAME_ONE}")
        return head
    layers = [] if model is None else [module for module in model.modules() if isinstance(module, nn.Linear)]
    if layers:
        return layers[-1]
    if needed:
        where = "no model was given" if model is None else f"{type(model).__name__} has no torch.nn.Linear"
        raise ValueError(f'ranking="first_order" needs a head, and {where}: {_NAME_ONE}')
    return None


class HeadRecorder:
    """Records, at a backward, the input and the output gradient of a linear layer.

    Nothing is kept of a forward whose output is not differentiated.
    """

    def __init__(self, head: nn.Linear) -> None:
        self.head = head
        #: Off while the weights are perturbed: pass 2 is not recorded.
        self.is_listening = True
        self._uses: list[tuple[Tensor, Tensor]] = []
        # Disabled here and not by a decorator: torch.compiler.disable imports torch._dynamo, which takes a second.
        self._handle = head.register_forward_hook(torch.compiler.disable(self._after_forward))

    def _after_forward(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.is_listening and args and isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(functools.partial(self._after_backward, args[0].detach()))

    def _after_backward(self, inputs: Tensor, grad: Tensor) -> None:
        if self.is_listening:
            self._uses.append((inputs, grad.detach()))

    @property
    def was_used_once(self) -> bool:
        """Whether the head was run once in pass 1."""
        return len(self._uses) == 1

    def forget(self) -> None:
        """Drop what was recorded."""
        self._uses.clear()

    def take(self, adaptive: bool = False, eta: float = 0.0) -> Head:
        """What the one forward of pass 1 left.

        Args:
            adaptive: whether T_w of the head's group is |w| + eta.
            eta: see ``adaptive``.

        Raises:
            RuntimeError: the head was not run in pass 1, or more than once.
        """
        uses, self._uses = self._uses, []
        if len(uses) == 1:
            transform = _transform_of(self.head, eta) if adaptive else None
            return Head(*uses[0], has_bias=self.head.bias is not None, transform=transform)
        name = f"the head (Linear with {self.head.out_features} outputs)"
        if uses:
            raise RuntimeError(
                f"{name} was used {len(uses)} times in pass 1, and this ranking needs a layer that is used once: "
                f"{_NAME_ONE}"
            )
        raise RuntimeError(
            f"{name} was not seen in pass 1. Either it has no part in the loss: {_NAME_ONE}. Or the model was compiled "
            "and run before the optimizer was built: build the optimizer first"
        )

    def close(self) -> None:
        """Take the hook off the layer."""
        self._handle.remove()


def _transform_of(head: nn.Linear, eta: float) -> tuple[Tensor, Tensor | None]:
    """T_w^2 = (|w| + eta)^2 of the head's weight and bias."""

    def squared(param: Tensor) -> Tensor:
        whole = param.full_tensor() if is_sharded(param) else param  # type: ignore[attr-defined]
        return (whole.detach().to(compute_dtype(whole.dtype)).abs() + eta).square()

    return squared(head.weight), None if head.bias is None else squared(head.bias)
