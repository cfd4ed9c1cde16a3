"""Checkpoints: the base optimizer's state in torch's own layout, and beside it what ESAM itself has to keep.

"esam" holds the version of this layout, the hyperparameters, and how many steps were taken. With ascent="previous" the
state of each parameter holds its last gradient too.
"""

from __future__ import annotations

import warnings
from dataclasses import fields, replace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from esam_kernels.base_optimizer import group_defaults
from esam_kernels.perturbation.swp import StochasticWeightPerturbation
from esam_kernels.settings import Settings, check

VERSION = 3
"""1, which is not written down, had neither ``version`` nor ``ascent`` nor ``ranking``; 2 had no ``ascent_share``."""

_SETTINGS = tuple(field.name for field in fields(Settings))
# These are chosen when an optimizer is built, not taken from a checkpoint.
_BUILT_IN = ("ascent", "ranking")
# Under which name the state of a parameter holds its last gradient, with ascent="previous".
_HISTORY = "previous_gradient"
# What other SAM optimizers keep in a parameter's state during a step, and write into checkpoints: the common two-step
# class, the released ESAM code, and variants of the two.
_FOREIGN = frozenset(("old_p", "e_w", "old_g", "new_g", "old_grad_p"))


def note(perturbation: StochasticWeightPerturbation) -> dict[str, Any]:
    """What is saved under "esam", noted in every group too: torch.distributed.checkpoint keeps nothing else."""
    saved = {**perturbation.settings.saved, "version": VERSION, "step": perturbation.step}
    for group in perturbation.base.param_groups:
        group["esam"] = saved.copy()
        group["rho"] = float(group["rho"])  # torch.load takes no scalar of numpy's
    return saved


def state_dict(perturbation: StochasticWeightPerturbation) -> dict[str, Any]:
    """The base optimizer's state, and what :func:`note` says under "esam"."""
    saved = note(perturbation)
    state: dict[str, Any] = perturbation.base.state_dict()
    for number, last in perturbation.ascent.state().items():
        state["state"][number] = {**state["state"].get(number, {}), _HISTORY: last}
    return {**state, "esam": saved}


def load(perturbation: StochasticWeightPerturbation, state: dict[str, Any]) -> None:
    """Take over what :func:`state_dict` returned, or the state of a plain torch optimizer of the base's kind.

    Raises:
        ValueError: no state of an optimizer, or one of another kind than the base, groups of other sizes,
            hyperparameters out of range, entries that are unknown, or a checkpoint of another ascent. Nothing is
            changed then.
    """
    base = perturbation.base
    _check_kind(base, state)
    saved = _saved(state)
    settings = _settings(perturbation.settings, saved)
    entries, history = _without_history(state)
    entries = _without_foreign(entries, type(base).__name__)
    for group in state["param_groups"]:
        group_defaults(group, 0.0, False)
    plain = {key: value for key, value in state.items() if key != "esam"}
    base.load_state_dict({**plain, "state": entries})
    perturbation.settings = settings
    perturbation.step = saved.get("step", perturbation.step)
    perturbation.ascent.load(history, perturbation.params)
    note(perturbation)


def _check_kind(base: Optimizer, state: dict[str, Any]) -> None:
    """Refuse what is no state of an optimizer, and the state of another kind than ``base``, where that is torch's own.

    torch would load it, and the next step would raise a KeyError.
    """
    if not {"state", "param_groups"} <= state.keys():
        raise ValueError(
            "state_dict must be what state_dict() of an optimizer returned, with the entries 'state' and "
            f"'param_groups', got the entries {list(state)[:4]}: the state of a model goes to model.load_state_dict"
        )
    kind = type(base)
    # Flags, and what may be None, came later in some kinds: torch fills them in.
    needed = [name for name, value in base.defaults.items() if not (value is None or isinstance(value, bool))]
    lacking = [name for group in state["param_groups"] for name in needed if name not in group]
    if lacking and kind.__module__.startswith("torch.optim."):
        raise ValueError(
            f"the state is not that of {kind.__name__}, the base optimizer: its groups have no {lacking[0]!r}. Build "
            "the optimizer with the base optimizer that the state was saved from"
        )


def _saved(state: dict[str, Any]) -> dict[str, Any]:
    noted = [group["esam"] for group in state["param_groups"] if "esam" in group]
    saved = dict(state.get("esam", noted[0] if noted else {}))
    version = saved.get("version", 1)
    unknown = sorted(set(saved) - {*_SETTINGS, "step", "version"})
    if unknown:
        newer = f" (it is of version {version}, this package writes {VERSION})" if version > VERSION else ""
        raise ValueError(f"the state holds unknown ESAM entries: {unknown}{newer}")
    if "step" in saved:
        check("step", saved["step"])
    return saved


def _settings(settings: Settings, saved: dict[str, Any]) -> Settings:
    """The saved hyperparameters; ascent and ranking stay as the optimizer was built."""
    if saved.get("ascent", settings.ascent) != settings.ascent:
        raise ValueError(
            f'the state was saved with ascent="{saved["ascent"]}", this optimizer has ascent="{settings.ascent}": '
            'build it with the same ascent, or remove "ascent" from state_dict["esam"] and from "esam" in each group'
        )
    own = settings.saved["ranking"]
    ranking = saved.get("ranking", own)
    if ranking != own:
        warnings.warn(
            f'the state was saved with ranking="{ranking}": this optimizer goes on with ranking="{own}"',
            stacklevel=6,
        )
    return replace(settings, **{name: saved[name] for name in _SETTINGS if name in saved and name not in _BUILT_IN})


def _without_history(state: dict[str, Any]) -> tuple[dict[Any, Any], dict[int, Tensor]]:
    """The base optimizer's part of the state, and the last gradients by the number of the parameter."""
    keys = [key for group in state["param_groups"] for key in group["params"]]
    states = state["state"]
    history = {number: states[key][_HISTORY] for number, key in enumerate(keys) if _HISTORY in states.get(key, {})}
    return (_without(states, {_HISTORY}), history) if history else (states, {})


def _without_foreign(states: dict[Any, Any], base: str) -> dict[Any, Any]:
    found = _FOREIGN & {name for values in states.values() if isinstance(values, dict) for name in values}
    if not found:
        return states
    warnings.warn(
        f"the state is that of another SAM optimizer: {', '.join(sorted(found))} in it are dropped. Such optimizers do "
        f"not save the state of {base}, its momentum for one: where there is none it starts anew",
        stacklevel=6,
    )
    return _without(states, found)


def _without(states: dict[Any, Any], names: set[str] | frozenset[str]) -> dict[Any, Any]:
    """The states without these entries; one that is empty then is left out."""
    plain = {
        key: {name: value for name, value in values.items() if name not in names}
        if isinstance(values, dict)
        else values
        for key, values in states.items()
    }
    return {key: values for key, values in plain.items() if values}
