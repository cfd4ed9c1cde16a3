"""The modes of training that the study compares, each with the radii that its search may try."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from esam_kernels import ESAM, RankingContext, normalization_groups
from esam_kernels.schedules import LinearSchedule, PhaseSchedule, Schedule

RADII = (0.02, 0.05, 0.1, 0.2)
# The gradient of a part of the batch is longer than the whole's (a quarter's up to twice): its noise takes a larger
# part of the radius.
QUARTER_RADII = tuple(2.0 * radius for radius in RADII)
NORMALIZATION_RADII = (0.25, 0.5, 1.0, 2.0)
MOMENTUM_RADII = (0.3, 1.0, 3.0)


@dataclass(frozen=True)
class Mode:
    """A way to train: ESAM with some settings, or the plain base optimizer."""

    name: str
    text: str
    radii: tuple[float, ...] = ()
    """Those that its search may try; none: plain SGD."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    only_normalization: bool = False
    gamma_warmup: float | None = None
    """The share of the training in which gamma falls from 1."""
    rho_warmup: float | None = None
    """The share of the training in which rho grows from 0."""
    start: float | None = None
    """The share of the training after which rho is above 0."""
    sharpness_share: float = 1.0
    """The share of the batch on which the part of the gradient that rho adds is measured; see ``training.step``."""

    @property
    def chooses_data(self) -> bool:
        """Whether pass 2 takes only B+."""
        return self.settings.get("gamma", 1.0) < 1.0

    @property
    def is_in_package(self) -> bool:
        """Whether a user of the package can take it: neither the step nor the ranking is the study's own."""
        return self.sharpness_share == 1.0 and not isinstance(self.settings.get("ranking"), type)

    def optimizer(
        self, model: nn.Module, rho: float | None, seed: int, steps: int, **base: Any
    ) -> tuple[torch.optim.Optimizer, list[Schedule]]:
        """The optimizer over the model's parameters and the schedules that are stepped with it."""
        if rho is None:
            return torch.optim.SGD(model.parameters(), **base), []
        params = normalization_groups(model, rho) if self.only_normalization else model.parameters()
        optimizer = ESAM(params, torch.optim.SGD, rho=rho, seed=seed, model=model, **self._settings(seed), **base)
        schedules: list[Schedule] = []
        if self.gamma_warmup is not None:
            end = self.settings["gamma"]
            schedules.append(LinearSchedule(optimizer, "gamma", 1.0, end, round(self.gamma_warmup * steps)))
        if self.rho_warmup is not None:
            schedules.append(LinearSchedule(optimizer, "rho", 0.0, rho, max(1, round(self.rho_warmup * steps))))
        if self.start is not None:
            schedules.append(PhaseSchedule(optimizer, "rho", rho, start=round(self.start * steps)))
        return optimizer, schedules

    def _settings(self, seed: int) -> dict[str, Any]:
        settings = {"beta": 1.0, "gamma": 1.0, **self.settings}
        if isinstance(settings.get("ranking"), type):
            settings["ranking"] = settings["ranking"](seed)
        return settings


class Softened:
    """The first-order scores, standardised, with Gumbel noise added: the k largest are a draw without replacement.

    Sample i is drawn first with probability proportional to exp(standard score of i) (Kool et al., 2019).
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, context: RankingContext) -> Tensor:
        scores = first_order(context)
        standard = (scores - scores.mean()) / (scores.std() + 1e-12)
        uniform = torch.rand(scores.shape, generator=self._generator).clamp_(1e-12)
        return standard - (-uniform.log()).log()


class CentredByClass:
    """The first-order scores minus their mean over the samples of the same label: B+ keeps the classes' shares."""

    def __init__(self, seed: int) -> None:
        del seed

    def __call__(self, context: RankingContext) -> Tensor:
        scores, labels = first_order(context), context.batch[1]
        sums = scores.new_zeros(int(labels.max()) + 1).index_add_(0, labels, scores)
        counts = torch.bincount(labels, minlength=len(sums)).clamp(min=1)
        return scores - (sums / counts)[labels]


