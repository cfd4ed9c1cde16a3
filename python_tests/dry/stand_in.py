"""A stand-in for the GPU: Triton specialises, compiles for sm_90 and "launches", and nothing is computed.

The path is the real one, on CPU tensors: only the driver at its end is replaced. What a kernel would write is not
written, so results are garbage, apart from the kernels in ``EFFECTS``, whose output decides what the host does next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch.multiprocessing.reductions import StorageWeakRef
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from esam_kernels import backends, uploads
from esam_kernels.backends.triton import adam, blocks, cross_entropy, norm, perturb, select_gather, update

MODULES = (norm, perturb, update, adam, cross_entropy, select_gather)
TARGET = GPUTarget("cuda", 90, 32)


@dataclass(frozen=True)
class Pointer:
    """A tensor among the arguments of a launch. The tensor itself is not kept: it would not be freed."""

    address: int
    dtype: torch.dtype
    storage: StorageWeakRef | None = field(default=None, compare=False)
    numbers: tuple[int, ...] | None = field(default=None, compare=False)
    """What a table holds, where :attr:`StandIn.reads_tables`."""


@dataclass(frozen=True)
class Launch:
    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]


def _choose_the_first(arguments: dict[str, Any]) -> None:
    """Indices that lie inside the batch: what is gathered by them is read on the host in this tier."""
    torch.arange(arguments["k"], out=arguments["indices_ptr"])


EFFECTS: dict[str, Callable[[dict[str, Any]], None]] = {"select_kernel": _choose_the_first}


@dataclass
class StandIn:
    """What the host has asked the device for, in order.

    ``listeners`` are called with each event as it comes: ("compile", kernel's name), ("load", kernel's name),
    ("launch", :class:`Launch`), ("upload", bytes). One that raises stops the call that made the event.
    """

    compilations: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    uploads: list[int] = field(default_factory=list)
    listeners: list[Callable[[str, Any], None]] = field(default_factory=list)
    reads_tables: bool = False

    def note(self, kind: str, what: Any) -> None:
        lists = {"compile": self.compilations, "load": self.loads, "launch": self.launches, "upload": self.uploads}
        lists[kind].append(what)
        for listener in self.listeners:
            listener(kind, what)

    def take(self) -> list[str]:
        """The names of the kernels that were launched since the last call, in order, without their "_kernel"."""
        names = [launch.kernel.removesuffix("_kernel") for launch in self.launches]
        self.launches.clear()
        return names

    def forget(self) -> None:
        """Start counting anew."""
        for events in (self.compilations, self.loads, self.launches, self.uploads):
            events.clear()

    def counts(self) -> Counter[str]:
        """How often each kernel was launched."""
        return Counter(launch.kernel.removesuffix("_kernel") for launch in self.launches)


class _Utils:
    def __init__(self, stand_in: StandIn) -> None:
        self._stand_in = stand_in

    def load_binary(self, name: str, *_: Any) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills, and the threads a program may have."""
        self._stand_in.note("load", name)
        return 1, 1, 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        """An H100's."""
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}


class Driver:
    """What Triton asks of its driver."""

    def __init__(self, stand_in: StandIn) -> None:
        self._stand_in = stand_in
        self.utils = _Utils(stand_in)

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, *_: Any) -> tuple[int, int]:
        return 9, 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        names = source.fn.arg_names

        def launch(grid_0: int, grid_1: int, grid_2: int, *rest: Any) -> None:
            arguments = dict(zip(names, rest[-len(names) :], strict=True))
            if source.fn.__name__ in EFFECTS:
                EFFECTS[source.fn.__name__](arguments)
            tables = TABLES if self._stand_in.reads_tables else ()
            recorded = {name: _recorded(value, name in tables) for name, value in arguments.items()}
            self._stand_in.note("launch", Launch(source.fn.__name__, (grid_0, grid_1, grid_2), recorded))

        return launch


TABLES = ("addresses_ptr", "layout_ptr")


def _recorded(value: Any, is_table: bool) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    numbers = tuple(value.tolist()) if is_table else None
    return Pointer(value.data_ptr(), value.dtype, StorageWeakRef(value.untyped_storage()), numbers)


def kernels() -> Iterator[JITFunction]:
    """Every kernel and device function of the Triton backend."""
    seen = set()
    for module in (blocks, *MODULES):
        for value in vars(module).values():
            if isinstance(value, JITFunction) and id(value) not in seen:
                seen.add(id(value))
                yield value


@contextmanager
def installed(patch: Any) -> Iterator[StandIn]:
    """The stand-in as Triton's driver, and CPU tensors served by the Triton backend as if they lay on its device.

    Nothing is loaded or compiled at the start, whatever ran before. ``patch`` is pytest's ``monkeypatch``.
    """
    stand_in = StandIn()
    _tell_package(patch, stand_in)
    compile_kernel = JITFunction._do_compile

    def do_compile(kernel: JITFunction, *args: Any, **kwargs: Any) -> Any:
        stand_in.note("compile", kernel.__name__)
        return compile_kernel(kernel, *args, **kwargs)

    patch.setattr(JITFunction, "_do_compile", do_compile)
    for kernel in kernels():
        kernel.device_caches.clear()
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(Driver(stand_in))
    try:
        yield stand_in
    finally:
        triton.runtime.driver.set_active(before)
        for kernel in kernels():
            kernel.device_caches.clear()


def _tell_package(patch: Any, stand_in: StandIn) -> None:
    """CPU tensors are on the device: "cpu" takes the defaults of "cuda"."""
    triton_backend = backends.load("triton")
    patch.setattr(triton_backend, "unavailable", lambda device: None)
    patch.setitem(backends._DEFAULT_ORDER, "cpu", backends._DEFAULT_ORDER["cuda"])
    patch.setattr(backends, "_resolved", {})
    staged = uploads.staged

    def counted(values: torch.Tensor, device: torch.device) -> torch.Tensor:
        stand_in.note("upload", values.nbytes)
        return staged(values, device)

    patch.setattr(uploads, "staged", counted)
    for cached in (blocks._addresses, blocks._layout):
        cached.cache_clear()
