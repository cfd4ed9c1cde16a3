"""The element mask m of Eq. 5, from Philox4x32-10: never stored, the same bits on every backend."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def element_mask(seed, step, bound, first, BLOCK: tl.constexpr):
    """Which of the elements ``first .. first + BLOCK`` of the whole model are perturbed; ``first % 4 == 0``.

    Element i takes word i % 4 of the counter (i // 4, step) under the 64-bit key ``seed``, and is kept where that word,
    as an unsigned integer, is at most ``bound``.
    """
    counter = first // 4 + tl.arange(0, BLOCK // 4)
    a, b, c, d = tl.philox(
        seed,
        counter.to(tl.uint32),
        (counter >> 32).to(tl.uint32),
        step.to(tl.uint32),
        (step >> 32).to(tl.uint32),
    )
    # join puts its second argument last and fastest: this order is a, b, c, d
    words = tl.join(tl.join(a, c), tl.join(b, d)).reshape(BLOCK)
    return (words <= bound.to(tl.uint32)) & (bound >= 0)
