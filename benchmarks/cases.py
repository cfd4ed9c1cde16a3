"""What is measured: the parameter lists of published networks, logits and images.

A network is here its list of parameter shapes, in the order of ``model.parameters()``, made by as little code as says
what the network is. The numbers of parameters are tested against those that the papers and model zoos state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

Shape = tuple[int, ...]


def convolution(inputs: int, outputs: int, kernel: int) -> list[Shape]:
    return [(outputs, inputs, kernel, kernel)]


def batch_norm(width: int) -> list[Shape]:
    return [(width,), (width,)]


def linear(inputs: int, outputs: int) -> list[Shape]:
    return [(outputs, inputs), (outputs,)]


def resnet18(classes: int = 10) -> list[Shape]:
    """ResNet-18 for 32x32 images (He et al., 2016): 3x3 stem, BasicBlocks, projections where the shape changes."""
    shapes = convolution(3, 64, 3) + batch_norm(64)
    inputs = 64
    for width in (64, 128, 256, 512):
        for block in range(2):
            shapes += convolution(inputs, width, 3) + batch_norm(width)
            shapes += convolution(width, width, 3) + batch_norm(width)
            if block == 0 and inputs != width:
                shapes += convolution(inputs, width, 1) + batch_norm(width)
            inputs = width
    return shapes + linear(512, classes)


def wide_resnet(depth: int = 28, widen: int = 10, classes: int = 10) -> list[Shape]:
    """WRN-28-10 (Zagoruyko and Komodakis, 2016): pre-activation blocks, a 1x1 projection at the start of a stage."""
    shapes = convolution(3, 16, 3)
    inputs = 16
    for width in (16 * widen, 32 * widen, 64 * widen):
        for _ in range((depth - 4) // 6):
            shapes += batch_norm(inputs) + convolution(inputs, width, 3)
            shapes += batch_norm(width) + convolution(width, width, 3)
            if inputs != width:
                shapes += convolution(inputs, width, 1)
            inputs = width
    return shapes + batch_norm(inputs) + linear(inputs, classes)


def pyramidnet(depth: int = 110, alpha: int = 270, classes: int = 10) -> list[Shape]:
    """PyramidNet (Han et al., 2017): every block alpha / blocks wider than the last; shortcuts padded with zeros."""
    blocks = 3 * ((depth - 2) // 6)
    shapes = convolution(3, 16, 3) + batch_norm(16)
    inputs = 16
    for block in range(1, blocks + 1):
        width = math.floor(16 + alpha * block / blocks)
        shapes += batch_norm(inputs) + convolution(inputs, width, 3)
        shapes += batch_norm(width) + convolution(width, width, 3) + batch_norm(width)
        inputs = width
    return shapes + batch_norm(inputs) + linear(inputs, classes)


def resnet50(classes: int = 1000) -> list[Shape]:
    """ResNet-50 for ImageNet: bottlenecks, each stage beginning with a projection."""
    shapes = convolution(3, 64, 7) + batch_norm(64)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += convolution(inputs, width, 1) + batch_norm(width)
            shapes += convolution(width, width, 3) + batch_norm(width)
            shapes += convolution(width, 4 * width, 1) + batch_norm(4 * width)
            if block == 0:
                shapes += convolution(inputs, 4 * width, 1) + batch_norm(4 * width)
            inputs = 4 * width
    return shapes + linear(inputs, classes)


def vit_small(patch: int = 16, width: int = 384, depth: int = 12, image: int = 224, classes: int = 1000) -> list[Shape]:
    """ViT-S/16 (Touvron et al., 2021): class token, learned positions, qkv in one matrix."""
    norm = [(width,), (width,)]
    shapes: list[Shape] = [(1, 1, width), (1, (image // patch) ** 2 + 1, width), (width, 3, patch, patch), (width,)]
    for _ in range(depth):
        shapes += norm + linear(width, 3 * width) + linear(width, width)
        shapes += norm + linear(width, 4 * width) + linear(4 * width, width)
    return shapes + norm + linear(width, classes)


def small_cnn(classes: int = 10) -> list[Shape]:
    """Six 3x3 convolutions with BatchNorm, 0.3 million parameters: no paper's, of the size of a tutorial's."""
    shapes, inputs = [], 3
    for width in (32, 32, 64, 64, 128, 128):
        shapes += convolution(inputs, width, 3) + batch_norm(width)
        inputs = width
    return shapes + linear(inputs, classes)


def small_tensors(count: int = 10, size: int = 100) -> list[Shape]:
    """Nothing to compute: what is left is the host's time."""
    return [(size,)] * count


PARAMETERS: dict[str, Callable[[], list[Shape]]] = {
    "ResNet-18": resnet18,
    "WRN-28-10": wide_resnet,
    "PyramidNet-110": pyramidnet,
    "ResNet-50": resnet50,
    "ViT-S/16": vit_small,
}
# One tensor, for the bandwidth of a GPU; too large for a CPU's minutes. The smaller one is measured stage by stage.
LARGE = "flat 100 million"
GPU_PARAMETERS: dict[str, Callable[[], list[Shape]]] = {
    **PARAMETERS,
    LARGE: lambda: [(10**8,)],
    "flat billion": lambda: [(10**9,)],
}

OVERHEAD: dict[str, Callable[[], list[Shape]]] = {
    "10 tensors of 100": small_tensors,
    "161 tensors of 100": lambda: small_tensors(len(resnet50())),
}

LOGITS: list[Shape] = [(128, 10), (512, 1000), (4096, 32000), (64, 128 * 1024)]
IMAGES: list[Shape] = [(128, 3, 32, 32), (512, 3, 224, 224)]
# (logits, images) of losses + selection + gather.
SELECTIONS: list[tuple[Shape, Shape]] = [((128, 10), (128, 3, 32, 32)), ((512, 1000), (512, 3, 32, 32))]


def numel(shapes: list[Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes)


@dataclass(frozen=True)
class Sizes:
    """How large a run of the suites is."""

    parameters: dict[str, Callable[[], list[Shape]]]
    overhead: dict[str, Callable[[], list[Shape]]]
    logits: list[Shape]
    images: list[Shape]
    selections: list[tuple[Shape, Shape]]
    network: str  # of examples.models
    batch: int
    compiles: bool  # whether torch.compile is among the peers
    copy_bytes: int | None = None
    min_rounds: int = 5
    image: int = 32  # pixels on a side, of the whole steps
    classes: int = 10


def sizes_of(device: torch.device) -> Sizes:
    """What is published in benchmarks/results: batch 32 on a CPU, 128 on a GPU."""
    on_gpu = device.type == "cuda"
    parameters = GPU_PARAMETERS if on_gpu else PARAMETERS
    return Sizes(parameters, OVERHEAD, LOGITS, IMAGES, SELECTIONS, "resnet18", 128 if on_gpu else 32, compiles=True)


TINY = Sizes(
    parameters={"tiny": lambda: convolution(3, 8, 3) + batch_norm(8) + linear(8, 4)},
    overhead={"2 tensors of 10": lambda: small_tensors(2, 10)},
    logits=[(8, 10)],
    images=[(8, 3, 4, 4)],
    selections=[((8, 10), (8, 3, 4, 4))],
    network="cnn",
    batch=4,
    compiles=False,
    copy_bytes=1 << 16,
    min_rounds=2,
)
