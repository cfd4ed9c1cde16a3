"""Stochastic Weight Perturbation (section 2.2): norm, perturb, restore."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from esam_kernels import backends, distributed, logs, ops
from esam_kernels.device_numbers import DeviceNumbers, is_capturing
from esam_kernels.ops.perturbation import in_memory
from esam_kernels.perturbation.ascent import ASCENTS
from esam_kernels.perturbation.draw import TensorDraw, bound
from esam_kernels.perturbation.fused_update import (
    NotFused,
    Plan,
    check_rates,
    plan_update,
    restore_and_step,
    waits_for_its_rate,
    why_not_fused,
)
from esam_kernels.perturbation.parameters import Parameters
from esam_kernels.settings import Settings, check_rho
from esam_kernels.tensor_lists import are_alike, are_plainly_alike, gradients


class StochasticWeightPerturbation:
    """e = (rho / beta) m T(w)^2 g / (||T(w) g|| + eps), added to the weights and taken back (Eq. 4 and 5).

    Args:
        base: the base optimizer. Its groups, each with its own ``rho`` and ``adaptive``, are read at every step.
        settings: the hyperparameters. Others may be put in their place between steps.
        backend: the name of a backend; None: what the environment names, or the default of the device.
        flatten: whether the parameters are moved into flat buffers; None: where that is possible.

    Raises:
        ValueError, RuntimeError: as :class:`Parameters` raises them.
    """

    def __init__(self, base: Optimizer, settings: Settings, *, backend: str | None, flatten: bool | None) -> None:
        self.base = base
        self.settings = settings
        self.ascent = ASCENTS[settings.ascent]()
        self.step = 0
        self.backend = backends.wanted(backend)
        self.flatten = flatten
        self.draw = TensorDraw()
        # Set by a captured step: the learning rate of each group, to be read on the device.
        self.lr_tensors: list[Tensor] | None = None
        self._begin(Parameters(base.param_groups, self.backend, flatten))

    def _begin(self, parameters: Parameters) -> None:
        self.parameters = parameters
        self._scale = DeviceNumbers(torch.float64)
        self._random_state = DeviceNumbers(torch.int64)
        self.is_perturbed = False
        self.sum_of_squares: Tensor | None = None
        self._perturbed: list[Tensor] = []
        self._backups: list[Tensor] = []

    @property
    def params(self) -> list[Tensor]:
        """All parameters, in the order of the groups."""
        return self.parameters.tensors

    @property
    def is_flattened(self) -> bool:
        """Whether the parameters live in flat buffers."""
        return self.parameters.buffers is not None

    def follow(self) -> bool:
        """Take over what is in the base optimizer's groups now. Returns whether that was something else before.

        Raises:
            ValueError, RuntimeError: as :class:`Parameters` raises them. Nothing is changed then.
        """
        if self.parameters.are_those_of(self.base.param_groups):
            return False
        before = self.params
        self._begin(Parameters(self.base.param_groups, self.backend, self.flatten))
        self.ascent.renumber(before, self.params)
        return True

    def check_parameters(self) -> None:
        """Refuse to finish a step with other parameters than it has perturbed.

        Raises:
            RuntimeError: the groups hold other parameters than at ``first_step``.
        """
        if not self.parameters.are_those_of(self.base.param_groups):
            raise RuntimeError(
                "the parameters in the groups have changed since first_step: change them between steps, or call "
                "restore() first"
            )

    def check_places(self) -> None:
        """Refuse to put the old weights where they do not fit any more.

        Raises:
            RuntimeError: a parameter has another dtype, device, shape or strides than at ``first_step``. Nothing is
                changed then.
        """
        if are_alike(self._backups, self._perturbed):
            return
        for backup, param in zip(self._backups, self._perturbed):
            if not are_alike([backup], [param]):
                i = next(i for i, own in enumerate(self.params) if own is param)
                raise RuntimeError(
                    f"parameter {i} has changed since first_step: it was {in_memory(backup)}, and is "
                    f"{in_memory(param)} now. Change it back, then call restore(), which puts the old weights back: "
                    "convert or move a model between steps"
                )

    @property
    def _operators(self) -> ModuleType:
        return distributed if self.parameters.is_sharded else ops

    # -- m: which weights are perturbed --------------------------------------------------------------------------------

    @property
    def draws_elements(self) -> bool:
        """Whether single weights are drawn (Eq. 5)."""
        return self.settings.mask == "element" and self.settings.beta < 1.0

    @property
    def radii(self) -> list[float]:
        """Each group's rho.

        Raises:
            ValueError: one that is negative or not finite.
        """
        return [check_rho(group["rho"]) for group in self.base.param_groups]

    def trained(self) -> list[int]:
        """The parameters that train, by number."""
        return self.parameters.trained()

    def candidates(self) -> list[int]:
        """The parameters that train and whose group has a radius above 0, by number."""
        radii = self.radii
        if all(radii):
            return self.trained()
        return [i for i in self.trained() if radii[self.parameters.groups[i]] > 0.0]

    def drawn(self) -> list[int]:
        """The parameters that take part in this step, by number: all candidates, or those that SWP drew of them."""
        candidates, settings = self.candidates(), self.settings
        if settings.mask == "element" or settings.beta == 1.0:
            return candidates
        return self.draw.chosen(candidates, self.parameters.tied_to, settings.beta, settings.seed, self.step)

    # -- w -> w + e ----------------------------------------------------------------------------------------------------

    def perturb(self, gradients_are_dropped: bool, may_lack_gradients: bool = False, average_over: Any = None) -> None:
        """Add e to the weights that are drawn, along the gradients in ``.grad`` or what else the ascent goes along.

        Args:
            gradients_are_dropped: the caller drops the gradients after this. Where nobody else holds one, the old
                weights are then kept in its memory.
            may_lack_gradients: no gradient at all is no error: none of the drawn parameters has a part in the loss.
            average_over: the process group over whose ranks the gradients of the first of two passes are averaged;
                None: nothing is.

        Raises:
            RuntimeError: no gradients at all, or sparse ones.
            ValueError: a group's rho that is negative or not finite.
        """
        has_radius = any(self.radii)
        self.parameters.refresh()
        self.check_gradients(may_lack_gradients or not (self.ascent.two_passes and has_radius))
        if not has_radius:
            self.is_perturbed = True
            return
        if average_over is not None and self.ascent.two_passes:
            distributed.average_gradients([self.params[i] for i in self.drawn()], average_over)
        indices, grads = self._directions()
        if not grads:
            self.is_perturbed = True
            return
        if not is_capturing():
            self.upload()
        settings = self.settings
        params = _pick(self.params, indices)
        groups = _pick(self.parameters.groups, indices)
        offsets = _pick(self.parameters.offsets, indices)
        adaptive = [bool(group["adaptive"]) for group in self.base.param_groups]
        partials = self._operators.norm_partials(params, grads, groups, adaptive, settings.eta, backend=self.backend)
        is_sharded = self.parameters.is_sharded
        free = [False] * len(grads) if is_sharded else self.ascent.are_free(grads, gradients_are_dropped)
        backups = [grad if ours else torch.empty_like(param) for grad, ours, param in zip(grads, free, params)]
        self.sum_of_squares = partials
        try:
            for ours in (True, False):
                chosen = [j for j, is_free in enumerate(free) if is_free is ours]
                if chosen:
                    self._operators.perturb_(
                        _pick(params, chosen),
                        _pick(grads, chosen),
                        [] if ours else _pick(backups, chosen),
                        _pick(groups, chosen),
                        _pick(offsets, chosen),
                        partials,
                        self._scale.tensor,
                        adaptive,
                        settings.eta,
                        self._norm_factor,
                        settings.eps,
                        self._random_state.tensor if self.draws_elements else None,
                        backend=self.backend,
                    )
                    self._perturbed += _pick(params, chosen)
                    self._backups += _pick(backups, chosen)
        except BaseException:
            self._put_back()
            self.forget()
            raise
        self.is_perturbed = True

    def upload(self) -> None:
        """Bring up to date what the kernels read on the device: rho / beta of each group; the random state, if any."""
        device, settings = self.params[0].device, self.settings
        scale = [self.ascent.sign(group) * group["rho"] / settings.beta for group in self.base.param_groups]
        self._scale.set(scale, device)
        if self.draws_elements:
            self._random_state.set([settings.seed, self.step, bound(settings.beta)], device)

    def numbers(self) -> list[Tensor]:
        """The tensors that :meth:`upload` writes."""
        return [self._scale.tensor, self._random_state.tensor] if self.draws_elements else [self._scale.tensor]

    @property
    def _norm_factor(self) -> float:
        estimated = self.settings.mask == "tensor" and self.settings.radius == "paper"
        return 1.0 / math.sqrt(self.settings.beta) if estimated else 1.0

    def check_gradients(self, may_lack: bool) -> None:
        """Refuse sparse gradients, and none at all unless they ``may_lack``.

        Raises:
            RuntimeError: with the parameter's number.
        """
        grads = gradients(self.params)
        if are_alike(grads, self.params):  # the usual case: every parameter has a gradient like itself
            return
        for i, grad in enumerate(grads):
            if grad is not None and grad.layout is not torch.strided:
                raise RuntimeError(
                    f"parameter {i} has a sparse gradient ({grad.layout}), which is not supported: leave out "
                    "sparse=True, of nn.Embedding for example"
                )
        if not may_lack and all(grad is None for grad in grads):
            raise RuntimeError("no parameter has a gradient: call backward before first_step")

    def _directions(self) -> tuple[list[int], list[Tensor]]:
        """What the drawn parameters are moved along, and their numbers, lying in memory as the parameters do.

        Those of tied parameters are added up, under the first one's number.
        """
        given = self.ascent.directions(self.params, self.drawn(), self.base)
        indices, grads = list(given), list(given.values())
        usual = not self.parameters.has_ties and are_plainly_alike(grads, _pick(self.params, indices))
        return (indices, grads) if usual else self._aligned(given)

    def _aligned(self, given: dict[int, Tensor]) -> tuple[list[int], list[Tensor]]:
        found: dict[int, Tensor] = {}
        for i, grad in given.items():
            param = self.params[i]
            if grad.numel() == 0:
                continue
            if grad.dtype != param.dtype or grad.stride() != param.stride() or grad.requires_grad:
                grad = torch.empty_like(param).copy_(grad.detach())
            owner = self.parameters.tied_to[i]
            if owner != i:  # of the same memory, if perhaps of another shape
                grad = grad.as_strided(self.params[owner].size(), self.params[owner].stride())
            found[owner] = found[owner] + grad if owner in found else grad
        return list(found), list(found.values())

    # -- w + e -> w ----------------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Put the old weights back, bit for bit."""
        self._put_back()
        self._finish()

    def _put_back(self) -> None:
        if self._perturbed:
            self._operators.restore_(self._perturbed, self._backups, backend=self.backend)

    def restore_and_update(self) -> None:
        """Put the old weights back and let the base optimizer take its step, in one pass where that is possible.

        Raises:
            TypeError: a group's lr is neither a number nor a tensor. The weights are still perturbed then.
        """
        self._restore_and_update()

    def update(self) -> None:
        """The base optimizer's step on weights that are not perturbed.

        Raises:
            TypeError: a group's lr is neither a number nor a tensor. Nothing is changed then.
        """
        if self.lr_tensors is not None or waits_for_its_rate(self.base):
            self._restore_and_update()
            return
        self.base.step()
        self.step += 1

    def _restore_and_update(self) -> None:
        base = self.base
        check_rates(base)
        # Also where nothing is perturbed: the base optimizer's own step would freeze the learning rate in a graph, or
        # wait for it.
        is_captured = self.lr_tensors is not None
        plan = None
        if self._perturbed or is_captured or waits_for_its_rate(base):
            try:
                plan = self._plan_update(align=is_captured)
            except NotFused as reason:
                name = type(base).__name__
                if is_captured:
                    raise RuntimeError(
                        f"the update of {name} cannot be captured, since its learning rate would be frozen in the CUDA "
                        f"graph: {reason}. Call optimizer.step in place of the graphed step"
                    ) from None
                logs.debug_once(f"the update of {name} is not fused into the restore, it takes its own step: {reason}")
        if plan is not None:
            backups = {id(param): backup for param, backup in zip(self._perturbed, self._backups)}
            restore_and_step(base, plan, backups, self._perturbed, self.backend, self.lr_tensors)
            self._finish()
        else:
            self.restore()
            base.step()

    def _plan_update(self, align: bool) -> Plan:
        if reason := self._how_parameters_share():
            raise NotFused(reason)
        return plan_update(self.base, self.backend, self.params, align)

    def _how_parameters_share(self) -> str | None:
        """What keeps an update from being fused that the base optimizer does not know of."""
        if self.parameters.has_ties:
            return "parameters are tied to each other"
        return "parameters are sharded" if self.parameters.is_sharded else None

    def why_not_fused(self) -> str | None:
        """Why the base optimizer's update cannot be part of the restore, whatever the gradients; None if it can."""
        return self._how_parameters_share() or why_not_fused(self.base, self.backend, self.params)

    def forget(self) -> None:
        """Drop the saved weights without putting them back."""
        self.is_perturbed = False
        self._perturbed, self._backups, self.sum_of_squares = [], [], None

    def _finish(self) -> None:
        self.forget()
        self.step += 1


def _pick(values: list[Any], indices: Sequence[int]) -> list[Any]:
    """The values of these numbers, which ascend."""
    return values if len(values) == len(indices) else [values[i] for i in indices]
