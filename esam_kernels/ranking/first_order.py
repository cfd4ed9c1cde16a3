"""ranking="first_order"."""

from __future__ import annotations

import torch
from torch import Tensor

from esam_kernels.backends.reference import compute_dtype
from esam_kernels.ranking.base import Ranking, RankingContext


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
        head = context.head
        return first_order_scores(head.input, head.output_grad, has_bias=head.has_bias, transform=head.transform)


def first_order_scores(
    inputs: Tensor,
    output_grads: Tensor,
    *,
    has_bias: bool = True,
    transform: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """The scores of :class:`FirstOrder`.

    Args:
        inputs: of a linear layer, shape (b, ..., D).
        output_grads: of its output, shape (b, ..., C).
        has_bias: whether the layer has a bias, whose gradient is g.
        transform: T_w^2 of its weight, shape (C, D), and of its bias, shape (C,); None: 1.

    Returns:
        Scores, shape (b,), float32, or float64 where the inputs are.
    """
    dtype = compute_dtype(inputs.dtype)
    of_weight, of_bias = transform
    with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
        h = inputs.reshape(-1, inputs.shape[-1]).to(dtype)
        delta = output_grads.reshape(-1, output_grads.shape[-1]).to(dtype)
        weight_grad = delta.T @ h
        moved = h @ (weight_grad if of_weight is None else weight_grad * of_weight).T
        if has_bias:
            bias_grad = delta.sum(dim=0)
            moved = moved + (bias_grad if of_bias is None else bias_grad * of_bias)
        return (moved * delta).sum(dim=1).reshape(inputs.shape[0], -1).sum(dim=1)
