"""The networks that the examples train: a small BatchNorm CNN for tries, and those of the paper.

They are written here, so that nothing but torch has to be installed. ResNet-50, ResNet-101 and ViT-S/16 have the
parameters of torchvision's and timm's, number by number, but not their names: who needs pretrained weights takes those.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .cnn import SmallCNN
from .preactivation import PyramidNet, WideResNet
from .resnet import BottleneckResNet, ResNet18
from .vit import VisionTransformer

# Name: the network of (channels, size, classes).
_BUILDERS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "cnn": SmallCNN,
    "resnet18": lambda channels, _, classes: ResNet18(channels, classes),
    "wrn28-10": lambda channels, _, classes: WideResNet(channels, classes, depth=28, widen=10),
    "pyramidnet110": lambda channels, _, classes: PyramidNet(channels, classes, depth=110, alpha=270),
    "resnet50": lambda channels, _, classes: BottleneckResNet(channels, classes, blocks=(3, 4, 6, 3)),
    "resnet101": lambda channels, _, classes: BottleneckResNet(channels, classes, blocks=(3, 4, 23, 3)),
    "vit-s16": lambda channels, size, classes: VisionTransformer(channels, size, classes),
}
MODELS = tuple(_BUILDERS)
# By how much a network shrinks its images. One that ends at one pixel cannot normalise a batch of one image.
REDUCTION = {"resnet18": 8, "wrn28-10": 4, "pyramidnet110": 4, "resnet50": 32, "resnet101": 32}


def build_model(name: str, channels: int, size: int, classes: int) -> nn.Module:
    """A freshly initialised network for square images of ``channels`` channels and ``size`` pixels a side.

    Raises:
        ValueError: no such network, or images of a size that it cannot take.
    """
    if name not in _BUILDERS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    return _BUILDERS[name](channels, size, classes)


def needs_two_images(name: str, size: int) -> bool:
    """Whether the BatchNorm of the network would see one value per channel in a batch of one image."""
    return name in REDUCTION and size <= REDUCTION[name]
