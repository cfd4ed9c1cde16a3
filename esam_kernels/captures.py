"""Captured steps: a CUDA graph each, what is fixed in it, the memory that it holds, and what a capture must not change.

A graph holds addresses. Where a tensor has moved since (``load_state_dict`` and ``model.to`` move them), a replay would
read and write memory that is freed, and nothing would say so: :class:`Captures` compares the addresses each time.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from esam_kernels import state
from esam_kernels.batches import num_ascent
from esam_kernels.device_numbers import is_capturing
from esam_kernels.optimizer import ESAM
from esam_kernels.perturbation.fused_update import has_hooks
from esam_kernels.settings import Settings
from esam_kernels.step.plan import choose
from esam_kernels.tensor_lists import MemoryMarks, tensors_in


@dataclass
class Capture:
    """A kind of step that has run eagerly, where ``graph`` is None, or that is captured."""

    memory: MemoryMarks
    graph: torch.cuda.CUDAGraph | None = None
    result: Any = None
    """What the captured step returned, in the graph's own memory."""


class Captures:
    """The kinds of steps that were seen, by their key; at most ``limit``: of more, the least recently used goes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._by_key: OrderedDict[Hashable, Capture] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_key)

    @property
    def hold_a_graph(self) -> bool:
        """Whether any of them is captured."""
        return any(capture.graph is not None for capture in self._by_key.values())

    def find(self, key: Hashable, memory: list[Tensor]) -> Capture | None:
        """The kind of step of this key; None where it is new, or where a tensor of ``memory`` has moved since."""
        capture = self._by_key.get(key)
        if capture is not None and not capture.memory.are_all(memory):
            del self._by_key[key]
            return None
        if capture is not None:
            self._by_key.move_to_end(key)
        return capture

    def keep(self, key: Hashable, capture: Capture) -> None:
        """Add one."""
        self._by_key[key] = capture
        if len(self._by_key) > self._limit:
            self._by_key.popitem(last=False)

    def clear(self) -> None:
        """Forget all."""
        self._by_key.clear()


def modules_of(optimizer: ESAM) -> list[nn.Module]:
    """The modules of the optimizer's model; none where no model is known. Faster than ``model.modules()``."""
    modules = [] if optimizer._model is None else [optimizer._model]
    for module in modules:  # which grows meanwhile
        modules += [child for child in module._modules.values() if child is not None]
    return modules


def key_of(optimizer: ESAM, modules: list[nn.Module], samples: int) -> tuple[Any, ...]:
    """What is fixed in a graph of the optimizer's next step on so many samples."""
    perturbation, phases = optimizer._perturbation, optimizer._phases
    settings = perturbation.settings
    return (
        type(choose(phases)).__name__,
        phases.num_selected(samples),
        (num_ascent(settings.ascent_share, samples), settings.ascent_share < 1.0),
        tuple(perturbation.drawn()),
        tuple(perturbation.trained()),
        tuple(getattr(settings, name) for name in _FIXED_SETTINGS),
        settings.beta if settings.mask == "tensor" else perturbation.draws_elements,
        tuple(_fixed_of(group) for group in optimizer.param_groups),
        phases.replays_noise,
        tuple([module.training for module in modules]),
        _autocast_of(perturbation.params[0].device.type),
        has_hooks(optimizer.base_optimizer),
    )


# beta, gamma and ascent_share are in the key in their own way. The seed is read on the device. The ranking, which may
# have no hash, never changes.
_NOT_AS_THEY_ARE = ("beta", "gamma", "ascent_share", "seed", "ranking")
_FIXED_SETTINGS = tuple(field.name for field in fields(Settings) if field.name not in _NOT_AS_THEY_ARE)
# What a group holds that a graph reads on the device, or not at all.
_NOT_FIXED = frozenset(("params", "lr", "rho", "esam", "initial_lr", "initial_rho", "rho_over_lr"))


def _fixed_of(group: dict[str, Any]) -> tuple[Any, ...]:
    """The numbers of a group that kernels take as arguments, by name: ``load_state_dict`` changes their order."""
    names = sorted(name for name, value in group.items() if name not in _NOT_FIXED and not isinstance(value, Tensor))
    return group["rho"] > 0.0, *((name, None if group[name] is None else repr(group[name])) for name in names)


def _autocast_of(device_type: str) -> tuple[Any, ...]:
    """What autocast makes of a forward, where it is entered outside the closure."""
    enabled = torch.is_autocast_enabled(device_type)
    return enabled, torch.get_autocast_dtype(device_type), torch.is_autocast_cache_enabled()


def memory_of(optimizer: ESAM, modules: list[nn.Module]) -> list[Tensor]:
    """The tensors outside a graph that a step of the optimizer reads or writes, but for numbers that are uploaded."""
    tensors = [*optimizer._perturbation.params, *tensors_in(optimizer.state)]
    tensors += [last for _, last in sorted(optimizer._perturbation.ascent.state().items())]
    for group in optimizer.param_groups:
        tensors += [value for value in group.values() if isinstance(value, Tensor) and value.is_cuda]
    held = [kept for module in modules for kept in (module._parameters, module._buffers) if kept]
    # Those of a scripted module are no dicts.
    held = [kept if isinstance(kept, dict) else dict(kept.items()) for kept in held]
    return tensors + tensors_in(dict(enumerate(held)))


