"""The hyperparameters of a step: one frozen set of them, and the one place where they are checked."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

MASKS = ("tensor", "element")
RADII = ("paper", "released")
ASCENTS = ("current", "previous", "momentum")
# With these a step has one pass, and no losses before and after the perturbation to select data by.
ONE_PASS_ASCENTS = ("previous", "momentum")


@dataclass(frozen=True)
class Settings:
    """What a step depends on beside the groups' own ``rho`` and ``adaptive``; see :class:`esam_kernels.ESAM`.

    Raises:
        ValueError: a value out of range, with its name, what is allowed, and the value.
    """

    beta: float = 0.6
    gamma: float = 0.5
    eta: float = 0.0
    mask: str = "tensor"
    radius: str = "paper"
    eps: float = 1e-12
    seed: int = 0
    ascent: str = "current"
    ascent_share: float = 1.0
    ranking: str | Callable[..., Any] = "rise"

    def __post_init__(self) -> None:
        for field in fields(self):
            check(field.name, getattr(self, field.name))
        for name in ("beta", "gamma", "ascent_share", "eta", "eps"):
            object.__setattr__(self, name, float(getattr(self, name)))
        if self.gamma < 1.0 and self.ascent in ONE_PASS_ASCENTS:
            raise ValueError(
                f'gamma must be 1 with ascent="{self.ascent}", got {self.gamma}: such a step has one pass, and cannot '
                "compare losses before and after the perturbation to choose samples. Pass gamma=1.0"
            )
        if self.ascent_share < 1.0:
            self._check_ascent_share()

    @functools.cached_property
    def saved(self) -> dict[str, Any]:
        """The hyperparameters by name, as a checkpoint holds them: of a function its name. Not to be changed."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**named, "ranking": _name_of(self.ranking)}

    def _check_ascent_share(self) -> None:
        if self.ascent in ONE_PASS_ASCENTS:
            raise ValueError(
                f'ascent_share must be 1 with ascent="{self.ascent}", got {self.ascent_share}: it is the share of the '
                "batch in pass 1, and this ascent has no pass 1"
            )
        if self.gamma < 1.0:
            raise ValueError(
                f"ascent_share < 1 needs gamma = 1, got ascent_share={self.ascent_share} and gamma={self.gamma}: the "
                "samples for pass 2 are chosen by the losses of the whole batch, of which pass 1 would see only a "
                "part. Take gamma=1.0, as SAM has it, or ascent_share=1.0"
            )


def check(name: str, value: Any) -> None:
    """Refuse the value of one hyperparameter, by its name.

    Raises:
        ValueError: with the name, what is allowed, and the value.
    """
    if name in ("beta", "gamma", "ascent_share"):
        check_share(name, value)
    elif name in _CHOICES:
        if value not in _CHOICES[name]:
            raise ValueError(f"{name} must be one of {_CHOICES[name]}, got {value!r}")
    elif name == "ranking":
        pass  # esam_kernels.ranking.make checks it
    elif name in ("seed", "step"):
        if not (isinstance(value, int) and 0 <= value < 2**63):
            raise ValueError(f"{name} must be an integer in [0, 2^63), got {value!r}")
    elif not (isinstance(value, Real) and math.isfinite(value) and float(value) >= 0.0):
        whose = ". It is ESAM's own: to set the base optimizer's eps, pass an instance" if name == "eps" else ""
        raise ValueError(f"{name} must be finite and not negative, got {value!r}{whose}")


def _name_of(ranking: Any) -> str:
    return ranking if isinstance(ranking, str) else getattr(ranking, "__name__", type(ranking).__name__)


_CHOICES = {"ascent": ASCENTS, "mask": MASKS, "radius": RADII}


def check_share(name: str, value: Any) -> float:
    """A share such as beta or gamma.

    Raises:
        ValueError: not in (0, 1].
    """
    if not isinstance(value, Real) or isinstance(value, bool) or not 0.0 < float(value) <= 1.0:
        raise ValueError(f"{name} must lie in (0, 1], got {value!r}")
    return float(value)


def check_rho(rho: Any) -> float:
    """A group's radius.

    Raises:
        ValueError: negative or not finite.
    """
    if type(rho) is not float or not 0.0 <= rho < math.inf:  # the usual case at once: every step asks
        check("rho", rho)
    return float(rho)
