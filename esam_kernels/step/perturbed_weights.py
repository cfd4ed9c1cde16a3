"""The weights while they are perturbed: opened by ``open``, closed by ``restore`` or by ``update``.

What has to happen at the two ends, and in which order, is written here and nowhere else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from esam_kernels.distributed import Parallelism
from esam_kernels.perturbation.swp import StochasticWeightPerturbation
from esam_kernels.step.replay import ModelBuffers


class PerturbedWeights:
    """w + e, from ``open`` to ``restore`` or ``update``.

    Args:
        perturbation: adds e to the weights, and takes it back.
        parallelism: how the model is spread over processes.
        model: its buffers (running statistics, for one) stay as the first forward left them; None: no model is known.
    """

    def __init__(
        self, perturbation: StochasticWeightPerturbation, parallelism: Parallelism, model: nn.Module | None
    ) -> None:
        self._perturbation = perturbation
        self._parallelism = parallelism
        self._buffers = None if model is None else ModelBuffers(model)

    @property
    def is_open(self) -> bool:
        """Whether the weights are perturbed."""
        return self._perturbation.is_perturbed

    def open(self, *, gradients_are_dropped: bool, may_lack_gradients: bool, average_over: Any) -> None:
        """w -> w + e; see :meth:`StochasticWeightPerturbation.perturb` for arguments and errors."""
        self._parallelism.reshard()
        self._perturbation.perturb(gradients_are_dropped, may_lack_gradients, average_over)
        torch.clear_autocast_cache()
        if self._buffers is not None and self._perturbation.ascent.two_passes:
            self._buffers.remember()

    def restore(self) -> None:
        """w + e -> w.

        Raises:
            RuntimeError: parameters of another dtype, device, shape or strides. The weights are still perturbed then.
        """
        self._perturbation.check_places()
        self._close()
        self._perturbation.restore()
        torch.clear_autocast_cache()

    def update(self) -> None:
        """w + e -> w, and the base optimizer's step.

        Raises:
            RuntimeError: sparse gradients, other parameters in the groups than were perturbed, or of another dtype,
                device, shape or strides. The weights are still perturbed then.
        """
        self._perturbation.check_parameters()
        self._perturbation.check_places()
        self._perturbation.check_gradients(may_lack=True)
        self._close()
        self._perturbation.restore_and_update()
        torch.clear_autocast_cache()

    def abandon(self) -> None:
        """Forget weights that were never computed: those of a CUDA graph that failed to be captured."""
        if self.is_open:
            if self._buffers is not None:
                self._buffers.abandon()
            self._perturbation.forget()

    def _close(self) -> None:
        if self._buffers is not None:
            self._buffers.put_back()
        self._parallelism.reshard()