def first_order(context: RankingContext) -> Tensor:
    """s_i = delta_i . (G h_i + g) at the head."""
    from esam_kernels.ranking import first_order_scores

    assert context.head is not None
    return first_order_scores(context.head.input, context.head.output_grad, has_bias=context.head.has_bias)


def _half(**settings: Any) -> dict[str, Any]:
    return {"gamma": 0.5, **settings}


_PAPER = {"beta": 0.6, "gamma": 0.5}

MODES: tuple[Mode, ...] = (
    Mode("sgd", "SGD"),
    Mode("sam", "SAM", RADII),
    Mode("esam", "ESAM, the paper's", RADII, _PAPER),
    Mode("esam-warm", "ESAM, gamma from 1 to .5 in the first half", RADII, _PAPER, gamma_warmup=0.5),
    Mode("first-order", "ESAM, first order", RADII, {**_PAPER, "ranking": "first_order"}),
    Mode("random", "ESAM, random half", RADII, {**_PAPER, "ranking": "random"}),
    Mode("softened", "ESAM, first order softened", RADII, {**_PAPER, "ranking": Softened}),
    Mode("by-class", "ESAM, first order centred by class", RADII, {**_PAPER, "ranking": CentredByClass}),
    Mode("norm", "normalization layers only, whole batch", NORMALIZATION_RADII, only_normalization=True),
    Mode("norm-rise", "normalization only, measured rise", NORMALIZATION_RADII, _half(), only_normalization=True),
    Mode(
        "norm-first-order",
        "normalization only, first order",
        NORMALIZATION_RADII,
        _half(ranking="first_order"),
        only_normalization=True,
    ),
    Mode(
        "norm-softened",
        "normalization only, softened",
        NORMALIZATION_RADII,
        _half(ranking=Softened),
        only_normalization=True,
    ),
    Mode(
        "norm-random",
        "normalization only, random half",
        NORMALIZATION_RADII,
        _half(ranking="random"),
        only_normalization=True,
    ),
    Mode("sam-eighth", "SAM, pass 1 on an eighth of the batch", QUARTER_RADII, {"ascent_share": 0.125}),
    Mode(
        "sam-three-sixteenths", "SAM, pass 1 on three sixteenths of the batch", QUARTER_RADII, {"ascent_share": 0.1875}
    ),
    Mode("sam-quarter", "SAM, pass 1 on a quarter of the batch", QUARTER_RADII, {"ascent_share": 0.25}),
    Mode("sam-three-eighths", "SAM, pass 1 on three eighths of the batch", QUARTER_RADII, {"ascent_share": 0.375}),
    Mode(
        "norm-quarter",
        "normalization only, pass 1 on a quarter of the batch",
        NORMALIZATION_RADII,
        {"ascent_share": 0.25},
        only_normalization=True,
    ),
    Mode("sharp-quarter", "SAM, sharpness of a quarter of the batch", RADII, sharpness_share=0.25),
    Mode("sharp-three-eighths", "SAM, sharpness of three eighths of the batch", RADII, sharpness_share=0.375),
    Mode("sam-last", "SAM in the last 30 %", RADII, start=0.7),
    Mode("momentum", "along the momentum", MOMENTUM_RADII, {"ascent": "momentum"}),
    Mode(
        "momentum-warm",
        "along the momentum, radius from 0 in the first tenth",
        MOMENTUM_RADII,
        {"ascent": "momentum"},
        rho_warmup=0.1,
    ),
    Mode("momentum-adaptive", "along the momentum, adaptive", MOMENTUM_RADII, {"ascent": "momentum", "adaptive": True}),
    Mode(
        "momentum-norm",
        "along the momentum, normalization only",
        NORMALIZATION_RADII,
        {"ascent": "momentum"},
        only_normalization=True,
    ),
)
BY_NAME: dict[str, Mode] = {mode.name: mode for mode in MODES}
