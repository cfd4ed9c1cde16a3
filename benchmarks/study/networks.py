"""The networks of the study: small enough for many seeds on a CPU, with BatchNorm, with LayerNorm and with neither."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.paper import ROOT  # noqa: F401  (puts examples/ on the path)

# isort: split
from models import build_model


def conv1d(length: int = 40, channels: int = 64, classes: int = 10) -> nn.Module:
    """Three convolutions of kernels 5, 3, 3 and stride 2, each followed by BatchNorm and ReLU, and a linear layer."""
    layers: list[nn.Module] = []
    inputs = 1
    for kernel in (5, 3, 3):
        convolution = nn.Conv1d(inputs, channels, kernel, stride=2, padding=kernel // 2, bias=False)
        layers += [convolution, nn.BatchNorm1d(channels), nn.ReLU()]
        inputs, length = channels, (length + 1) // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * length, classes))


def mlp(length: int = 40, width: int = 256, classes: int = 10) -> nn.Module:
    """Two hidden layers, no normalization."""
    hidden = [nn.Linear(length, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, classes))


class Transformer(nn.Module):
    """A signal in patches of 4 numbers; two pre-norm encoder layers; the mean over positions; a linear layer."""

    PATCH = 4

    def __init__(self, length: int = 40, width: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.embed = nn.Conv1d(1, width, self.PATCH, stride=self.PATCH)
        self.position = nn.Parameter(
            nn.init.normal_(self.embed.weight.new_empty(1, length // self.PATCH, width), std=0.02)
        )
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, signals: Tensor) -> Tensor:
        """Logits (b, classes) of signals (b, 1, length)."""
        positions = self.embed(signals).transpose(1, 2) + self.position
        return self.head(self.encoder(positions).mean(dim=1))


def digits_cnn() -> nn.Module:
    """The network that ``examples/train.py`` trains on the digits."""
    return build_model("cnn", 1, 8, 10)


class Residual(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut (He et al., 2016)."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != channels:
            convolution = nn.Conv2d(inputs, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(channels))

    def forward(self, images: Tensor) -> Tensor:
        return functional.relu(self.body(images) + self.shortcut(images))


def small_resnet(classes: int = 10) -> nn.Module:
    """A residual network of 7 layers for 32x32 images: 16, 32 and 64 channels, at 16x16 pixels and below."""
    stem = [nn.Conv2d(3, 16, 3, 2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2)]
    network = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))
    return network.to(memory_format=torch.channels_last)


def plain_cnn(classes: int = 10) -> nn.Module:
    """Three 3x3 convolutions of stride 2 for 32x32 images, no normalization."""
    layers: list[nn.Module] = []
    inputs = 3
    for channels in (32, 64, 128):
        layers += [nn.Conv2d(inputs, channels, 3, 2, padding=1), nn.ReLU()]
        inputs = channels
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 4 * inputs, classes))
    return network.to(memory_format=torch.channels_last)
