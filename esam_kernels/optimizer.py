"""ESAM and SAM: Algorithm 1 as one step, made of its phases, and nothing numerical."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esam_kernels import distributed
from esam_kernels.ascent import RHO_OF_ASCENT, rho_or_default
from esam_kernels.base_optimizer import build_base, group_defaults
from esam_kernels.loss_scaling import nan_unless_finite, restore_and_scaled_step
from esam_kernels.perturbation import StochasticWeightPerturbation
from esam_kernels.phases import Phases
from esam_kernels.selection import batch_size, losses_and_rest, num_selected, split
from esam_kernels.wrapper import check_gamma


class ESAM(Phases):
    r"""Efficient Sharpness-aware Minimization (Du et al., ICLR 2022) around any torch optimizer.

    One step on a batch B (Algorithm 1):

    .. math::
        e &= \frac{\rho}{\beta}\, m \odot \frac{T_w^2 g}{\lVert T_w g \rVert + \epsilon},
             \qquad g = \nabla_w L_B(w), \quad m_i \sim \mathrm{Bern}(\beta) \\
        B^+ &= \text{the } \gamma \lvert B \rvert \text{ samples with the largest }
             \ell(w + e) - \ell(w) \\
        w &\leftarrow \text{base update of } w \text{ with } \nabla_w L_{B^+}(w + e)

    Args:
        params: parameters or parameter groups, as for any torch optimizer; ``rho`` and ``adaptive`` may differ
            by group.
        base_optimizer: a torch optimizer class, built with ``base_kwargs``, or an instance over the same parameters.
        rho: radius of the perturbation, >= 0. Without one: that of the ascent, :data:`esam_kernels.ascent.DEFAULT_RHO`
            (0.05, and 1.0 for "momentum").
        beta: share of the weights that are perturbed, in (0, 1].
        gamma: share of the batch that the second pass uses, in (0, 1].
        adaptive: T_w = \|w\| + eta instead of 1 (ASAM, Kwon et al., 2021).
        eta: see ``adaptive``.
        mask: "tensor" draws whole parameter tensors, and the gradients of the others are not computed in the first pass
            (appendix A.4); "element" draws single weights (Eq. 5).
        radius: with mask="tensor", "paper" scales so that E[e] is SAM's perturbation, "released" so that
            \|\|e\|\| = rho / beta, as the authors' code does.
        eps: keeps the division finite. Not the base optimizer's: one that needs another eps is given as an instance.
        ascent: what e goes along. "current", the gradient of this batch, is the paper's algorithm, with two passes a
            step. "previous", the gradient of the step before, and "momentum", against the base optimizer's, take one:
            there is no second look to select data with, so that gamma must be 1, and the first step, which has no
            history, is the base optimizer's. See :mod:`esam_kernels.ascent`.
        seed: of the draws. The same seed draws the same on every device and backend.
        model: given, its BatchNorm statistics move in the first forward of a step only. One that is wrapped in
            DistributedDataParallel, or sharded by ``fully_shard``, has to be given, as it is trained (see
            :mod:`esam_kernels.distributed`).
        sync_perturbation: with DistributedDataParallel, average the first gradients over the ranks, so that all use one
            perturbation; by default each perturbs for its own batch. With ``fully_shard`` it is one always.
        backend: "reference", "native", "triton" or "cuda"; None: the fastest that the device has.
        flatten: move the parameters into flat buffers; None: where they are plain dense tensors on one device.
        base_kwargs: what ``base_optimizer`` takes beside the parameters.

    ``beta``, ``gamma`` and each group's ``rho`` may be set between steps. ``replay_noise`` (True) makes ``step`` repeat
    the first forward's random numbers in the forward that measures the rise of the losses.

    Raises:
        ValueError, TypeError: arguments outside these ranges, a base optimizer over other parameters, or one that
            cannot be wrapped (LBFGS, Adadelta). Nothing is changed then.
        RuntimeError: a backend that is not available here.
    """

    # GradScaler then calls step() on an overflow as well, and leaves it to step() to skip the update.
    _step_supports_amp_scaling = True
    grad_scale: Tensor | None
    found_inf: Tensor

    def __init__(
        self,
        params: Any,
        base_optimizer: type[Optimizer] | Optimizer,
        *,
        rho: float = RHO_OF_ASCENT,
        beta: float = 0.6,
        gamma: float = 0.5,
        adaptive: bool = False,
        eta: float = 0.0,
        mask: str = "tensor",
        radius: str = "paper",
        eps: float = 1e-12,
        seed: int = 0,
        ascent: str = "current",
        model: nn.Module | None = None,
        backend: str | None = None,
        flatten: bool | None = None,
        sync_perturbation: bool = False,
        **base_kwargs: Any,
    ) -> None:
        StochasticWeightPerturbation.check({"ascent": ascent, "flatten": flatten})
        rho = rho_or_default(rho, ascent)
        check_gamma(gamma, ascent)
        self._gamma = float(gamma)
        self.replay_noise = True
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        group_defaults({}, rho, adaptive)
        base, own = build_base(params, base_optimizer, base_kwargs)
        added = [
            {**values, **group_defaults({**group, **values}, rho, adaptive)}
            for group, values in zip(base.param_groups, own)
        ]
        groups = [{**group, **missing} for group, missing in zip(base.param_groups, added)]
        params = [param for group in groups for param in group["params"]]
        self._parallelism = distributed.Parallelism(model)
        self._parallelism.check(params)
        if sync_perturbation:
            distributed.check_same_seed(seed, params[0].device, self._parallelism.process_group)
        self._perturbation = StochasticWeightPerturbation(
            groups,
            beta=beta,
            eta=eta,
            mask=mask,
            radius=radius,
            eps=eps,
            seed=seed,
            ascent=ascent,
            backend=backend,
            flatten=flatten,
        )
        self._perturbation.ascent.check(base)
        for group, missing in zip(base.param_groups, added):
            group.update(missing)
        self._model = model
        self.sync_perturbation = sync_perturbation
        self.base_optimizer = base
        self._begin()
        self.defaults = {**base.defaults, "rho": rho, "adaptive": adaptive}
        super().__setstate__({})  # the hooks that torch gives to every optimizer
        self._perturbation.use_groups(base.param_groups)
        self._note_saved()

    def step(  # type: ignore[override]
        self,
        closure: Callable[..., Any] | None = None,
        *batch: Any,
        micro_batch: int | None = None,
        max_grad_norm: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Any:
        """One whole step.

        ``step(losses, *batch)`` is Algorithm 1: ``losses(*batch)`` returns one loss per sample, shape (b,), and is
        called on the batch, again on it under ``no_grad`` with the weights perturbed (unless gamma = 1), and on B+.
        It may return a tuple, (losses, anything else). Gradients that are there before are dropped; those of the last
        pass stay in ``.grad``, except with ascent="previous", which keeps them for the next step: ``.grad`` is None
        then, unless somebody else holds the gradient.

        ``step(closure)`` takes a closure that computes loss and gradients, as torch's optimizers do, and calls it
        before and after the perturbation. Where new gradients are there already (the convention of the common two-step
        SAM class), it is called after it only. Losses per sample are not seen, so gamma has no part in it.

        ``step()`` after ``first_step`` is ``second_step``: that is how the loops of frameworks end a step, and how
        ``GradScaler.step(optimizer)`` does, which restores the weights where it skips the update. A closure, if one is
        given, is called first. ``step()`` where the learning rate of every group is 0 is the base optimizer's alone: so
        does torch.distributed.checkpoint create its state.

        If the closure raises, the weights are restored first.

        Args:
            closure: see above.
            batch: tensors or pytrees of tensors with the samples in front.
            micro_batch: at most so many samples at a time, each part with its own perturbation and its own B+
                (m-sharpness); the gradients of the second passes add up to that of the mean over all B+.
            max_grad_norm: clip the norm of the second gradient, as ``torch.nn.utils.clip_grad_norm_`` does.
            scaler: scales the losses, and takes the base optimizer's step or skips it where a gradient of either pass
                is not finite. ``scaler.update()`` remains the caller's. The first gradient needs no unscaling: e does
                not depend on its length.

        Returns:
            The mean loss at w, detached, and what else the closure returned for it, (loss, rest), if it returned more
            (with ``micro_batch``: a list of one for each part). For ``step(closure)`` what the closure returned first.

        Raises:
            RuntimeError: no closure, or within another step.
            ValueError: an empty batch, samples of different number, or losses that are not one number a sample.
        """
        if self._perturbation.is_perturbed and not batch:
            return self._finish_step(closure)
        # torch.distributed.checkpoint takes such a step to make the base optimizer create its state.
        if closure is None and all(group.get("lr") == 0.0 for group in self.param_groups):
            self.base_optimizer.step()
            self._perturbation.ascent.prepare(self._perturbation.params)
            return None
        if not callable(closure):
            raise RuntimeError("step needs a closure: step(losses, *batch), or first_step and second_step in its place")
        self._require(perturbed=False, call="step")
        if not batch and not (micro_batch is None and max_grad_norm is None and scaler is None):
            raise ValueError("micro_batch, max_grad_norm and scaler need the batch: step(losses, *batch, ...)")
        with torch.enable_grad():
            try:
                if not batch:
                    return self._step_with_closure(closure)
                return self._step_on_batch(closure, batch, micro_batch, max_grad_norm, scaler)
            except BaseException:
                if self._perturbation.is_perturbed:
                    self._parallelism.leave_forward()
                self.restore()
                raise

    def _step_on_batch(
        self,
        losses: Callable[..., Any],
        batch: tuple[Any, ...],
        micro_batch: int | None,
        max_grad_norm: float | None,
        scaler: torch.amp.GradScaler | None,
    ) -> Any:
        parts = split(batch, micro_batch)
        sizes = [batch_size(part) for part in parts]
        self.zero_grad(set_to_none=True)
        run = self._two_passes_each if self._perturbation.ascent.two_passes else self._one_pass_each
        results = run(losses, parts, scaler)
        self._update(max_grad_norm, scaler)
        loss = results[0][0]
        if len(parts) > 1:
            loss = torch.stack([loss * size for (loss, _), size in zip(results, sizes)]).sum() / sum(sizes)
        rest = [extra for _, extra in results if extra is not None]
        if not rest:
            return loss
        return loss, rest if micro_batch is not None else rest[0]

    def _one_pass_each(
        self, losses: Callable[..., Any], parts: list[tuple[Any, ...]], scaler: torch.amp.GradScaler | None
    ) -> list[tuple[Tensor, Any]]:
        """One perturbation along what is in memory, then one pass over each part; w is left at w + e."""
        samples = sum(map(batch_size, parts))
        results = []
        self.first_step()
        for number, part in enumerate(parts, start=1):
            here = batch_size(part)
            alone = self._parallelism.without_synchronization
            with contextlib.nullcontext() if number == len(parts) else alone():
                loss_perturbed, rest = losses_and_rest(losses(*part), here)
                loss = loss_perturbed.mean()
                _scaled(loss * (here / samples), scaler).backward()
            results.append((loss.detach(), rest))
        return results

    def _two_passes_each(
        self, losses: Callable[..., Any], parts: list[tuple[Any, ...]], scaler: torch.amp.GradScaler | None
    ) -> list[tuple[Tensor, Any]]:
        """Algorithm 1 up to the update, for each part from the clean weights; w is left at the last one's w + e."""
        selected = sum(num_selected(self.gamma, batch_size(part)) for part in parts)
        results = []
        summed: list[Tensor | None] = [None] * len(self._perturbation.params)
        for number, part in enumerate(parts, start=1):
            is_last = number == len(parts)
            results.append(self._two_passes(losses, part, summed, selected, scaler, is_last))
            if not is_last:
                summed = [param.grad for param in self._perturbation.params]
                self.zero_grad(set_to_none=True)
                self.restore()
        return results

    def _update(self, max_grad_norm: float | None, scaler: torch.amp.GradScaler | None) -> None:
        """Back to w, and the base optimizer's update, or what the scaler makes of it."""
        params = self._perturbation.params
        if scaler is None:
            if max_grad_norm is not None:
                nn.utils.clip_grad_norm_(params, max_grad_norm)
            self.second_step()
            return
        self.restore()
        if max_grad_norm is not None:
            scaler.unscale_(self.base_optimizer)
            nn.utils.clip_grad_norm_(params, max_grad_norm)
        scaler.step(self.base_optimizer)
        self._perturbation.ascent.remember(params)
        self._remember_used_gradients()

    def _two_passes(
        self,
        losses: Callable[..., Any],
        batch: tuple[Any, ...],
        summed: list[Tensor | None],
        selected_in_all: int,
        scaler: torch.amp.GradScaler | None,
        is_last: bool,
    ) -> tuple[Tensor, Any]:
        """Both passes over ``batch``; the gradients of the second are added to ``summed``, and w is left at w + e.

        Only the second pass of the last part is synchronised with other ranks.
        """
        alone = self._parallelism.without_synchronization
        samples = batch_size(batch)
        noise = self._remember_noise() if self.replay_noise else None

        with alone():
            loss_before, rest = losses_and_rest(losses(*batch), samples)
            loss = loss_before.mean()
            self.backward(_scaled(loss, scaler))
        self.first_step(zero_grad=True)

        k = num_selected(self.gamma, samples)
        if k < samples or (self.gamma < 1.0 and self._parallelism.forward_communicates):
            with torch.no_grad(), alone(), noise.replay() if noise else contextlib.nullcontext():
                loss_after, _ = losses_and_rest(losses(*batch), samples)
            chosen = self.select(loss_before, loss_after, *batch)
            batch = chosen if len(batch) > 1 else (chosen,)

        with contextlib.nullcontext() if is_last else alone():
            loss_selected, _ = losses_and_rest(losses(*batch), k)
            for param, grad in zip(self._perturbation.params, summed):
                param.grad = grad
            loss_selected = loss_selected.mean() * (k / selected_in_all)
            if scaler is not None and scaler.is_enabled():
                loss_selected = nan_unless_finite(loss_selected, self._perturbation.sum_of_squares)
            _scaled(loss_selected, scaler).backward()
        return loss.detach(), rest

    def _step_with_closure(self, closure: Callable[[], Any]) -> Any:
        if not self._perturbation.ascent.two_passes:
            self.first_step()
            loss = closure()
            self.second_step()
            return loss
        with self._parallelism.without_synchronization():
            loss = None if self._has_new_gradients() else closure()
        if not self._has_new_gradients():
            raise RuntimeError(
                "the closure computed no gradients: it has to call loss.backward(), or the batch has to be given, "
                "step(losses, *batch)"
            )
        self.first_step(zero_grad=True)
        loss_perturbed = closure()
        self.second_step()
        return loss_perturbed if loss is None else loss

    def _finish_step(self, closure: Callable[[], Any] | None) -> Any:
        """``second_step``, or what a GradScaler (which sets ``found_inf`` while it calls ``step``) makes of it."""
        try:
            with torch.enable_grad():
                loss = closure() if closure is not None else None
            if hasattr(self, "found_inf"):
                with torch.no_grad():
                    scaling = (self.base_optimizer, self.grad_scale, self.found_inf)
                    restore_and_scaled_step(*scaling, self.restore, self.second_step)
                self._perturbation.ascent.remember(self._perturbation.params)
                self._remember_used_gradients()
            else:
                self.second_step()
        except BaseException:
            self.restore()
            raise
        return loss

    def _abandon(self) -> None:
        """Forget a step of which nothing was computed."""
        if self._perturbation.is_perturbed:
            self._batch_norm.close()
            self._perturbation.forget()


