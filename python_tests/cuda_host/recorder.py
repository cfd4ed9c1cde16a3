"""Calls of the extension, in order, with what they were given; the emulator computes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Call:
    name: str
    arguments: tuple[Any, ...]

    @property
    def lists(self) -> list[list[int]]:
        """The addresses of a streaming kernel's lists of tensors."""
        return self.arguments[2]

    @property
    def numels(self) -> list[int]:
        return self.arguments[3]


@dataclass
class Recorder:
    """In the place of the extension ``_cuda``."""

    extension: ModuleType
    calls: list[Call] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.extension, name)
        if not callable(value):
            return value

        def call(*arguments: Any) -> Any:
            self.calls.append(Call(name, arguments))
            return value(*arguments)

        return call

    def take(self) -> list[Call]:
        """The calls since the last time."""
        calls = list(self.calls)
        self.calls.clear()
        return calls
