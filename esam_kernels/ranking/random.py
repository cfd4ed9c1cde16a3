"""ranking="random"."""

from __future__ import annotations

import torch
from torch import Tensor

from esam_kernels.backends import reference
from esam_kernels.device_numbers import DeviceNumbers, is_capturing
from esam_kernels.ranking.base import Ranking, RankingContext

# Samples count in a part of the Philox space that neither elements nor tensors reach.
_STREAM = 3 << 61


class Random(Ranking):
    """A B+ drawn from the seed and the step, every one as likely: the expected second gradient is SAM's."""

    def __init__(self) -> None:
        # For each size of a batch, so that a captured step finds its own in place after a smaller last batch.
        self._ranks: dict[int, DeviceNumbers] = {}

    def scores(self, context: RankingContext) -> Tensor:
        """A random number for each sample: the same on every device and backend."""
        losses = context.losses
        if not is_capturing():
            self.upload(context.seed, context.step, len(losses), losses.device)
        return self._ranks[len(losses)].tensor

    def upload(self, seed: int, step: int, samples: int, device: torch.device) -> list[Tensor]:
        """The ranks of this step's words, of which of two that are equal the earlier is the higher.

        float32 holds them exactly, which a word does not fit into.
        """
        counters = torch.arange(-(-samples // 4), device="cpu") + _STREAM
        words = torch.stack(reference.philox(counters, step, seed), dim=-1).flatten()[:samples]
        ranks = torch.empty(samples, dtype=torch.int64, device="cpu")
        ranks[words.argsort(descending=True, stable=True)] = torch.arange(samples, 0, -1, device="cpu")
        numbers = self._ranks.setdefault(samples, DeviceNumbers(torch.float32))
        numbers.set(ranks.tolist(), device)
        return [numbers.tensor]
