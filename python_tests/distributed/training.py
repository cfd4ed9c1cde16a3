"""What the tests of this tier train: a small model with awkward shapes, and ESAM in one process to compare with."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from esam_kernels import ESAM, cross_entropy

SAMPLES, FEATURES, CLASSES = 8, 6, 5
SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
ADAMW = {"base_optimizer": torch.optim.AdamW, "lr": 0.01}
TENSOR = {"mask": "tensor", "beta": 0.6, "rho": 0.2, "seed": 3}
ELEMENT = {"mask": "element", "beta": 0.6, "rho": 0.2, "seed": 3}
ADAPTIVE = {"mask": "element", "beta": 0.6, "rho": 0.5, "seed": 3, "adaptive": True, "eta": 0.01}


def build_model(batch_norm: bool = False) -> nn.Sequential:
    """Odd widths: on two ranks shards are uneven, begin within a Philox counter, or (the scale) are empty on one."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(FEATURES, 7),
        nn.BatchNorm1d(7) if batch_norm else nn.LayerNorm(7),
        nn.GELU(),
        nn.Linear(7, 9),
        nn.GELU(),
        nn.Linear(9, CLASSES),
        Scale(),
    )


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1, 3), 0.5))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.scale.sum()


def batches(steps: int, ranks: int = 2) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """For every step one batch for each rank."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield [
            (
                torch.randn(SAMPLES, FEATURES, generator=generator),
                torch.randint(CLASSES, (SAMPLES,), generator=generator),
            )
            for _ in range(ranks)
        ]


def joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([inputs for inputs, _ in parts]), torch.cat([targets for _, targets in parts])


def losses_of(model: nn.Module) -> Any:
    return lambda inputs, targets: cross_entropy(model(inputs), targets)


def weights(model: nn.Module) -> list[Tensor]:
    """Whole parameters, gathered from the ranks where they are sharded."""
    return [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for p in model.parameters()]


def shard(model: nn.Module, **kwargs: Any) -> nn.Module:
    """FSDP2 with a group for each layer with parameters of its own, and the root for the rest."""
    kwargs.setdefault("mesh", init_device_mesh("cpu", (dist.get_world_size(),)))
    for layer in (model[0], model[3]):  # type: ignore[index]
        fully_shard(layer, **kwargs)
    return fully_shard(model, **kwargs)


def wrap(model: nn.Module, **kwargs: Any) -> nn.Module:
    # Buckets of 100 bytes: several of them, as in a real model.
    return DistributedDataParallel(model, bucket_cap_mb=100 / 2**20, **kwargs)


def train_on_ranks(kind: str, options: dict[str, Any], steps: int, step: dict[str, Any], **kwargs: Any) -> list[Tensor]:
    """Weights after ``steps`` steps on this rank's batches."""
    model = {"ddp": wrap, "fsdp": shard}[kind](build_model(), **kwargs)
    optimizer = ESAM(model.parameters(), model=model, **options)
    for parts in batches(steps, dist.get_world_size()):
        optimizer.step(losses_of(model), *parts[dist.get_rank()], **step)
    return weights(model)


def train_alone(
    options: dict[str, Any],
    steps: int,
    ranks: int = 2,
    parts: int = 1,
    max_grad_norm: float | None = None,
    scores: Any = None,
) -> list[Tensor]:
    """One process, one perturbation from the gradient of all ranks' batches; each batch selects its own share.

    ``scores(model, inputs, targets)``, at w, ranks the samples of each batch; None: the rise of their losses does.
    """
    model = build_model()
    optimizer = ESAM(model.parameters(), model=model, **options)
    losses = losses_of(model)
    for step in batches(steps, ranks):
        sums = [torch.zeros_like(param) for param in model.parameters()]
        for number in range(parts):
            if number:
                optimizer.restore()
            micro = [(inputs.chunk(parts)[number], targets.chunk(parts)[number]) for inputs, targets in step]
            optimizer.zero_grad()
            before = [losses(*first_part(optimizer, part)) for part in micro]
            ranked = [scores(model, *part) for part in micro] if scores else []
            optimizer.backward(torch.cat(before).mean())
            optimizer.first_step(zero_grad=True)
            with torch.no_grad():
                needs_loss_after = optimizer._phases.ranking.needs_loss_after
                after = ranked or [losses(*part) if needs_loss_after else None for part in micro]
                before = [torch.zeros_like(score) for score in ranked] or before
            chosen = micro
            if optimizer.ascent_share == 1.0:
                chosen = [optimizer.select(b, a, *part) for b, a, part in zip(before, after, micro)]
            losses(*joined(chosen)).mean().backward()
            sums = [total + param.grad / parts for total, param in zip(sums, model.parameters())]
        for param, total in zip(model.parameters(), sums):
            param.grad = total
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.second_step(zero_grad=True)
    return weights(model)


