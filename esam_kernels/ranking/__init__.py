"""How B+ is ranked: a score for each sample of the batch, of which the k largest are taken (section 2.3).

A ranking is a class with one method, :meth:`Ranking.scores`, in a file of its own, and a line in :data:`RANKINGS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from esam_kernels.ranking.base import Head, Ranking, RankingContext
from esam_kernels.ranking.custom import Custom
from esam_kernels.ranking.first_order import FirstOrder, first_order_scores
from esam_kernels.ranking.head import HeadRecorder, find_head
from esam_kernels.ranking.random import Random
from esam_kernels.ranking.rise import Rise

__all__ = ["RANKINGS", "Head", "HeadRecorder", "Ranking", "RankingContext", "find_head", "first_order_scores", "make"]

RANKINGS: dict[str, type[Ranking]] = {"rise": Rise, "first_order": FirstOrder, "random": Random}


def make(ranking: str | Callable[[RankingContext], Tensor] | Any) -> Ranking:
    """The ranking of this name, or of this function.

    Raises:
        ValueError: neither a name of :data:`RANKINGS` nor a function.
    """
    if isinstance(ranking, str) and ranking in RANKINGS:
        return RANKINGS[ranking]()
    if not callable(ranking):
        raise ValueError(f"ranking must be one of {tuple(RANKINGS)} or a function of the context, got {ranking!r}")
    return Custom(ranking)
