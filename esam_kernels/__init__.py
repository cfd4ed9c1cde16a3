"""Efficient Sharpness-aware Minimization (Du et al., ICLR 2022) for PyTorch, as fused kernels."""

from esam_kernels import diagnostics, logs, ops, schedules
from esam_kernels.graphs import make_graphed_step
from esam_kernels.normalization import normalization_groups
from esam_kernels.optimizer import ESAM, SAM
from esam_kernels.ranking import RankingContext
from esam_kernels.selection import cross_entropy, gather, select
from esam_kernels.step.replay import RandomState, frozen_batch_norm

__version__ = "0.2.0"

__all__ = [
    "ESAM",
    "SAM",
    "RandomState",
    "RankingContext",
    "cross_entropy",
    "diagnostics",
    "frozen_batch_norm",
    "gather",
    "make_graphed_step",
    "normalization_groups",
    "ops",
    "schedules",
    "select",
]

logs.set_up()
