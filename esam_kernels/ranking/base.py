"""What a ranking is, and what it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """What pass 1 left at the head, the network's last linear layer."""

    input: Tensor
    """What it was given, shape (b, ..., D), detached."""
    output_grad: Tensor
    """The gradient of the mean loss with respect to its output, shape (b, ..., C). A GradScaler's factor is in it."""
    has_bias: bool = True
    transform: tuple[Tensor | None, Tensor | None] = (None, None)
    """T_w^2 of its weight, and of its bias, where their group is ``adaptive``; None stands for 1."""


@dataclass(frozen=True)
class RankingContext:
    """What is known of a batch when its B+ is chosen: what a ``ranking`` of your own is called with.

    >>> def hard_but_not_hopeless(context):
    ...     return torch.where(context.losses < 3.0, context.losses, -1.0)  # a score for each sample, shape (b,)
    >>> optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, ranking=hard_but_not_hopeless, model=model)
    """

    losses: Tensor
    """The loss of each sample at w, shape (b,), detached."""
    batch: tuple[Any, ...]
    """The tensors or pytrees of tensors that ``step`` or ``select`` was given."""
    head: Head | None
    """None without a head, if pass 1 did not use the head exactly once, and in a second ``select`` of one step."""
    seed: int
    """The optimizer's, for rankings that draw."""
    step: int
    """How many steps the optimizer has taken."""


class Ranking:
    """Scores from pass 1 alone."""

    #: Whether the losses at w + e are measured, in a forward of their own.
    needs_loss_after = False
    #: Whether the head's input and output gradient are recorded in pass 1, where there is a head.
    records_head = False
    #: Whether there has to be one.
    needs_head = False

    def scores(self, context: RankingContext) -> Tensor:
        """A score for each sample, shape (b,), floating point, on the device of the losses."""
        raise NotImplementedError

    def upload(self, seed: int, step: int, samples: int, device: torch.device) -> list[Tensor]:
        """Bring up to date what a captured step reads on the device, and return it."""
        return []
