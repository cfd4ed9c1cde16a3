"""Schedulers for rho, beta, gamma and ascent_share. They are used as those of ``torch.optim.lr_scheduler`` are.

>>> gamma = LinearSchedule(optimizer, "gamma", start=1.0, end=0.5, total_iters=100)
>>> for inputs, targets in loader:
...     loss = optimizer.step(losses, inputs, targets)
...     gamma.step()

Each sets its value when it is built and at every ``step()``, and has ``state_dict`` and ``load_state_dict``. Call
``step()`` where the learning rate's scheduler is called: after the optimizer's step, once a batch or once an epoch.

A group whose own rho is 0 has no part in the perturbation (see :func:`esam_kernels.normalization_groups`), and a
schedule of rho leaves it at 0. Its own rho is what it has when the first schedule of rho is built, or at the next
``step()`` after it was added; it is noted in the group as ``initial_rho``. Where that is 0 in all groups, the schedule
sets all.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from esam_kernels.optimizer import ESAM
from esam_kernels.settings import check_rho, check_share

__all__ = ["ConstantSchedule", "CosineSchedule", "LinearSchedule", "PhaseSchedule", "RhoProportionalToLR", "Schedule"]

_NAMES = ("rho", "beta", "gamma", "ascent_share")


class Schedule:
    """The base of all: counts the steps in ``last_epoch`` and sets ``name`` to ``value()``.

    Args:
        optimizer: whose hyperparameter it is.
        name: "rho" (of every group, except those whose own is 0, as above), "beta", "gamma" or "ascent_share".

    Raises:
        TypeError: ``optimizer`` is no ESAM or SAM.
        ValueError: another name, or values outside the hyperparameter's range.
    """

    def __init__(self, optimizer: ESAM, name: str) -> None:
        _check_optimizer(optimizer)
        if name not in _NAMES:
            raise ValueError(f"name must be one of {_NAMES}, got {name!r}")
        self.optimizer = optimizer
        self.name = name
        self.last_epoch = 0
        self._apply()

    def value(self) -> float:
        """The hyperparameter at ``last_epoch``."""
        raise NotImplementedError

    def step(self) -> None:
        """Count one step, and set the hyperparameter."""
        self.last_epoch += 1
        self._apply()

    def get_last_value(self) -> float:
        """What was set last."""
        return self._last_value

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer."""
        return {key: value for key, value in self.__dict__.items() if key != "optimizer"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned, and set the hyperparameter accordingly.

        Raises:
            ValueError: the state of another kind of schedule, or of another hyperparameter. Nothing is changed then.
        """
        missing = self.state_dict().keys() - state_dict.keys()
        if missing or state_dict["name"] != self.name:
            of = f"of {state_dict['name']!r}" if "name" in state_dict else "without a name"
            lacks = f", and lacks {', '.join(sorted(missing))}" if missing else ""
            raise ValueError(
                f"state_dict is that of another schedule: it is {of}{lacks}, and this is a {type(self).__name__} of "
                f"{self.name!r}. Load what this schedule's own state_dict() returned"
            )
        self.__dict__.update({key: state_dict[key] for key in self.state_dict()})
        self._apply()

    def _apply(self) -> None:
        self._last_value = self.value()
        if self.name == "rho":
            self.optimizer._follow()
            groups = self.optimizer.param_groups
            own = [group.setdefault("initial_rho", group["rho"]) for group in groups]
            for group, rho in zip(groups, own):
                group["rho"] = self._last_value if rho > 0.0 or not any(own) else 0.0
        else:
            setattr(self.optimizer, self.name, self._last_value)


class ConstantSchedule(Schedule):
    """``value`` for ``total_iters`` steps, then ``end``: a hard switch (gamma = 1 at first, say).

    >>> schedule = ConstantSchedule(optimizer, "gamma", 1.0, end=0.5, total_iters=100)

    Args:
        optimizer, name: as for :class:`Schedule`.
        value: at first.
        end: afterwards; None keeps ``value`` for good.
        total_iters: after how many calls of ``step()`` it changes.
    """

    def __init__(
        self, optimizer: ESAM, name: str, value: float, end: float | None = None, total_iters: int = 0
    ) -> None:
        self.name, self.total_iters = name, _total(total_iters, 0)
        self.start, self.end = _checked(optimizer, name, value, value if end is None else end)
        super().__init__(optimizer, name)

    def value(self) -> float:
        """``value``, then ``end``."""
        return self.start if self.last_epoch < self.total_iters else self.end


class LinearSchedule(Schedule):
    """From ``start`` to ``end`` in a straight line over ``total_iters`` steps, ``end`` from then on.

    Where labels may be wrong, start with the whole batch, and shrink it over the first half of the training:

    >>> schedule = LinearSchedule(optimizer, "gamma", 1.0, 0.5, total_iters=steps // 2)

    Args:
        optimizer, name: as for :class:`Schedule`.
        start: at the beginning.
        end: after ``total_iters`` calls of ``step()``.
        total_iters: how many calls of ``step()`` the change takes, >= 1.
    """

    def __init__(self, optimizer: ESAM, name: str, start: float, end: float, total_iters: int) -> None:
        self.name, self.total_iters = name, _total(total_iters, 1)
        self.start, self.end = _checked(optimizer, name, start, end)
        super().__init__(optimizer, name)

    def value(self) -> float:
        """The point of the line."""
        if self.last_epoch >= self.total_iters:
            return self.end
        return self.start + (self.end - self.start) * self._share_of_change()

    def _share_of_change(self) -> float:
        return min(self.last_epoch / self.total_iters, 1.0)


class CosineSchedule(LinearSchedule):
    """As :class:`LinearSchedule`, along half a cosine: slow at both ends.

    >>> schedule = CosineSchedule(optimizer, "rho", 0.1, 0.02, total_iters=steps)
    """

    def _share_of_change(self) -> float:
        return (1.0 - math.cos(math.pi * super()._share_of_change())) / 2.0


class PhaseSchedule(Schedule):
    """``value`` in the steps from ``start`` to before ``stop``, and 0 outside.

    A step at rho = 0 is the base optimizer's, at its price. For ESAM in the last 30 % of a training:

    >>> schedule = PhaseSchedule(optimizer, "rho", 0.05, start=steps * 7 // 10)

    Args:
        optimizer: whose radius it is.
        name: "rho"; the other hyperparameters cannot be 0.
        value: within the phase.
        start: the first step of the phase, counted from 0, an integer >= 0.
        stop: the first step after it; None: it lasts to the end.
    """

    def __init__(self, optimizer: ESAM, name: str, value: float, start: int, stop: int | None = None) -> None:
        if name != "rho":
            raise ValueError(f'name must be "rho": outside its phase it is 0, which {name} cannot be')
        if not _is_integer(start) or start < 0:
            raise ValueError(f"start must be an integer >= 0, got {start!r}")
        if stop is not None and not (_is_integer(stop) and stop > start):
            raise ValueError(f"stop must be None or an integer above start ({start}), got {stop!r}")
        self.name, self.start, self.stop = name, int(start), None if stop is None else int(stop)
        (self.inside,) = _checked(optimizer, name, value)
        super().__init__(optimizer, name)

    def value(self) -> float:
        """``value`` or 0."""
        is_inside = self.start <= self.last_epoch and (self.stop is None or self.last_epoch < self.stop)
        return self.inside if is_inside else 0.0


class RhoProportionalToLR(Schedule):
    """rho = rho_0 lr / lr_0 in each group: the radius follows the learning rate, whatever schedules that.

    >>> radius = RhoProportionalToLR(optimizer)
    >>> rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)

    rho_0 and lr_0 are the group's values when this is built, or at the next ``step()`` after the group was added; their
    ratio is noted in the group as ``rho_over_lr``. Build it before the learning rate's scheduler: one that begins with
    a warm-up (``OneCycleLR``, for one) makes the rate small at once, and the radius would grow far above rho_0
    afterwards. Call ``step()`` after the learning rate's scheduler.

    Raises:
        TypeError: ``optimizer`` is no ESAM or SAM.
        ValueError: a learning rate that starts at 0; at ``load_state_dict``, the state of more groups than there are.
    """

    def __init__(self, optimizer: ESAM) -> None:
        _check_optimizer(optimizer)
        optimizer._follow()
        _note_ratios(optimizer.param_groups)
        super().__init__(optimizer, "rho")

    def value(self) -> float:
        """rho of the first group."""
        return _proportional(self.optimizer.param_groups[0])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As :meth:`Schedule.load_state_dict`."""
        groups, ratios = self.optimizer.param_groups, state_dict.get("ratios", [])
        if len(ratios) > len(groups):
            raise ValueError(
                f"state_dict holds the ratios of rho to lr of {len(ratios)} parameter groups, and the optimizer has "
                f"{len(groups)}: build it with the same groups"
            )
        super().load_state_dict(state_dict)
        for group, ratio in zip(groups, ratios):
            group["rho_over_lr"] = ratio
        self._apply()

    def _apply(self) -> None:
        self.optimizer._follow()
        groups = self.optimizer.param_groups
        _note_ratios([group for group in groups if "rho_over_lr" not in group])
        self.ratios = [group["rho_over_lr"] for group in groups]
        self._last_value = self.value()
        for group in groups:
            group["rho"] = _proportional(group)


def _note_ratios(groups: list[dict[str, Any]]) -> None:
    rates = [float(group["lr"]) for group in groups]
    if not all(rate > 0.0 for rate in rates):
        raise ValueError(
            f"rho can only follow learning rates that start above 0, got {rates}: build the schedule of rho before "
            "what sets them to 0 (a warm-up, load_state_dict)"
        )
    for group, rate in zip(groups, rates):
        group["rho_over_lr"] = float(group["rho"]) / rate


def _proportional(group: dict[str, Any]) -> float:
    ratio: float = group["rho_over_lr"]
    return ratio * float(group["lr"])


def _is_integer(value: Any) -> bool:
    """Integers of other libraries, numpy's for one, are integers."""
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _total(total_iters: int, least: int) -> int:
    if not _is_integer(total_iters) or total_iters < least:
        raise ValueError(f"total_iters must be an integer >= {least}, got {total_iters!r}")
    return int(total_iters)


def _check_optimizer(optimizer: Any) -> None:
    if not isinstance(optimizer, ESAM):
        raise TypeError(f"optimizer must be an ESAM or SAM, got {type(optimizer).__name__}")


def _checked(optimizer: ESAM, name: str, *values: float) -> list[float]:
    """The values as Python's own numbers: torch.load takes no scalars of numpy's.

    What the optimizer's ascent cannot have is refused here, not in the middle of a training.
    """
    _check_optimizer(optimizer)
    checked = [check_rho(value) if name == "rho" else check_share(name, value) for value in values]
    if name in ("gamma", "ascent_share"):
        others = replace(optimizer._perturbation.settings, gamma=1.0, ascent_share=1.0)
        for value in checked:
            replace(others, **{name: value})  # type: ignore[arg-type]
    return checked
