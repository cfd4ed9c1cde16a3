"""The price of each mode of training: a whole step against SAM's and the base optimizer's, beside its counted cost.

Every mode is ours; so is the SAM that it is compared with. The heap keeps its memory, as in the suite ``step``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import OURS, Contender
from benchmarks.rows import Row, of_measurement
from benchmarks.suites import BETA, GAMMA, RHO, Case, Context
from benchmarks.suites.step import BASES, batch, per_sample_losses, training_step
from esam_kernels import ESAM, cross_entropy, normalization_groups
from examples.models import build_model

KEEPS_HEAP = True
BASE = "SGD"
SAM = "SAM, ours"


@dataclass(frozen=True)
class Mode:
    """ESAM's arguments in a mode."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    only_normalization: bool = False
    rho: float = RHO

    def optimizer(self, model: torch.nn.Module, backend: str | None) -> ESAM:
        """ESAM around SGD."""
        params: Any = list(model.parameters())
        base = BASES[BASE](params)
        if self.only_normalization:
            base = BASES[BASE](normalization_groups(model, self.rho))
        rho = {} if self.only_normalization else {"rho": self.rho}
        return ESAM(params, base, model=model, backend=backend, **rho, **self.settings)


_SAM = Mode({"beta": 1.0, "gamma": 1.0})
MODES = {
    "ascent_share=0.25": Mode({"beta": 1.0, "gamma": 1.0, "ascent_share": 0.25}),
    "first_order": Mode({"beta": BETA, "gamma": GAMMA, "ranking": "first_order"}),
    "normalization, first_order": Mode(
        {"beta": 1.0, "gamma": GAMMA, "ranking": "first_order"}, only_normalization=True
    ),
    "rise": Mode({"beta": BETA, "gamma": GAMMA}),
    "random": Mode({"beta": BETA, "gamma": GAMMA, "ranking": "random"}),
    "normalization": Mode({"beta": 1.0, "gamma": 1.0}, only_normalization=True),
    "momentum": Mode({"beta": 1.0, "gamma": 1.0, "ascent": "momentum"}),
    "rho = 0": Mode({"beta": BETA, "gamma": GAMMA}, rho=0.0),
}
# The larger batch for the modes that have to keep a promise of speed.
LARGER_BATCH = 4
OF_LARGER_BATCH = ("ascent_share=0.25", "first_order", "normalization, first_order")


def cases(context: Context) -> Iterator[Case]:
    small, large = context.sizes, dataclasses.replace(context.sizes, batch=LARGER_BATCH * context.sizes.batch)
    for sizes, names in ((small, tuple(MODES)), (large, OF_LARGER_BATCH)):
        for dtype in ("fp32", "bf16"):
            for name in names:
                yield _case(dataclasses.replace(context, sizes=sizes), name, dtype)


def _case(context: Context, name: str, dtype: str) -> Case:
    sizes = context.sizes
    title = f"{sizes.network} b{sizes.batch} {dtype} {name}"

    def run(seconds: float) -> list[Row]:
        images, target = batch(context)
        ours, cost = _step(context, MODES[name], dtype)
        steps = {OURS: ours, f"{BASE} alone": training_step(context, f"{BASE} alone", "SAM", BASE, dtype)}
        if MODES[name].rho > 0.0:
            steps[SAM] = _step(context, _SAM, dtype)[0]
        contenders = [Contender(each, [lambda step=step: step(images, target)]) for each, step in steps.items()]
        measurement = context.measure(contenders, seconds, with_copy=False)
        more = {"backend": context.backend_name(), "batch": sizes.batch, "counted": round(cost(), 4)}
        return of_measurement("modes", title, measurement, context.device, **more)

    return Case(title, 10.0, run)


def _step(context: Context, mode: Mode, dtype: str) -> tuple[Callable[[Tensor, Tensor], Any], Callable[[], float]]:
    """A step of a freshly made model as a function of a batch, and its counted cost."""
    torch.manual_seed(0)
    sizes = context.sizes
    model = build_model(sizes.network, 3, sizes.image, sizes.classes).to(context.device).train()
    optimizer = mode.optimizer(model, context.backend)
    losses = per_sample_losses(model, cross_entropy, context.device, dtype)
    return lambda images, target: optimizer.step(losses, images, target), lambda: optimizer.relative_cost
