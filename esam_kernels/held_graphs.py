"""Graphs of autograd that outlive their step. What a CUDA graph is captured for must not be part of one.

torch adds the gradients of a parameter up on the stream of the forward that made the first graph that it is in. A loss
or an output that somebody holds keeps that graph; where its stream is not captured, the capture of a later step breaks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def detached(result: Any) -> Any:
    """What a step returned, of which no tensor holds a graph."""
    return pytree.tree_map_only(Tensor, Tensor.detach, result)


def told(params: list[Tensor]) -> str:
    """What to do about a graph that is held now, with a space behind; empty where none of ``params`` is in one."""
    for number, param in enumerate(params):
        if param.requires_grad:
            _notes(param)["esam_kernels"] = True
            if "esam_kernels" in _notes(param):
                return (
                    "Also, a loss or an output of an earlier forward is still held: the gradient of parameter "
                    f"{number} may then be added up on the stream of that forward, which is not captured. Delete it, "
                    "or keep loss.detach() in its place. "
                )
    return ""


def _notes(param: Tensor) -> dict[str, Any]:
    """Of the node that adds the gradients of a parameter up. It goes with the last graph that it is in, and they do."""
    node: Any = torch.autograd.graph.get_gradient_edge(param).node
    notes: dict[str, Any] = node.metadata
    return notes
