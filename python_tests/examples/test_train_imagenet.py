"""ImageNet as an image folder: labels, crops, worker processes, and folders that are none."""

import random

import pytest
import torch

Image = pytest.importorskip("PIL.Image")

import imagenet  # noqa: E402
import train  # noqa: E402
from data import UserError, load  # noqa: E402

SIZES = [(300, 260), (224, 400), (90, 120)]
CLASSES = ("n01", "n02")


def ramp(width, height, blue):
    """Red is the column and green the row, as shares of the image; blue says which image it is."""
    columns = (torch.arange(width) + 0.5) / width * 255
    rows = (torch.arange(height) + 0.5) / height * 255
    red, green = columns.expand(height, width), rows[:, None].expand(height, width)
    pixels = torch.stack([red, green, torch.full((height, width), float(blue))], dim=2).round().to(torch.uint8)
    return Image.frombytes("RGB", (width, height), bytes(pixels.flatten().tolist()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("imagenet")
    for part, count in (("train", 3), ("val", 2)):
        for label, name in enumerate(CLASSES):
            (path / part / name).mkdir(parents=True)
            for i in range(count):
                file = path / part / name / f"{name}_{i}.{'png' if i else 'JPEG'}"
                ramp(*SIZES[i], 100 * label + 10 * i).save(file, **({} if i else {"quality": 95}))
            (path / part / name / "notes.txt").write_text("no image")
    return path


def batches_of(data, batch_size=4, seed=1):
    return list(data.training_batches(batch_size, torch.Generator().manual_seed(seed)))


def pixels(images):
    """Back to the values 0 to 255."""
    mean, std = (torch.tensor(value).reshape(1, 3, 1, 1) for value in (imagenet.MEAN, imagenet.STD))
    return images * std + mean


def test_files_and_labels_are_read_in_order(folder):
    data = load("imagenet", str(folder))
    assert data.classes == 2
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test_labels.tolist() == [0, 0, 1, 1]
    assert [file.rsplit("/", 1)[1] for file in data.test_files] == [
        f"{name}_{i}.{'png' if i else 'JPEG'}" for name in CLASSES for i in range(2)
    ]
    limited = load("imagenet", str(folder), limit=2)
    assert limited.train_labels.tolist() == limited.test_labels.tolist() == [0, 1]


def test_every_image_keeps_its_label(folder):
    for images, labels in [*batches_of(load("imagenet", str(folder))), *load("imagenet", str(folder)).test_batches(3)]:
        blue = pixels(images)[:, 2].mean(dim=(1, 2))
        assert torch.equal((blue > 60).long(), labels)


def test_test_images_are_the_middle_of_the_resized_image(folder):
    ((images, labels),) = load("imagenet", str(folder)).test_batches(10)
    assert images.shape == (4, 3, 224, 224)
    for image, (width, height) in zip(pixels(images), [SIZES[0], SIZES[1]] * 2):
        scale = 256 / min(width, height)
        for channel, side in ((0, width), (1, height)):
            length = int(side * scale)
            place = torch.arange(224) + round((length - 224) / 2) + 0.5
            shown = image[channel].mean(dim=0 if channel == 0 else 1)
            assert (shown - place / length * 255).abs().max() < 1.5
    assert labels.tolist() == [0, 0, 1, 1]


def test_training_images_show_the_drawn_window_mirrored_or_not():
    image = ramp(300, 260, 0)
    mirrored = 0
    for seed in range(40):
        shown = imagenet.random_crop(image, random.Random(seed))
        draw = random.Random(seed)
        left, top, width, height = imagenet.draw_window(300, 260, draw)
        flip = draw.random() < 0.5
        mirrored += flip
        assert shown.size == (224, 224)
        columns = (left + (torch.arange(224) + 0.5) / 224 * width) / 300 * 255
        rows = (top + (torch.arange(224) + 0.5) / 224 * height) / 260 * 255
        content = torch.frombuffer(bytearray(shown.tobytes()), dtype=torch.uint8).reshape(224, 224, 3).float()
        assert (content[..., 0].mean(0) - (columns.flip(0) if flip else columns)).abs().max() < 1.5
        assert (content[..., 1].mean(1) - rows).abs().max() < 1.5
    assert 10 < mirrored < 30


def test_windows_have_the_areas_and_shapes_of_inception():
    draw = random.Random(0)
    windows = [imagenet.draw_window(500, 400, draw) for _ in range(2000)]
    areas = torch.tensor([w * h / (500 * 400) for _, _, w, h in windows])
    ratios = torch.tensor([w / h for _, _, w, h in windows])
    assert all(left >= 0 and top >= 0 and left + w <= 500 and top + h <= 400 for left, top, w, h in windows)
    assert 0.079 < areas.min() < 0.1
    assert 0.9 < areas.max() <= 1.0
    assert 0.74 < ratios.min() < 0.76
    assert 1.32 < ratios.max() < 1.35
    assert ratios.log().mean().abs() < 0.05


@pytest.mark.parametrize(("width", "height", "expected"), [(4000, 10, 13), (10, 4000, 13)])
def test_images_that_no_window_fits_show_their_middle(width, height, expected, monkeypatch):
    monkeypatch.setattr(imagenet, "TRIES", 0)
    left, top, w, h = imagenet.draw_window(width, height, random.Random(0))
    assert max(w, h) == expected
    assert min(w, h) == 10
    assert (left, top) == ((width - w) // 2, (height - h) // 2)


def test_number_of_workers_changes_nothing(folder):
    alone = batches_of(load("imagenet", str(folder)))
    with_workers = batches_of(load("imagenet", str(folder), workers=2))
    other_seed = batches_of(load("imagenet", str(folder)), seed=2)
    for (images, labels), (expected_images, expected_labels) in zip(with_workers, alone, strict=True):
        assert torch.equal(images, expected_images)
        assert torch.equal(labels, expected_labels)
    assert not torch.equal(other_seed[0][0], alone[0][0])


def test_imagenet_trains(folder, tmp_path):
    arguments = ["--data", "imagenet", "--data-path", str(folder), "--batch-size", "3", "--epochs", "1", "--seeds", "1"]
    assert train.main([*arguments, "--optimizer", "esam", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "imagenet_cnn.json").exists()


def broken_image(path):
    for part in ("train", "val"):
        (path / part / "n01").mkdir(parents=True)
        (path / part / "n01" / "bad.jpg").write_bytes(b"text")


def no_images(path):
    for part in ("train", "val"):
        (path / part / "n01").mkdir(parents=True)


def unknown_class(path):
    no_images(path)
    ramp(9, 9, 0).save(path / "train" / "n01" / "a.png")
    (path / "val" / "n09").mkdir()


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "no such directory: .*train"),
        (no_images, "train holds no images"),
        (unknown_class, "val: classes that the training set does not have: n09"),
        (broken_image, r"bad.jpg: not an image \(cannot identify image file"),
    ],
)
def test_wrong_folders_are_refused(write, message, workers, tmp_path, capsys):
    write(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        batches_of(load("imagenet", str(tmp_path), workers=int(workers)))
    assert "\n" not in str(error.value)


def test_missing_path_is_refused():
    with pytest.raises(UserError, match="needs --data-path: a directory with train"):
        load("imagenet")
