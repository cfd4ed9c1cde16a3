"""A stand-in for CUDA graphs: a capture records the operators of a step and computes nothing, a replay runs them again.

As in a graph, a replay takes the addresses and the numbers of the capture. Memory outside the graph is not kept alive.
Before each replay of a graphed step graph_checks.py looks at that memory, and compares what the graph holds with what a
step would pass at that time. What a capture forbids raises and breaks the capture: waiting for the device, copies from
ordinary memory of the host, pinning memory, and work on a stream that is not captured, whose memory would not be the
graph's. What libraries of CUDA allocate for themselves cannot be seen on a CPU. Random numbers behave as those of torch
2.11: a capture that fails leaves the generator "capturing".
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from graph_checks import Call, Ledger, Outside, check_arguments, check_memory, key_of
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from esam_kernels import graphs, uploads
from esam_kernels.captures import Capture, Captures

aten = torch.ops.aten
_WAITING = {
    aten._local_scalar_dense.default: "waiting for a value (.item(), print, bool(tensor))",
    aten.nonzero.default: "a shape that depends on values (nonzero)",
    aten.masked_select.default: "a shape that depends on values (masked_select)",
    aten._unique2.default: "a shape that depends on values (unique)",
    aten._pin_memory.default: "pinning memory of the host",
}
# Written by kernels whose schemas do not say so.
_WRITTEN_UNSAID = ("running_mean", "running_var")


class _Temporaries(TorchDispatchMode):
    """Notes the memory that an operator takes for itself while it runs."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {key_of(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and key_of(leaf) not in given:
                self._ledger.note(leaf, is_pool=True)
        return result


class _Recorder(TorchDispatchMode):
    def __init__(self, device: Device) -> None:
        super().__init__()
        self._device = device
        self.calls: list[Callable[[], None]] = []
        self.ledger = Ledger()
        self._inside: dict[int, Tensor] = {}  # by storage: memory of the graph, which it keeps
        self._of_host: set[int] = set()  # storages that were filled from Python numbers
        self._saved: dict[int, tuple[Tensor, Tensor]] = {}  # memory outside as it was before the capture

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._refuse(func, args, kwargs)
        self._save_what_is_written(func, args, kwargs)
        for tensor in pytree.tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self.ledger.note(tensor, is_pool=key_of(tensor) in self._inside)
        launches = len(self._device.launches)
        with _Temporaries(self.ledger):
            result = func(*args, **kwargs)
        made = []
        for tensor in pytree.tree_leaves(result):
            is_ours = isinstance(tensor, Tensor) and key_of(tensor) not in self._keys_of(args, kwargs)
            if is_ours:
                self._inside.setdefault(key_of(tensor), tensor.detach())
                self.ledger.note(tensor, is_pool=True)
            made.append(tensor.detach() if isinstance(tensor, Tensor) and key_of(tensor) in self._inside else None)
        if func is aten.lift_fresh.default:
            self._of_host.add(key_of(result))
        packed_args, packed_kwargs = pytree.tree_map_only(Tensor, self._pack, (args, kwargs))
        launched = [self.ledger.resolve(launch) for launch in self._device.launches[launches:]]
        self.calls.append(Call(func, packed_args, packed_kwargs, made, launched))
        return result

    def _refuse(self, func: Any, args: Any, kwargs: Any) -> None:
        graph = self._device.graph
        if graph is not None and graph.is_broken:
            raise RuntimeError("operation failed due to a previous error during capture")
        if graph is not None and self._device.stream not in graph.streams:
            self._device.refuse("memory outside the graph's pool, for an operator on a stream that is not captured")
        if kwargs.get("pin_memory"):
            self._device.refuse(_WAITING[aten._pin_memory.default])
        reads_host = any(isinstance(a, Tensor) and key_of(a) in self._of_host for a in pytree.tree_leaves(args[1:2]))
        if func is aten.copy_.default and reads_host and key_of(args[0]) not in self._of_host:
            self._device.refuse("a copy from ordinary memory of the host")
        is_of_host = bool(args) and isinstance(args[0], Tensor) and key_of(args[0]) in self._of_host
        if func in _WAITING and not is_of_host:
            self._device.refuse(_WAITING[func])
        indices = pytree.tree_leaves(args[1:2]) if func is aten.index.Tensor else []
        if any(index is not None and index.dtype is torch.bool for index in indices):
            self._device.refuse("a shape that depends on values (a boolean index)")

    def _save_what_is_written(self, func: Any, args: Any, kwargs: Any) -> None:
        for number, argument in enumerate(func._schema.arguments):
            value = kwargs.get(argument.name, args[number] if number < len(args) else None)
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written or argument.name in _WRITTEN_UNSAID:
                for tensor in pytree.tree_leaves(value):
                    if isinstance(tensor, Tensor) and key_of(tensor) not in {*self._inside, *self._saved}:
                        whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                        self._saved[key_of(tensor)] = whole, whole.clone()

    def undo(self) -> None:
        """A capture has computed nothing."""
        for whole, before in self._saved.values():
            whole.copy_(before)
        self._saved.clear()

    def _keys_of(self, *arguments: Any) -> set[int]:
        return {key_of(tensor) for tensor in pytree.tree_leaves(arguments) if isinstance(tensor, Tensor)}

    def _pack(self, tensor: Tensor) -> Any:
        return tensor.detach() if key_of(tensor) in self._inside else Outside.of(tensor)


