"""Norm, perturb, restore and SGD over the parameter lists of published networks; then stage by stage.

The gradients of pass 1 are fresh tensors that nobody else holds, as autograd leaves them; those of pass 2 are put in
place inside the time, for every implementation alike. SGD is torch's fused one on every side but ``compile``, which
fuses its own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.cases import LARGE, Shape, numel
from benchmarks.clocks import CACHE_MULTIPLE, cache_bytes
from benchmarks.harness import Contender
from benchmarks.rows import Row, of_measurement
from benchmarks.suites import BETA, DTYPES, INDUCTOR, RHO, SGD, Case, Context
from esam_kernels import ESAM, ops

# Values that have to be read or written for each weight (section "Speed" of the design).
NORM, PERTURB, RESTORE, RESTORE_SGD = 1, 4, 2, 5
# A whole compilation of 62 tensors takes about half a minute: only the first network gets one.
COMPILED_NETWORKS = 1
# Above this many weights each peer's copies would not fit: the fastest one stands for all.
MANY = 500_000_000


def cases(context: Context) -> Iterator[Case]:
    names = list(context.sizes.parameters)
    compiles = context.sizes.compiles and context.inductor != "without"
    first, others = names[:COMPILED_NETWORKS], names[COMPILED_NETWORKS:]
    for name in first:
        for dtype in DTYPES:
            for mask in ("tensor", "element"):
                yield _case(context, name, dtype, mask, 5.0, compiles=compiles and dtype == "fp32")
        for dtype in DTYPES:
            yield from _stage_cases(context, name, dtype, 1.5)
    if LARGE in others:
        for dtype in DTYPES:
            yield from _stage_cases(context, LARGE, dtype, 1.5)
    for dtype in DTYPES:
        for name in others:
            for mask in ("tensor", "element"):
                yield _case(context, name, dtype, mask, 3.0, compiles=False)


def _case(context: Context, name: str, dtype: str, mask: str, seconds: float, compiles: bool) -> Case:
    title = f"{name} {dtype} {mask}"

    def run(seconds: float) -> list[Row]:
        lists = Lists(context, context.sizes.parameters[name](), DTYPES[dtype])
        contenders = lists.whole(mask, compiles)
        return _rows(context, lists, title, context.measure(contenders, seconds))

    return Case(title, seconds, run, has_inductor=compiles)


def _stage_cases(context: Context, name: str, dtype: str, seconds: float) -> Iterator[Case]:
    for stage in ("norm", "perturb", "perturb element", "restore", "restore + SGD"):
        title = f"{name} {dtype} stage: {stage}"

        def run(seconds: float, stage: str = stage, title: str = title) -> list[Row]:
            lists = Lists(context, context.sizes.parameters[name](), DTYPES[dtype])
            return _rows(context, lists, title, context.measure(lists.stage(stage), seconds))

        yield Case(title, seconds, run)


def _rows(context: Context, lists: Lists, title: str, measurement: Any) -> list[Row]:
    more = {"backend": context.backend_name(), "parameters": lists.numel, "tensors": len(lists.shapes)}
    return of_measurement("perturb", title, measurement, context.device, **more)


class Lists:
    """Weights and gradients of one network, and what the implementations do with them."""

    def __init__(self, context: Context, shapes: list[Shape], dtype: torch.dtype) -> None:
        self.context, self.shapes, self.dtype = context, shapes, dtype
        self.numel = numel(shapes)
        self.itemsize = dtype.itemsize
        self.generator = torch.Generator(context.device).manual_seed(0)
        self.first, self.second = self.tensors(), self.tensors()
        size = 1 if context.sizes.copy_bytes else CACHE_MULTIPLE * cache_bytes(context.device) // 4
        self._evict = torch.zeros(size, device=context.device)

    def tensors(self) -> list[Tensor]:
        device = self.context.device
        made = (torch.randn(shape, device=device, generator=self.generator) * 0.01 for shape in self.shapes)
        return [tensor.to(self.dtype) for tensor in made]

    def params(self) -> list[nn.Parameter]:
        return [nn.Parameter(tensor) for tensor in self.tensors()]

    def bytes_of(self, values: int) -> int:
        return values * self.numel * self.itemsize

    def evict(self) -> None:
        """Drop everything else from the caches."""
        self._evict.add_(1.0)

    def _contender(self, name: str, optimizer: Any, params: list[nn.Parameter]) -> Contender:
        def prepare() -> None:
            for param, grad in zip(params, self.first):
                param.grad = grad.clone()
            self.evict()

        def run() -> None:
            optimizer.first_step(zero_grad=True)
            for param, grad in zip(params, self.second):
                param.grad = grad
            optimizer.second_step()

        return Contender(name, [run], prepare, self.bytes_of(NORM + PERTURB + RESTORE_SGD))

    def _ours(self, mask: str) -> Contender:
        params = self.params()
        beta = BETA if mask == "element" else 1.0
        options = {"rho": RHO, "beta": beta, "gamma": 1.0, "mask": mask, "backend": self.context.backend}
        return self._contender("ours", ESAM(params, torch.optim.SGD, fused=True, **options, **SGD), params)

    def _published(self, name: str, foreach: bool, element_beta: float) -> Contender:
        params = self.params()
        base = torch.optim.SGD(params, fused=True, **SGD)
        optimizer = peers.PublishedESAM(params, base, RHO, element_beta=element_beta, foreach=foreach)
        return self._contender(name, optimizer, params)

    def _sgd(self) -> Contender:
        params = self.params()
        optimizer = torch.optim.SGD(params, fused=True, **SGD)
        for param, grad in zip(params, self.second):
            param.grad = grad
        return Contender("SGD alone", [optimizer.step], self.evict, self.bytes_of(RESTORE_SGD))

    def _compiled(self, element_beta: float) -> Contender:
        params = self.tensors()
        buffers = [torch.zeros_like(param) for param in params]
        perturb, update = peers.compiled(peers.foreach_perturb), peers.compiled(peers.restore_and_sgd)

        def run() -> None:
            moves = perturb(params, self.first, RHO, element_beta=element_beta)
            update(params, moves, self.second, buffers, *SGD.values())

        return Contender(INDUCTOR, [run], self.evict, self.bytes_of(NORM + PERTURB + RESTORE_SGD))

    def whole(self, mask: str, compiles: bool) -> list[Contender]:
        """Ours and its peers. With the element mask "as released" and "foreach" draw none: they do less."""
        if self.context.inductor == "only":
            return [self._ours(mask), self._compiled(BETA if mask == "element" else 1.0)]
        contenders = [self._ours(mask), self._published("foreach", True, 1.0)]
        if self.numel <= MANY:
            contenders.append(self._published("as released", False, 1.0))
            if mask == "element":
                contenders.append(self._published("as released + mask", False, BETA))
                contenders.append(self._published("foreach + mask", True, BETA))
            if compiles:
                contenders.append(self._compiled(BETA if mask == "element" else 1.0))
        return [*contenders, self._sgd()]

    # -- one stage at a time -------------------------------------------------------------------------------------------

    def stage(self, stage: str) -> list[Contender]:
        params, grads, extra = self.tensors(), self.tensors(), self.tensors()
        make: dict[str, Callable[..., tuple[int, dict[str, Callable[[], Any]]]]] = {
            "norm": self._norm,
            "perturb": functools.partial(self._perturb, element=False),
            "perturb element": functools.partial(self._perturb, element=True),
            "restore": self._restore,
            "restore + SGD": self._restore_sgd,
        }
        values, runs = make[stage](params, grads, extra)
        own = self.context
        for name in own.other_backends():
            self.context = dataclasses.replace(own, backend=name)
            runs[f"ours, {name}"] = make[stage](params, grads, extra)[1]["ours"]
        self.context = own
        return [
            Contender(name, [torch.no_grad()(run)], self.evict, self.bytes_of(values), capturable=True)
            for name, run in runs.items()
        ]

    def _norm(self, params: list[Tensor], grads: list[Tensor], _: Any) -> tuple[int, dict[str, Callable[[], Any]]]:
        groups, backend = [0] * len(params), self.context.backend or ""
        return NORM, {
            "ours": lambda: ops.norm_partials(params, grads, groups, [False], 0.0, backend=backend),
            "foreach": lambda: peers.foreach_norm(params, grads),
            "as released": lambda: peers.loop_norm(params, grads),
        }

    def _perturb(
        self, params: list[Tensor], grads: list[Tensor], extra: list[Tensor], element: bool
    ) -> tuple[int, dict[str, Callable[[], Any]]]:
        # The old weights go over the gradients: from the second run on weights are perturbed along weights.
        device, backend = self.context.device, self.context.backend or ""
        groups, offsets, position = [0] * len(params), [], 0
        for param in params:
            offsets.append(position)
            position += -(-param.numel() // 4) * 4
        partials = ops.norm_partials(params, grads, groups, [False], 0.0, backend=backend)
        scale = torch.tensor([RHO], dtype=torch.float64, device=device)
        state = torch.tensor([0, 0, round(BETA * 2**32) - 1], device=device) if element else None
        norm = peers.foreach_norm(params, self.first)
        return PERTURB, {
            "ours": lambda: ops.perturb_(
                params, grads, [], groups, offsets, partials, scale, [False], 0.0, 1.0, 1e-12, state, backend=backend
            ),
            "foreach": lambda: peers.foreach_perturb(extra, self.first, RHO, norm=norm),
            "as released": lambda: peers.loop_perturb(extra, self.first, RHO, norm=norm),
        }

    def _restore(self, params: list[Tensor], saved: list[Tensor], _: Any) -> tuple[int, dict[str, Callable[[], Any]]]:
        backend = self.context.backend or ""
        return RESTORE, {
            "ours": lambda: ops.restore_(params, saved, backend=backend),
            "foreach": lambda: torch._foreach_copy_(params, saved),
        }

    def _restore_sgd(
        self, params: list[Tensor], grads: list[Tensor], saved: list[Tensor]
    ) -> tuple[int, dict[str, Callable[[], Any]]]:
        buffers = [torch.zeros_like(param) for param in params]
        lr, momentum, decay = SGD.values()
        other = self.params()
        base = torch.optim.SGD(other, fused=True, **SGD)
        for param, grad in zip(other, self.second):
            param.grad = grad
        backend = self.context.backend or ""

        def peer(restore: peers.Restore) -> Callable[[], Any]:
            def run() -> None:
                restore(other, self.first)
                base.step()

            return run

        return RESTORE_SGD, {
            "ours": lambda: ops.restore_sgd_(
                params, saved, grads, buffers, False, lr, None, momentum, 0.0, decay, False, False, backend=backend
            ),
            "foreach": peer(peers.foreach_restore),
            "as released": peer(peers.loop_restore),
        }
