"""A ranking that the user has written."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from esam_kernels.ranking.base import Ranking, RankingContext


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
            if isinstance(scores, Tensor):
                got = f"{scores.dtype} of shape {tuple(scores.shape)} on {scores.device}"
            else:
                got = type(scores).__name__
            raise ValueError(
                f"the ranking must return one floating-point score per sample, shape ({len(losses)},) on "
                f"{losses.device}, got {got}"
            )
        return scores