def first_part(optimizer: ESAM, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What pass 1 takes of a batch."""
    count = round(optimizer.ascent_share * len(batch[0]))
    return tuple(tensor[:count] for tensor in batch)


def head_products(model: nn.Module, inputs: Tensor, targets: Tensor, eta: float | None = None) -> Tensor:
    """grad l_i . T^2 grad L over the head, for each sample: what ranking="first_order" computes, by autograd.

    T is |w| + eta, or 1 where ``eta`` is None.
    """
    params = list(model[5].parameters())  # type: ignore[index]
    each = losses_of(model)(inputs, targets)
    whole = torch.autograd.grad(each.mean(), params, retain_graph=True)
    if eta is not None:
        whole = tuple(g * (w.detach().abs() + eta) ** 2 for g, w in zip(whole, params))
    own = [torch.autograd.grad(loss, params, retain_graph=True) for loss in each]
    return torch.stack([sum((g * o).sum() for g, o in zip(whole, mine)) for mine in own])  # type: ignore[misc]


def train_on_joined_batches(options: dict[str, Any], steps: int, ranks: int = 2) -> list[Tensor]:
    """One process that takes the batches of all ranks as one."""
    model = build_model()
    optimizer = ESAM(model.parameters(), model=model, **options)
    for step in batches(steps, ranks):
        optimizer.step(losses_of(model), *joined(step))
    return weights(model)


def train_replicas(options: dict[str, Any], steps: int, ranks: int = 2, parts_per_rank: int = 1) -> list[Tensor]:
    """One process, a replica for each rank with a perturbation of its own; the second gradients are averaged."""
    replicas = []
    for _ in range(ranks):
        model = copy.deepcopy(build_model())
        replicas.append((model, ESAM(model.parameters(), model=model, **options)))
    for batch in batches(steps, ranks):
        sums: list[Tensor] | None = None
        for (model, optimizer), (inputs, targets) in zip(replicas, batch):
            for number, part in enumerate(zip(inputs.chunk(parts_per_rank), targets.chunk(parts_per_rank))):
                grads = _second_gradients(model, optimizer, part)
                if number < parts_per_rank - 1:
                    optimizer.restore()
                grads = [grad / (ranks * parts_per_rank) for grad in grads]
                sums = grads if sums is None else [a + b for a, b in zip(sums, grads)]
        for model, optimizer in replicas:
            for param, grad in zip(model.parameters(), sums or []):
                param.grad = grad.clone()
            optimizer.second_step(zero_grad=True)
    return weights(replicas[0][0])


def _second_gradients(model: nn.Module, optimizer: ESAM, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
    losses = losses_of(model)
    before = losses(*first_part(optimizer, batch))
    optimizer.backward(before.mean())
    optimizer.first_step(zero_grad=True)
    after = None
    if optimizer._phases.ranking.needs_loss_after:
        with torch.no_grad():
            after = losses(*batch)
    chosen = optimizer.select(before, after, *batch) if optimizer.ascent_share == 1.0 else batch
    losses(*chosen).mean().backward()
    grads = [param.grad for param in model.parameters()]
    optimizer.zero_grad()
    return [torch.zeros_like(p) if grad is None else grad for p, grad in zip(model.parameters(), grads)]


def assert_same(weights: list[list[Tensor]], expected: list[Tensor], atol: float = 1e-5) -> None:
    """Ranks equal bit for bit, and equal to ``expected`` up to rounding."""
    for other in weights[1:]:
        for ours, theirs in zip(weights[0], other, strict=True):
            assert torch.equal(ours, theirs)
    for got, wanted in zip(weights[0], expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=atol)
