"""What a replay relies on: the memory that a graph touches, and the arguments that its operators and launches hold.

Before each replay, :func:`check_memory` looks at every address outside the graph's own memory: it has to be alive, and
to belong to the step, which compares it before each replay (parameters, state, numbers, the held batch) or keeps it
(tables). :func:`check_arguments` compares what the graph holds with what a step would pass at that time: a
number or an address that was baked in, and has changed since, differs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree


class FreedMemoryError(AssertionError):
    """A replay touches memory that nobody owns any more."""


class UnownedMemoryError(AssertionError):
    """A replay touches memory that may be freed or moved without the step's notice."""


class StaleArgumentError(AssertionError):
    """A graph holds another argument than a step would pass now."""


def key_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True)
class Outside:
    """A tensor in memory that is not the graph's: its address and geometry."""

    storage: StorageWeakRef
    address: int
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Outside:
        storage, place = StorageWeakRef(tensor.untyped_storage()), tensor.data_ptr()
        return cls(storage, place, tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride())

    def tensor(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise FreedMemoryError(f"a graph touches freed memory: {self}")
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.size, self.stride)

    def __str__(self) -> str:
        return f"{self.dtype} {tuple(self.size)} at {self.address:#x}"


@dataclass(frozen=True)
class Place:
    """An address among the arguments of a launch: where it lies in which memory."""

    storage: StorageWeakRef
    offset: int
    is_pool: bool


@dataclass(frozen=True)
class Kept:
    """A table that a launch reads: memory that is kept for the graph, and the numbers in it."""

    storage: StorageWeakRef
    address: int
    is_kept: bool
    numbers: tuple[int, ...]
    resolved: tuple[Any, ...]


@dataclass
class Launch:
    name: str
    arguments: list[Any]


@dataclass
class Call:
    """An operator that was recorded: tensors of the graph as they are, others as :class:`Outside`."""

    function: Any
    args: Any
    kwargs: Any
    made: list[Tensor | None]
    launches: list[Launch] = field(default_factory=list)

    def __call__(self) -> None:
        given, named = pytree.tree_map_only(Outside, Outside.tensor, (self.args, self.kwargs))
        results = pytree.tree_leaves(self.function(*given, **named))
        for before, now in zip(self.made, results, strict=True):
            if before is not None and key_of(before) != key_of(now):
                before.copy_(now)

    def leaves(self) -> list[Any]:
        return pytree.tree_leaves((self.args, self.kwargs))


class Ledger:
    """The memory that was met in a capture, so that an address among a launch's arguments can be told from a number."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[int, int, StorageWeakRef, bool]] = {}
        self._kept: list[tuple[StorageWeakRef, int]] = []

    def note(self, tensor: Tensor, is_pool: bool) -> None:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            entry = storage.data_ptr(), storage.data_ptr() + storage.nbytes(), StorageWeakRef(storage), is_pool
            self._entries[storage.data_ptr()] = entry

    def keep(self, tensor: Tensor) -> None:
        self._kept.append((StorageWeakRef(tensor.untyped_storage()), tensor.data_ptr()))

    def resolve(self, launch: Any) -> Launch:
        """A launch of the stand-in for Triton's driver, or a call of the emulated extension."""
        arguments = launch.arguments
        values = list(arguments.values()) if isinstance(arguments, dict) else list(arguments)
        starts = sorted(self._entries)
        name = getattr(launch, "kernel", None) or launch.name
        grid = getattr(launch, "grid", None)
        resolved = [self._resolved(value, starts) for value in values]
        if isinstance(arguments, dict) and "addresses_ptr" in arguments:
            resolved[0] = _without_alignments(resolved[0], arguments["num_tensors"])
        return Launch(name, [grid, *resolved])

    def _resolved(self, value: Any, starts: list[int]) -> Any:
        if isinstance(value, (list, tuple)):
            return [self._resolved(one, starts) for one in value]
        if isinstance(value, int) and not isinstance(value, bool):
            return self._at(value, starts)
        if hasattr(value, "storage"):  # a pointer of the stand-in
            if value.numbers is None:
                found = self._at(value.address, starts)
                return found if isinstance(found, Place) else Place(value.storage, 0, is_pool=False)
            is_kept = (value.storage, value.address) in self._kept
            resolved = tuple(self._resolved(value.numbers, starts))
            return Kept(value.storage, value.address, is_kept, value.numbers, resolved)
        return value

    def _at(self, number: int, starts: list[int]) -> Any:
        at = bisect_right(starts, number) - 1
        if at >= 0:
            start, end, storage, is_pool = self._entries[starts[at]]
            if start <= number < end:
                return Place(storage, number - start, is_pool)
        return number


def _without_alignments(table: Kept, num_tensors: int) -> Kept:
    """The first row of a table of addresses holds sums of them: what counts is their alignment."""
    rows = tuple(number % 16 for number in table.numbers[:num_tensors]) + table.resolved[num_tensors:]
    return replace(table, resolved=rows)


