"""Small models and their steps, made twice alike."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from esam_kernels import ESAM, cross_entropy

BATCH, FEATURES, CLASSES = 48, 40, 10

# The learning rate as torch wants it where a graph is captured, and weight decay, in each.
BASES: dict[str, Callable[[list[nn.Parameter], torch.device], torch.optim.Optimizer]] = {
    "SGD": lambda params, _: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "AdamW": lambda params, device: torch.optim.AdamW(
        params, lr=torch.tensor(1e-3, device=device), weight_decay=0.05, capturable=device.type == "cuda"
    ),
}


def model_on(device: torch.device, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(FEATURES, 64), nn.LayerNorm(64), nn.ReLU(), nn.Dropout(dropout), nn.Linear(64, 33), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(33, CLASSES)).to(device, dtype)


def batches(device: torch.device, count: int, size: int = BATCH) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, FEATURES, generator=generator).to(device),
            torch.randint(CLASSES, (size,), generator=generator).to(device),
        )
        for _ in range(count)
    ]


class Training:
    """A model, ESAM over it, and the closure of its step."""

    def __init__(
        self,
        device: torch.device,
        backend: str,
        base: str = "SGD",
        autocast: bool = False,
        dropout: float = 0.0,
        **esam: Any,
    ) -> None:
        self.device, self.autocast = device, autocast
        self.model = model_on(device, dropout)
        params = list(self.model.parameters())
        self.optimizer = ESAM(params, BASES[base](params, device), backend=backend, model=self.model, **esam)

    def losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        context = torch.autocast(self.device.type, torch.bfloat16) if self.autocast else contextlib.nullcontext()
        with context:
            logits = self.model(inputs)
        return cross_entropy(logits, targets)

    def step(self, batch: tuple[Tensor, Tensor], **options: Any) -> Tensor:
        return self.optimizer.step(self.losses, *batch, **options)

    def weights(self) -> list[Tensor]:
        return [param.detach().clone() for param in self.model.parameters()]


def assert_same_weights(one: Training, other: Training) -> None:
    for a, b in zip(one.weights(), other.weights(), strict=True):
        assert torch.equal(a, b), (a - b).abs().max()


def set_lr(optimizer: ESAM, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
