"""Residual networks that normalise before each convolution: WideResNet-28-10 and PyramidNet-110, for 32x32 images."""

from __future__ import annotations

from torch import Tensor, nn

from .resnet import initialise_convolutions

STEM_WIDTH = 16
STAGES = 3
CONVOLUTIONS_PER_BLOCK = 2


class WideResNet(nn.Module):
    """WRN-``depth``-``widen`` (Zagoruyko and Komodakis, 2016), without dropout."""

    def __init__(self, channels: int, classes: int, depth: int = 28, widen: int = 10) -> None:
        super().__init__()
        self.stem = conv3x3(channels, STEM_WIDTH)
        blocks: list[nn.Module] = []
        channels = STEM_WIDTH
        for stage in range(STAGES):
            width = STEM_WIDTH * 2**stage * widen
            for block in range((depth - 4) // (STAGES * CONVOLUTIONS_PER_BLOCK)):
                blocks.append(WideBlock(channels, width, stride=2 if stage > 0 and block == 0 else 1))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, classes)
        initialise_convolutions(self)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        maps = nn.functional.relu(self.norm(self.blocks(self.stem(images))))
        return self.classifier(maps.mean(dim=(2, 3)))


class WideBlock(nn.Module):
    """BatchNorm, ReLU and a 3x3 convolution, twice; a 1x1 convolution on the shortcut where the width changes.

    There the shortcut, too, starts from the normalised and rectified maps.
    """

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = conv3x3(channels, width, stride)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        same = stride == 1 and channels == width
        self.shortcut = None if same else nn.Conv2d(channels, width, 1, stride=stride, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        active = nn.functional.relu(self.norm1(maps))
        shortcut = maps if self.shortcut is None else self.shortcut(active)
        residual = self.conv2(nn.functional.relu(self.norm2(self.conv1(active))))
        return residual + shortcut


class PyramidNet(nn.Module):
    """PyramidNet (Han et al., 2017) of basic blocks: each is wider than the last by ``alpha`` / number of blocks."""

    def __init__(self, channels: int, classes: int, depth: int = 110, alpha: int = 270) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv3x3(channels, STEM_WIDTH), nn.BatchNorm2d(STEM_WIDTH))
        per_stage = (depth - 2) // (STAGES * CONVOLUTIONS_PER_BLOCK)
        count = STAGES * per_stage
        widths = [STEM_WIDTH + alpha * block // count for block in range(count + 1)]
        self.blocks = nn.Sequential(
            *(
                PyramidBlock(widths[block], widths[block + 1], stride=2 if block in (per_stage, 2 * per_stage) else 1)
                for block in range(count)
            )
        )
        self.norm = nn.BatchNorm2d(widths[-1])
        self.classifier = nn.Linear(widths[-1], classes)
        initialise_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        maps = nn.functional.relu(self.norm(self.blocks(self.stem(images))))
        return self.classifier(maps.mean(dim=(2, 3)))


class PyramidBlock(nn.Module):
    """BatchNorm, 3x3 convolution, BatchNorm, ReLU, 3x3 convolution, BatchNorm.

    The shortcut has no parameters: averages of 2x2 pixels where the resolution halves, zeros as the channels it lacks.
    """

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = conv3x3(channels, width, stride)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.norm3 = nn.BatchNorm2d(width)
        self.stride = stride
        self.lacking = width - channels

    def forward(self, maps: Tensor) -> Tensor:
        residual = self.conv1(self.norm1(maps))
        residual = self.norm3(self.conv2(nn.functional.relu(self.norm2(residual))))
        shortcut = maps if self.stride == 1 else nn.functional.avg_pool2d(maps, self.stride)
        return residual + nn.functional.pad(shortcut, (0, 0, 0, 0, 0, self.lacking))


def conv3x3(channels: int, width: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
