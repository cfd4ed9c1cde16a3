"""Batches: what counts as one, its size and its parts, and the losses that a closure returns for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# Leaves of a batch that are no tensors, and stay as they are.
PASSED_THROUGH = (type(None), bool, int, float, str)


def batch_size(batch: Any) -> int:
    """The number of samples, which all tensors of the pytree ``batch`` agree on.

    Raises:
        ValueError: an empty batch, no tensors, a tensor without a batch dimension, or sizes that differ.
        TypeError: a leaf that is neither a tensor nor a number, a string or None.
    """
    sizes = []
    plain = type(batch) is tuple and all(isinstance(leaf, Tensor) for leaf in batch)
    for leaf in batch if plain else pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor):
            if leaf.is_nested and leaf.layout is torch.strided:
                raise ValueError(
                    "a tensor of the batch is a nested tensor that has no sizes: pad it, or build it with "
                    "layout=torch.jagged, of which no part can be taken"
                )
            if leaf.dim() == 0:
                raise ValueError("a tensor of the batch has no dimensions: the batch must be in front")
            sizes.append(leaf.shape[0])
        elif not isinstance(leaf, PASSED_THROUGH):
            raise TypeError(
                f"the batch holds a {type(leaf).__name__}: give tensors, or dicts, lists and tuples of tensors. "
                "torch.as_tensor makes a tensor of an array, dict(...) a dict of another mapping"
            )
    if not sizes:
        raise ValueError("the batch holds no tensors")
    if len(set(sizes)) > 1:
        raise ValueError(f"the tensors of the batch have different numbers of samples: {sizes}")
    if sizes[0] == 0:
        raise ValueError("the batch is empty")
    return sizes[0]


def num_ascent(share: float, samples: int) -> int:
    """How many samples pass 1 takes: round(share b), at least 2, which BatchNorm needs to normalize, and at most b."""
    return min(samples, max(2, round(share * samples)))


def check_parts(batch: Any) -> None:
    """Refuse tensors of which no samples can be taken.

    Raises:
        ValueError: a tensor in another layout than ``torch.strided`` and ``torch.sparse_coo``.
    """
    plain = type(batch) is tuple and all(isinstance(leaf, Tensor) for leaf in batch)
    for leaf in batch if plain else pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.layout not in (torch.strided, torch.sparse_coo):
            raise ValueError(
                f"a tensor of the batch has the layout {leaf.layout}, of which no part can be taken, as gamma or "
                "ascent_share below 1, micro_batch and gather do: give a dense tensor (a nested one padded), or one in "
                "torch.sparse_coo"
            )


def samples_between(batch: tuple[Any, ...], start: int, stop: int) -> tuple[Any, ...]:
    """The samples [start, stop) of each tensor, as views; of sparse ones copies.

    Raises:
        ValueError: a tensor in a layout that cannot be cut.
    """
    check_parts(batch)

    def cut(tensor: Tensor) -> Tensor:
        if tensor.layout is torch.sparse_coo:
            return tensor.narrow_copy(0, start, min(stop, len(tensor)) - start)
        return tensor[start:stop]

    return pytree.tree_map_only(Tensor, cut, batch)  # type: ignore[no-any-return]


def split(batch: tuple[Any, ...], micro_batch: int | None) -> list[tuple[Any, ...]]:
    """The batch in parts of at most ``micro_batch`` samples, in order; None: in one part.

    Raises:
        ValueError: ``micro_batch`` is no positive integer.
    """
    if micro_batch is None:
        return [batch]
    if not isinstance(micro_batch, int) or micro_batch < 1:
        raise ValueError(f"micro_batch must be a positive integer, got {micro_batch!r}")
    samples = batch_size(batch)
    return [samples_between(batch, first, first + micro_batch) for first in range(0, samples, micro_batch)]


def check_losses(losses: Any, samples: int | None = None, name: str = "the closure's losses") -> None:
    """Refuse what is not one loss per sample.

    Raises:
        ValueError: not a floating-point tensor of shape (b,), or of another b than ``samples``.
    """
    if not isinstance(losses, Tensor) or losses.dim() != 1 or not losses.is_floating_point():
        got = f"{losses.dtype} {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"{name} must be one floating-point number per sample, shape (b,), got {got}: "
            'use esam_kernels.cross_entropy, or reduction="none"'
        )
    if samples is not None and losses.shape[0] != samples:
        raise ValueError(f"{name} hold {losses.shape[0]} samples, the batch {samples}")


def losses_and_rest(returned: Any, samples: int) -> tuple[Tensor, tuple[Any, ...] | None]:
    """What a closure returned: the losses, checked, and the rest of a tuple (None if it returned the losses alone)."""
    has_rest = isinstance(returned, tuple) and returned
    losses, rest = (returned[0], returned[1:]) if has_rest else (returned, None)
    check_losses(losses)
    if losses.shape[0] != samples:
        raise ValueError(
            f"the closure's losses hold {losses.shape[0]} samples, the batch {samples}: compute them from the "
            "closure's arguments, which may be a part of the batch that step was given"
        )
    return losses, rest
