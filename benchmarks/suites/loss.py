"""Losses per sample, forward and backward; the gathering of B+; and losses + selection + gather as a step runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.cases import Shape
from benchmarks.harness import Contender, buffer_sets
from benchmarks.rows import Row, of_measurement
from benchmarks.suites import GAMMA, INDUCTOR, Case, Context
from esam_kernels import cross_entropy, gather, ops, select

Run = Callable[..., Any]
# Compiled once a shape, some seconds each.
MAX_COMPILED_NUMEL = 1 << 20
SELECTED = 512  # the batch whose selection alone is timed


def cases(context: Context) -> Iterator[Case]:
    for logits, images in context.sizes.selections:
        yield _selection(context, logits, images)
    for shape in context.sizes.logits:
        yield _cross_entropy(context, shape, backward=False)
        yield _cross_entropy(context, shape, backward=True)
    yield _select(context, SELECTED)
    for shape in context.sizes.images:
        yield _gather(context, shape)


def _title(shape: Shape) -> str:
    return "x".join(str(size) for size in shape)


def _batch(context: Context, shape: Shape) -> tuple[Tensor, Tensor]:
    logits = torch.randn(shape, device=context.device)
    return logits, torch.randint(shape[1], shape[:1], device=context.device)


def _case(
    context: Context,
    title: str,
    make_buffers: Callable[[], tuple[Tensor, ...]],
    runs: dict[str, Run],
    bytes_moved: int,
    seconds: float,
    not_capturable: tuple[str, ...] = (),
) -> Case:
    """The ``runs``, called with one set of buffers after the other, so that each is cold when its turn comes."""

    def run(seconds: float) -> list[Row]:
        one = make_buffers()
        count = buffer_sets(sum(tensor.nbytes for tensor in one), context.device)
        sets = [one, *(make_buffers() for _ in range(1, count))]
        contenders = [
            Contender(
                name,
                [lambda function=function, buffers=buffers: function(*buffers) for buffers in sets],
                bytes_moved=bytes_moved,
                capturable=name not in not_capturable,
            )
            for name, function in runs.items()
        ]
        measurement = context.measure(contenders, seconds)
        return of_measurement("loss", title, measurement, context.device, unit="us", backend=context.backend_name())

    return Case(title, seconds, run, has_inductor=INDUCTOR in runs)


def _with_compiled(context: Context, runs: dict[str, Run], function: Run, numel: int) -> dict[str, Run]:
    if not context.sizes.compiles or context.inductor == "without" or numel > MAX_COMPILED_NUMEL:
        return runs
    holder: list[Run] = []

    def compiled(*buffers: Any) -> Any:
        if not holder:
            holder.append(peers.compiled(function))
        return holder[0](*buffers)

    others = {} if context.inductor == "only" else runs
    return {"ours": runs["ours"], **others, INDUCTOR: compiled}


def _cross_entropy(context: Context, shape: Shape, backward: bool) -> Case:
    def forward_only(function: Run) -> Run:
        return torch.no_grad()(function)

    def with_backward(function: Run) -> Run:
        def run(logits: Tensor, target: Tensor) -> Tensor:
            logits = logits.detach().requires_grad_()
            return torch.autograd.grad(function(logits, target).mean(), logits)[0]

        return run

    wrap = with_backward if backward else forward_only
    numel = shape[0] * shape[1]
    runs = {"ours": wrap(cross_entropy), "library": wrap(peers.library_cross_entropy)}
    if not backward:
        runs = _with_compiled(context, runs, forward_only(peers.library_cross_entropy), numel)
        for name in context.other_backends():
            runs[f"ours, {name}"] = lambda logits, target, name=name: ops.cross_entropy_forward(
                logits, target, 0.0, -100, backend=name
            )
    # Forward reads the logits; backward reads them again and writes their gradient.
    return _case(
        context,
        f"cross-entropy {_title(shape)}{' + backward' if backward else ''}",
        lambda: _batch(context, shape),
        runs,
        numel * 4 * (3 if backward else 1),
        seconds=2.0,
    )


def _selection(context: Context, shape: Shape, images: Shape) -> Case:
    """loss_after from the logits at w + e, then B+ and its images and labels."""
    k = max(1, round(GAMMA * shape[0]))

    def buffers() -> tuple[Tensor, ...]:
        before = torch.rand(shape[0], device=context.device)
        return before, *_batch(context, shape), torch.randn(images, device=context.device)

    @torch.no_grad()
    def ours(before: Tensor, logits: Tensor, target: Tensor, pixels: Tensor) -> Any:
        return gather(select(before, cross_entropy(logits, target), k), pixels, target)

    @torch.no_grad()
    def published(before: Tensor, logits: Tensor, target: Tensor, pixels: Tensor) -> Any:
        return peers.published_select(before, peers.library_cross_entropy(logits, target), GAMMA, pixels, target)

    @torch.no_grad()
    def library(before: Tensor, logits: Tensor, target: Tensor, pixels: Tensor) -> Any:
        return peers.library_select(before, peers.library_cross_entropy(logits, target), k, pixels, target)

    runs = _with_compiled(context, {"ours": ours, "as released": published, "library": library}, library, 0)
    for name in context.other_backends():  # in one launch, where the backend has it
        runs[f"ours, {name}"] = lambda before, logits, target, pixels, name=name: ops.select_gather(
            before, logits, [pixels, target], k, target, backend=name
        )
    image = images[1] * images[2] * images[3]
    moved = 4 * (shape[0] * shape[1] + 2 * k * image)
    title = f"losses {_title(shape)} + selection + gather {_title(images)}"
    return _case(context, title, buffers, runs, moved, seconds=4.0, not_capturable=("as released",))


def _select(context: Context, samples: int) -> Case:
    """B+ alone, from losses."""
    k = max(1, round(GAMMA * samples))
    runs: dict[str, Run] = {
        "ours": lambda before, after: select(before, after, k),
        "library": lambda before, after: (after - before).topk(k).indices.sort().values,
    }

    for name in context.other_backends():
        runs[f"ours, {name}"] = lambda before, after, name=name: ops.select(before, after, k, backend=name)

    def buffers() -> tuple[Tensor, ...]:
        return torch.rand(samples, device=context.device), torch.rand(samples, device=context.device)

    return _case(context, f"select {samples}", buffers, runs, 8 * samples + 8 * k, 1.0)


def _gather(context: Context, images: Shape) -> Case:
    k = max(1, round(GAMMA * images[0]))
    indices = torch.randperm(images[0])[:k].sort().values.to(context.device)
    mask = torch.zeros(images[0], dtype=torch.bool, device=context.device).index_fill_(0, indices, True)
    runs: dict[str, Run] = {
        "ours": lambda pixels: gather(indices, pixels),
        "as released": lambda pixels: pixels[mask],
        "library": lambda pixels: pixels.index_select(0, indices),
    }
    for name in context.other_backends():
        runs[f"ours, {name}"] = lambda pixels, name=name: ops.gather([pixels], indices, backend=name)
    moved = 2 * 4 * k * images[1] * images[2] * images[3]

    def buffers() -> tuple[Tensor, ...]:
        return (torch.randn(images, device=context.device),)

    return _case(context, f"gather {_title(images)}", buffers, runs, moved, 2.0, not_capturable=("as released",))
