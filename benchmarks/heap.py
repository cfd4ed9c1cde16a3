"""What glibc does with freed memory.

It decides where the next tensor's pages come from, and a new page costs more than the work on it: 4 KiB are filled with
zeros, at about a microsecond each. By default glibc gives the top of its heap back whenever enough of it is free. In a
training step that happens again and again, to one optimizer or the other by chance of where its tensors lie.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def give_back() -> None:
    """Let the next case begin with the heap of a new process."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have none
        ctypes.CDLL(None).malloc_trim(0)


def keep() -> None:
    """From now on the process keeps what it frees, as it does with jemalloc or tcmalloc. There is no way back."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_MMAP_MAX, 0)
