"""Stochastic Weight Perturbation (section 2.2): draw, norm, perturb, restore."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from esam_kernels import distributed, ops
from esam_kernels.ascent import ASCENTS
from esam_kernels.backends import reference, resolve
from esam_kernels.device_numbers import DeviceNumbers, is_capturing
from esam_kernels.flat_buffer import FlatBuffers, is_dense, owners, why_not_all_flattenable, why_not_flattenable
from esam_kernels.fused_update import check_rates, plan_update, restore_and_step
from esam_kernels.selection import check_share
from esam_kernels.tensor_lists import are_alike, are_plainly_alike, gradients, trained

MASKS = ("tensor", "element")
RADII = ("paper", "released")
_CHOICES = {"ascent": tuple(ASCENTS), "mask": MASKS, "radius": RADII}

# Draws of whole tensors count in a part of the Philox space that no element index reaches.
_TENSOR_STREAM = 1 << 62
# Steps drawn for at once: the generator's cost in Python, divided by this.
_STEPS_PER_DRAW = 64
_OFFSET_STEP = 4


class StochasticWeightPerturbation:
    """e = (rho / beta) m T(w)^2 g / (||T(w) g|| + eps), added to the weights and taken back (Eq. 4 and 5).

    Args:
        param_groups: the base optimizer's groups; each has its own ``rho`` and ``adaptive``, read at every step.
        mask: "tensor" draws whole parameter tensors, "element" single weights.
        ascent: what e goes along: "current", "previous" or "momentum" (see :mod:`esam_kernels.ascent`).
        radius: "paper" estimates the full gradient's norm from that of the drawn tensors, ||m g|| / sqrt(beta);
            "released" takes ||m g|| itself, so that ||e|| = rho / beta.
        flatten: whether the parameters are moved into flat buffers; None: where that is possible.
    """

    def __init__(
        self,
        param_groups: Sequence[dict[str, Any]],
        *,
        beta: float,
        eta: float,
        mask: str,
        radius: str,
        eps: float,
        seed: int,
        ascent: str,
        backend: str | None,
        flatten: bool | None,
    ) -> None:
        self.check(
            {"beta": beta, "eta": eta, "mask": mask, "radius": radius, "eps": eps, "seed": seed, "ascent": ascent}
        )
        self.beta = float(beta)
        self.ascent = ASCENTS[ascent]()
        self.eta, self.mask, self.radius, self.eps, self.seed = eta, mask, radius, eps, seed
        self.step = 0
        self.backend = backend or ""
        self.flatten = flatten
        # Set by a captured step: draws of whole tensors repeat after so many steps.
        self.draw_pool: int | None = None
        # Set by a captured step: the learning rate of each group, to be read on the device.
        self.lr_tensors: list[Tensor] | None = None
        self.track(param_groups)

    @staticmethod
    def check(values: dict[str, Any]) -> None:
        """Refuse hyperparameters, by name, that are out of range.

        Raises:
            ValueError: with the name, what is allowed, and the value.
        """
        for name, value in values.items():
            if name == "beta":
                check_share(name, value)
            elif name in _CHOICES:
                if value not in _CHOICES[name]:
                    raise ValueError(f"{name} must be one of {_CHOICES[name]}, got {value!r}")
            elif name == "flatten":
                if not (value is None or isinstance(value, bool)):
                    raise ValueError(f"flatten must be True, False or None, got {value!r}")
            elif name in ("seed", "step"):
                if not (isinstance(value, int) and 0 <= value < 2**63):
                    raise ValueError(f"{name} must be an integer in [0, 2^63), got {value!r}")
            elif not (isinstance(value, Real) and math.isfinite(value) and float(value) >= 0.0):
                raise ValueError(f"{name} must be finite and not negative, got {value!r}")

    def track(self, param_groups: Sequence[dict[str, Any]]) -> None:
        """Take over the parameters of these groups, and flatten them.

        Raises:
            ValueError: parameters that are complex, on the meta device, not dense or partly shared, or that cannot be
                flattened though ``flatten`` is True.
            RuntimeError: the backend that was asked for is not available.
        """
        params = [param for group in param_groups for param in group["params"]]
        for i, param in enumerate(params):
            if param.is_complex():
                raise ValueError(f"parameter {i} is complex ({param.dtype}): only real parameters can be perturbed")
            if param.is_meta:
                raise ValueError(f"parameter {i} is on the meta device, without values: give the model memory first")
            if param.layout is not torch.strided or not is_dense(param):
                raise ValueError(f"parameter {i} (shape {tuple(param.shape)}) is not dense: make it contiguous")
            resolve(self.backend, param.device)
        owners([distributed.local_part(param) for param in params])
        reason = why_not_flattenable(params)
        if self.flatten and (why := why_not_all_flattenable(params)) is not None:
            raise ValueError(f"flatten=True is not possible: {why}")
        self._param_groups = param_groups
        self.params: list[Tensor] = params
        self._groups = [number for number, group in enumerate(param_groups) for _ in group["params"]]
        self._find_ties()
        self._offsets = _element_offsets(params)
        self.is_sharded = any(distributed.is_sharded(param) for param in params)
        self._buffers = FlatBuffers(params) if self.flatten is not False and reason is None else None
        self._scale = DeviceNumbers(torch.float64)
        self._random_state = DeviceNumbers(torch.int64)
        self._words: dict[tuple[int, int], list[int]] = {}
        self.is_perturbed = False
        self.sum_of_squares: Tensor | None = None
        self._perturbed: list[Tensor] = []
        self._backups: list[Tensor] = []

    def _find_ties(self) -> None:
        self._tied_to = owners([distributed.local_part(param) for param in self.params])
        self._is_tied = self._tied_to != list(range(len(self.params)))

    def use_groups(self, param_groups: Sequence[dict[str, Any]]) -> None:
        """Read rho and adaptive from these groups from now on; their parameters are the same."""
        self._param_groups = param_groups

    @property
    def is_flattened(self) -> bool:
        """Whether the parameters live in flat buffers."""
        return self._buffers is not None

    @property
    def _operators(self) -> ModuleType:
        return distributed if self.is_sharded else ops

    # -- m: which weights are perturbed --------------------------------------------------------------------------------

    @property
    def _bound(self) -> int:
        """A 32-bit word up to this one is a success of Bern(beta)."""
        return max(1, round(self.beta * 2**32)) - 1

    @property
    def draws_elements(self) -> bool:
        """Whether single weights are drawn (Eq. 5)."""
        return self.mask == "element" and self.beta < 1.0

    def trained(self) -> list[int]:
        """The parameters that train, by number."""
        return trained(self.params)

    def drawn(self) -> list[int]:
        """The parameters that take part in this step, by number: all that train, or those that SWP drew of them.

        Each tensor is drawn with probability beta, from the seed, the step and its own number alone. Where none is, the
        one that came nearest is taken.
        """
        trainable = self.trained()
        if self.mask == "element" or self.beta == 1.0:
            return trainable
        words, bound = self._tensor_words(), self._bound
        chosen = [i for i in trainable if words[self._tied_to[i]] <= bound]
        if trainable and not chosen:
            nearest = min((words[self._tied_to[i]], self._tied_to[i]) for i in trainable)[1]
            chosen = [i for i in trainable if self._tied_to[i] == nearest]
        return chosen

    def _tensor_words(self) -> list[int]:
        """One random 32-bit word for each parameter, for the current step."""
        step = self.step % self.draw_pool if self.draw_pool else self.step
        if (self.seed, step) not in self._words:
            steps = torch.arange(step, step + _STEPS_PER_DRAW, device="cpu")
            counters = torch.arange(-(-len(self.params) // 4), device="cpu") + _TENSOR_STREAM
            words = torch.stack(reference.philox(counters[None, :], steps[:, None], self.seed), dim=-1)
            self._words = {(self.seed, each): row for each, row in zip(steps.tolist(), words.flatten(1).tolist())}
        return self._words[self.seed, step]

    # -- w -> w + e ----------------------------------------------------------------------------------------------------

    def perturb(
        self,
        base: Optimizer,
        gradients_are_dropped: bool,
        may_lack_gradients: bool = False,
        average_over: Any = None,
    ) -> None:
        """Add e to the weights that are drawn, along the gradients in ``.grad`` or what else the ascent goes along.

        Args:
            base: the base optimizer, whose momentum it may be.
            gradients_are_dropped: the caller drops the gradients after this. Where nobody else holds one, the old
                weights are then kept in its memory.
            may_lack_gradients: no gradient at all is no error: none of the drawn parameters has a part in the loss.
            average_over: the process group over whose ranks the gradients of the first of two passes are averaged;
                None: nothing is.

        Raises:
            RuntimeError: no gradients at all, or sparse ones.
            ValueError: a group's rho that is negative or not finite.
        """
        radii = [self.check_rho(group["rho"]) for group in self._param_groups]
        if self._buffers is not None and self._buffers.refresh():
            self._find_ties()
        self.check_gradients(may_lack_gradients or not self.ascent.two_passes)
        if average_over is not None and self.ascent.two_passes:
            distributed.average_gradients([self.params[i] for i in self.drawn()], average_over)
        indices, grads = self._directions(base)
        if not grads or not any(radii):
            self.is_perturbed = True
            return
        if not is_capturing():
            self.upload()
        params = [self.params[i] for i in indices]
        groups = [self._groups[i] for i in indices]
        adaptive = [bool(group["adaptive"]) for group in self._param_groups]
        partials = self._operators.norm_partials(params, grads, groups, adaptive, self.eta, backend=self.backend)
        free = self.ascent.are_free(grads, gradients_are_dropped) if not self.is_sharded else [False] * len(grads)
        backups = [grad if ours else torch.empty_like(param) for grad, ours, param in zip(grads, free, params)]
        for ours in (True, False):
            chosen = [j for j, is_free in enumerate(free) if is_free is ours]
            if chosen:
                self._operators.perturb_(
                    [params[j] for j in chosen],
                    [grads[j] for j in chosen],
                    [] if ours else [backups[j] for j in chosen],
                    [groups[j] for j in chosen],
                    [self._offsets[indices[j]] for j in chosen],
                    partials,
                    self._scale.tensor,
                    adaptive,
                    self.eta,
                    self._norm_factor,
                    self.eps,
                    self._random_state.tensor if self.draws_elements else None,
                    backend=self.backend,
                )
        self._perturbed, self._backups, self.sum_of_squares = params, backups, partials
        self.is_perturbed = True

    def upload(self) -> None:
        """Bring up to date what the kernels read on the device: rho / beta of each group; the random state, if any."""
        device = self.params[0].device
        self._scale.set([self.ascent.sign * group["rho"] / self.beta for group in self._param_groups], device)
        if self.draws_elements:
            self._random_state.set([self.seed, self.step, self._bound], device)

    @staticmethod
    def check_rho(rho: Any) -> float:
        """A group's radius.

        Raises:
            ValueError: negative or not finite.
        """
        if not (isinstance(rho, Real) and math.isfinite(rho) and float(rho) >= 0.0):
            raise ValueError(f"rho must be finite and not negative, got {rho!r}")
        return float(rho)

    @property
    def _norm_factor(self) -> float:
        estimated = self.mask == "tensor" and self.radius == "paper"
        return 1.0 / math.sqrt(self.beta) if estimated else 1.0

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
                raise RuntimeError(f"parameter {i} has a sparse gradient ({grad.layout}), which is not supported")
        if not may_lack and all(grad is None for grad in grads):
            raise RuntimeError("no parameter has a gradient: call backward before first_step")

    def _directions(self, base: Optimizer) -> tuple[list[int], list[Tensor]]:
        """What the drawn parameters are moved along, and their numbers, lying in memory as the parameters do.

        Those of tied parameters are added up, under the first one's number.
        """
        given = self.ascent.directions(self.params, self.drawn(), base)
        indices, grads = list(given), list(given.values())
        if not self._is_tied and are_plainly_alike(grads, [self.params[i] for i in indices]):  # the usual case
            return indices, grads
        found: dict[int, Tensor] = {}
        for i, grad in given.items():
            param = self.params[i]
            if grad.numel() == 0:
                continue
            if grad.dtype != param.dtype or grad.stride() != param.stride() or grad.requires_grad:
                grad = torch.empty_like(param).copy_(grad.detach())
            owner = self._tied_to[i]
            if owner != i:  # of the same memory, if perhaps of another shape
                grad = grad.as_strided(self.params[owner].size(), self.params[owner].stride())
            found[owner] = found[owner] + grad if owner in found else grad
        return list(found), list(found.values())

    # -- w + e -> w ----------------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Put the old weights back, bit for bit."""
        if self._perturbed:
            self._operators.restore_(self._perturbed, self._backups, backend=self.backend)
        self._finish()

    def restore_and_update(self, base: Optimizer) -> None:
        """Put the old weights back and let the base optimizer take its step, in one pass where that is possible.

        Raises:
            TypeError: a group's lr is neither a number nor a tensor. The weights are still perturbed then.
        """
        check_rates(base)
        fuses = bool(self._perturbed) and not (self._is_tied or self.is_sharded)
        plan = plan_update(base, self.backend, self.params) if fuses else None
        if plan is not None:
            backups = {id(param): backup for param, backup in zip(self._perturbed, self._backups)}
            restore_and_step(base, plan, backups, self._perturbed, self.backend, self.lr_tensors)
            self._finish()
        else:
            self.restore()
            base.step()

    def forget(self) -> None:
        """Drop the saved weights without putting them back."""
        self.is_perturbed = False
        self._perturbed, self._backups, self.sum_of_squares = [], [], None

    def _finish(self) -> None:
        self.forget()
        self.step += 1


def _element_offsets(params: Sequence[Tensor]) -> list[int]:
    """The number of each parameter's first weight in the whole model; parameters begin at whole Philox counters."""
    offsets, position = [], 0
    for param in params:
        offsets.append(position + distributed.first_element(param))
        position += -(-param.numel() // _OFFSET_STEP) * _OFFSET_STEP
    return offsets
