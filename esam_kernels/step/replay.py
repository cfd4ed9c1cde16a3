"""What a second look at the same batch must not change: BatchNorm's running statistics and the random noise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn


@contextlib.contextmanager
def frozen_batch_norm(model: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm layers of ``model`` in training mode normalise by the batch, but keep their running statistics.

    ``running_mean``, ``running_var`` and ``num_batches_tracked`` stay as they are, bit for bit. Uses may be nested, and
    an exception leaves everything as it was.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    tracked = [layer.track_running_stats for layer in layers]
    try:
        for layer in layers:
            # In training mode this hides the buffers from the kernel; momentum = 0 would still write 0 * NaN into them.
            layer.track_running_stats = layer.track_running_stats and not layer.training
        yield
    finally:
        for layer, track in zip(layers, tracked):
            layer.track_running_stats = track


class RandomState:
    """The state of torch's random generators at one moment, to be replayed: the same dropout in two forwards.

    >>> noise = RandomState(devices)
    >>> first = model(inputs)
    >>> with noise.replay():
    ...     second = model(inputs)      # the same dropout masks as in the first

    Args:
        devices: CUDA devices whose generators count, beside the CPU's.
    """

    def __init__(self, devices: Iterable[torch.device] = ()) -> None:
        self._devices = sorted({device.index or 0 for device in devices if device.type == "cuda"})
        self._cpu = torch.get_rng_state()
        self._cuda = [torch.cuda.get_rng_state(index) for index in self._devices]

    @contextlib.contextmanager
    def replay(self) -> Iterator[None]:
        """Inside, the generators run from the remembered state; afterwards from where they were."""
        with torch.random.fork_rng(devices=self._devices):
            torch.set_rng_state(self._cpu)
            for index, state in zip(self._devices, self._cuda):
                torch.cuda.set_rng_state(state, index)
            yield
