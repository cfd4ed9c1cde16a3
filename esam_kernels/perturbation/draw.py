"""m of Eq. 4: which tensors of a model, or which single weights, a step perturbs.

Every draw comes from the seed, the step and the tensor's own number alone, so that it is the same on every device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from esam_kernels.backends import reference

# Draws of whole tensors count in a part of the Philox space that no element index reaches.
_TENSOR_STREAM = 1 << 62
# Steps drawn for at once: the generator's cost in Python, divided by this.
_STEPS_PER_DRAW = 64


def bound(beta: float) -> int:
    """A 32-bit word up to this one is a success of Bern(beta)."""
    return max(1, round(beta * 2**32)) - 1


class TensorDraw:
    """Draws whole tensors (appendix A.4), a random 32-bit word for each tensor and step."""

    def __init__(self) -> None:
        # Set by a captured step: the draws repeat after so many steps.
        self.pool: int | None = None
        self._words: dict[tuple[int, int, int], list[int]] = {}

    def chosen(self, candidates: Sequence[int], tied_to: Sequence[int], beta: float, seed: int, step: int) -> list[int]:
        """Those of the tensors ``candidates`` that are drawn with probability ``beta``; tied ones together.

        If none is drawn, the one with the smallest word is taken.
        """
        words, largest = self._of_step(len(tied_to), seed, step), bound(beta)
        chosen = [i for i in candidates if words[tied_to[i]] <= largest]
        if candidates and not chosen:
            nearest = min((words[tied_to[i]], tied_to[i]) for i in candidates)[1]
            chosen = [i for i in candidates if tied_to[i] == nearest]
        return chosen

    def _of_step(self, tensors: int, seed: int, step: int) -> list[int]:
        """One random 32-bit word for each tensor."""
        step = step % self.pool if self.pool else step
        if (tensors, seed, step) not in self._words:
            steps = torch.arange(step, step + _STEPS_PER_DRAW, device="cpu")
            counters = torch.arange(-(-tensors // 4), device="cpu") + _TENSOR_STREAM
            words = torch.stack(reference.philox(counters[None, :], steps[:, None], seed), dim=-1)
            self._words = {(tensors, seed, each): row for each, row in zip(steps.tolist(), words.flatten(1).tolist())}
        return self._words[tensors, seed, step]
