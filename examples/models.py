"""The networks that the examples train: a small BatchNorm CNN, and ResNet-18 in its CIFAR form."""

from __future__ import annotations

from torch import Tensor, nn

MODELS = ("cnn", "resnet18")


def build_model(name: str, channels: int, size: int, classes: int) -> nn.Module:
    """A freshly initialised network for square images of ``channels`` channels and ``size`` pixels a side."""
    return ResNet18(channels, classes) if name == "resnet18" else SmallCNN(channels, size, classes)


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


class ResNet18(nn.Module):
    """ResNet-18 (He et al., 2016) with a 3x3 stem and no max pooling, as is usual for 32x32 images."""

    WIDTHS = (64, 128, 256, 512)

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(*convolution(channels, self.WIDTHS[0]), nn.ReLU())
        blocks: list[nn.Module] = []
        channels = self.WIDTHS[0]
        for stage, width in enumerate(self.WIDTHS):
            blocks += [ResidualBlock(channels, width, stride=1 if stage == 0 else 2), ResidualBlock(width, width)]
            channels = width
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(images)).mean(dim=(2, 3)))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, and a 1x1 convolution on the shortcut where the shape changes."""

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            *convolution(channels, width, stride=stride), nn.ReLU(), *convolution(width, width)
        )
        same = stride == 1 and channels == width
        self.shortcut = nn.Identity() if same else nn.Sequential(*convolution(channels, width, kernel=1, stride=stride))

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.relu(self.residual(images) + self.shortcut(images))


def convolution(channels: int, width: int, kernel: int = 3, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    """A convolution and its BatchNorm, which takes the place of a bias."""
    layer = nn.Conv2d(channels, width, kernel, stride=stride, padding=kernel // 2, bias=False)
    return layer, nn.BatchNorm2d(width)