def _leaves(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list):
            yield from _leaves(value)
        elif isinstance(value, Kept):
            yield value
            yield from _leaves(list(value.resolved))
        else:
            yield value


# -- Memory ------------------------------------------------------------------------------------------------------------


def check_memory(calls: Sequence[Any], owned: set[int]) -> None:
    """Every address outside the graph's memory is alive and owned. ``owned``: storages that the step answers for.

    Raises:
        FreedMemoryError: one is not alive, or a table was written over.
        UnownedMemoryError: one is alive by chance.
    """
    for call in calls:
        if not isinstance(call, Call):
            continue
        for leaf in call.leaves():
            if isinstance(leaf, Outside):
                _check_place(f"{call.function} reads {leaf}", leaf.storage, owned)
        for launch in call.launches:
            for number, value in enumerate(_leaves(launch.arguments)):
                what = f"{launch.name}, argument {number}"
                if isinstance(value, Place) and not value.is_pool:
                    _check_place(what, value.storage, owned)
                elif isinstance(value, Kept):
                    _check_table(what, value)


def _check_place(what: str, storage: StorageWeakRef, owned: set[int]) -> None:
    if storage.expired():
        raise FreedMemoryError(f"{what}: a graph touches freed memory")
    if storage.cdata not in owned:
        raise UnownedMemoryError(f"{what}: neither the step nor the graph holds that memory")


def _check_table(what: str, table: Kept) -> None:
    storage = torch.UntypedStorage._new_with_weak_ptr(table.storage.cdata)
    if storage is None:
        raise FreedMemoryError(f"{what}: a graph touches freed memory, a table of addresses")
    if not table.is_kept:
        raise UnownedMemoryError(f"{what}: a table of addresses that is not kept for the graph")
    first = (table.address - storage.data_ptr()) // torch.int64.itemsize
    found = torch.empty(0, dtype=torch.int64).set_(storage)[first : first + len(table.numbers)]
    if tuple(found.tolist()) != table.numbers:
        raise FreedMemoryError(f"{what}: a table of addresses was written over since the capture")


# -- Arguments ---------------------------------------------------------------------------------------------------------


def check_arguments(recorded: Sequence[Any], now: Sequence[Any]) -> None:
    """What a graph holds is what a step passes now; memory of the graph's own corresponds to fresh memory.

    Raises:
        StaleArgumentError: with the operator or kernel, what the graph holds and what the step passes.
    """
    same = _Correspondence()
    held, passed = ([call for call in calls if isinstance(call, Call)] for calls in (recorded, now))
    for one, other in zip_longest(held, passed):
        if one is None or other is None or one.function is not other.function:
            names = [None if call is None else str(call.function) for call in (one, other)]
            raise StaleArgumentError(f"a graph holds the operator {names[0]}, and a step calls {names[1]} now")
        same.compare(str(one.function), one.leaves(), other.leaves())
        for launch, fresh in zip_longest(one.launches, other.launches):
            names = [None if launch is None else launch.name for launch in (launch, fresh)]
            if names[0] != names[1]:
                raise StaleArgumentError(f"a graph holds a launch of {names[0]}, and a step launches {names[1]} now")
            same.compare(launch.name, list(_leaves(launch.arguments)), list(_leaves(fresh.arguments)))


class _Correspondence:
    def __init__(self) -> None:
        self._fresh_of: dict[Any, Any] = {}

    def compare(self, name: str, held: list[Any], passed: list[Any]) -> None:
        for number, (one, other) in enumerate(zip_longest(held, passed)):
            if not self._is_same(one, other):
                raise StaleArgumentError(
                    f"{name}, argument {number}: a graph holds {_said(one)}, and a step passes {_said(other)} now"
                )

    def _is_same(self, one: Any, other: Any) -> bool:
        if type(one) is not type(other) and not (isinstance(one, Tensor) and isinstance(other, Tensor)):
            return False
        if isinstance(one, Tensor):
            alike = (one.dtype, one.size(), one.stride()) == (other.dtype, other.size(), other.stride())
            return alike and self._fresh_of.setdefault(key_of(one), key_of(other)) == key_of(other)
        if isinstance(one, Outside):
            return all(getattr(one, name) == getattr(other, name) for name in ("address", "dtype", "size", "stride"))
        if isinstance(one, Place):
            if one.is_pool or other.is_pool:  # a temporary of an operator may lie where another one lay
                return one.is_pool == other.is_pool and one.offset == other.offset
            return (one.storage.cdata, one.offset) == (other.storage.cdata, other.offset)
        if isinstance(one, Kept):  # its numbers follow, one by one
            return len(one.numbers) == len(other.numbers)
        return one == other or (isinstance(one, float) and one != one and other != other) or callable(one)


def _said(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"memory of its own, {value.dtype} {tuple(value.shape)}"
    if isinstance(value, Place):
        return "an address in its own memory" if value.is_pool else f"an address outside, {value.storage.cdata:#x}"
    return str(value) if isinstance(value, Outside) else repr(value)
