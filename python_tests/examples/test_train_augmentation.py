"""Augmentation on the device, memory formats and synthetic data."""

import pytest
import torch
import train
from data import CROP_PADDING, DataSet, crop_and_flip, load
from test_train_resume import assert_same, checkpoint
from trainer import Trainer


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def data():
    images = torch.randint(256, (30, 3, 32, 32), dtype=torch.uint8, generator=generator())
    labels = torch.arange(30)
    return DataSet(images[:20], labels[:20], images[20:], labels[20:], classes=30, augmented=True)


def cropped_one_by_one(images, draws):
    """The plain loop: pads, crops and mirrors each image by itself, with the draws of a batch of that size."""
    offsets = torch.randint(0, 2 * CROP_PADDING + 1, (2, len(images), 1), generator=draws)
    mirrored = torch.rand(len(images), 1, generator=draws) < 0.5
    results = []
    for i, image in enumerate(images):
        padded = torch.zeros(3, 40, 40, dtype=torch.uint8)
        padded[:, 4:36, 4:36] = image
        row, column = offsets[0, i].item(), offsets[1, i].item()
        window = padded[:, row : row + 32, column : column + 32]
        results.append(window.flip(2) if mirrored[i] else window)
    return torch.stack(results)


def test_crop_and_flip_is_the_loop_over_images(data):
    cropped = crop_and_flip(data.train_images, generator(5))
    assert torch.equal(cropped, cropped_one_by_one(data.train_images, generator(5)))
    assert cropped.is_contiguous()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_training_batches_are_the_loop_over_images(data, memory_format):
    data.memory_format = memory_format
    batches = list(data.training_batches(8, generator(5)))
    draws = generator(5)
    order = torch.randperm(20, generator=draws)
    cropped = cropped_one_by_one(data.train_images[order], draws)
    assert [len(labels) for _, labels in batches] == [8, 8, 4]
    assert torch.equal(torch.cat([labels for _, labels in batches]), data.train_labels[order])
    assert torch.equal(torch.cat([images for images, _ in batches]), (cropped.float() - data.mean) / data.std)
    assert all(images.is_contiguous(memory_format=memory_format) for images, _ in batches)


def test_augmentation_follows_from_the_seed(data):
    first, again, other = (
        torch.cat([images for images, _ in data.training_batches(8, generator(seed))]) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_test_and_plain_batches_are_not_augmented(data):
    plain = torch.cat([images for images, _ in data.plain_training_batches(8)])
    assert torch.equal(plain, data.normalised(data.train_images))
    assert torch.equal(torch.cat([images for images, _ in data.test_batches(8)]), data.normalised(data.test_images))


def test_a_batch_costs_one_indexing_of_the_images_and_no_wait(data):
    batches = data.training_batches(8, generator())
    next(batches)
    with torch.profiler.profile() as profile:
        next(batches)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::index"] == 2  # the images, and their labels
    assert not calls.keys() & {"aten::item", "aten::nonzero", "aten::_local_scalar_dense", "aten::randint"}


@pytest.mark.parametrize(
    ("name", "size", "classes", "augmented"),
    [
        ("synthetic-cifar10", 32, 10, True),
        ("synthetic-cifar100", 32, 100, True),
        ("synthetic-imagenet", 224, 1000, False),
    ],
)
def test_synthetic_data_has_the_shape_of_the_real(name, size, classes, augmented):
    data = load(name, limit=40)
    assert data.train_images.shape == data.test_images.shape == (40, 3, size, size)
    assert data.train_images.dtype == torch.uint8
    assert (data.classes, data.augmented) == (classes, augmented)
    assert data.train_labels.max() < classes
    assert data.train_labels.float().mean() == pytest.approx((classes - 1) / 2, rel=0.3)
    assert not torch.equal(data.train_images, data.test_images)
    normalised = data.normalised(data.train_images)
    assert abs(normalised.mean()) < 0.02
    assert normalised.std() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(data.train_images, load(name, limit=40).train_images)


OPTIONS = ["--data", "synthetic-cifar10", "--limit", "24", "--batch-size", "8", "--epochs", "3", "--seeds", "1"]


def program(directory, *arguments):
    return [*OPTIONS, "--optimizer", "sgd", "esam", "--checkpoint", str(directory), "--out", str(directory), *arguments]


def test_interrupted_run_goes_on_with_the_same_augmentation(tmp_path, monkeypatch):
    assert train.main(program(tmp_path / "whole")) == 0
    train_epoch, epochs = Trainer.train_epoch, []

    def interrupted(self, on_step):
        epochs.append(self.name)
        if len(epochs) == 4:
            raise KeyboardInterrupt
        train_epoch(self, on_step)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_epoch", interrupted)
        assert train.main(program(tmp_path / "cut")) == 130
    assert train.main(program(tmp_path / "cut", "--resume")) == 0
    assert_same(checkpoint(tmp_path / "cut"), checkpoint(tmp_path / "whole"))


def test_every_epoch_is_augmented_anew(data):
    options = train.parse_options([*OPTIONS, "--optimizer", "sgd"])
    trainer = Trainer("sgd", 0, data, options)
    seen = []
    monitored = data.training_batches
    data.training_batches = lambda *arguments: (seen.append(b[0]) or b for b in monitored(*arguments))
    trainer.train_epoch()
    trainer.train_epoch()
    epochs = [torch.cat(seen[:3]), torch.cat(seen[3:])]
    assert not torch.equal(*(epoch.sum(dim=(1, 2, 3)).sort().values for epoch in epochs))
