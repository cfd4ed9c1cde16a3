"""What a second forward of the same batch must not change: the buffers of the model and the random noise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

# A buffer up to this size is always kept: kernels that write through a raw pointer, torch.nn.functional.batch_norm's
# among them, leave no trace in its version. Statistics of channels are smaller, tables and masks are larger.
SMALL_BUFFER = 64 * 1024
"""Bytes."""


@contextlib.contextmanager
def frozen_batch_norm(model: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm layers of ``model`` in training mode normalise by the batch, but keep their running statistics.

    >>> with frozen_batch_norm(model):
    ...     outputs = model(inputs)

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


class ModelBuffers:
    """The buffers of a model as the first forward of a step left them, to be put back after the later ones.

    Running statistics of any kind of layer, scripted ones included, the vectors of spectral normalisation, observers'
    ranges and counters then move in the first forward only.

    >>> buffers = ModelBuffers(model)
    >>> first = model(inputs)
    >>> buffers.remember()
    >>> second = model(inputs)
    >>> buffers.put_back()             # as if the second forward had never been

    Little is copied:

    * torch's own BatchNorm layers: nothing. They are kept from moving, as :func:`frozen_batch_norm` does.
    * Other buffers of at most ``SMALL_BUFFER`` bytes: always.
    * Larger ones: if they have changed since the last ``put_back``, if a later forward changed them in the step before,
      and when they are seen for the first time.

    Buffers that the later forwards replace (``module.mean = new``) are put back as objects. Copies stay on the device
    and nothing waits for it: both calls may be captured in a CUDA graph.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # The version of each large buffer when it was last seen, by its identity.
        self._versions: dict[int, int] = {}
        self._forget()

    def _forget(self) -> None:
        self._is_remembered = False
        self._batch_norm: list[nn.Module] = []
        self._places: list[tuple[nn.Module, str, Tensor | None]] = []
        self._kept: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._watched: list[tuple[Tensor, int]] = []

    @torch.no_grad()
    def remember(self) -> None:
        """Call this after the first forward. What an earlier call remembers is put back first."""
        self.put_back()
        self._is_remembered = True
        for module in self._model.modules():
            if not module._buffers:
                continue
            if _is_torchs_batch_norm(module):
                if module.training and module.track_running_stats:
                    self._batch_norm.append(module)
                    _set_tracking(module, False)
            else:
                self._places += [(module, name, buffer) for name, buffer in module._buffers.items()]
        buffers = {id(buffer): buffer for _, _, buffer in self._places if buffer is not None and is_writable(buffer)}
        for key, buffer in buffers.items():
            if buffer.nbytes <= SMALL_BUFFER:
                self._kept.append(buffer)
                continue
            self._watched.append((buffer, buffer._version))
            if self._versions.get(key) != buffer._version:
                self._kept.append(buffer)
        if self._kept:
            self._copies = [torch.empty_like(buffer, requires_grad=False) for buffer in self._kept]
            torch._foreach_copy_(self._copies, self._kept)

    @torch.no_grad()
    def put_back(self) -> None:
        """Call this after the last forward of the step. Without a :meth:`remember` before, nothing happens."""
        if not self._is_remembered:
            return
        # One that a later forward writes is kept in the next step as well, whether or not the first one writes it.
        resting = [buffer for buffer, version in self._watched if buffer._version == version]
        if self._kept:
            torch._foreach_copy_(self._kept, self._copies)
        self._let_go()
        self._versions = {id(buffer): buffer._version for buffer in resting}
        self._forget()

    def abandon(self) -> None:
        """Give up what is remembered, where the later forwards computed nothing: after a capture that failed."""
        self._let_go()
        self._forget()

    def _let_go(self) -> None:
        for module in self._batch_norm:
            _set_tracking(module, True)
        for module, name, buffer in self._places:
            if module._buffers[name] is not buffer:
                _set_buffer(module, name, buffer)


_BATCH_NORM_FORWARDS = (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward)


def _is_torchs_batch_norm(module: nn.Module) -> bool:
    """Whether its forward obeys ``track_running_stats``: a subclass with a forward of its own may not."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and type(module).forward in _BATCH_NORM_FORWARDS


def _set_tracking(module: nn.Module, track: bool) -> None:
    # A module's __setattr__ costs more than the rest of the walk.
    module.__dict__["track_running_stats"] = track


def is_writable(buffer: Tensor) -> bool:
    """Whether a layer can write into it at all."""
    overlaps = any(stride == 0 and size > 1 for stride, size in zip(buffer.stride(), buffer.shape))
    return not (buffer.is_meta or buffer.is_inference() or buffer.numel() == 0 or overlaps)


def _set_buffer(module: nn.Module, name: str, buffer: Tensor | None) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        setattr(module, name, buffer)
    else:
        module._buffers[name] = buffer


class RandomState:
    """The state of torch's random generators at one moment, to be replayed: the same dropout in two forwards.

    >>> noise = RandomState()
    >>> first = model(inputs)
    >>> with noise.replay():
    ...     second = model(inputs)      # the same dropout masks as in the first

    Args:
        devices: CUDA devices whose generators count, as ``torch.device``, beside the CPU's, which always counts. None:
            all that this process sees, if it uses CUDA. Name the model's device to spare the others.
    """

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> RandomState:
        """The state of every device that one of ``tensors`` lies on: of a whole model that is split over several."""
        return cls({tensor.device for tensor in tensors})

    def __init__(self, devices: Iterable[torch.device] | None = None) -> None:
        if devices is None:
            self._devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        else:
            self._devices = sorted({_index(device) for device in devices if device.type == "cuda"})
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


def _index(device: torch.device) -> int:
    """``torch.device("cuda")`` is the current one."""
    return torch.cuda.current_device() if device.index is None else device.index
