"""The settings of the study: data, network, label noise, length of a training, and what its search may try."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import nn

from benchmarks.study import networks, samples
from benchmarks.study.modes import BY_NAME as MODES
from benchmarks.study.modes import Mode
from benchmarks.study.samples import Samples
from benchmarks.study.search import Search

SCALES = ("smoke", "full")


@dataclass(frozen=True)
class Setting:
    """One panel of the chart."""

    name: str
    title: str
    load: Callable[[str | None], Samples]
    network: Callable[[], nn.Module]
    label_noise: float
    epochs: int
    search: Search = field(default_factory=Search)
    seeds: int = 10
    bfloat16: bool = False
    modes: tuple[str, ...] = tuple(MODES)
    """The names of the modes that are compared here."""

    def has(self, mode: Mode) -> bool:
        """Whether the mode is compared here."""
        return mode.name in self.modes

    def smoke(self) -> Setting:
        """The smallest version, for tests of the program."""
        sizes = self.search.batch_sizes[-1:]
        search = Search(self.search.rates[:2], sizes, (5e-4,), combinations=1, rounds=((1, 1),), extensions=0)
        return replace(self, epochs=1, seeds=2, search=search)


# Every mode takes as many trainings as the others: 56 to search, and two for each seed of the report. So the settings
# whose trainings take half a minute or more compare few modes; the digits, at 3 seconds a training, nearly all.
_FEW = ("sgd", "sam", "esam", "sam-quarter", "momentum-warm")
_RANKINGS = (*_FEW, "momentum", "first-order", "random", "sharp-quarter")
_MORE_PARTS = ("sam-three-eighths", "sharp-three-eighths")


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


_CONVOLUTION = Setting(
    "mnist1d",
    "MNIST-1D, convolutions",
    _mnist1d,
    networks.conv1d,
    0.0,
    epochs=30,
    modes=(*_RANKINGS, "norm", "norm-first-order", "norm-quarter"),
)
_DIGITS = Setting(
    "digits",
    "digits, small CNN",
    _digits,
    networks.digits_cnn,
    0.0,
    epochs=25,
    modes=tuple(name for name in MODES if name not in _MORE_PARTS),
)
_MLP = replace(
    _CONVOLUTION,
    name="mnist1d-mlp",
    title="MNIST-1D, MLP",
    network=networks.mlp,
    # It has no normalization layers.
    modes=tuple(name for name, mode in MODES.items() if not mode.only_normalization),
)
_TRANSFORMER = replace(
    _CONVOLUTION,
    name="mnist1d-transformer",
    title="MNIST-1D, Transformer",
    network=networks.Transformer,
    search=Search((0.02, 0.05, 0.1), (32, 64), (5e-4,), combinations=2, rounds=((4, 1), (2, 1))),
    seeds=5,
    # The random half tells what the choice of ESAM costs from what half a batch costs.
    modes=(*_FEW, "random"),
)
_CIFAR = Setting(
    "cifar10",
    "CIFAR-10 (JPEG), 10,000 images, ResNet",
    samples.cifar10,
    networks.small_resnet,
    0.0,
    epochs=60,
    search=Search((0.05, 0.1), (64,), combinations=1, rounds=()),
    seeds=3,
    bfloat16=True,
    modes=_FEW,
)
_CIFAR_PLAIN = replace(
    _CIFAR,
    name="cifar10-plain",
    title="CIFAR-10 (JPEG), 10,000 images, network without normalization",
    network=networks.plain_cnn,
    search=Search((0.02, 0.05), (64,), combinations=1, rounds=()),
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
