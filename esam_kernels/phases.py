"""Algorithm 1, phase by phase, for loops of the user's own and for the step that is made of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from esam_kernels.selection import (
    batch_size,
    check_logits,
    check_losses,
    num_selected,
    selected_from_logits_on,
    selected_on,
)
from esam_kernels.training_modes import frozen_batch_norm
from esam_kernels.wrapper import WrappedOptimizer


class Phases(WrappedOptimizer):
    """What a step consists of: ``backward``, ``first_step``, ``select``, ``second_step``; ``restore`` gives it up."""

    sync_perturbation: bool
    _model: nn.Module | None

    def backward(self, loss: Tensor) -> None:
        """Pass 1: the gradients of ``loss``, of the parameters that SWP drew for this step and of no others.

        Args:
            loss: one number, the mean loss of the batch.

        With ``fully_shard`` the gradients of all are computed, and only the perturbation leaves the others out.

        Raises:
            RuntimeError: between ``first_step`` and ``second_step``, or outside ``no_sync`` of a model that is wrapped
                in DistributedDataParallel, which would wait for the gradients that are not computed.
            ValueError: a loss that is not one number.
        """
        self._require(perturbed=False, call="backward")
        if not self._perturbation.ascent.two_passes:
            raise RuntimeError(
                "this ascent has one pass a step: first_step() before the forward, loss.backward(), second_step()"
            )
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"backward takes the mean loss, one number, got {shape}")
        drawn = [self._perturbation.params[i] for i in self._perturbation.drawn()]
        if not drawn:
            raise RuntimeError("no parameter requires a gradient: nothing can be trained")
        if self._perturbation.is_sharded:
            loss.backward()
        else:
            if self._parallelism.synchronizes and len(drawn) < len(self._perturbation.trained()):
                raise RuntimeError("the first pass, forward and backward, belongs inside model.no_sync()")
            loss.backward(inputs=drawn)
        self._ran_backward = True

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """w -> w + e, from the gradients in ``.grad``. Freezes the BatchNorm statistics of ``model``.

        If the gradient's norm is zero or not finite, e = 0; that is decided on the device. With ascent="previous" or
        "momentum" this comes before the only forward, and freezes nothing.

        Args:
            zero_grad: drop the gradients (set them to None). The old weights may then be kept in their memory.

        Raises:
            RuntimeError: a second ``first_step`` without ``second_step`` or ``restore``, no gradients, or sparse ones.
            ValueError: a group's rho that is negative or not finite. Nothing is changed then.
        """
        self._require(perturbed=False, call="first_step")
        self._parallelism.reshard()
        self._perturbation.perturb(
            self.base_optimizer,
            gradients_are_dropped=zero_grad,
            may_lack_gradients=self._ran_backward,
            average_over=self._parallelism.process_group if self.sync_perturbation else None,
        )
        self._ran_backward = False
        self._used_gradients = []
        torch.clear_autocast_cache()
        if zero_grad:
            self.zero_grad(set_to_none=True)
        if self._model is not None and self._perturbation.ascent.two_passes:
            self._batch_norm.enter_context(frozen_batch_norm(self._model))

    def select(self, loss_before: Tensor, loss_after: Tensor, *tensors: Any) -> Any:
        """B+: the gamma share of the batch whose losses rise most (Eq. 6). With gamma = 1 the batch itself.

        Args:
            loss_before: losses per sample at w, shape (b,).
            loss_after: losses per sample at w + e, shape (b,).
            tensors: the batch, tensors or pytrees of tensors with the samples in front.

        Returns:
            The selected samples of ``tensors``, as :func:`esam_kernels.gather` returns them.

        Raises:
            ValueError: losses that are not one number a sample, or sizes that differ.
        """
        samples = batch_size(tensors)
        check_losses(loss_before, samples, "loss_before")
        check_losses(loss_after, samples, "loss_after")
        k = num_selected(self.gamma, samples)
        if k == samples:
            return tensors[0] if len(tensors) == 1 else tensors
        return selected_on(self._perturbation.backend, k, loss_before, loss_after, *tensors)

    def select_from_logits(
        self,
        loss_before: Tensor,
        logits_after: Tensor,
        target: Tensor,
        *tensors: Any,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
    ) -> Any:
        """:meth:`select` where the losses after are the :func:`esam_kernels.cross_entropy` of these logits.

        With backend="cuda" the losses, the selection and the gathering are one launch.

        Args:
            loss_before: losses per sample at w, shape (b,).
            logits_after: logits at w + e, in a layout that ``cross_entropy`` takes.
            target: as ``cross_entropy`` takes it. It is not gathered: give it among ``tensors`` as well.
            tensors: the batch, tensors or pytrees of tensors with the samples in front.
            label_smoothing: as of ``loss_before``.
            ignore_index: as of ``loss_before``.

        Returns:
            The selected samples of ``tensors``, as :func:`esam_kernels.gather` returns them.

        Raises:
            ValueError: losses that are not one number a sample, logits and target that do not fit, label_smoothing
                outside [0, 1], or sizes that differ.
            IndexError: a class index out of range, on the CPU. On other devices such a sample's loss is NaN.
        """
        samples = batch_size(tensors)
        batch_size((logits_after, *tensors))
        check_losses(loss_before, samples, "loss_before")
        check_logits(logits_after, target, label_smoothing, ignore_index)
        k = num_selected(self.gamma, samples)
        if k == samples:
            return tensors[0] if len(tensors) == 1 else tensors
        return selected_from_logits_on(
            self._perturbation.backend,
            k,
            loss_before,
            logits_after,
            target,
            *tensors,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
        )

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """w + e -> w, then the base optimizer's update with the gradients in ``.grad``.

        Args:
            zero_grad: drop the gradients afterwards (set them to None).

        Raises:
            RuntimeError: no ``first_step`` before, or sparse gradients.
        """
        self._require(perturbed=True, call="second_step")
        self._perturbation.check_gradients(may_lack=True)
        self._batch_norm.close()
        self._parallelism.reshard()
        self._perturbation.restore_and_update(self.base_optimizer)
        self._perturbation.ascent.remember(self._perturbation.params)
        torch.clear_autocast_cache()
        self._note_saved()
        self._opt_called = True  # what torch's LR schedulers look at to warn about a missing step()
        if zero_grad:
            self.zero_grad(set_to_none=True)
        self._remember_used_gradients()

    @torch.no_grad()
    def restore(self) -> None:
        """w + e -> w with no update: the step is given up. Without a ``first_step`` before, nothing happens."""
        if self._perturbation.is_perturbed:
            self._batch_norm.close()
            self._parallelism.reshard()
            self._perturbation.restore()
            torch.clear_autocast_cache()
