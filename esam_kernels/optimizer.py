"""ESAM and SAM: arguments, what torch's optimizers have, and the phases of a step by name. Nothing numerical."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esam_kernels import distributed, hooks, state
from esam_kernels.base_optimizer import build_base, check_options, fill, group_defaults, keep_radii, without_filled
from esam_kernels.perturbation.ascent import ASCENTS, RHO_OF_ASCENT, rho_or_default
from esam_kernels.perturbation.parameters import listed
from esam_kernels.perturbation.swp import StochasticWeightPerturbation
from esam_kernels.ranking import RankingContext, find_head, make
from esam_kernels.settings import Settings
from esam_kernels.step.phases import Phases
from esam_kernels.step.plan import relative_cost
from esam_kernels.step.whole import WholeStep

_T = TypeVar("_T")
_T1 = TypeVar("_T1")
_T2 = TypeVar("_T2")

# Hyperparameters that are no attributes: setting one would change nothing.
_OF_GROUPS = ("rho", "adaptive")
_CHOSEN_ONCE = ("eta", "mask", "radius", "eps", "seed", "ascent", "ranking")
# What a copy takes over.
_COPIED = ("base_optimizer", "defaults", "_perturbation", "_parallelism", "_model", "_head")


class ESAM(Optimizer):
    r"""Efficient Sharpness-aware Minimization (Du et al., ICLR 2022) around any torch optimizer.

    >>> optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05, model=model)
    >>> for inputs, targets in loader:
    ...     loss = optimizer.step(losses, inputs, targets)  # losses(inputs, targets) returns one loss for each sample

    One step on a batch B (Algorithm 1). In pass 1 the gradient g at the weights w gives the perturbation e; in pass 2
    the gradient at w + e, on a part of the batch, goes to the base optimizer:

    .. math::
        e &= \frac{\rho}{\beta}\, m \odot \frac{T_w^2 g}{\lVert T_w g \rVert + \epsilon},
             \qquad g = \nabla_w L_B(w), \quad m_i \sim \mathrm{Bern}(\beta) \\
        B^+ &= \text{the } \gamma \lvert B \rvert \text{ samples with the largest }
             \ell(w + e) - \ell(w) \\
        w &\leftarrow \text{base update of } w \text{ with } \nabla_w L_{B^+}(w + e)

    The defaults are the paper's. Where labels are wrong they can end below the base optimizer, because B+ then holds
    the wrong labels: begin with gamma = 1 (:class:`esam_kernels.schedules.LinearSchedule`), or choose no data and make
    pass 1 cheaper instead, ``gamma=1.0, ascent_share=0.25``.

    Args:
        params: parameters or parameter groups, as for any torch optimizer; ``rho`` and ``adaptive`` may differ
            by group.
        base_optimizer: a torch optimizer class, built with ``base_kwargs``, or an instance over the same parameters.
        rho: radius of the perturbation, >= 0. Without one: 0.05; with ascent="momentum" 1.0, and 3.0 if ``adaptive``
            (:mod:`esam_kernels.perturbation.ascent`).
        beta: share of the weights that are perturbed, in (0, 1].
        gamma: share of the batch that the second pass uses, in (0, 1].
        ranking: how the samples of B+ are chosen. "rise", the paper's: a forward at w + e measures how much each loss
            rises. "first_order": an estimate of that rise (appendix A.2) from what pass 1 has computed in the head, so
            that this forward is saved. "random": B+ is drawn, each one equally likely. Or a function of yours, which is
            called with a :class:`esam_kernels.RankingContext` and returns a score for each sample, shape (b,): those
            with the largest are taken. See :mod:`esam_kernels.ranking`.
        head: the network's last linear layer, for ranking="first_order"; None: the last ``nn.Linear`` of ``model``.
        adaptive: T_w = \|w\| + eta instead of 1 (ASAM, Kwon et al., 2021).
        eta: see ``adaptive``.
        mask: "tensor" draws whole parameter tensors, and the gradients of the others are not computed in the first pass
            (appendix A.4); "element" draws single weights (Eq. 5).
        radius: with mask="tensor", "paper" scales so that E[e] is SAM's perturbation, "released" so that
            \|\|e\|\| = rho / beta, as the authors' code does.
        eps: keeps the division finite. It is ESAM's own: to set the base optimizer's eps, pass an instance.
        ascent: where the direction of e comes from. "current", the gradient of this batch, is the paper's algorithm,
            with two passes a step. "previous" takes the gradient of the step before, and "momentum" goes against the
            base optimizer's momentum: one pass a step. They do not measure how losses rise, so gamma must be 1. Their
            first step has no history and is the base optimizer's. See :mod:`esam_kernels.perturbation.ascent`.
        ascent_share: share of the batch that pass 1 uses, in (0, 1]. At 0.25 ``step`` finds e on the first quarter of
            the batch (which has to be shuffled, as a ``DataLoader`` with ``shuffle=True`` does), and pass 2 takes the
            whole batch. Of b samples pass 1 takes round(ascent_share b), but at least 2, and with ``micro_batch`` so
            many of each part. With beta = 1 a quarter costs 1.25 steps of the base optimizer, where SAM costs 2. Below
            1 it needs gamma = 1 and ascent="current". In a loop of your own, give ``backward`` the loss of that part.
        seed: of the draws. The same seed draws the same on every device and backend.
        model: the model that is trained. If it is given, its BatchNorm statistics move in the first forward of a step
            only. A model that is wrapped in DistributedDataParallel, or sharded by ``fully_shard``, has to be given, as
            it is trained (see :mod:`esam_kernels.distributed`).
        sync_perturbation: with DistributedDataParallel, average the first gradients over the ranks, so that all use one
            perturbation; by default each perturbs for its own batch. With ``fully_shard`` it is one always.
        backend: the code of the operators: "reference" (plain PyTorch), "native" (C++ on the CPU), "triton" or "cuda".
            None: the fastest that the device has.
        flatten: move the parameters into flat buffers; None: where they are plain dense tensors on one device.
        base_kwargs: what ``base_optimizer`` takes beside the parameters.

    ``beta``, ``gamma``, ``ascent_share`` and each group's ``rho`` may be set between steps. ``replay_noise`` (True)
    makes ``step`` repeat the first forward's random numbers in the forward that measures the rise of the losses.

    Raises:
        ValueError, TypeError: arguments outside these ranges, a base optimizer over other parameters, or one that
            cannot be wrapped (LBFGS, Adadelta, SparseAdam). Nothing is changed then.
        RuntimeError: a backend that is not available here.
    """

    # How torch wraps the step() of a subclass.
    profile_hook_step = staticmethod(hooks.around_step)  # type: ignore[assignment]
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
        ranking: str | Callable[[RankingContext], Tensor] = "rise",
        head: nn.Module | None = None,
        adaptive: bool = False,
        eta: float = 0.0,
        mask: str = "tensor",
        radius: str = "paper",
        eps: float = 1e-12,
        seed: int = 0,
        ascent: str = "current",
        ascent_share: float = 1.0,
        model: nn.Module | None = None,
        backend: str | None = None,
        flatten: bool | None = None,
        sync_perturbation: bool = False,
        **base_kwargs: Any,
    ) -> None:
        settings = Settings(
            beta=beta,
            gamma=gamma,
            eta=eta,
            mask=mask,
            radius=radius,
            eps=eps,
            seed=seed,
            ascent=ascent,
            ascent_share=ascent_share,
            ranking=ranking,
        )
        if not (flatten is None or isinstance(flatten, bool)):
            raise ValueError(f"flatten must be True, False or None, got {flatten!r}")
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        head = find_head(head, model, needed=make(ranking).needs_head)
        given, rho = rho, rho_or_default(rho, ascent, adaptive)
        group_defaults({}, rho, adaptive)
        base, own = build_base(params, base_optimizer, base_kwargs)
        missing = []
        for group, values in zip(base.param_groups, own):
            group = {**without_filled(base, group), **values}
            its_rho = rho_or_default(given, ascent, bool(group.get("adaptive", adaptive)))
            missing.append({**values, **group_defaults(group, its_rho, adaptive)})
        params = listed(base.param_groups)
        self._parallelism = distributed.Parallelism(model)
        self._parallelism.check(params)
        if sync_perturbation:
            distributed.check_same_seed(seed, params[0].device, self._parallelism.process_group)
        ASCENTS[ascent]().check(base)
        self._perturbation = StochasticWeightPerturbation(base, settings, backend=backend, flatten=flatten)
        fill(base, missing)
        self.base_optimizer = base
        self.defaults = {**base.defaults, "rho": rho, "adaptive": adaptive}
        self._model, self._head = model, head
        self._begin(sync_perturbation)
        super().__setstate__({})  # the hooks that torch gives to every optimizer
        state.note(self._perturbation)

    def _begin(self, sync_perturbation: bool, replays_noise: bool = True) -> None:
        """What is neither saved nor copied."""
        self._phases = Phases(self._perturbation, self._parallelism, self._model, sync_perturbation, self._head)
        self._phases.replays_noise = replays_noise
        self._whole = WholeStep(self._phases)
        self._is_in_step = False
        self.base_optimizer.register_load_state_dict_pre_hook(keep_radii)

    # -- hyperparameters -----------------------------------------------------------------------------------------------

    @property
    def beta(self) -> float:
        """Share of the weights that are perturbed; may be set between steps."""
        return self._perturbation.settings.beta

    @beta.setter
    def beta(self, value: float) -> None:
        self._perturbation.settings = replace(self._perturbation.settings, beta=value)

    @property
    def gamma(self) -> float:
        """Share of the batch that the second pass uses; may be set between steps."""
        return self._perturbation.settings.gamma

    @gamma.setter
    def gamma(self, value: float) -> None:
        self._perturbation.settings = replace(self._perturbation.settings, gamma=value)

    @property
    def ascent_share(self) -> float:
        """Share of the batch that pass 1 of ``step`` uses; may be set between steps."""
        return self._perturbation.settings.ascent_share

    @ascent_share.setter
    def ascent_share(self, value: float) -> None:
        self._perturbation.settings = replace(self._perturbation.settings, ascent_share=value)

    @property
    def replay_noise(self) -> bool:
        """Whether ``step`` repeats the first forward's random numbers where it measures the rise of the losses."""
        return self._phases.replays_noise

    @replay_noise.setter
    def replay_noise(self, value: bool) -> None:
        self._phases.replays_noise = value

    @property
    def sync_perturbation(self) -> bool:
        """Whether the ranks of DistributedDataParallel share one perturbation."""
        return self._phases.sync_perturbation

    @property
    def relative_cost(self) -> float:
        """The counted cost of the next ``step`` on a batch, in units of the base optimizer's step.

        >>> print(f"{optimizer.relative_cost:.2f}")  # at beta = 0.6 and gamma = 0.5
        1.70

        Passes over the model are counted: a forward is 1, a backward 2 (1 for the gradients of the inputs of each
        layer, 1 for those of the weights), so that the base optimizer's step is 3. ESAM at beta = 0.6 and gamma = 0.5
        makes 3 + beta + 3 gamma = 5.1 of them: 1.7. The shares of the batch are taken as they are set, before they are
        rounded to samples. ``step(closure)``, which computes all gradients twice, costs 2 instead.
        """
        return relative_cost(self._phases)

    # -- what torch's optimizers have ----------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base optimizer's own groups."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The base optimizer's own state."""
        return self.base_optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base_optimizer.state = value

    def __getattr__(self, name: str) -> Any:
        """What the base optimizer has beside torch's own methods: ``train`` and ``eval`` of a schedule-free one."""
        if name.startswith("_") or "base_optimizer" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.base_optimizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse to set a hyperparameter that is no attribute.

        Raises:
            AttributeError: each group has its own, or it is chosen when the optimizer is built.
        """
        if name in _OF_GROUPS:
            raise AttributeError(f'each group has its own {name}: set optimizer.param_groups[0]["{name}"]')
        if name in _CHOSEN_ONCE:
            raise AttributeError(f"{name} is chosen when the optimizer is built, and cannot be set afterwards")
        super().__setattr__(name, value)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, or set them to 0, as any torch optimizer does.

        ``step(closure)`` takes gradients of 0 that this has set for old ones, not for those of a first pass.
        """
        self._follow()
        with hooks.label(self, "zero_grad"):
            if set_to_none:
                self._phases.drop_gradients()
            else:
                self.base_optimizer.zero_grad(set_to_none=False)
                self._phases.note_zeroed()

    def _follow(self) -> None:
        """Take over parameters and groups that were put into the base optimizer's groups behind this one's back."""
        if self._phases.weights.is_open:
            return
        lacking = [group for group in self.param_groups if "rho" not in group or "adaptive" not in group]
        missing = [group_defaults(group, self.defaults["rho"], self.defaults["adaptive"]) for group in lacking]
        if not self._perturbation.parameters.are_those_of(self.param_groups):
            self._take_over()
        for group, values in zip(lacking, missing):
            group.update(values)

    def _take_over(self) -> None:
        """Perturb the parameters that are in the groups now. Where that is refused, nothing is changed."""
        check_options(self.base_optimizer)
        self._perturbation.ascent.check(self.base_optimizer)
        parallelism = distributed.Parallelism(self._model)
        parallelism.check(listed(self.param_groups))
        are_old = self._phases.marks.are_all(self._perturbation.params)
        self._perturbation.follow()
        self._parallelism = parallelism
        self._phases.follow(parallelism, are_old)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer, as for any torch optimizer.

        >>> optimizer.add_param_group({"params": new_layer.parameters(), "rho": 0.0})  # trained, not perturbed

        Raises:
            RuntimeError: between ``first_step`` and ``second_step``.
            ValueError, TypeError: parameters that cannot be perturbed. Nothing is changed then.
        """
        self._phases.require(perturbed=False, call="add_param_group")
        missing = group_defaults(param_group, self.defaults["rho"], self.defaults["adaptive"])
        self.base_optimizer.add_param_group({**param_group, **missing})
        try:
            self._follow()
        except BaseException:
            del self.param_groups[-1]
            raise
        state.note(self._perturbation)

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """The base optimizer's ``state_dict``, with version, seed, step and hyperparameters under "esam".

        With ascent="previous" the state of each parameter holds its last gradient too, as "previous_gradient".

        Raises:
            RuntimeError: between ``first_step`` and ``second_step``, where a checkpoint would hold perturbed weights.
        """
        return hooks.saved_between_hooks(self, self._saved)

    def _saved(self) -> dict[str, Any]:
        self._phases.require(perturbed=False, call="state_dict")
        self._follow()
        return state.state_dict(self._perturbation)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned, or the state of a plain torch optimizer of the base's kind.

        Checkpoints of the common two-step SAM class and of the released ESAM code hold nothing of the base optimizer's
        state: what they hold instead is dropped, and one warning says so.

        Raises:
            RuntimeError: between ``first_step`` and ``second_step``.
            ValueError: no state of an optimizer, or one of another kind than the base, groups of other sizes,
                hyperparameters out of range, entries that a newer version has written, or a checkpoint of another
                ascent. Nothing is changed then.
        """
        self._phases.require(perturbed=False, call="load_state_dict")
        hooks.load_between_hooks(self, state_dict, self._load)

    def _load(self, saved: dict[str, Any]) -> None:
        self._follow()
        state.load(self._perturbation, saved)

    def __getstate__(self) -> dict[str, Any]:
        self._phases.require(perturbed=False, call="copying or pickling")
        phases = {"replays_noise": self._phases.replays_noise, "sync_perturbation": self._phases.sync_perturbation}
        return {**{name: self.__dict__[name] for name in _COPIED}, "_phases": phases}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        phases = state.pop("_phases")
        super().__setstate__(state)
        self._begin(**phases)

    # -- the phases ----------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor) -> None:
        """Pass 1: the gradients of ``loss``, of the parameters that are drawn for this step and of no others.

        >>> loss_before = losses(inputs, targets)
        >>> optimizer.backward(loss_before.mean())

        Parameters in groups with rho = 0 take no part in the perturbation: theirs are not computed either. With
        ``fully_shard`` the gradients of all are computed, and only the perturbation leaves the others out.

        Args:
            loss: one number, the mean loss of the batch.

        Raises:
            RuntimeError: between ``first_step`` and ``second_step``; outside ``no_sync`` of a model that is wrapped in
                DistributedDataParallel, which would wait for the gradients that are not computed; or with reentrant
                checkpointing in the graph, unless all parameters are drawn.
            ValueError: a loss that is not one number.
        """
        self._follow()
        self._phases.backward(loss)

    def first_step(self, zero_grad: bool = False) -> None:
        """w -> w + e, from the gradients in ``.grad``. Freezes the BatchNorm statistics of ``model``.

        >>> optimizer.first_step(zero_grad=True)

        If the gradient's norm is zero or not finite, e = 0; that is decided on the device. With ascent="previous" or
        "momentum" this comes before the only forward, and freezes nothing.

        Args:
            zero_grad: drop the gradients (set them to None). The old weights may then be kept in their memory.

        Raises:
            RuntimeError: a second ``first_step`` without ``second_step`` or ``restore``, no gradients, or sparse ones.
            ValueError: a group's rho that is negative or not finite. Nothing is changed then.
        """
        self._follow()
        self._phases.first_step(zero_grad)

    @overload
    def select(self, loss_before: Tensor, loss_after: Tensor | None, tensor: _T, /) -> _T: ...

    @overload
    def select(self, loss_before: Tensor, loss_after: Tensor | None, x: _T1, y: _T2, /) -> tuple[_T1, _T2]: ...

    @overload
    def select(self, loss_before: Tensor, loss_after: Tensor | None, *tensors: Any) -> tuple[Any, ...]: ...

    def select(self, loss_before: Tensor, loss_after: Tensor | None, *tensors: Any) -> Any:
        """B+: the gamma share of the batch whose losses rise most (Eq. 6). With gamma = 1 the batch itself.

        >>> with torch.no_grad():
        ...     loss_after = losses(inputs, targets)
        >>> chosen = optimizer.select(loss_before, loss_after, inputs, targets)

        Args:
            loss_before: the loss of each sample at w, floating point, shape (b,).
            loss_after: the loss of each sample at w + e, shape (b,); None with a ranking other than "rise".
            tensors: the batch: tensors whose first dimension counts the samples, or dicts, lists and tuples of such.

        Returns:
            The selected samples of ``tensors``, k = max(1, round(gamma b)) of each, as :func:`esam_kernels.gather`
            returns them.

        Raises:
            ValueError: losses that are not one number a sample, or sizes that differ.
        """
        return self._phases.select(loss_before, loss_after, *tensors)

    def select_from_logits(
        self,
        loss_before: Tensor,
        logits_after: Tensor,
        target: Tensor,
        *tensors: Any,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        class_dim: int | None = None,
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
            class_dim: as of ``loss_before``.

        Returns:
            The selected samples of ``tensors``, as :func:`esam_kernels.gather` returns them.

        Raises:
            ValueError: losses that are not one number a sample, logits and target that do not fit, label_smoothing
                outside [0, 1], or sizes that differ.
            IndexError: a class index out of range, on the CPU. On other devices such a sample's loss is NaN.
        """
        return self._phases.select_from_logits(
            loss_before,
            logits_after,
            target,
            *tensors,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            class_dim=class_dim,
        )

    @hooks.around_step
    def second_step(self, zero_grad: bool = False) -> None:
        """w + e -> w, then the base optimizer's update with the gradients in ``.grad``.

        >>> losses(*chosen).mean().backward()
        >>> optimizer.second_step(zero_grad=True)

        Args:
            zero_grad: drop the gradients afterwards (set them to None).

        Raises:
            RuntimeError: no ``first_step`` before, sparse gradients, or parameters that have another dtype, device,
                shape or strides since. The weights are still perturbed then.
        """
        self._phases.require(perturbed=True, call="second_step")
        self._phases.second_step()
        self._opt_called = True  # what torch's LR schedulers look at to warn about a missing step()
        if zero_grad:
            self._phases.drop_gradients()

    def restore(self) -> None:
        """w + e -> w with no update: the step is given up. Without a ``first_step`` before, nothing happens.

        The next ``first_step`` draws anew, as after ``second_step``.

        Raises:
            RuntimeError: parameters have another dtype, device, shape or strides since. The old weights are kept:
                change the parameters back, and call this again.
        """
        self._phases.restore()

    # -- the whole step ------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> Any: ...

    @overload
    def step(
        self,
        losses: Callable[..., Tensor],
        first: Any,
        /,
        *batch: Any,
        micro_batch: int | None = None,
        max_grad_norm: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Tensor: ...

    @overload
    def step(
        self,
        losses: Callable[..., tuple[Any, ...]],
        first: Any,
        /,
        *batch: Any,
        micro_batch: int | None = None,
        max_grad_norm: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> tuple[Tensor, Any]: ...

    @overload
    def step(
        self,
        closure: Callable[[], _T],
        *,
        first_gradients: bool | None = None,
    ) -> _T: ...

    @hooks.around_step
    def step(  # type: ignore[override]
        self,
        closure: Callable[..., Any] | None = None,
        *batch: Any,
        micro_batch: int | None = None,
        max_grad_norm: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
        first_gradients: bool | None = None,
    ) -> Any:
        """One whole step.

        >>> loss = optimizer.step(losses, inputs, targets)

        **step(losses, *batch)** is Algorithm 1. ``losses(*batch)`` returns one loss for each sample, shape (b,). It is
        called on the batch, again on it under ``no_grad`` with the weights perturbed (with ranking="rise" and gamma < 1
        only), and on B+; with an ascent_share below 1 on that part of the batch, then on the whole. It may return a
        tuple, (losses, anything else). Gradients that are there before are dropped; those of the last pass stay in
        ``.grad``. The exception is ascent="previous", which keeps them for the next step: ``.grad`` is None then,
        unless something else holds the gradient.

        **step(closure)** takes a function without arguments that computes loss and gradients, as torch's optimizers do,
        and calls it before and after the perturbation. If new gradients are there already (the convention of the common
        two-step SAM class), it is called after it only, unless it sets the gradients to zero itself.
        ``first_gradients`` says which of the two is meant. Each call computes all gradients of the whole batch, so the
        step costs what SAM's does, whatever beta and gamma are.

        **step()** after ``first_step`` is ``second_step``: that is how the loops of frameworks end a step, and how
        ``GradScaler.step(optimizer)`` does, which restores the weights where it skips the update. A closure, if one is
        given, is called first. ``step()`` where the learning rate of every group is 0 is the base optimizer's alone: so
        does torch.distributed.checkpoint create its state.

        If the closure raises, the weights are restored first, and the next step draws the same as this one. With
        ascent="previous" the gradient of the step before is used up by then: the next step is the base optimizer's.

        Args:
            closure: see above.
            batch: tensors whose first dimension counts the samples, or dicts, lists and tuples of such. Numbers,
                strings and None inside them, also lists of these, are handed on whole, whatever part of the batch a
                pass takes.
            micro_batch: at most so many samples at a time, each part with its own perturbation and its own B+
                (m-sharpness); the gradients of the second passes add up to that of the mean over all B+.
            max_grad_norm: clip the norm of the second gradient, as ``torch.nn.utils.clip_grad_norm_`` does; above 0.
            scaler: scales the losses, and takes the base optimizer's step or skips it where a gradient of either pass
                is not finite. ``scaler.update()`` remains the caller's. The first gradient needs no unscaling: e does
                not depend on its length.
            first_gradients: of ``step(closure)``: True, the gradients that are there are those of pass 1, and the
                closure is called once, at w + e; False, they are dropped, and it is called twice. None: found out from
                the gradients that are new since the last step, and from what the closure does to them.

        Returns:
            The mean loss at w, detached, and what else the closure returned for it, (loss, rest), if it returned more
            (with ``micro_batch``: a list of one for each part). With an ascent_share below 1, or another ascent than
            "current", both are those of the pass at w + e, which sees the whole batch. For ``step(closure)`` what the
            closure returned first.

        Raises:
            RuntimeError: no closure, or within another step.
            ValueError: an empty batch, samples of different number, losses that are not one number a sample, or a
                max_grad_norm that is not above 0.

        """
        self._follow()
        scaling = (self.grad_scale, self.found_inf) if "found_inf" in self.__dict__ else None
        result = self._whole.run(closure, batch, scaling, micro_batch, max_grad_norm, scaler, first_gradients)
        self._opt_called = True
        return result

    def _is_skipped_by_scaler(self) -> bool:
        """Within ``GradScaler.step``: whether it skips the update. The weights are restored then."""
        return self._whole.is_skipped(self.found_inf)


class SAM(ESAM):
    """Sharpness-Aware Minimization (Foret et al., 2021): ESAM with beta = gamma = 1.

    >>> optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05, model=model)
    >>> losses(inputs, targets).mean().backward()
    >>> optimizer.first_step(zero_grad=True)
    >>> losses(inputs, targets).mean().backward()
    >>> optimizer.second_step(zero_grad=True)

    Takes the place of the common two-step SAM class: the same constructor, ``first_step``, ``second_step`` and
    ``step(closure)``.

    Args:
        params: parameters or parameter groups.
        base_optimizer: a torch optimizer class, or an instance over the same parameters.
        rho: radius of the perturbation, >= 0; without one, as for ESAM.
        adaptive: T_w = \\|w\\| + eta instead of 1.
        kwargs: the other arguments of :class:`ESAM` (not beta, gamma, ranking, head, mask, radius), and the base
            optimizer's.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: type[Optimizer] | Optimizer,
        rho: float = RHO_OF_ASCENT,
        adaptive: bool = False,
        **kwargs: Any,
    ) -> None:
        fixed = {"beta", "gamma", "ranking", "head", "mask", "radius"} & set(kwargs)
        if fixed:
            raise TypeError(f"SAM has no {', '.join(sorted(fixed))}: use ESAM")
        super().__init__(params, base_optimizer, rho=rho, adaptive=adaptive, beta=1.0, gamma=1.0, **kwargs)
