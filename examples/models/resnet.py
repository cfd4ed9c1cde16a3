"""ResNets with the activation after the sum: ResNet-18 for 32x32 images, ResNet-50 and ResNet-101 for ImageNet."""

from __future__ import annotations

from torch import Tensor, nn


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


class BottleneckResNet(nn.Module):
    """ResNet-50 (``blocks`` 3, 4, 6, 3) and ResNet-101 (3, 4, 23, 3) for ImageNet, initialised as He et al. (2015).

    The stride is in the 3x3 convolution, as in torchvision ("ResNet v1.5").
    """

    WIDTHS = (64, 128, 256, 512)

    def __init__(self, channels: int, classes: int, blocks: tuple[int, ...]) -> None:
        super().__init__()
        width = self.WIDTHS[0]
        stem = convolution(channels, width, kernel=7, stride=2)
        self.stem = nn.Sequential(*stem, nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1))
        layers: list[nn.Module] = []
        channels = width
        for stage, (width, count) in enumerate(zip(self.WIDTHS, blocks)):
            for block in range(count):
                layers.append(Bottleneck(channels, width, stride=2 if stage > 0 and block == 0 else 1))
                channels = Bottleneck.EXPANSION * width
        self.blocks = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes)
        initialise_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(images)).mean(dim=(2, 3)))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions to four times the width, and a 1x1 on the shortcut where the shape changes."""

    EXPANSION = 4

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        outputs = self.EXPANSION * width
        self.residual = nn.Sequential(
            *(*convolution(channels, width, kernel=1), nn.ReLU()),
            *(*convolution(width, width, stride=stride), nn.ReLU()),
            *convolution(width, outputs, kernel=1),
        )
        same = stride == 1 and channels == outputs
        projection = () if same else convolution(channels, outputs, kernel=1, stride=stride)
        self.shortcut = nn.Sequential(*projection)

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.relu(self.residual(images) + self.shortcut(images))


def convolution(channels: int, width: int, kernel: int = 3, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    """A convolution and its BatchNorm, which takes the place of a bias."""
    layer = nn.Conv2d(channels, width, kernel, stride=stride, padding=kernel // 2, bias=False)
    return layer, nn.BatchNorm2d(width)


def initialise_convolutions(model: nn.Module) -> None:
    """Normal weights of variance 2 / fan-out in every convolution (He et al., 2015)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
