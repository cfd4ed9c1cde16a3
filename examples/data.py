"""The data sets as tensors on the device: reading, label noise, batches and augmentation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

DATA_SETS = ("digits", "cifar10", "cifar100")
# The first so many of a fixed permutation of scikit-learn's 1,797 digits are for training, the other 450 for testing.
DIGITS_TRAINING_IMAGES = 1347
# Zeros around a CIFAR image before a random crop to the old size (He et al., 2016).
CROP_PADDING = 4


class UserError(Exception):
    """Something that the user can put right: reported as one line, with exit code 2."""


@dataclass
class DataSet:
    """Images uint8 (n, channels, height, width) and labels int64 (n,), of the training and the test set."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int
    augmented: bool

    def __post_init__(self) -> None:
        self.mean = self.train_images.float().mean(dim=(0, 2, 3), keepdim=True)
        self.std = self.train_images.float().std(dim=(0, 2, 3), keepdim=True)

    def to(self, device: torch.device) -> DataSet:
        tensors = ("train_images", "train_labels", "test_images", "test_labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})

    def normalised(self, images: Tensor) -> Tensor:
        """float32 images of mean 0 and variance 1 in each channel, over the training set."""
        return (images.float() - self.mean) / self.std

    def training_batches(self, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """The training set once, in the order that ``generator`` draws; the last batch may be smaller."""
        order = torch.randperm(len(self.train_labels), generator=generator, device=generator.device)
        for indices in order.split(batch_size):
            images = self.train_images[indices]
            if self.augmented:
                images = crop_and_flip(images, generator)
            yield self.normalised(images), self.train_labels[indices]

    def test_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in zip(self.test_images.split(batch_size), self.test_labels.split(batch_size)):
            yield self.normalised(images), labels


def load(name: str, path: str | None = None, limit: int | None = None) -> DataSet:
    """The data set ``name``, on the CPU; ``limit`` keeps the first so many training and test images."""
    if name == "digits":
        data = read_digits()
    else:
        from cifar import read_cifar

        images_and_labels = read_cifar(path, classes=int(name.removeprefix("cifar")), limit=limit)
        data = DataSet(*images_and_labels, classes=int(name.removeprefix("cifar")), augmented=True)
    return replace(
        data,
        train_images=data.train_images[:limit],
        train_labels=data.train_labels[:limit],
        test_images=data.test_images[:limit],
        test_labels=data.test_labels[:limit],
    )


def read_digits() -> DataSet:
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
    return DataSet(images[:n], labels[:n], images[n:], labels[n:], classes=10, augmented=False)


def with_label_noise(data: DataSet, share: float, seed: int) -> DataSet:
    """``data`` where ``share`` of the training labels, drawn at random, is another class, drawn uniformly."""
    generator = torch.Generator().manual_seed(seed)
    labels = data.train_labels.clone()
    flipped = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    shift = torch.randint(1, data.classes, (len(flipped),), generator=generator)
    labels[flipped] = (labels[flipped] + shift) % data.classes
    return replace(data, train_labels=labels)


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to ``CROP_PADDING`` pixels and mirrored with probability 1/2, as one indexing."""
    samples, _, height, width = images.shape
    device = images.device
    padded = torch.nn.functional.pad(images, (CROP_PADDING,) * 4)
    offsets = torch.randint(0, 2 * CROP_PADDING + 1, (2, samples, 1), generator=generator, device=device)
    mirrored = torch.rand(samples, 1, generator=generator, device=device) < 0.5
    rows = offsets[0] + torch.arange(height, device=device)
    columns = torch.arange(width, device=device)
    columns = offsets[1] + torch.where(mirrored, columns.flip(0), columns)
    sample = torch.arange(samples, device=device)
    return padded[sample[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
