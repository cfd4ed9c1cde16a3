"""What the package logs, under the logger "esam_kernels": ``ESAM_KERNELS_LOG=debug`` shows all of it on stderr.

At the level debug each operator of a backend says once, for each kind of tensors, that the backend has served it, and
each fallback to the reference says so too. Where the base optimizer's update is not fused into the restore, a line says
why, once for each reason.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

ENVIRONMENT_VARIABLE = "ESAM_KERNELS_LOG"
LEVELS = ("debug", "info", "warning", "error")

logger = logging.getLogger("esam_kernels")


def set_up() -> None:
    """Show what is logged from the level that ``ESAM_KERNELS_LOG`` names; without it leave logging to the user.

    Raises:
        ValueError: it names none.
    """
    level = os.environ.get(ENVIRONMENT_VARIABLE, "").lower()
    if not level:
        return
    if level not in LEVELS:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be one of {', '.join(LEVELS)}, got {level!r}")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s %(levelname)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False


def report_calls(backend: Any, operators: tuple[str, ...]) -> None:
    """Let the operators of a backend say what they serve. Called where debug lines are wanted: it costs time."""
    if getattr(backend, "_reports", False):
        return
    backend._reports = True
    name = backend.__name__.rpartition(".")[2]
    for operator in operators:
        setattr(backend, operator, _reporting(getattr(backend, operator), name, operator))
    if backend.direct is not None:
        fast = ("cross_entropy", "select", "gather")
        functions = {operator: _reporting(getattr(backend.direct, operator), name, operator) for operator in fast}
        backend.direct = SimpleNamespace(**functions)


_said: set[str] = set()


def debug_once(line: str) -> None:
    """A debug line, the first time that it comes up."""
    if logger.isEnabledFor(logging.DEBUG) and line not in _said:
        _said.add(line)
        logger.debug("%s", line)


_calls = threading.local()


def _reporting(function: Callable[..., Any], backend: str, operator: str) -> Callable[..., Any]:
    """``function``, with a line for the first call on each kind of tensors that it takes."""
    said = set()

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        outer = getattr(_calls, "backend", None)
        _calls.backend, _calls.passed_on = backend, False
        try:
            result = function(*args, **kwargs)
        finally:
            _calls.backend = outer
        passed_on, _calls.passed_on = _calls.passed_on, outer not in (None, backend)
        # The fast way answers None where it does not take the tensors; operators in place answer None always.
        if passed_on or (result is None and not operator.endswith("_")):
            return result
        line = (outer, _kinds(args))
        if line not in said:
            said.add(line)
            by = f", passed on by {outer}, which does not take them" if _calls.passed_on else ""
            logger.debug("%s: backend %s serves %s%s", operator, backend, line[1], by)
        return result

    return call


def _kinds(arguments: tuple[Any, ...]) -> str:
    """The kinds of tensors among the arguments, for a log line."""
    tensors = [tensor for argument in arguments for tensor in _tensors(argument)]
    kinds = {
        f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}{'' if _is_dense(tensor) else ' with gaps'}"
        for tensor in tensors
    }
    return ", ".join(sorted(kinds)) or "no tensors"


def _tensors(argument: Any) -> Iterator[Tensor]:
    if isinstance(argument, Tensor):
        yield argument
    elif isinstance(argument, (list, tuple)):
        yield from (value for value in argument if isinstance(value, Tensor))


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))
