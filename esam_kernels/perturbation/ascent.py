"""Where the direction of the perturbation comes from: this batch's gradient, the last one's, or the momentum.

"current" is the paper's algorithm, with two passes a step. "previous" and "momentum" perturb before the only pass, from
what is in memory already: along the gradient of the step before, or against the base optimizer's momentum, which is
where its next update would go.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from esam_kernels.tensor_lists import are_alike, are_unshared, gradients

# The radius of each ascent where none is given: the paper's, and for the others what examples/ascent_study.py says.
DEFAULT_RHO = {"current": 0.05, "previous": 0.05, "momentum": 1.0}
# With adaptive=True the length is relative to the weights: about 3, as the authors of Momentum-SAM take it.
DEFAULT_RHO_ADAPTIVE = {**DEFAULT_RHO, "momentum": 3.0}


class RhoOfAscent(float):
    """What a signature holds for "none given": a number, that of "current", which stands for the ascent's own."""


RHO_OF_ASCENT = RhoOfAscent(DEFAULT_RHO["current"])


def rho_or_default(rho: float, ascent: str, adaptive: bool) -> float:
    """``rho``, or the radius of ``ascent`` where none was given."""
    defaults = DEFAULT_RHO_ADAPTIVE if adaptive else DEFAULT_RHO
    return defaults.get(ascent, rho) if isinstance(rho, RhoOfAscent) else rho


class CurrentGradient:
    """g of this batch, from ``.grad`` (Algorithm 1)."""

    two_passes = True

    def sign(self, group: dict[str, Any]) -> float:
        """Of e along the direction: -1 where the group's base optimizer maximizes, since its worse side is below."""
        return -1.0 if group.get("maximize") else 1.0

    def check(self, base: Optimizer) -> None:
        """Refuse a base optimizer that lacks what this ascent reads; here none."""

    def directions(self, params: list[Tensor], drawn: Sequence[int], base: Optimizer) -> dict[int, Tensor]:
        """The vector g of Eq. 4 for the parameters ``drawn``, by their number. Some may have none."""
        grads = gradients(params)
        return {i: grad for i in drawn if (grad := grads[i]) is not None}

    def are_free(self, directions: list[Tensor], gradients_are_dropped: bool) -> list[bool]:
        """For each direction, whether the old weights may be written over it."""
        return are_unshared(directions) if gradients_are_dropped else [False] * len(directions)

    def remember(self, params: Sequence[Tensor]) -> None:
        """Keep what the next step needs, after the update."""

    def prepare(self, params: Sequence[Tensor]) -> None:
        """Create the state that a checkpoint is loaded into, after a step with a learning rate of 0."""

    def state(self) -> dict[int, Tensor]:
        """What a checkpoint has to hold of it, by the number of the parameter."""
        return {}

    def load(self, state: dict[int, Tensor], params: Sequence[Tensor]) -> None:
        """Take over what ``state`` returned."""

    def put_back(self, state: dict[int, Tensor]) -> None:
        """Have again what :meth:`state` returned, the same tensors: what was done since is to count for nothing."""

    def renumber(self, before: Sequence[Tensor], now: Sequence[Tensor]) -> None:
        """Other parameters are in the groups than before: what is kept by number has new numbers."""


