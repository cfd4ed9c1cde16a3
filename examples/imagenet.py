"""ImageNet as an image folder: ``train/<class>/*.JPEG`` and ``val/<class>/*.JPEG``, decoded while training goes on.

Training images are cropped and mirrored as for Inception (Szegedy et al., 2015), test images resized to 256 pixels and
cropped to 224 in the middle. All that is random follows from one number an image, drawn in the main process: how many
worker processes decode changes nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from data import UserError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

try:
    from PIL import Image
except ImportError:
    raise UserError("--data imagenet needs Pillow: pip install pillow") from None

SIZE = 224
RESIZED = 256
SUFFIXES = (".jpeg", ".jpg", ".png")
# Of ImageNet's training set, in units of 1/255.
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
# The crop's share of the image and its width / height; after so many misfits, the middle.
AREA, RATIO, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10
# The sharpness is measured on so many training images: all of them would take as long as an epoch.
PLAIN_IMAGES = 10_000


@dataclass
class ImageFolder:
    """The same to a training loop as :class:`data.DataSet`; labels int64 (n,) on ``device``."""

    train_files: list[str]
    train_labels: Tensor
    test_files: list[str]
    test_labels: Tensor
    classes: int
    workers: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    memory_format: torch.memory_format = torch.contiguous_format

    image_shape = (3, SIZE, SIZE)

    def to(self, device: torch.device) -> ImageFolder:
        train, test = self.train_labels.to(device), self.test_labels.to(device)
        return replace(self, train_labels=train, test_labels=test, device=device)

    def training_batches(self, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """The training set once, in the order and the crops that ``generator`` draws; the last may be smaller."""
        count = len(self.train_files)
        order = torch.randperm(count, generator=generator, device=generator.device)
        seeds = torch.randint(2**62, (count,), generator=generator, device=generator.device)
        files = [self.train_files[index] for index in order.tolist()]
        yield from self._batches(files, seeds.tolist(), self.train_labels[order], batch_size)

    def plain_training_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """At most ``PLAIN_IMAGES`` training images, evenly spaced, transformed as the test images are."""
        step = -(-len(self.train_files) // PLAIN_IMAGES)
        files = self.train_files[::step]
        yield from self._batches(files, [None] * len(files), self.train_labels[::step], batch_size)

    def test_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        files = self.test_files
        yield from self._batches(files, [None] * len(files), self.test_labels, batch_size)

    def _batches(
        self, files: list[str], seeds: Sequence[int | None], labels: Tensor, batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        pairs = list(zip(files, seeds))
        batches = [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]
        pinned = self.device.type == "cuda"
        loader: Any = DataLoader(Decoder(), None, sampler=batches, num_workers=self.workers, pin_memory=pinned)
        mean, std = (torch.tensor(value, device=self.device).reshape(1, 3, 1, 1) for value in (MEAN, STD))
        for (images, problem), part in zip(loader, labels.split(batch_size)):
            if problem:
                raise UserError(problem)
            images = images.to(self.device, non_blocking=True).contiguous(memory_format=self.memory_format)
            yield (images.float() - mean) / std, part


class Decoder(Dataset):
    """Pairs of a file and a seed (None: no augmentation) to images uint8 (b, 3, 224, 224), and what went wrong."""

    def __getitem__(self, pairs: list[tuple[str, int | None]]) -> tuple[Tensor, str]:
        images = torch.empty(len(pairs), 3, SIZE, SIZE, dtype=torch.uint8)
        for image, (file, seed) in zip(images, pairs):
            try:
                with Image.open(file) as opened:
                    decoded = opened.convert("RGB")
            except (OSError, SyntaxError, ValueError) as error:
                return images, f"{file}: not an image ({str(error).splitlines()[0]})"
            shown = middle(decoded) if seed is None else random_crop(decoded, random.Random(seed))
            pixels = torch.frombuffer(bytearray(shown.tobytes()), dtype=torch.uint8)
            image.copy_(pixels.reshape(SIZE, SIZE, 3).permute(2, 0, 1))
        return images, ""


def random_crop(image: Image.Image, draw: random.Random) -> Image.Image:
    """A window of random area and shape, resized to 224x224 and mirrored with probability 1/2."""
    left, top, width, height = draw_window(*image.size, draw)
    window = image.crop((left, top, left + width, top + height))
    resized = window.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else resized


def draw_window(width: int, height: int, draw: random.Random) -> tuple[int, int, int, int]:
    """(left, top, width, height) of the crop of an image ``width`` x ``height``."""
    for _ in range(TRIES):
        area = width * height * draw.uniform(*AREA)
        ratio = math.exp(draw.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return draw.randint(0, width - w), draw.randint(0, height - h), w, h
    w = min(width, max(1, round(height * RATIO[1])))
    h = min(height, max(1, round(width / RATIO[0])))
    return (width - w) // 2, (height - h) // 2, w, h


def middle(image: Image.Image) -> Image.Image:
    """The middle 224x224 pixels of the image, its shorter side resized to 256."""
    short = min(image.size)
    width, height = (RESIZED * side // short for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - SIZE) / 2), round((height - SIZE) / 2)
    return resized.crop((left, top, left + SIZE, top + SIZE))


def read_image_folder(path: str | None, limit: int | None, workers: int) -> ImageFolder:
    """The files and labels; ``limit`` keeps so many of each set, evenly spaced, so that classes are spread."""
    if path is None:
        raise UserError("--data imagenet needs --data-path: a directory with train/<class>/ and val/<class>/")
    parts = {part: Path(path) / part for part in ("train", "val")}
    for directory in parts.values():
        if not directory.is_dir():
            raise UserError(f"no such directory: {directory}")
    names = sorted(entry.name for entry in parts["train"].iterdir() if entry.is_dir())
    train, test = (list_files(directory, names, limit) for directory in parts.values())
    return ImageFolder(*train, *test, classes=len(names), workers=workers)


def list_files(directory: Path, names: list[str], limit: int | None) -> tuple[list[str], Tensor]:
    """The images below ``directory`` in the order of their names, and the place of their class in ``names``."""
    unknown = sorted({entry.name for entry in directory.iterdir() if entry.is_dir()} - set(names))
    if unknown:
        raise UserError(f"{directory}: classes that the training set does not have: {', '.join(unknown[:3])}")
    found = [
        (str(file), label)
        for label, name in enumerate(names)
        for file in (sorted((directory / name).iterdir()) if (directory / name).is_dir() else [])
        if file.suffix.lower() in SUFFIXES
    ]
    if not found:
        raise UserError(f"{directory} holds no images: <class>/*.JPEG, *.jpg or *.png")
    if limit is not None and limit < len(found):
        found = [found[i * len(found) // limit] for i in range(limit)]
    return [file for file, _ in found], torch.tensor([label for _, label in found])
