"""A step of SAM around SGD against the packages that a user would install instead.

``pip install '.[bench]'`` brings them; one that is not installed has no number. HeavyBall's wrapper does other
arithmetic: each gradient is scaled by the square of its weight, no norm is taken, and its base optimizer is HeavyBall's
own SGD.
The heap keeps its memory, as in the suite ``step``.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from benchmarks.harness import OURS, Contender
from benchmarks.rows import Row, of_measurement
from benchmarks.suites import INDUCTOR, RHO, SGD, Case, Context
from benchmarks.suites.step import batch, training_step
from esam_kernels import SAM
from examples.models import build_model

KEEPS_HEAP = True
PYTORCH_OPTIMIZER, HEAVYBALL = "pytorch_optimizer", "HeavyBall"
SGD_ALONE = "SGD alone"
# What each contender is imported from.
MODULES = {PYTORCH_OPTIMIZER: "pytorch_optimizer", f"{PYTORCH_OPTIMIZER}, foreach": "pytorch_optimizer"}
MODULES[HEAVYBALL] = "heavyball"

Closure = Callable[[], Any]


def installed() -> list[str]:
    """The contenders whose package can be imported here."""
    return [name for name, module in MODULES.items() if importlib.util.find_spec(module) is not None]


def build(name: str, params: Sequence[Tensor], backend: str | None) -> Any:
    """SAM around SGD, as ``name`` makes it."""
    if name == OURS:
        return SAM(params, torch.optim.SGD, rho=RHO, backend=backend, fused=True, **SGD)
    if name == HEAVYBALL:
        import heavyball

        base = heavyball.SGD(params, lr=SGD["lr"], beta=SGD["momentum"], weight_decay=SGD["weight_decay"])
        return heavyball.SAMWrapper(params, base, ball=RHO)
    if name in MODULES:
        import pytorch_optimizer

        foreach = True if name.endswith("foreach") else None
        return pytorch_optimizer.SAM(params, torch.optim.SGD, rho=RHO, foreach=foreach, **SGD)
    base = torch.optim.SGD(params, fused=True, **SGD)
    return base if name == SGD_ALONE else peers.PublishedESAM(params, base, RHO, foreach=name == "foreach")


def cases(context: Context) -> Iterator[Case]:
    # HeavyBall compiles its steps.
    names = [name for name in installed() if name != HEAVYBALL or context.inductor != "without"]
    compiled = [INDUCTOR] if context.sizes.compiles and context.inductor != "without" else []
    contenders = (OURS, *names, "foreach", *compiled, "as released", SGD_ALONE)
    network = context.sizes.network
    parts = (
        (f"{network} fp32 SAM(SGD), optimizer's part", optimizers_part),
        (f"{network} b{context.sizes.batch} fp32 SAM(SGD), whole step", whole_step),
    )
    for title, make in parts:

        def run(seconds: float, title: str = title, make: Any = make) -> list[Row]:
            measurement = context.measure([make(context, name) for name in contenders], seconds, with_copy=False)
            return of_measurement("packages", title, measurement, context.device, backend=context.backend_name())

        yield Case(title, 10.0, run)


def _network(context: Context) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = context.sizes
    return build_model(sizes.network, 3, sizes.image, sizes.classes).to(context.device).train()


def optimizers_part(context: Context, name: str) -> Contender:
    """A step whose two backward passes only put new gradients in place; made at its first run, see ``step``."""

    if name == INDUCTOR:
        return _compiled(context)

    @functools.cache
    def made() -> tuple[list[Tensor], Any]:
        params = list(_network(context).parameters())
        return params, build(name, params, context.backend)

    fresh: list[list[Tensor]] = []

    def prepare() -> None:
        fresh[:] = [[torch.full_like(param, 1e-3) for param in made()[0]] for _ in range(2)]

    def gradients() -> None:
        for param, grad in zip(made()[0], fresh.pop()):
            param.grad = grad

    def run() -> None:
        _, optimizer = made()
        if name == HEAVYBALL:
            optimizer.step(gradients)
            return
        gradients()
        if name == SGD_ALONE:
            optimizer.step()
            return
        optimizer.first_step(zero_grad=True)
        gradients()
        optimizer.second_step(zero_grad=True)

    return Contender(name, [run], prepare)


def _compiled(context: Context) -> Contender:
    params = list(_network(context).parameters())
    gradients = itertools.cycle([[torch.full_like(param.detach(), 1e-3) for param in params] for _ in range(2)])
    return Contender(INDUCTOR, [_compiled_step(params, gradients.__next__)])


def _compiled_step(params: Sequence[Tensor], gradients: Callable[[], list[Tensor]]) -> Callable[[], None]:
    """What "foreach" does, under ``torch.compile``: perturb, then restore and update."""
    weights = [param.detach() for param in params]
    buffers = [torch.zeros_like(weight) for weight in weights]
    perturb, update = peers.compiled(peers.foreach_perturb), peers.compiled(peers.restore_and_sgd)

    def run() -> None:
        moves = perturb(weights, gradients(), RHO)
        update(weights, moves, gradients(), buffers, *SGD.values())

    return run


def whole_step(context: Context, name: str) -> Contender:
    """A step of training, in the way that each package documents."""
    images, target = batch(context)
    if name in (OURS, SGD_ALONE):
        made = functools.cache(lambda: training_step(context, name, "SAM", "SGD", "fp32"))
        return Contender(name, [lambda: made()(images, target)])

    @functools.cache
    def step() -> Callable[[], Any]:
        model = _network(context)
        params = list(model.parameters())

        def closure() -> Tensor:
            model.zero_grad()
            loss = F.cross_entropy(model(images), target)
            loss.backward()
            return loss

        def gradients() -> list[Tensor]:
            closure()
            return [param.grad for param in params]

        if name == INDUCTOR:
            return _compiled_step(params, gradients)
        optimizer = build(name, params, context.backend)

        def run() -> None:
            if name != HEAVYBALL:  # its wrapper calls the closure twice
                closure()
            if name in MODULES:
                optimizer.step(closure)
                return
            optimizer.first_step(zero_grad=True)
            closure()
            optimizer.second_step(zero_grad=True)

        return run

    # Made before the first run of any: ``peers.compiled`` forgets what HeavyBall has compiled.
    return Contender(name, [step() if name == INDUCTOR else lambda: step()()])
