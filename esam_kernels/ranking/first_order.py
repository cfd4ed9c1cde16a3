"""ranking="first_order"."""

from __future__ import annotations

import torch
from torch import Tensor

from esam_kernels.backends.reference import compute_dtype
from esam_kernels.ranking.base import Head, Ranking, RankingContext


class FirstOrder(Ranking):
    r"""The first-order term of the rise (appendix A.2), over the weights of the network's last linear layer, the head.

    With h_i the head's input of sample i and delta_i the gradient of the mean loss with respect to the head's output,

    .. math:: s_i = \delta_i \cdot (G h_i + g), \qquad G = \sum_j \delta_j h_j^T, \quad g = \sum_j \delta_j

    (G and g times T_w^2 where their group is ``adaptive``), summed over the positions of a sequence. Both h and delta
    exist after pass 1: no forward at w + e is needed.
    """

    records_head = needs_head = True

    def scores(self, context: RankingContext) -> Tensor:
        """s_i of the equation above, in float32 (float64 where the head works in float64)."""
        assert context.head is not None
        return first_order_scores(context.head)


def first_order_scores(head: Head) -> Tensor:
    """The scores of :class:`FirstOrder`, shape (b,), float32, or float64 where the head's input is."""
    inputs, output_grad = head.input, head.output_grad
    dtype = compute_dtype(inputs.dtype)
    transform, bias_transform = head.transform
    with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
        h = inputs.reshape(-1, inputs.shape[-1]).to(dtype)
        delta = output_grad.reshape(-1, output_grad.shape[-1]).to(dtype)
        weight_grad = delta.T @ h
        moved = h @ (weight_grad if transform is None else weight_grad * transform).T
        if head.has_bias:
            bias_grad = delta.sum(dim=0)
            moved = moved + (bias_grad if bias_transform is None else bias_grad * bias_transform)
        return (moved * delta).sum(dim=1).reshape(inputs.shape[0], -1).sum(dim=1)
