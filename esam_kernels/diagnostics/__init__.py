"""Looking at the loss around the weights of a model: what the paper's figures measure, for any model.

Every function takes the model, or the optimizer that trains it (``ranking_agreement``), a closure as
:meth:`esam_kernels.ESAM.step` does, and the batch. The model, with its gradients, buffers and modes, and torch's random
state are afterwards what they were, bit for bit and in the same memory, whatever happened in between.
"""

from esam_kernels.diagnostics.curvature import TopEigenvalue, top_hessian_eigenvalue
from esam_kernels.diagnostics.landscape import LossLandscape, loss_landscape
from esam_kernels.diagnostics.ranking import RankingAgreement, ranking_agreement
from esam_kernels.diagnostics.selected_data import GradientCosine, SplitLosses, gradient_cosine, split_losses
from esam_kernels.diagnostics.sharpness import Linearity, Sharpness, linearity, sharpness

__all__ = [
    "GradientCosine",
    "Linearity",
    "LossLandscape",
    "RankingAgreement",
    "Sharpness",
    "SplitLosses",
    "TopEigenvalue",
    "gradient_cosine",
    "linearity",
    "loss_landscape",
    "ranking_agreement",
    "sharpness",
    "split_losses",
    "top_hessian_eigenvalue",
]
