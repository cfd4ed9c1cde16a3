"""The implementations behind every operator, and how one is chosen.

A backend is a module that declares what :mod:`esam_kernels.backends.protocol` lists: one function per operator of
:mod:`esam_kernels.ops`, and what else the package may use of it.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os

import torch

from esam_kernels import logs
from esam_kernels.backends import extensions, protocol
from esam_kernels.backends.protocol import Backend

logger = logging.getLogger("esam_kernels")

ENVIRONMENT_VARIABLE = "ESAM_KERNELS_BACKEND"
NAMES = ("reference", "native", "triton", "cuda")

# Stands for the default of the device, whatever the environment says.
_DEFAULT = "default"

# The order in which backends are tried on a device when none is asked for; anything else runs the reference.
_DEFAULT_ORDER = {"cpu": ("native", "reference"), "cuda": ("triton", "cuda", "reference")}


@functools.cache
def load(name: str) -> Backend:
    """The module of the backend ``name``. It can always be imported, whatever the machine lacks."""
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(NAMES)}")
    return protocol.check(importlib.import_module(f"esam_kernels.backends.{name}"))


def unavailable(name: str, device: torch.device) -> str | None:
    """Why the backend ``name`` cannot serve ``device``, and how to get it; None if it can."""
    return load(name).unavailable(device)


def wanted(name: str | None) -> str:
    """What :func:`resolve` is to be asked for again and again: ``name``, or what the environment names now.

    Raises:
        ValueError: the environment names a backend that does not exist.
    """
    if name:
        return name
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named and named not in NAMES:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be one of {', '.join(NAMES)}, got {named!r}")
    return named or _DEFAULT


def resolve(name: str | None, device: torch.device) -> Backend:
    """The backend for tensors on ``device``: ``name``, or ``ESAM_KERNELS_BACKEND``, or the device's default.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend that was asked for cannot serve this device.
    """
    return _resolve(wanted(name), device)


def _resolve(name: str, device: torch.device) -> Backend:
    device_type = device.type
    key = (name, device_type)
    if key not in _resolved:
        found = _resolved[key] = _choose(name, device)
        logger.debug("%s tensors: backend %r%s", device_type, found.__name__.rpartition(".")[2], _asked(name))
        if logger.isEnabledFor(logging.DEBUG):
            for backend in (found, load("reference")):
                logs.report_calls(backend, protocol.OPERATORS)
    return _resolved[key]


_resolved: dict[tuple[str, str], Backend] = {}


def _asked(name: str) -> str:
    return ", the default" if name == _DEFAULT else ", as was asked for"


def _from_environment(name: str) -> str:
    return f" ({ENVIRONMENT_VARIABLE}={name})" if os.environ.get(ENVIRONMENT_VARIABLE) == name else ""


def _choose(name: str, device: torch.device) -> Backend:
    if name != _DEFAULT:
        reason = unavailable(name, device)
        if reason is not None:
            others = ", ".join(other for other in NAMES if unavailable(other, device) is None)
            raise RuntimeError(
                f"backend {name!r}{_from_environment(name)} is not available for {device.type} tensors: {reason}. "
                f"Name one of those that are ({others}), or none"
            )
        return load(name)
    order = _DEFAULT_ORDER.get(device.type, ("reference",))
    reasons: dict[str, str] = {}
    for candidate in order:
        reason = unavailable(candidate, device)
        if reason is None:
            break
        reasons[candidate] = reason
    if reasons:
        # One that is there and cannot be used is worth a line that is seen, and so is a GPU that is not made use of.
        is_seen = device.type == "cuda" or any(map(extensions.is_present, reasons))
        found = "; ".join(
            f"backend {name!r} is not available for {device.type} tensors: {reasons[name]}" for name in reasons
        )
        logger.log(logging.WARNING if is_seen else logging.INFO, "%s; backend %r takes its place", found, candidate)
    return load(candidate)
