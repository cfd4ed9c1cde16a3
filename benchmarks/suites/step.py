"""Whole training steps on 32x32 images: SGD, SAM and ESAM, the published way and ours, same model and batch.

The published way takes one sample fewer than k into B+; it is asked for one more here, so that both do the same work.
The heap keeps its memory, or page faults in the model's own passes, which no optimizer decides on, would be all there
is to see.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esam_kernels
from benchmarks import peers
from benchmarks.harness import Contender
from benchmarks.rows import Row, of_measurement
from benchmarks.suites import BETA, DTYPES, GAMMA, RHO, SGD, Case, Context
from esam_kernels import ESAM, cross_entropy
from esam_kernels.graphs import DRAW_POOL, WARMUP_STEPS
from esam_kernels.selection import num_selected
from examples.models import build_model

# (beta, gamma, mask, ascent): SAM is ESAM at beta = gamma = 1.
METHODS = {
    "ESAM": (BETA, GAMMA, "tensor", "current"),
    "SAM": (1.0, 1.0, "tensor", "current"),
    "ESAM element": (BETA, GAMMA, "element", "current"),
    "ESAM previous": (1.0, 1.0, "tensor", "previous"),
    "ESAM momentum": (1.0, 1.0, "tensor", "momentum"),
}
KEEPS_HEAP = True
BASES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, fused=True, **SGD),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
}


def cases(context: Context) -> Iterator[Case]:
    for base, dtype, method in (
        ("SGD", "fp32", "ESAM"),
        ("SGD", "fp32", "SAM"),
        ("SGD", "bf16", "ESAM"),
        ("SGD", "bf16", "SAM"),
        ("AdamW", "fp32", "ESAM"),
        ("AdamW", "fp32", "SAM"),
        ("SGD", "fp32", "ESAM previous"),
        ("SGD", "fp32", "ESAM momentum"),
        ("SGD", "fp32", "ESAM element"),
        ("SGD", "bf16", "ESAM element"),
    ):
        where = ", default heap" if context.default_heap else ""
        title = f"{context.sizes.network} b{context.sizes.batch} {dtype} {method}({base}){where}"

        def run(seconds: float, title: str = title, case: tuple[str, str, str] = (method, base, dtype)) -> list[Row]:
            measurement = context.measure(contenders(context, *case), seconds, with_copy=False)
            more = {"backend": context.backend_name(), "batch": context.sizes.batch}
            return of_measurement("step", title, measurement, context.device, **more)

        yield Case(title, 10.0, run)


def contenders(context: Context, method: str, base: str, dtype: str) -> list[Contender]:
    """Ours, the published way, and the base optimizer alone.

    Nobody else's code takes one pass a step: there the base optimizer is what to compare with.
    """
    images, target = batch(context)
    one_pass = METHODS[method][3] != "current"
    names: tuple[str, ...] = ("ours", f"{base} alone") if one_pass else ("ours", "as released", f"{base} alone")
    if context.device.type == "cuda":
        names += ("ours, graphed",)

    def contender(name: str) -> Contender:
        # Made at its first run: one that cannot be made is left out there, like one that fails later.
        step = functools.cache(lambda: training_step(context, name, method, base, dtype))
        return Contender(name, [lambda: step()(images, target)])

    return [contender(name) for name in names]


def batch(context: Context) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(context.sizes.batch, 3, context.sizes.image, context.sizes.image, generator=generator)
    target = torch.randint(context.sizes.classes, (context.sizes.batch,), generator=generator)
    return images.to(context.device), target.to(context.device)


def training_step(context: Context, name: str, method: str, base: str, dtype: str) -> Callable[[Tensor, Tensor], Any]:
    """One step of a freshly made model with one optimizer, as a function of a batch."""
    torch.manual_seed(0)
    sizes = context.sizes
    model = build_model(sizes.network, 3, sizes.image, sizes.classes).to(context.device).train()
    params = list(model.parameters())
    base_optimizer = BASES[base](params)
    beta, gamma, mask, ascent = METHODS[method]
    criterion = cross_entropy if name.startswith("ours") else peers.library_cross_entropy
    losses = per_sample_losses(model, criterion, context.device, dtype)
    if name.startswith("ours"):
        ours = ESAM(
            params,
            base_optimizer,
            rho=RHO,
            beta=beta,
            gamma=gamma,
            mask=mask,
            ascent=ascent,
            model=model,
            backend=context.backend,
        )
        if name.endswith("graphed"):
            return _captured(esam_kernels.make_graphed_step(ours, losses, *batch(context)), *batch(context))
        return lambda images, target: ours.step(losses, images, target)
    if name == "as released":
        by_tensor = mask == "tensor"
        published = peers.PublishedESAM(
            params,
            base_optimizer,
            RHO,
            beta=beta if by_tensor else 1.0,
            gamma=(num_selected(gamma, sizes.batch) + 1) / sizes.batch if gamma < 1.0 else gamma,
            element_beta=1.0 if by_tensor else beta,
        )
        return lambda images, target: published.step(losses, images, target)

    def plain(images: Tensor, target: Tensor) -> None:
        with _autocast(context.device, dtype):
            loss = F.cross_entropy(model(images), target)
        loss.backward()
        base_optimizer.step()
        base_optimizer.zero_grad()

    return plain


def _captured(step: Callable[[Tensor, Tensor], Any], *batch: Tensor) -> Callable[[Tensor, Tensor], Any]:
    """``step`` once all its graphs are there: each draw of the pool runs eagerly first, and is captured after that."""
    for _ in range(WARMUP_STEPS + 2 * DRAW_POOL):
        step(*batch)
    return step


def _autocast(device: torch.device, dtype: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device.type, DTYPES[dtype]) if dtype != "fp32" else contextlib.nullcontext()


def per_sample_losses(
    model: nn.Module, criterion: Callable[[Tensor, Tensor], Tensor], device: torch.device, dtype: str
) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss for each sample, as a function of a batch."""

    def losses(images: Tensor, target: Tensor) -> Tensor:
        with _autocast(device, dtype):
            return criterion(model(images), target)

    return losses
