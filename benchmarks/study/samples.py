"""The data of the study as tensors: training, validation and test set."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.paper import ROOT  # noqa: F401  (puts examples/ on the path)
from benchmarks.paper.data_sets import Data

# isort: split
from data import UserError, load

# The test set does not change with the seed of a training.
SPLIT_SEED = 20


@dataclass(frozen=True)
class Samples:
    """Inputs float32 (n, ...) and labels int64 (n,) of the three sets."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int = 10
    wrong: Tensor | None = None
    """Which training labels are wrong, bool (n,); None where none is."""

    def redrawn(self, seed: int) -> Samples:
        """A copy whose training and validation set are drawn anew from the two together; the sizes stay.

        What the search chooses then depends less on which samples happen to be in one validation set.
        """
        order = torch.randperm(
            len(self.train[1]) + len(self.validation[1]), generator=torch.Generator().manual_seed(SPLIT_SEED + seed)
        )
        inputs, labels = (torch.cat(both)[order] for both in zip(self.train, self.validation))
        count = len(self.train[1])
        return Samples((inputs[:count], labels[:count]), (inputs[count:], labels[count:]), self.test, self.classes)

    def with_label_noise(self, share: float, seed: int) -> Samples:
        """A copy in which ``share`` of the training labels is replaced, each by one of the other classes."""
        if share == 0.0:
            return self
        generator = torch.Generator().manual_seed(seed)
        inputs, labels = self.train
        count = round(share * len(labels))
        chosen = torch.randperm(len(labels), generator=generator)[:count]
        moved = torch.randint(1, self.classes, (count,), generator=generator)
        noisy = labels.clone()
        noisy[chosen] = (labels[chosen] + moved) % self.classes
        return Samples((inputs, noisy), self.validation, self.test, self.classes, noisy != labels)


def split(inputs: Tensor, labels: Tensor, train: int, validation: int, test: int) -> Samples:
    """The three sets, drawn from a fixed permutation, without overlap.

    Raises:
        UserError: there are fewer samples than that.
    """
    if len(labels) < train + validation + test:
        raise UserError(f"{train + validation + test} samples are needed, and there are {len(labels)}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    parts = order[: train + validation + test].split([train, validation, test])
    return Samples(*((inputs[part], labels[part]) for part in parts))


@functools.cache
def mnist1d(train: int = 4000, validation: int = 4000, test: int = 4000) -> Samples:
    """MNIST-1D (Greydanus, 2020), made by its own package with its own defaults: signals of 40 numbers, 10 classes.

    Raises:
        UserError: the package is not installed.
    """
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ImportError:
        raise UserError('MNIST-1D needs the package mnist1d: pip install "esam_kernels[study]"') from None
    arguments = get_dataset_args()
    arguments.num_samples = train + validation + test
    arguments.train_split = 1.0
    made = make_dataset(arguments)
    inputs = torch.as_tensor(made["x"], dtype=torch.float32).unsqueeze(1)
    return split(inputs, torch.as_tensor(made["y"], dtype=torch.int64), train, validation, test)


@functools.cache
def digits(train: int = 900, validation: int = 447, test: int = 450) -> Samples:
    """Scikit-learn's handwritten digits, 8x8 pixels; the test set is that of ``examples/train.py``."""
    data = load("digits")
    images = split(data.normalised(data.train_images), data.train_labels, train, validation, 0)
    tested = (data.normalised(data.test_images[:test]), data.test_labels[:test])
    return Samples(images.train, images.validation, tested)


@functools.cache
def cifar10(folder: str | None, train: int = 10_000, validation: int = 5_000, test: int = 10_000) -> Samples:
    """CIFAR-10: a part of the training images, another part for validation, the test images.

    Raises:
        UserError: ``folder`` (or $ESAM_DATA) holds no CIFAR-10.
    """
    data = Data(folder, "small", torch.device("cpu"))
    if "cifar10" not in data.paths:
        raise UserError("CIFAR-10 is needed: --data FOLDER, or the variable ESAM_DATA")
    images = data.load("cifar10")
    parts = split(images.train_images, images.train_labels, train, validation, 0)
    tested = (images.test_images[:test], images.test_labels[:test])
    three = ((images.normalised(inputs), labels) for inputs, labels in (parts.train, parts.validation, tested))
    return Samples(*three)
