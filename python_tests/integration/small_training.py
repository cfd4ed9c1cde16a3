"""What the tests of this tier train: a small net with BatchNorm and dropout, over batches that can be drawn again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esam_kernels import ESAM, RandomState, cross_entropy

CLASSES = 4
FEATURES = 8


def small_net(seed: int = 0, dropout: float = 0.2, batch_norm: bool = True) -> nn.Module:
    torch.manual_seed(seed)
    norm = nn.BatchNorm1d(16) if batch_norm else nn.Identity()
    return nn.Sequential(nn.Linear(FEATURES, 16), norm, nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, CLASSES))


def batch(number: int, samples: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + number)
    inputs = torch.randn(samples, FEATURES, generator=generator)
    return inputs, torch.randint(CLASSES, (samples,), generator=generator)


def losses_of(model: nn.Module):
    def losses(inputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(model(inputs), targets)

    return losses


def three_phases(optimizer: ESAM, losses, inputs: Tensor, targets: Tensor, scale=lambda loss: loss) -> Tensor:
    """The loop of the manual up to the second backward: the weights are left perturbed."""
    noise = RandomState()
    loss_before = losses(inputs, targets)
    optimizer.backward(scale(loss_before.mean()))
    optimizer.first_step(zero_grad=True)
    with torch.no_grad(), noise.replay():
        loss_after = losses(inputs, targets)
    inputs, targets = optimizer.select(loss_before, loss_after, inputs, targets)
    scale(losses(inputs, targets).mean()).backward()
    return loss_before.mean().detach()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the weights and buffers."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(bits(first[name]), bits(second[name]))]
    assert not different, f"these differ: {different}"


def assert_different(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert any(not torch.equal(first[name], second[name]) for name in first)
