"""The base optimizer: built or taken over, with rho and adaptive in each of its groups."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.nn import ParameterList
from torch.optim import LBFGS, Adadelta, Optimizer, SparseAdam

from esam_kernels.settings import check_rho

# The groups of each base optimizer, each with what fill has put there.
_filled: weakref.WeakKeyDictionary[Optimizer, list[tuple[dict[str, Any], dict[str, Any]]]] = weakref.WeakKeyDictionary()


def build_base(
    params: Any, base: type[Optimizer] | Optimizer, kwargs: dict[str, Any]
) -> tuple[Optimizer, list[dict[str, Any]]]:
    """The base optimizer, and for each of its groups the rho and adaptive that ``params`` gives it."""
    kind = base if inspect.isclass(base) else type(base)
    if not issubclass(kind, Optimizer) or hasattr(kind, "first_step"):  # another two-step optimizer, this one included
        raise TypeError(f"base_optimizer must be a torch optimizer, a class or an instance, got {base!r}")
    if issubclass(kind, LBFGS):
        raise TypeError("LBFGS cannot be the base optimizer: its step evaluates the loss several times by itself")
    if issubclass(kind, Adadelta):
        raise TypeError("Adadelta cannot be the base optimizer: its own hyperparameter is called rho as well")
    if issubclass(kind, SparseAdam):
        raise TypeError(
            "SparseAdam cannot be the base optimizer: it takes sparse gradients, which cannot be perturbed along"
        )
    if callable(params) and not isinstance(params, ParameterList):
        raise TypeError(f"params must be parameters, as model.parameters() returns them, got {type(params).__name__}")
    _check_names(kind, kwargs)
    if not isinstance(base, Optimizer):
        built = base(params, **kwargs)
        check_options(built)
        return built, [{} for _ in built.param_groups]
    check_options(base)
    if kwargs:
        raise TypeError(
            f"the base optimizer is an instance already: set {', '.join(kwargs)} where it is built, or pass its class"
        )
    return base, _values_by_group(params, base)


def check_options(base: Optimizer) -> None:
    """Refuse options of the base optimizer that cannot be honoured.

    Raises:
        ValueError: ``differentiable=True``.
    """
    if base.defaults.get("differentiable") or any(group.get("differentiable") for group in base.param_groups):
        raise ValueError(
            "differentiable=True is not supported: a step perturbs and restores the weights in place, which autograd "
            "cannot differentiate"
        )


def _check_names(kind: type[Optimizer], kwargs: dict[str, Any]) -> None:
    """Refuse arguments that neither ESAM nor a base optimizer of this kind has."""
    # A decorator of the constructor may take more than what it wraps.
    known = inspect.signature(kind, follow_wrapped=False).parameters
    unknown = [name for name in kwargs if name not in known]
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        raise TypeError(f"neither ESAM nor {kind.__name__} has an argument {', '.join(unknown)}")


def keep_radii(base: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
    """A hook for ``base.load_state_dict``: groups that a plain optimizer saved keep the rho and adaptive they have.

    So do groups that were saved without a schedule keep what a schedule has noted in them.
    """
    groups = state_dict["param_groups"]
    if len(groups) != len(base.param_groups):
        return None
    names = ("rho", "adaptive", "initial_rho", "rho_over_lr")
    own = [{name: group[name] for name in names if name in group} for group in base.param_groups]
    return {**state_dict, "param_groups": [{**values, **group} for values, group in zip(own, groups)]}


def _values_by_group(params: Any, base: Optimizer) -> list[dict[str, Any]]:
    """Check that an instance is over ``params``; the rho and adaptive that these give to its groups."""
    given = [params] if isinstance(params, Tensor) else list(params)
    groups: list[Any] = given if given and isinstance(given[0], dict) else [{"params": given}]
    listed = [_tensors(group["params"]) for group in groups]
    held = [list(group["params"]) for group in base.param_groups]
    if {id(p) for group in listed for p in group} != {id(p) for group in held for p in group}:
        raise ValueError(
            "base_optimizer holds other parameters than params: build it over the same ones, or pass its class"
        )
    special = [{name: group[name] for name in ("rho", "adaptive") if name in group} for group in groups]
    if not any(special):
        return [{} for _ in held]
    if [[id(p) for p in group] for group in listed] != [[id(p) for p in group] for group in held]:
        raise ValueError(
            "params sets rho or adaptive by group, but its groups are not those of base_optimizer: build both over the "
            "same groups, or pass the class of the base optimizer"
        )
    return special


def _tensors(params: Any) -> list[Tensor]:
    """The tensors of a group, which may be one tensor or carry names."""
    if isinstance(params, Tensor):
        return [params]
    listed: Iterable[Any] = list(params)
    return [param[1] if isinstance(param, tuple) else param for param in listed]


def without_filled(base: Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    """A copy of the group without what :func:`fill` has put there: it was an argument of an earlier wrapper."""
    filled = [values for known, values in _filled.get(base, ()) if known is group]
    return {
        name: value
        for name, value in group.items()
        if not any(name in values and values[name] == value for values in filled)
    }


def fill(base: Optimizer, values: list[dict[str, Any]]) -> None:
    """Put into each group of ``base`` what it lacks."""
    for group, its_values in zip(base.param_groups, values):
        group.update(its_values)
    _filled[base] = list(zip(base.param_groups, values))


def group_defaults(group: dict[str, Any], rho: float, adaptive: bool) -> dict[str, Any]:
    """What a group lacks of rho and adaptive, both checked."""
    values = {"rho": group.get("rho", rho), "adaptive": group.get("adaptive", adaptive)}
    check_rho(values["rho"])
    if not isinstance(values["adaptive"], bool):
        raise TypeError(f"adaptive must be True or False, got {values['adaptive']!r}")
    return {name: value for name, value in values.items() if name not in group}