class HostState:
    """What a step changes on the host, as it was before a capture. A capture computes nothing: all of it is put back.

    Args:
        optimizer: whose step is captured.
    """

    def __init__(self, optimizer: ESAM) -> None:
        self._optimizer = optimizer
        self._step = optimizer._perturbation.step
        self._states = {param: dict(values) for param, values in optimizer.state.items()}
        self._history = optimizer._perturbation.ascent.state()
        self._buffers = [
            (module, name, buffer) for module in modules_of(optimizer) for name, buffer in module._buffers.items()
        ]
        self._noise = torch.get_rng_state()

    def end(self) -> None:
        """The step is captured, and still to come.

        Raises:
            RuntimeError: a buffer was replaced by a new tensor, which a replay cannot do.
        """
        for module, name, buffer in self._buffers:
            if module._buffers.get(name) is not buffer:
                raise RuntimeError(
                    f"the forward puts a new tensor in place of the buffer {name!r} of {type(module).__name__}; in a "
                    f"graph it has to write into it: self.{name}.copy_(...)"
                )
        self._count()

    def put_back(self) -> None:
        """The capture has failed: go on as if it had not been tried."""
        optimizer, states = self._optimizer, self._optimizer.state
        optimizer._phases.abandon()
        for param in [param for param in states if param not in self._states]:
            del states[param]
        for param, values in self._states.items():
            states[param].clear()
            states[param].update(values)
        optimizer._perturbation.ascent.put_back(self._history)
        for module, name, buffer in self._buffers:
            if module._buffers.get(name) is not buffer:
                module._buffers[name] = buffer
        torch.set_rng_state(self._noise)
        self._count()

    def _count(self) -> None:
        self._optimizer._phases.drop_gradients()
        self._optimizer._perturbation.step = self._step
        state.note(self._optimizer._perturbation)


class CapturedNoise:
    """The random numbers of the first forward once more, inside a graph.

    A second generator state takes part in the graph; before each replay it is set to where the first one stands.
    """

    def __init__(self, device: torch.device) -> None:
        index = device.index if device.index is not None else torch.cuda.current_device()
        self._generator = torch.cuda.default_generators[index]
        self._second = self._generator.clone_state()

    def register(self, graph: torch.cuda.CUDAGraph) -> None:
        """The second state takes part in ``graph``, which is to be captured now."""
        graph.register_generator_state(self._second)
        self.align()

    def align(self) -> None:
        """Set the second state to where the first one stands."""
        self._second.set_state(self._generator.get_state())

    def remember(self) -> CapturedNoise:
        """What :class:`esam_kernels.step.replay.RandomState` is for an eager step. In a graph it is aligned already."""
        if not is_capturing():
            self.align()
        return self

    @contextlib.contextmanager
    def replay(self) -> Iterator[None]:
        """Inside, random numbers come from the second state."""
        first = self._generator.graphsafe_get_state()
        self._generator.graphsafe_set_state(self._second)
        try:
            yield
        finally:
            self._generator.graphsafe_set_state(first)

    def mend(self) -> None:
        """After a capture that failed: torch 2.11 leaves the generator's state "capturing", and then refuses to draw.

        A copy of the state takes its place. Graphs captured before hold the old one: they must not be replayed any
        more.
        """
        self._generator.graphsafe_set_state(self._generator.clone_state())
        self._second = self._generator.clone_state()


# Graphs whose capture broke. torch ends a capture in its allocator of pinned memory only where the capture is whole,
# and Python has no call for it: that allocator goes on asking the graph, at its address, which stream it records.
_broken: list[torch.cuda.CUDAGraph] = []
# What is left of each is some hundred bytes, and a question at each allocation of pinned memory.
MAX_BROKEN = 64


def check_failures() -> None:
    """Refuse a capture where too many have failed in this process.

    Raises:
        RuntimeError: it is refused.
    """
    if len(_broken) >= MAX_BROKEN:
        raise RuntimeError(
            f"{len(_broken)} captures in a CUDA graph have failed in this process, and torch keeps a piece of each: no "
            "other is tried. Call optimizer.step in place of the graphed step, or mend what the failures named and "
            "start the program again"
        )


def give_up(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> None:
    """Give back the memory of a capture that failed, and end it in torch's allocator if torch has not done so."""
    try:
        torch._C._cuda_endAllocateToPool(device.index, pool)
    except RuntimeError:  # ended already: the closure raised, and the capture itself is whole
        graph.reset()
        return
    torch._C._cuda_releasePool(device.index, pool)
    graph.reset()
    _broken.append(graph)


def first_cause(error: BaseException) -> BaseException:
    """What broke a capture: what comes up after it, and when the capture ends, only says that it is broken."""
    while error.__context__ is not None:
        error = error.__context__
    return error
