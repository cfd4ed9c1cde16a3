"""The optimizer's own host time: a step over tensors so small that there is nothing to compute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from benchmarks import peers
from benchmarks.cases import Shape
from benchmarks.clocks import host_clock, wall_clock
from benchmarks.harness import Contender, quantiles
from benchmarks.rows import Row, of_measurement
from benchmarks.suites import BETA, RHO, SGD, Case, Context
from esam_kernels import ESAM


def cases(context: Context) -> Iterator[Case]:
    for name, shapes in context.sizes.overhead.items():
        for mask in ("tensor", "element"):
            title = f"{name}, {mask}"

            def run(seconds: float, title: str = title, shapes: Any = shapes, mask: str = mask) -> list[Row]:
                return _measure(context, title, shapes(), mask, seconds)

            yield Case(title, 2.0, run)


def _measure(context: Context, title: str, shapes: list[Shape], mask: str, seconds: float) -> list[Row]:
    def params() -> list[nn.Parameter]:
        return [nn.Parameter(torch.randn(shape, device=context.device)) for shape in shapes]

    gradients = [[torch.randn(shape, device=context.device) for shape in shapes] for _ in range(2)]

    def two_steps(name: str, optimizer: Any, weights: list[nn.Parameter]) -> Contender:
        def prepare() -> None:
            for param, grad in zip(weights, gradients[0]):
                param.grad = grad.clone()

        def run() -> None:
            optimizer.first_step(zero_grad=True)
            for param, grad in zip(weights, gradients[1]):
                param.grad = grad
            optimizer.second_step(zero_grad=True)

        return Contender(name, [run], prepare)

    def published(name: str, foreach: bool) -> Contender:
        weights = params()
        base = torch.optim.SGD(weights, fused=True, **SGD)
        return two_steps(name, peers.PublishedESAM(weights, base, RHO, foreach=foreach), weights)

    def sgd() -> Contender:
        weights = params()
        base = torch.optim.SGD(weights, fused=True, **SGD)

        def prepare() -> None:
            for param, grad in zip(weights, gradients[1]):
                param.grad = grad

        return Contender("SGD alone", [base.step], prepare)

    weights = params()
    options = {"rho": RHO, "beta": BETA if mask == "element" else 1.0, "mask": mask, "backend": context.backend}
    ours = two_steps("ours", ESAM(weights, torch.optim.SGD, fused=True, **options, **SGD), weights)
    clock = host_clock if context.device.type == "cuda" else wall_clock
    contenders = [ours, published("as released", False), published("foreach", True), sgd()]
    measurement = context.measure(contenders, seconds, with_copy=False, clock=clock)
    rows = of_measurement("overhead", title, measurement, context.device, unit="us", backend=context.backend_name())
    base = quantiles(measurement.times("SGD alone"))[1] * 1e6
    return [row | {"above_sgd": round(row["p50"] - base, 2)} for row in rows]
