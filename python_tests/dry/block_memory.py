"""Gradients and backups at addresses that repeat from step to step, as a GPU's caching allocator gives them out.

The CPU's allocator shares its heap with all that the process does: there, hardly an address comes again.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass
class _Block:
    """Memory, and who has it: a view of it that lives as long as the tensor that is made of it."""

    memory: np.ndarray
    user: Any = lambda: None


@dataclass
class BlockMemory:
    """For tensors of each shape the first block that is free, or a new one."""

    blocks: dict[tuple[torch.Size, torch.dtype], list[_Block]] = field(default_factory=dict)

    def empty_like(self, tensor: Tensor) -> Tensor:
        blocks = self.blocks.setdefault((tensor.shape, tensor.dtype), [])
        free = next((block for block in blocks if block.user() is None), None)
        if free is None:
            free = _Block(torch.zeros(tensor.shape, dtype=tensor.dtype).numpy())
            blocks.append(free)
        lent = free.memory[...]
        free.user = weakref.ref(lent)
        return torch.from_numpy(lent)

    def hold_gradients(self, model: nn.Module) -> None:
        """From now on the gradients of ``model`` lie here."""

        def move(param: Tensor) -> None:
            assert param.grad is not None
            param.grad = self.empty_like(param.grad).copy_(param.grad)

        for param in model.parameters():
            param.register_post_accumulate_grad_hook(move)


def install(patch: Any) -> BlockMemory:
    """Memory that ``torch.empty_like`` takes its tensors from too. ``patch`` is pytest's ``monkeypatch``."""
    memory = BlockMemory()
    patch.setattr(torch, "empty_like", memory.empty_like)
    return memory
