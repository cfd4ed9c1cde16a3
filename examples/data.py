"""The data sets as tensors on the device: reading, label noise, batches and augmentation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from imagenet import ImageFolder

AnyDataSet = TypeVar("AnyDataSet", "DataSet", "ImageFolder")

DATA_SETS = (
    *("digits", "cifar10", "cifar100", "imagenet"),
    *("synthetic-cifar10", "synthetic-cifar100", "synthetic-imagenet"),
)
# The first so many of a fixed permutation of scikit-learn's 1,797 digits are for training, the other 450 for testing.
DIGITS_TRAINING_IMAGES = 1347
# Zeros around a CIFAR image before a random crop to the old size (He et al., 2016).
CROP_PADDING = 4


# Training images, test images, pixels a side and classes of the synthetic data sets.
SYNTHETIC = {
    "cifar10": (50_000, 10_000, 32, 10),
    "cifar100": (50_000, 10_000, 32, 100),
    "imagenet": (2_048, 512, 224, 1000),
}
# Of the integers from 0 to 255, all equally likely.
UNIFORM_MEAN, UNIFORM_STD = 127.5, 73.9


class UserError(Exception):
    """Something that the user can put right: reported as one line, with exit code 2."""


@dataclass
class DataSet:
    """Images uint8 (n, channels, height, width) and labels int64 (n,), of the training and the test set.

    ``mean`` and ``std``, float32 (1, channels, 1, 1), are those of the training images where they are not given.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int
    augmented: bool
    mean: Tensor | None = None
    std: Tensor | None = None
    memory_format: torch.memory_format = torch.contiguous_format

    def __post_init__(self) -> None:
        if self.mean is None or self.std is None:
            self.mean = self.train_images.float().mean(dim=(0, 2, 3), keepdim=True)
            self.std = self.train_images.float().std(dim=(0, 2, 3), keepdim=True)

    @property
    def device(self) -> torch.device:
        return self.train_images.device

    @property
    def image_shape(self) -> torch.Size:
        """(channels, height, width)."""
        return self.train_images.shape[1:]

    def to(self, device: torch.device) -> DataSet:
        tensors = ("train_images", "train_labels", "test_images", "test_labels", "mean", "std")
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})

    def normalised(self, images: Tensor) -> Tensor:
        """float32 images of mean 0 and variance 1 in each channel, over the training set."""
        images = images.contiguous(memory_format=self.memory_format)
        return (images.float() - self.mean) / self.std

    def training_batches(self, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """The training set once, in the order that ``generator`` draws; the last batch may be smaller.

        Nothing in it waits for the device, and an augmented batch is one indexing of the padded training set.
        """
        order = torch.randperm(len(self.train_labels), generator=generator, device=generator.device)
        if not self.augmented:
            for indices in order.split(batch_size):
                yield self.normalised(self.train_images[indices]), self.train_labels[indices]
            return
        padded = pad(self.train_images)
        windows = draw_windows(len(order), *self.image_shape[1:], generator)
        for parts in zip(*(part.split(batch_size) for part in (order, *windows))):
            yield self.normalised(take_windows(padded, *parts)), self.train_labels[parts[0]]

    def plain_training_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The training set in its own order, as it is."""
        for images, labels in zip(self.train_images.split(batch_size), self.train_labels.split(batch_size)):
            yield self.normalised(images), labels

    def test_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in zip(self.test_images.split(batch_size), self.test_labels.split(batch_size)):
            yield self.normalised(images), labels


def load(name: str, path: str | None = None, limit: int | None = None, workers: int = 0) -> DataSet | ImageFolder:
    """The data set ``name``, on the CPU; ``limit`` keeps the first so many training and test images.

    ``workers`` processes decode the images of an image folder; all other data sets lie in memory.
    """
    if name == "imagenet":
        from imagenet import read_image_folder

        return read_image_folder(path, limit, workers)
    if name.startswith("synthetic-"):
        return synthetic(name.removeprefix("synthetic-"), limit)
    if name == "digits":
        return read_digits(limit)
    from cifar import read_cifar

    classes = int(name.removeprefix("cifar"))
    tensors = [tensor[:limit] for tensor in read_cifar(path, classes=classes, limit=limit)]
    return DataSet(*tensors, classes=classes, augmented=True)


def read_digits(limit: int | None = None) -> DataSet:
    """scikit-learn's handwritten digits: scans of 8x8 pixels with 17 grey levels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("--data digits needs scikit-learn: pip install scikit-learn") from None
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)[order]
    labels = torch.from_numpy(digits.target).to(torch.int64)[order]
    n = DIGITS_TRAINING_IMAGES
    parts = (images[:n], labels[:n], images[n:], labels[n:])
    return DataSet(*(part[:limit] for part in parts), classes=10, augmented=False)


def synthetic(name: str, limit: int | None) -> DataSet:
    """Random images and labels of the shape and augmentation of ``name``: for measuring speed, not for learning.

    ImageNet's images are too many to be held; they are few, and as a decoder would hand them over.
    """
    train, test, size, classes = SYNTHETIC[name]
    generator = torch.Generator().manual_seed(0)
    parts = []
    for count in (train, test):
        count = count if limit is None else min(limit, count)
        parts.append(torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator))
        parts.append(torch.randint(classes, (count,), generator=generator))
    mean, std = (torch.full((1, 3, 1, 1), value) for value in (UNIFORM_MEAN, UNIFORM_STD))
    return DataSet(*parts, classes=classes, augmented=name != "imagenet", mean=mean, std=std)


def with_label_noise(data: AnyDataSet, share: float, seed: int) -> AnyDataSet:
    """``data`` where ``share`` of the training labels, drawn at random, is another class, drawn uniformly."""
    generator = torch.Generator().manual_seed(seed)
    labels = data.train_labels.clone()
    flipped = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    shift = torch.randint(1, data.classes, (len(flipped),), generator=generator)
    labels[flipped] = (labels[flipped] + shift) % data.classes
    return replace(data, train_labels=labels)


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to ``CROP_PADDING`` pixels and mirrored with probability 1/2, as one indexing."""
    sample = torch.arange(len(images), device=images.device)
    return take_windows(pad(images), sample, *draw_windows(len(images), *images.shape[2:], generator)).contiguous()


def pad(images: Tensor) -> Tensor:
    return torch.nn.functional.pad(images, (CROP_PADDING,) * 4)


def draw_windows(samples: int, height: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which rows (samples, height) and columns (samples, width) of the padded image each sample shows."""
    device = generator.device
    offsets = torch.randint(0, 2 * CROP_PADDING + 1, (2, samples, 1), generator=generator, device=device)
    mirrored = torch.rand(samples, 1, generator=generator, device=device) < 0.5
    columns = torch.arange(width, device=device)
    rows = offsets[0] + torch.arange(height, device=device)
    return rows, offsets[1] + torch.where(mirrored, columns.flip(0), columns)


def take_windows(padded: Tensor, sample: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The images ``sample`` at these rows and columns, (samples, channels, height, width), channels last in memory."""
    windows = padded[sample[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return windows.permute(0, 3, 1, 2)
