"""CIFAR-10 and CIFAR-100 from the files that are around.

- The standard files, for python (pickles) or binary, unpacked in a directory or as the .tar.gz they come in.
- The CIFAR-10 JPEG archive, one .npz: ``train_jpeg`` (uint8, all JPEG files end to end), ``train_offsets`` (int64,
  n + 1: image i is ``train_jpeg[offsets[i]:offsets[i + 1]]``), ``train_labels``, the same for ``test_``, and
  ``classes`` (the names).
"""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from itertools import pairwise
from pathlib import Path

import torch
from data import UserError
from torch import Tensor

try:
    import numpy as np
except ImportError:
    raise UserError("CIFAR needs NumPy: pip install numpy") from None

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32
BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
# Names of the training and test files, by number of classes and kind of file.
PYTHON_FILES = {10: (BATCHES, ["test_batch"]), 100: (["train"], ["test"])}
BINARY_FILES = {10: ([f"{name}.bin" for name in BATCHES], ["test_batch.bin"]), 100: (["train.bin"], ["test.bin"])}
# What stands before the pixels of an image in a binary file; the last byte is the label (CIFAR-100: coarse, fine).
BINARY_LABEL_BYTES = {10: 1, 100: 2}
PYTHON_LABELS = {10: b"labels", 100: b"fine_labels"}

Part = tuple[Tensor, Tensor]


def read_cifar(path: str | None, classes: int, limit: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images uint8 (n, 3, 32, 32) and labels int64 (n,) of the training set, then of the test set.

    ``limit`` bounds how many images of each set are decoded from the JPEG archive.
    """
    if path is None:
        raise UserError(f"--data cifar{classes} needs --data-path: a directory, .tar.gz or .npz")
    if not Path(path).exists():
        raise UserError(f"no such file or directory: {path}")
    if Path(path).suffix == ".npz":
        train, test = read_jpeg_archive(path, limit)
    else:
        train, test = read_standard_files(path, classes)
    for images, labels in (train, test):
        if len(images) == 0 or len(images) != len(labels):
            raise UserError(f"{path}: wrong format: {len(images)} images with {len(labels)} labels")
        if not 0 <= labels.min() <= labels.max() < classes:
            raise UserError(f"{path}: wrong format: labels up to {int(labels.max())}, not those of {classes} classes")
    return *train, *test


def read_standard_files(path: str, classes: int) -> tuple[Part, Part]:
    """The training and the test set from python or binary files, whichever are there."""
    kinds = ((PYTHON_FILES[classes], parse_python), (BINARY_FILES[classes], parse_binary))
    files = files_in(path, {name for (train, test), _ in kinds for name in train + test})
    for (train, test), parse in kinds:
        if not all(name in files for name in train + test):
            continue
        parts = []
        for names in (train, test):
            read = [parse(files[name], classes, f"{path}: {name}") for name in names]
            parts.append((torch.cat([images for images, _ in read]), torch.cat([labels for _, labels in read])))
        return parts[0], parts[1]
    python, binary = (f"{', '.join(train + test)}" for (train, test), _ in kinds)
    raise UserError(f"{path} holds no CIFAR-{classes}: neither {python} nor {binary}")


def files_in(path: str, names: set[str]) -> dict[str, bytes]:
    """The files called ``names`` in a .tar.gz, or in a directory or right below it."""
    if Path(path).is_dir():
        found = [entry for pattern in ("*/*", "*") for entry in Path(path).glob(pattern)]
        return {entry.name: entry.read_bytes() for entry in found if entry.name in names and entry.is_file()}
    files = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = Path(member.name).name
                if name in names and (content := archive.extractfile(member)):
                    files[name] = content.read()
    except (tarfile.TarError, EOFError, OSError):
        raise UserError(f"{path}: wrong format: neither a directory nor a .tar.gz nor an .npz") from None
    return files


class ArrayUnpickler(pickle.Unpickler):
    """Reads NumPy arrays, and refuses pickles that would call anything else."""

    ALLOWED = ("_reconstruct", "_frombuffer", "ndarray", "dtype", "encode")

    def find_class(self, module: str, name: str) -> object:
        if module.split(".")[0] in ("numpy", "_codecs") and name in self.ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"unexpected {module}.{name}")


def parse_python(content: bytes, classes: int, source: str) -> Part:
    """One pickled dict: data uint8 (n, 3072), and a list of labels."""
    try:
        batch = ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        batch = {key.encode() if isinstance(key, str) else key: value for key, value in batch.items()}
        images = torch.from_numpy(np.asarray(batch[b"data"], dtype=np.uint8)).reshape(-1, *SHAPE)
        return images, torch.tensor(batch[PYTHON_LABELS[classes]], dtype=torch.int64)
    except Exception as error:  # a damaged pickle may raise anything
        raise UserError(f"{source}: wrong format: {type(error).__name__}: {error}") from None


def parse_binary(content: bytes, classes: int, source: str) -> Part:
    """Records of one or two label bytes and 3072 pixels."""
    size = BINARY_LABEL_BYTES[classes] + PIXELS
    if len(content) == 0 or len(content) % size:
        raise UserError(f"{source}: wrong format: {len(content)} bytes are not a multiple of {size}")
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(-1, size)
    return records[:, -PIXELS:].reshape(-1, *SHAPE), records[:, -PIXELS - 1].to(torch.int64)


def read_jpeg_archive(path: str, limit: int | None) -> tuple[Part, Part]:
    """The training and the test set, decoded."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return read_jpeg_part(archive, "train", limit), read_jpeg_part(archive, "test", limit)
    except (KeyError, ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: wrong format: {error}") from None


def read_jpeg_part(archive: np.lib.npyio.NpzFile, part: str, limit: int | None) -> Part:
    try:
        from PIL import Image
    except ImportError:
        raise UserError("the CIFAR-10 JPEG archive needs Pillow: pip install pillow") from None
    content, offsets = archive[f"{part}_jpeg"].tobytes(), archive[f"{part}_offsets"].tolist()
    labels = torch.from_numpy(archive[f"{part}_labels"]).to(torch.int64)
    if len(offsets) != len(labels) + 1:
        raise ValueError(f"{len(offsets) - 1} {part} images with {len(labels)} labels")
    labels = labels[:limit]
    images = np.empty((len(labels), *SHAPE[1:], SHAPE[0]), dtype=np.uint8)
    for i, (start, end) in enumerate(pairwise(offsets[: len(labels) + 1])):
        images[i] = Image.open(io.BytesIO(content[start:end])).convert("RGB")
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels
