"""A network small enough for digits on a CPU."""

from __future__ import annotations

from torch import Tensor, nn

from .resnet import convolution


class SmallCNN(nn.Module):
    """3x3 convolutions, each followed by BatchNorm, ReLU and a halving of the resolution, down to 2x2 pixels.

    The width starts at 32 and doubles each time: two layers for the digits' 8x8 pixels, four for CIFAR's 32x32.
    """

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 32
        while size > 2:
            layers += [*convolution(channels, width), nn.ReLU(), nn.MaxPool2d(2)]
            channels, width, size = width, 2 * width, size // 2
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels * size * size, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).flatten(1))
