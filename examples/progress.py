"""How far the work is: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None


class Progress:
    """Counts the steps of the whole job; used as a context manager."""

    def __init__(self, total: int, done: int = 0) -> None:
        self._bar = None
        if tqdm is not None and sys.stdout.isatty() and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def step(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def report(self, text: str) -> None:
        """What is known after an epoch."""
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        else:
            print(text, flush=True)
