"""The settings of the study: data, network, label noise, length of a training, and what its search may try."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from benchmarks.study import networks, samples
from benchmarks.study.modes import Mode
from benchmarks.study.samples import Samples
from benchmarks.study.training import Trial

SCALES = ("smoke", "full")
# The seeds of the search; those of the report start at 0.
FIRST_SEARCH_SEED = 100


@dataclass(frozen=True)
class Setting:
    """One panel of the chart."""

    name: str
    title: str
    load: Callable[[str | None], Samples]
    network: Callable[[], nn.Module]
    label_noise: float
    epochs: int
    rates: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2)
    batch_sizes: tuple[int, ...] = (32, 64, 128)
    weight_decays: tuple[float, ...] = (5e-4, 2e-3)
    trials: int = 12
    search_seeds: int = 2
    seeds: int = 10
    bfloat16: bool = False
    without: tuple[str, ...] = ()
    """Modes that this network has no layers for."""

    def trials_of(self, mode: Mode) -> list[Trial]:
        """The trials of a mode's search: the same number for each mode, drawn from its grid, always the same ones."""
        radii: tuple[float | None, ...] = mode.radii or (None,)
        grid = list(itertools.product(self.rates, self.batch_sizes, self.weight_decays, radii))
        drawn = random.Random(f"{self.name} {mode.searched_as or mode.name}").sample(grid, min(self.trials, len(grid)))
        return [Trial(*values) for values in drawn]

    def has(self, mode: Mode) -> bool:
        """Whether the mode can be run here."""
        return mode.name not in self.without

    def smoke(self) -> Setting:
        """The smallest version, for tests of the program."""
        return replace(self, epochs=1, trials=2, search_seeds=1, seeds=2, batch_sizes=self.batch_sizes[-1:])


_NO_NORMALIZATION = (
    "norm",
    "norm-rise",
    "norm-first-order",
    "norm-softened",
    "norm-random",
    "norm-random-last",
    "norm-quarter",
    "norm-sharp-quarter",
)


def _mnist1d(_: str | None) -> Samples:
    return samples.mnist1d()


def _digits(_: str | None) -> Samples:
    return samples.digits()


def _with_noise(base: Setting, *shares: float) -> list[Setting]:
    """The setting with each share of wrong training labels."""
    return [
        replace(
            base,
            name=f"{base.name}-{round(100 * share)}" if share else base.name,
            title=f"{base.title}, {round(100 * share)} % wrong labels" if share else base.title,
            label_noise=share,
        )
        for share in shares
    ]


_CONVOLUTION = Setting("mnist1d", "MNIST-1D, convolutions", _mnist1d, networks.conv1d, 0.0, epochs=30)
_DIGITS = Setting("digits", "digits, small CNN", _digits, networks.digits_cnn, 0.0, epochs=25)
_MLP = replace(
    _CONVOLUTION,
    name="mnist1d-mlp",
    title="MNIST-1D, MLP",
    network=networks.mlp,
    without=(*_NO_NORMALIZATION, "momentum-norm"),
)
_TRANSFORMER = replace(
    _CONVOLUTION,
    name="mnist1d-transformer",
    title="MNIST-1D, Transformer",
    network=networks.Transformer,
    rates=(0.01, 0.02, 0.05, 0.1),
    seeds=5,
)
_CIFAR = Setting(
    "cifar10",
    "CIFAR-10 (JPEG), 10,000 images, ResNet",
    samples.cifar10,
    networks.small_resnet,
    0.0,
    epochs=60,
    rates=(0.05, 0.1),
    batch_sizes=(64, 128),
    trials=4,
    search_seeds=1,
    seeds=3,
    bfloat16=True,
)
_CIFAR_PLAIN = replace(
    _CIFAR,
    name="cifar10-plain",
    title="CIFAR-10 (JPEG), 10,000 images, network without normalization",
    network=networks.plain_cnn,
    rates=(0.01, 0.03),
    without=_MLP.without,
)

SETTINGS: tuple[Setting, ...] = (
    *_with_noise(_CONVOLUTION, 0.0, 0.2),
    *_with_noise(_DIGITS, 0.0, 0.2, 0.4, 0.6),
    *_with_noise(_MLP, 0.0, 0.2),
    *_with_noise(_TRANSFORMER, 0.0, 0.2),
    *_with_noise(_CIFAR, 0.0, 0.2),
    *_with_noise(_CIFAR_PLAIN, 0.0),
)
BY_NAME = {setting.name: setting for setting in SETTINGS}