class SAM(ESAM):
    """Sharpness-Aware Minimization (Foret et al., 2021): ESAM with beta = gamma = 1.

    Takes the place of the common two-step SAM class: the same constructor, ``first_step``, ``second_step`` and
    ``step(closure)``.

    Args:
        params: parameters or parameter groups.
        base_optimizer: a torch optimizer class, or an instance over the same parameters.
        rho: radius of the perturbation, >= 0; without one, as for ESAM.
        adaptive: T_w = \\|w\\| + eta instead of 1.
        kwargs: the other arguments of :class:`ESAM` (not beta, gamma, mask, radius), and the base optimizer's.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: type[Optimizer] | Optimizer,
        rho: float = RHO_OF_ASCENT,
        adaptive: bool = False,
        **kwargs: Any,
    ) -> None:
        fixed = {"beta", "gamma", "mask", "radius"} & set(kwargs)
        if fixed:
            raise TypeError(f"SAM has no {', '.join(sorted(fixed))}: use ESAM")
        super().__init__(params, base_optimizer, rho=rho, adaptive=adaptive, beta=1.0, gamma=1.0, **kwargs)


def _scaled(loss: Tensor, scaler: torch.amp.GradScaler | None) -> Tensor:
    return loss if scaler is None else scaler.scale(loss)
