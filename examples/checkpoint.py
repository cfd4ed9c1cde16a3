"""Checkpoints that are whole or not there, whenever the program is stopped."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from data import UserError

FILE = "checkpoint.pt"
LOCK = "checkpoint.lock"


@contextlib.contextmanager
def alone_in(directory: str) -> Iterator[None]:
    """Inside, no other training that asks for it gets ``directory``.

    The operating system ends this with the process, however that ends; data-loading workers do not inherit it.
    """
    with contextlib.ExitStack() as stack:
        try:
            fcntl.lockf(stack.enter_context((Path(directory) / LOCK).open("w")), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{directory} is in use: another training that is running saves its state there. Wait for its end, or "
                "name another directory"
            ) from None
        except OSError:  # no such directory, or a network file system without locks
            pass
        yield


def save_checkpoint(directory: str, state: dict[str, Any]) -> None:
    """Replace the checkpoint in ``directory``; until the new one is complete on disk, the old one stays."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    temporary = Path(directory) / f"{FILE}.tmp"
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, Path(directory) / FILE)


def load_checkpoint(directory: str, options: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The state last saved, which must have been made with the same ``options``."""
    path = Path(directory) / FILE
    if not path.exists():
        raise UserError(f"nothing to resume: no such file: {path}")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        saved = state["options"]
    except Exception as error:  # a damaged file may raise anything
        raise UserError(f"{path}: not a checkpoint of this program ({type(error).__name__})") from None
    differing = [name for name in options if saved.get(name) != options[name]]
    if differing:
        pairs = ", ".join(f"{name.replace('_', '-')} {saved.get(name)}, not {options[name]}" for name in differing)
        raise UserError(f"{path} was made with other options: {pairs}")
    return state
