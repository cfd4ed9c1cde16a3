"""Which of the paper's data sets are at hand, and reading them; without any, the digits stand in for them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from data import DataSet, UserError, load

from benchmarks.paper import ROOT

# The folder that is searched where --data says nothing: this variable, or "data" beside the package.
VARIABLE = "ESAM_DATA"
STAND_IN = "digits"
# What a data set may be called within a folder: the first that is there is taken.
NAMES = {
    "cifar10": (
        "cifar-10-batches-py",
        "cifar-10-batches-bin",
        "cifar-10-python.tar.gz",
        "cifar-10-binary.tar.gz",
        "cifar10_jpeg.npz",
    ),
    "cifar100": ("cifar-100-python", "cifar-100-binary", "cifar-100-python.tar.gz", "cifar-100-binary.tar.gz"),
    "imagenet": ("imagenet", "ILSVRC2012", "ILSVRC/Data/CLS-LOC"),
}
# A file or a folder in it by which a folder is the data set itself.
SIGNS = {"cifar10": ("data_batch_1", "data_batch_1.bin"), "cifar100": ("train.bin",), "imagenet": ("train/n01440764",)}


class Data:
    """The data sets below ``root``: a folder with some of them, one of them, "digits", or None for the default.

    Raises:
        UserError: ``root`` is given, and holds nothing that is known.
    """

    def __init__(self, root: str | None, scale: str, device: torch.device) -> None:
        self.scale, self.device = scale, device
        self.asked = root
        self.paths: dict[str, Path] = {}
        folder = root or os.environ.get(VARIABLE) or str(ROOT / "data")
        if folder != STAND_IN:
            self.paths = {name: path for name in NAMES if (path := find(Path(folder), name))}
        if root not in (None, STAND_IN) and not self.paths:
            known = ", ".join(name for names in NAMES.values() for name in names)
            raise UserError(f"--data {root}: no data set there (known: {known})")

    def available(self, *wanted: str) -> list[str]:
        """Those of ``wanted`` that are there; the digits where none is.

        Raises:
            UserError: none is there, and the scale is "paper".
        """
        found = [name for name in wanted if name in self.paths]
        if not found and self.scale == "paper":
            raise UserError(
                f"the scale 'paper' needs {' or '.join(wanted)}: --data FOLDER, or the variable {VARIABLE} "
                "(files as the data set's makers offer them, or the CIFAR-10 JPEG archive)"
            )
        return found or [STAND_IN]

    def label(self, name: str) -> str:
        """The name as rows carry it: the JPEG archive is not quite the paper's data."""
        return f"{name} (JPEG)" if name in self.paths and self.paths[name].suffix == ".npz" else name

    def load(self, name: str, limit: int | None = None) -> DataSet:
        """The digits or a CIFAR, on the device; ``limit`` keeps the first so many training and test images."""
        path = str(self.paths[name]) if name in self.paths else None
        return load(name, path, limit).to(self.device)


def find(root: Path, name: str) -> Path | None:
    """Where the data set ``name`` lies, ``root`` itself included."""
    candidates: Iterable[Path] = (root / entry for entry in NAMES[name])
    if root.name in NAMES[name] or any((root / sign).exists() for sign in SIGNS[name]):
        candidates = [root]
    return next((path for path in candidates if path.exists()), None)
