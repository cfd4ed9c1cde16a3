"""The data: label noise, batches, augmentation, and every kind of CIFAR file."""

import io
import pickle
import tarfile

import data
import numpy as np
import pytest
import torch
import train
from data import DataSet, UserError, crop_and_flip, load, with_label_noise

CASES = [("cifar10", 10), ("cifar100", 100)]
TRAIN_IMAGES = 20
TEST_IMAGES = 6


@pytest.fixture
def images():
    """Random training and test images uint8 (n, 3072), as the files hold them."""
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (n, 3072), dtype=np.uint8) for n in (TRAIN_IMAGES, TEST_IMAGES)]


def labels_of(count, classes):
    return [(7 * i + classes - 1) % classes for i in range(count)]


def write_python(directory, images, classes):
    if classes == 100:
        parts, key = {"train": images[0], "test": images[1]}, b"fine_labels"
    else:
        batches = {f"data_batch_{i + 1}": part for i, part in enumerate(np.split(images[0], 5))}
        parts, key = {**batches, "test_batch": images[1]}, b"labels"
    start = 0
    for name, part in parts.items():
        start = 0 if name.startswith("test") else start
        labels = labels_of(TRAIN_IMAGES, classes)[start : start + len(part)]
        content = {b"data": part, key: labels, b"coarse_labels": [0] * len(part), b"filenames": [b"x"] * len(part)}
        (directory / name).write_bytes(pickle.dumps(content, protocol=2))
        start += len(part)


def write_binary(directory, images, classes):
    def records(part, labels):
        columns = [np.full(len(part), 3), labels] if classes == 100 else [labels]
        return np.concatenate([np.array(columns, dtype=np.uint8).T, part], axis=1).tobytes()

    labels = labels_of(TRAIN_IMAGES, classes)
    if classes == 100:
        (directory / "train.bin").write_bytes(records(images[0], labels))
        (directory / "test.bin").write_bytes(records(images[1], labels[:TEST_IMAGES]))
        return
    for i, part in enumerate(np.split(images[0], 5)):
        (directory / f"data_batch_{i + 1}.bin").write_bytes(records(part, labels[4 * i : 4 * i + 4]))
    (directory / "test_batch.bin").write_bytes(records(images[1], labels[:TEST_IMAGES]))


@pytest.mark.parametrize("place", ["in the directory", "in a folder below", "in a .tar.gz"])
@pytest.mark.parametrize("write", [write_python, write_binary])
@pytest.mark.parametrize(("name", "classes"), CASES)
def test_standard_files_are_read(name, classes, write, place, images, tmp_path):
    folder = tmp_path if place == "in the directory" else tmp_path / "cifar-files"
    folder.mkdir(exist_ok=True)
    write(folder, images, classes)
    path = tmp_path
    if place == "in a .tar.gz":
        path = tmp_path / "cifar.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            archive.add(folder, "cifar-files")
    read = load(name, str(path))
    assert torch.equal(read.train_images, torch.from_numpy(images[0]).reshape(-1, 3, 32, 32))
    assert torch.equal(read.test_images, torch.from_numpy(images[1]).reshape(-1, 3, 32, 32))
    assert read.train_labels.tolist() == labels_of(TRAIN_IMAGES, classes)
    assert read.test_labels.tolist() == labels_of(TEST_IMAGES, classes)
    assert read.classes == classes
    assert read.augmented


def write_jpeg_archive(path, **changes):
    """Images of one colour each, which JPEG keeps nearly as it is; returns the colours of the training images."""
    image_module = pytest.importorskip("PIL.Image")
    colours = np.random.default_rng(0).integers(0, 256, (TRAIN_IMAGES, 3), dtype=np.uint8)
    arrays = {"classes": np.array([f"class {i}" for i in range(10)])}
    for part, count in (("train", TRAIN_IMAGES), ("test", TEST_IMAGES)):
        files = []
        for colour in colours[:count]:
            buffer = io.BytesIO()
            image_module.fromarray(np.broadcast_to(colour, (32, 32, 3)).copy()).save(buffer, "JPEG", quality=95)
            files.append(buffer.getvalue())
        arrays[f"{part}_jpeg"] = np.frombuffer(b"".join(files), dtype=np.uint8)
        arrays[f"{part}_offsets"] = np.cumsum([0, *map(len, files)], dtype=np.int64)
        arrays[f"{part}_labels"] = np.array(labels_of(count, 10), dtype=np.uint8)
    arrays |= changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return torch.from_numpy(colours)


@pytest.mark.parametrize("limit", [None, 3])
def test_jpeg_archive_is_read(limit, tmp_path):
    colours = write_jpeg_archive(tmp_path / "cifar.npz")
    read = load("cifar10", str(tmp_path / "cifar.npz"), limit)
    assert read.train_images.shape == (limit or TRAIN_IMAGES, 3, 32, 32)
    assert read.train_images.is_contiguous()
    difference = read.train_images.int() - colours[:limit, :, None, None].int()
    assert difference.abs().max() <= 3
    assert read.train_labels.tolist() == labels_of(TRAIN_IMAGES, 10)[:limit]
    assert read.test_labels.tolist() == labels_of(TEST_IMAGES, 10)[:limit]


def test_cifar_trains(images, tmp_path):
    write_binary(tmp_path, images, 100)
    arguments = ["--data", "cifar100", "--data-path", str(tmp_path), "--batch-size", "8", "--epochs", "1"]
    assert train.main([*arguments, "--seeds", "1", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "cifar100_cnn.json").exists()


class Malicious:
    def __reduce__(self):
        return print, ("unpickled something that is no array",)


def damaged_pickle(directory):
    (directory / "train").write_bytes(pickle.dumps({b"data": Malicious(), b"fine_labels": []}))
    (directory / "test").write_bytes(b"")
    return directory


def cut_binary(directory):
    (directory / "train.bin").write_bytes(b"0" * 3075)
    (directory / "test.bin").write_bytes(b"0" * 3074)
    return directory


def no_archive(directory):
    (directory / "cifar.tar.gz").write_bytes(b"text")
    return directory / "cifar.tar.gz"


def no_npz(directory):
    (directory / "cifar.npz").write_bytes(b"text")
    return directory / "cifar.npz"


def npz_without_labels(directory):
    write_jpeg_archive(directory / "cifar.npz", train_labels=None)
    return directory / "cifar.npz"


def npz_with_broken_images(directory):
    write_jpeg_archive(directory / "cifar.npz", train_jpeg=np.zeros(100, dtype=np.uint8))
    return directory / "cifar.npz"


def npz_with_too_few_images(directory):
    write_jpeg_archive(directory / "cifar.npz", train_labels=np.zeros(TRAIN_IMAGES + 1, dtype=np.uint8))
    return directory / "cifar.npz"


def labels_out_of_range(directory):
    write_jpeg_archive(directory / "cifar.npz", train_labels=np.full(TRAIN_IMAGES, 200, dtype=np.uint8))
    return directory / "cifar.npz"


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda directory: directory, "holds no CIFAR-100: neither train, test nor train.bin, test.bin"),
        (damaged_pickle, "train: wrong format: UnpicklingError: unexpected builtins.print"),
        (cut_binary, "train.bin: wrong format: 3075 bytes are not a multiple of 3074"),
        (no_archive, "wrong format: neither a directory nor a .tar.gz nor an .npz"),
        (no_npz, "wrong format"),
        (npz_without_labels, "wrong format.*train_labels"),
        (npz_with_broken_images, "wrong format"),
        (npz_with_too_few_images, "wrong format: 20 train images with 21 labels"),
        (labels_out_of_range, "wrong format: labels up to 200, not those of 100 classes"),
    ],
)
def test_wrong_files_are_refused(write, message, tmp_path, capsys):
    with pytest.raises(UserError, match=message) as error:
        load("cifar100", str(write(tmp_path)))
    assert "\n" not in str(error.value)
    assert capsys.readouterr().out == ""


@pytest.fixture
def digits():
    pytest.importorskip("sklearn")
    return load("digits")


def test_label_noise_flips_the_given_share_to_other_classes(digits):
    noisy = with_label_noise(digits, 0.4, seed=1)
    flipped = noisy.train_labels != digits.train_labels
    assert flipped.sum() == round(0.4 * len(digits.train_labels))
    shift = (noisy.train_labels - digits.train_labels)[flipped] % 10
    counts = torch.bincount(shift, minlength=10)
    assert counts[0] == 0
    assert counts[1:].min() > 30  # 60 are expected, with a standard deviation of 7
    assert torch.equal(noisy.test_labels, digits.test_labels)
    assert torch.equal(noisy.train_labels, with_label_noise(digits, 0.4, seed=1).train_labels)
    assert not torch.equal(noisy.train_labels, with_label_noise(digits, 0.4, seed=2).train_labels)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_label_noise_is_drawn_on_the_host_for_labels_on_another_device(digits, share):
    noisy = with_label_noise(digits.to(torch.device("meta")), share, seed=1)
    assert noisy.train_labels.device.type == "meta"
    assert noisy.train_labels.shape == digits.train_labels.shape


def test_digits_are_split_and_keep_their_labels(digits):
    from sklearn.datasets import load_digits

    assert (len(digits.train_labels), len(digits.test_labels)) == (data.DIGITS_TRAINING_IMAGES, 450)
    images = torch.cat([digits.train_images, digits.test_images]).flatten(1).tolist()
    labels = torch.cat([digits.train_labels, digits.test_labels]).tolist()
    original = load_digits()
    assert sorted(zip(images, labels)) == sorted(zip(original.data.tolist(), original.target.tolist()))


def test_every_image_is_in_one_batch_and_the_last_may_be_smaller(digits):
    labels = torch.arange(len(digits.train_labels))
    numbered = DataSet(digits.train_images, labels, digits.test_images, digits.test_labels, 10, augmented=False)
    batches = list(numbered.training_batches(64, torch.Generator().manual_seed(1)))
    assert [len(images) for images, _ in batches] == [64] * 21 + [3]
    order = torch.cat([labels for _, labels in batches])
    assert not torch.equal(order, labels)
    assert torch.equal(order.sort().values, labels)
    assert torch.equal(torch.cat([images for images, _ in batches]), digits.normalised(digits.train_images[order]))


def test_normalised_images_have_mean_zero_and_variance_one(digits):
    images = digits.normalised(digits.train_images)
    assert abs(images.mean()) < 1e-4
    assert abs(images.std() - 1.0) < 1e-4


def test_crop_and_flip_shows_every_image_through_a_shifted_window():
    images = torch.randint(1, 256, (64, 3, 32, 32), dtype=torch.uint8)
    changed = crop_and_flip(images, torch.Generator().manual_seed(0))
    assert changed.dtype == torch.uint8
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    seen = set()
    for image, source in zip(changed, padded):
        windows = {
            (row, column, mirrored): source[:, row : row + 32, column : column + 32]
            for row in range(9)
            for column in range(9)
            for mirrored in (False, True)
        }
        shown = [key for key, window in windows.items() if torch.equal(image, window.flip(2) if key[2] else window)]
        assert len(shown) == 1
        seen.update(shown)
    assert {mirrored for *_, mirrored in seen} == {False, True}
    assert len(seen) > 40