@dataclass
class _State:
    """Of a generator. The numbers of the one in use are those of torch's generator on the CPU."""

    numbers: Tensor
    is_capturing: bool = False


class Generator:
    """The device's default generator, and handles on states of it."""

    def __init__(self, device: Device, state: _State) -> None:
        self._device, self.state = device, state

    @property
    def _is_in_use(self) -> bool:
        return self._device.generator.state is self.state

    def get_state(self) -> Tensor:
        return torch.get_rng_state() if self._is_in_use else self.state.numbers

    def set_state(self, numbers: Tensor) -> None:
        if self._device.graph is not None:
            self._device.refuse("setting the state of a generator")
        if self._is_in_use:
            torch.set_rng_state(numbers)
        else:
            self.state.numbers = numbers

    def clone_state(self) -> Generator:
        return Generator(self._device, _State(self.get_state()))

    def graphsafe_get_state(self) -> Generator:
        return Generator(self._device, self.state)

    def graphsafe_set_state(self, other: Generator) -> None:
        def switch() -> None:
            self.state.numbers = torch.get_rng_state()
            self.state = other.state
            torch.set_rng_state(self.state.numbers)

        switch()
        if self._device.graph is not None:
            self._device.graph.recorder.calls.append(switch)


class Graph:
    """torch.cuda.CUDAGraph."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._states: list[_State] = []
        self._registered_on: list[Any] = []
        self.streams: list[Any] = []
        """Those that are captured."""
        self.recorder = _Recorder(device)
        self.is_broken = self._is_whole = False
        self._pool: Any = None

    def __del__(self) -> None:
        self.reset()

    def register_generator_state(self, generator: Generator) -> None:
        """The state's seed and offset are put where kernels read them: on the device of the current stream."""
        self._states.append(generator.state)
        self._registered_on.append(self._device.stream)

    def capture_begin(self, pool: Any) -> None:
        assert self._device.graph is None
        if any(stream is not self._device.stream for stream in self._registered_on):
            raise RuntimeError(
                "illegal memory access: the seed lies on the device that was current, not the captured one"
            )
        self._device.use_pool(pool)
        self._pool = pool
        self._states.append(self._device.generator.state)
        for state in self._states:
            state.is_capturing = True
        self._numbers = torch.get_rng_state()
        self._device.graph = self
        self._device.open_pools += 1
        self._device.recorder = self.recorder
        self.recorder.__enter__()

    def capture_end(self) -> None:
        self.recorder.__exit__(None, None, None)
        self._device.graph = self._device.recorder = None
        self.recorder.undo()
        torch.set_rng_state(self._numbers)
        if self.is_broken:
            raise RuntimeError("operation failed due to a previous error during capture")
        self._device.open_pools -= 1
        self._is_whole = True
        for state in self._states:
            state.is_capturing = False

    def reset(self) -> None:
        """Lets go of what was recorded, and of the pool where the capture has ended as it should."""
        self.recorder = _Recorder(self._device)
        if self._is_whole:
            self._device.release_pool(None, self._pool)
        self._is_whole = False

    def replay(self) -> None:
        self._device.replays += 1
        self._device.is_replaying = True
        try:
            with torch.no_grad():
                for call in self.recorder.calls:
                    call()
        finally:
            self._device.is_replaying = False


