"""What tools/sanitize.py runs in processes of their own: ``python tools/sanitize_probes.py NAME``.

``where`` names the extension that is imported. The next three do what is wrong, each with the extension's own loops,
and end well only where nobody watches. ``threads`` runs every kernel on several threads.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from esam_kernels.backends import native

THREADS = 4
# A chunk more than each thread's share: see kChunk and kGrain in csrc/cpu/blocks.h.
ELEMENTS = 4 * 32768 + 8193


def where() -> None:
    """The file of the extension."""
    print(native.extension.__file__)


def memory() -> None:
    """Reads beyond a tensor whose storage claims more bytes than there are."""
    owner = torch.zeros(16)
    storage = torch._C._construct_storage_from_data_pointer(owner.data_ptr(), torch.device("cpu"), 4096)
    claimed = torch.empty(0).set_(storage, 0, (1024,), (1,))
    native.restore_([torch.empty(1024)], [claimed])


def arithmetic() -> None:
    """Numbers the elements of a tensor beyond int64, as no model does."""
    weights, grads = [torch.zeros(ELEMENTS)], [torch.ones(ELEMENTS)]
    partials, scale = torch.ones(1024, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    state = torch.tensor([1, 2, 2**31])
    native.perturb_(weights, grads, [], [0], [2**63 - 4], partials, scale, [False], 0.0, 1.0, 0.0, state)


def race() -> None:
    """Two threads perturb the same weights. Copies would not show it: what goes past the caches is not watched."""
    size = 1 << 21
    weights, grads, backups = [torch.zeros(size)], [torch.ones(size)], [torch.empty(size)]
    partials, scale = torch.ones(1024, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    rest = (backups, [0], [0], partials, scale, [False], 0.0, 1.0, 0.0, None)
    torch.set_num_threads(1)
    both = [threading.Thread(target=native.perturb_, args=(weights, grads, *rest)) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()


def some(dtype: torch.dtype) -> list[Tensor]:
    """Tensors of sizes that do not divide among the threads evenly, and one that is empty."""
    return [torch.randn(size).to(dtype) for size in (ELEMENTS, 0, 17, 8192 * 3 + 5)]


def threads() -> None:
    """Every kernel on several threads, from two threads of Python at once: each has tensors of its own."""
    torch.set_num_threads(THREADS)
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            every_kernel()
        except BaseException as error:
            errors.append(error)

    both = [threading.Thread(target=guarded) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    if errors:
        raise errors[0]


def every_kernel() -> None:
    """Each once, in every dtype."""
    scale, state = torch.ones(1, dtype=torch.float64), torch.tensor([1, 2, 2**31])
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        w, g, b, m, v = (some(dtype) for _ in range(5))
        groups, offsets = [0] * len(w), [4 * 10**6 * i for i in range(len(w))]
        for adaptive in (False, True):
            partials = native.norm_partials(w, g, groups, [adaptive], 0.1)
            for mask in (None, state):
                native.perturb_(w, g, b, groups, offsets, partials, scale, [adaptive], 0.1, 1.0, 1e-12, mask)
        native.restore_(w, b)
        native.restore_sgd_(w, b, g, m, False, 0.1, None, 0.9, 0.0, 0.1, True, False)
        steps, squares = [torch.ones(()) for _ in w], [tensor.abs() for tensor in v]
        native.restore_adam_(w, b, g, m, squares, [], steps, 0.1, None, 0.9, 0.99, 1e-8, 0.1, False, False, True)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits, upstream = torch.randn(257, 1003).to(dtype), torch.rand(257)
        for target in (torch.randint(1003, (257,)), torch.rand(257, 1003)):
            losses, normalizer = native.cross_entropy_forward(logits, target, 0.1, -100)
            native.cross_entropy_backward(upstream, logits, target, normalizer, 0.1, -100)
        native.gather([torch.randn(257, 4099)], native.select(losses, upstream, 128))


PROBES: dict[str, Callable[[], None]] = {probe.__name__: probe for probe in (where, memory, arithmetic, race, threads)}

if __name__ == "__main__":
    PROBES[sys.argv[1]]()