class PreviousGradient(CurrentGradient):
    """g of the step before. Its memory, 4 bytes a weight in float32, is kept between steps and holds w during one."""

    two_passes = False

    def __init__(self) -> None:
        self._history: dict[int, Tensor] = {}
        # Set by a captured step: the history stays in these places, and new gradients are copied there.
        self.in_place = False
        self._places: dict[int, Tensor] = {}

    def directions(self, params: list[Tensor], drawn: Sequence[int], base: Optimizer) -> dict[int, Tensor]:
        """The last gradients of the parameters ``drawn``, which are used up by this. In the first step there are none.

        What the step does not renew is gone, since the old weights are written over it.
        """
        taken = {i: self._history.pop(i) for i in drawn if i in self._history}
        # One of another shape belongs to weights that were pruned since.
        taken = {i: last for i, last in taken.items() if last.shape == params[i].shape}
        for i, last in taken.items():
            if last.device != params[i].device or last.dtype != params[i].dtype:
                taken[i] = last.to(params[i])
        if self.in_place:
            self._places.update(taken)
        return taken

    def are_free(self, directions: list[Tensor], gradients_are_dropped: bool) -> list[bool]:
        """All: the history is nobody else's."""
        return [True] * len(directions)

    def remember(self, params: Sequence[Tensor]) -> None:
        """Take the gradients out of ``.grad``; copy those that somebody else holds."""
        # No name here may hold a gradient beside the list, or it would count as somebody else's.
        indices = [i for i, param in enumerate(params) if param.grad is not None and param.numel()]
        grads = [grad for grad in (params[i].grad for i in indices) if grad is not None]
        free = [False] * len(grads) if self.in_place else are_unshared(grads)
        for j, i in enumerate(indices):
            if free[j] and are_alike([grads[j]], [params[i]]):
                self._history[i] = grads[j]
                params[i].grad = None
            elif i in self._places:
                self._history[i] = self._places[i].copy_(grads[j])
            else:
                self._history[i] = torch.empty_like(params[i]).copy_(grads[j].detach())
                if self.in_place:  # also of what no step has drawn yet
                    self._places[i] = self._history[i]

    def prepare(self, params: Sequence[Tensor]) -> None:
        """A history of zeros, which perturbs nothing, where there is none."""
        if not self._history:
            self.remember(params)

    def state(self) -> dict[int, Tensor]:
        """The last gradient of each parameter."""
        return dict(self._history)

    def load(self, state: dict[int, Tensor], params: Sequence[Tensor]) -> None:
        """Take over copies, on the parameters' devices, but none of another shape: a step drops those as well."""
        fitting = {i: last for i, last in state.items() if last.shape == params[i].shape}
        self._history = {i: torch.empty_like(params[i]).copy_(last) for i, last in fitting.items()}

    def put_back(self, state: dict[int, Tensor]) -> None:
        """The last gradients as they were."""
        self._history = dict(state)

    def renumber(self, before: Sequence[Tensor], now: Sequence[Tensor]) -> None:
        """What belongs to parameters that are gone is dropped."""
        numbers = {id(param): i for i, param in enumerate(now)}
        moved = {i: numbers[id(param)] for i, param in enumerate(before) if id(param) in numbers}
        self._history = {moved[i]: last for i, last in self._history.items() if i in moved}
        self._places = {moved[i]: place for i, place in self._places.items() if i in moved}


class Momentum(CurrentGradient):
    """-v: against SGD's momentum buffer or Adam's first moment. The old weights need memory of their own for a step."""

    two_passes = False

    def sign(self, group: dict[str, Any]) -> float:
        """-1: the base optimizer moves against its momentum, which has the sign of ``maximize`` in it already."""
        return -1.0

    def check(self, base: Optimizer) -> None:
        """Refuse a base optimizer without momentum, and one whose momentum is spread over the ranks.

        Raises:
            ValueError: it keeps none, is set to keep none, or is a ZeroRedundancyOptimizer.
        """
        if _shards_its_state(base):
            raise ValueError(
                'ascent="momentum" needs the momentum of all weights, and with ZeroRedundancyOptimizer each rank keeps '
                'that of its own part: take ascent="previous", or another base optimizer'
            )
        for number, group in enumerate(base.param_groups):
            if _momentum_name(group) is None:
                raise ValueError(
                    f'ascent="momentum" needs a base optimizer with momentum: {type(base).__name__} keeps none in '
                    f"group {number} (SGD and RMSprop do with momentum > 0, and Adam and its kin do)"
                )

    def directions(self, params: list[Tensor], drawn: Sequence[int], base: Optimizer) -> dict[int, Tensor]:
        """The momentum of the parameters ``drawn``. In the first step there is none.

        Raises:
            RuntimeError: the base optimizer keeps its state under other names than those of torch.
        """
        names = {id(param): _momentum_name(group) for group in base.param_groups for param in group["params"]}
        found = {}
        for i in drawn:
            name, state = names[id(params[i])], base.state.get(params[i], {})
            if state and name is not None and name not in state:
                raise RuntimeError(
                    f'ascent="momentum" needs {name!r} in the state of each parameter, as torch.optim keeps it, and '
                    f"{type(base).__name__} keeps {', '.join(map(str, state))}: take another ascent or base optimizer"
                )
            found[i] = state.get(name)
        return {i: momentum for i, momentum in found.items() if momentum is not None}

    def are_free(self, directions: list[Tensor], gradients_are_dropped: bool) -> list[bool]:
        """None: the base optimizer needs them."""
        return [False] * len(directions)


def _shards_its_state(base: Optimizer) -> bool:
    # Not imported here: that takes time, and torch warns of its own deprecated code.
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    return module is not None and isinstance(base, module.ZeroRedundancyOptimizer)


ASCENTS = {"current": CurrentGradient, "previous": PreviousGradient, "momentum": Momentum}


def _momentum_name(group: dict[str, Any]) -> str | None:
    """Under which name the optimizers of torch keep the momentum of a group's parameters."""
    if "betas" in group:
        return "exp_avg"
    return "momentum_buffer" if group.get("momentum", 0.0) != 0.0 else None