@dataclass
class Device:
    """What ``torch.cuda`` answers while this stands in."""

    graph: Graph | None = None
    """The one that is being captured."""
    captures: list[weakref.ref[Graph]] = field(default_factory=list)
    replays: int = 0
    is_replaying: bool = False
    """Python runs that would not run on a GPU."""
    stream: Stream = field(init=False)
    modes: list[str] = field(default_factory=list)
    """The capture_error_mode of each capture."""
    open_pools: int = 0
    """Captures that the allocator believes to be going on."""
    pools: dict[Any, int] = field(default_factory=dict)
    """By the handle of each pool of memory that was used, how many graphs and captures hold it."""
    on_host: list[Tensor] = field(default_factory=list)
    """Tensors that are not on the device."""
    launches: list[Any] = field(default_factory=list)
    """Where another stand-in notes launches of kernels, in order."""
    other_logs: list[list[Any]] = field(default_factory=list)
    """What else is noted elsewhere, and is to say nothing of the captures that only check a graph."""
    compared: list[Tensor] = field(default_factory=list)
    """The memory that the step has compared with a graph's before its next replay."""
    recorder: _Recorder | None = None
    """What records operators now."""

    def __post_init__(self) -> None:
        self.stream = Stream(self)
        self.generator = Generator(self, _State(torch.get_rng_state()))

    def refuse(self, what: str) -> None:
        """What is not allowed in a capture."""
        if self.graph is not None:
            self.graph.is_broken = True
            raise RuntimeError(f"operation not permitted when stream is capturing: {what}")

    def check(self, step: Any, capture: Any) -> None:
        """Look at what a graph touches and holds, before the replay ``capture`` of a graphed step."""
        calls = capture.graph.recorder.calls
        inputs = [leaf for leaf in pytree.tree_leaves(step._inputs) if isinstance(leaf, Tensor)]
        check_memory(calls, {key_of(tensor) for tensor in [*self.compared, *inputs]})
        check_arguments(calls, self._calls_of_a_step(step))

    def _calls_of_a_step(self, step: Any) -> list[Any]:
        """What a step on the held inputs calls now, as a capture sees it. Nothing is left of that capture."""
        logs = [self.launches, self.modes, self.captures, *self.other_logs]
        before, fresh = [list(log) for log in logs], Capture(None)
        step._capture(fresh)
        for log, noted in zip(logs, before):
            log[:] = noted
        calls = fresh.graph.recorder.calls
        fresh.graph.reset()
        return calls

    def new_graph(self) -> Graph:
        graph = Graph(self)
        self.captures.append(weakref.ref(graph))
        return graph

    @property
    def users_of_pools(self) -> int:
        """Graphs and captures that hold a pool of memory."""
        return sum(self.pools.values())

    def use_pool(self, pool: Any) -> None:
        """torch's allocator, which lets go of a pool when the last of its graphs has gone and all its memory is free.

        Until then it refuses the handle. When that is nobody can tell: here the handle is refused ever after.
        """
        if self.pools.get(pool) == 0:
            raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED: the graphs of this pool are gone")
        self.pools[pool] = self.pools.get(pool, 0) + 1

    @contextlib.contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        """torch.cuda.stream."""
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextlib.contextmanager
    def capturing(
        self, graph: Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        """torch.cuda.graph, which leaves the stream set where ending the capture raises."""
        self.modes.append(capture_error_mode)
        before, self.stream = self.stream, stream or Stream(self)
        graph.streams.append(self.stream)
        graph.capture_begin(object() if pool is None else pool)
        try:
            yield
        finally:
            graph.capture_end()
            self.stream = before

    def end_allocations(self, index: Any, pool: Any) -> None:
        """torch._C._cuda_endAllocateToPool."""
        if self.open_pools == 0:
            raise RuntimeError("not currently recording to this pool")
        self.open_pools -= 1

    def release_pool(self, index: Any, pool: Any) -> None:
        """torch._C._cuda_releasePool."""
        self.pools[pool] -= 1


@dataclass
class Event:
    """torch.cuda.Event, on a device that is done at once."""

    device: Device

    def record(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        self.device.refuse("asking whether the device has come to an event (query)")
        return True


class Stream:
    """torch.cuda.Stream. One that waits for a captured stream is captured too."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.waits: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waits.append(other)
        graph = self._device.graph
        if graph is not None and other in graph.streams:
            graph.streams.append(self)


def install(patch: Any) -> Device:
    """CPU tensors are on a CUDA device, as far as Python asks. ``patch`` is pytest's ``monkeypatch``."""
    device, handles = Device(), itertools.count(1)
    patch.setattr(
        torch.Tensor,
        "is_cuda",
        property(lambda tensor: all(tensor is not other for other in device.on_host)),
        raising=False,
    )
    for name, value in {
        "Stream": lambda *_: Stream(device),
        "stream": device.on,
        "current_stream": lambda *_: device.stream,
        "current_device": lambda: 0,
        "CUDAGraph": device.new_graph,
        "Event": lambda *_: Event(device),
        "synchronize": lambda *_: device.refuse("waiting for the device (synchronize)"),
        "graph": device.capturing,
        "graph_pool_handle": lambda: (0, next(handles)),
        "is_initialized": lambda: True,
        "is_current_stream_capturing": lambda: device.graph is not None,
        "default_generators": (device.generator,),
    }.items():
        patch.setattr(torch.cuda, name, value)
    replay, find, keep = graphs._GraphedStep._replay, Captures.find, uploads.keep

    def checked_replay(step: Any, capture: Any) -> Any:
        device.check(step, capture)
        return replay(step, capture)

    def noted_find(captures: Any, key: Any, memory: Any) -> Any:
        device.compared = list(memory)
        return find(captures, key, memory)

    def noted_keep(*memory: Tensor) -> None:
        keep(*memory)
        for tensor in memory:
            device.recorder.ledger.keep(tensor)

    patch.setattr(graphs._GraphedStep, "_replay", checked_replay)
    patch.setattr(Captures, "find", noted_find)
    patch.setattr(uploads, "keep", noted_keep)
    patch.setattr(torch._C, "_cuda_endAllocateToPool", device.end_allocations, raising=False)
    patch.setattr(torch._C, "_cuda_releasePool", device.release_pool, raising=False)
    return device
