"""ranking="rise"."""

from __future__ import annotations

from esam_kernels.ranking.base import Ranking


class Rise(Ranking):
    """The paper's: the loss at w + e minus that at w, measured by a forward (Eq. 6)."""

    needs_loss_after = True
