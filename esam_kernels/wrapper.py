"""What a torch optimizer has, for one that wraps another: groups, state, checkpoints, copies, hyperparameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from esam_kernels.ascent import ASCENTS, CurrentGradient
from esam_kernels.base_optimizer import group_defaults
from esam_kernels.distributed import Parallelism
from esam_kernels.perturbation import StochasticWeightPerturbation
from esam_kernels.selection import check_share
from esam_kernels.tensor_lists import drop_gradients
from esam_kernels.training_modes import RandomState

# What state_dict() holds beside the base optimizer's own state.
_SAVED = ("seed", "step", "beta", "gamma", "mask", "radius", "eta", "eps")
# Under which name the state of a parameter holds its last gradient, with ascent="previous".
_HISTORY = "previous_gradient"
# What a copy takes over.
_COPIED = (
    "base_optimizer",
    "defaults",
    "_perturbation",
    "_model",
    "_parallelism",
    "_gamma",
    "replay_noise",
    "sync_perturbation",
)


def check_gamma(gamma: Any, ascent: CurrentGradient | str) -> None:
    """Refuse a share of the batch that is out of range, or that this ascent cannot choose.

    Raises:
        ValueError: not in (0, 1], or less than 1 with one pass a step.
    """
    check_share("gamma", gamma)
    two_passes = ASCENTS.get(ascent, CurrentGradient).two_passes if isinstance(ascent, str) else ascent.two_passes
    if gamma < 1.0 and not two_passes:
        raise ValueError(
            f"gamma must be 1 with this ascent, got {gamma}: choosing B+ takes the losses before and after the "
            "perturbation, and a step with one pass sees only the latter"
        )


class WrappedOptimizer(Optimizer):
    """The base optimizer's groups and state under this one's name, and beside them what ESAM itself has to keep."""

    base_optimizer: Optimizer
    _perturbation: StochasticWeightPerturbation
    _parallelism: Parallelism
    _model: nn.Module | None

    def _begin(self) -> None:
        """What is neither saved nor copied."""
        self._batch_norm = contextlib.ExitStack()
        self._remember_noise: Callable[[], Any] = self._random_state
        self._ran_backward = False
        self._used_gradients: list[tuple[Tensor, int]] = []

    def _random_state(self) -> RandomState:
        return RandomState(param.device for param in self._perturbation.params[:1])

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base optimizer's own groups."""
        return self.base_optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The base optimizer's own state."""
        return self.base_optimizer.state

    @property
    def beta(self) -> float:
        """Share of the weights that are perturbed; may be set between steps."""
        return self._perturbation.beta

    @beta.setter
    def beta(self, value: float) -> None:
        self._perturbation.beta = check_share("beta", value)

    @property
    def gamma(self) -> float:
        """Share of the batch that the second pass uses; may be set between steps."""
        return self._gamma

    @gamma.setter
    def gamma(self, value: float) -> None:
        check_gamma(value, self._perturbation.ascent)
        self._gamma = float(value)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As for any torch optimizer. Gradients set to 0 are none that ``step(closure)`` would take for new."""
        if set_to_none:
            drop_gradients(self._perturbation.params)
        else:
            super().zero_grad(set_to_none=False)
            self._remember_used_gradients()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer, as for any torch optimizer.

        Raises:
            RuntimeError: between ``first_step`` and ``second_step``.
            ValueError, TypeError: parameters that cannot be perturbed. Nothing is changed then.
        """
        self._require(perturbed=False, call="add_param_group")
        missing = group_defaults(param_group, self.defaults["rho"], self.defaults["adaptive"])
        self.base_optimizer.add_param_group({**param_group, **missing})
        try:
            self._parallelism.check(list(self.param_groups[-1]["params"]))
            self._perturbation.track(self.param_groups)
        except BaseException:
            del self.param_groups[-1]
            raise
        self._note_saved()

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """The base optimizer's ``state_dict``, with seed, step and hyperparameters under "esam".

        With ascent="previous" the state of each parameter holds its last gradient too, as "previous_gradient".

        Raises:
            RuntimeError: between ``first_step`` and ``second_step``, where a checkpoint would hold perturbed weights.
        """
        self._require(perturbed=False, call="state_dict")
        saved = self._note_saved()
        state_dict = self.base_optimizer.state_dict()
        for number, last in self._perturbation.ascent.state().items():
            state_dict["state"][number] = {**state_dict["state"].get(number, {}), _HISTORY: last}
        return {**state_dict, "esam": saved}

    def _note_saved(self) -> dict[str, Any]:
        """What is saved under "esam", noted in every group too: torch.distributed.checkpoint keeps nothing else."""
        perturbation = self._perturbation
        saved = {name: self._gamma if name == "gamma" else getattr(perturbation, name) for name in _SAVED}
        for group in self.param_groups:
            group["esam"] = dict(saved)
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned, or the state of a plain torch optimizer of the base's kind.

        Raises:
            RuntimeError: between ``first_step`` and ``second_step``.
            ValueError: groups of other sizes, or hyperparameters out of range. Nothing is changed then.
        """
        self._require(perturbed=False, call="load_state_dict")
        noted = [group["esam"] for group in state_dict["param_groups"] if "esam" in group]
        saved = dict(state_dict.get("esam", noted[0] if noted else {}))
        state, history = _without_history(state_dict)
        unknown = set(saved) - set(_SAVED)
        if unknown:
            raise ValueError(f"the state holds unknown ESAM entries: {sorted(unknown)}")
        if "gamma" in saved:
            check_gamma(saved["gamma"], self._perturbation.ascent)
        self._perturbation.check({name: value for name, value in saved.items() if name != "gamma"})
        for group in state_dict["param_groups"]:
            group_defaults(group, 0.0, False)
        own = [{name: group[name] for name in ("rho", "adaptive")} for group in self.param_groups]
        plain = {key: value for key, value in state_dict.items() if key != "esam"}
        self.base_optimizer.load_state_dict({**plain, "state": state})
        for group, values in zip(self.param_groups, own):
            for name, value in values.items():
                group.setdefault(name, value)
        for name, value in saved.items():
            setattr(self if name == "gamma" else self._perturbation, name, value)
        self._perturbation.use_groups(self.param_groups)
        self._perturbation.ascent.load(history, self._perturbation.params)
        self._note_saved()

    def __getstate__(self) -> dict[str, Any]:
        self._require(perturbed=False, call="copying or pickling")
        return {name: self.__dict__[name] for name in _COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin()

    def _require(self, *, perturbed: bool, call: str) -> None:
        if self._perturbation.is_perturbed and not perturbed:
            raise RuntimeError(f"{call} while the weights are perturbed: second_step() or restore() has to come first")
        if perturbed and not self._perturbation.is_perturbed:
            raise RuntimeError(f"{call} without first_step: the weights are not perturbed")

    def _remember_used_gradients(self) -> None:
        first = self._first_gradient()
        self._used_gradients = [] if first is None else [(first, first._version)]

    def _first_gradient(self) -> Tensor | None:
        return next((param.grad for param in self._perturbation.params if param.grad is not None), None)

    def _has_new_gradients(self) -> bool:
        """Whether somebody has computed gradients since the last step left its own behind."""
        first = self._first_gradient()
        if first is None:
            return False
        return not any(first is grad and first._version == version for grad, version in self._used_gradients)


def _without_history(state_dict: dict[str, Any]) -> tuple[dict[Any, Any], dict[int, Tensor]]:
    """The base optimizer's part of the state, and the last gradients by the number of the parameter."""
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    states = state_dict["state"]
    history = {number: states[key][_HISTORY] for number, key in enumerate(keys) if _HISTORY in states.get(key, {})}
    if not history:
        return states, {}
    plain = {
        key: {name: value for name, value in values.items() if name != _HISTORY} if isinstance(values, dict) else values
        for key, values in states.items()
    }
    return {key: values for key, values in plain.items() if values}, history
