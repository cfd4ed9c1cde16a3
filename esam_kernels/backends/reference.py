"""The specification: every operator in plain PyTorch, on any device.

Written to be read. Each function states the equation that the other backends are tested against: bit for bit where
nothing is rounded (masks, restore, selection, gather), within one unit in the last place where it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

FUSES_UPDATES = False
direct = None
losses_select_gather = None

NUM_PARTIALS = 1024

PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW32 = 0xFFFFFFFF


def unavailable(device: torch.device) -> str | None:
    return None


def storage_order(tensor: Tensor) -> Tensor:
    """A dense tensor as one row, in the order of its memory (channels_last weights included)."""
    return tensor.as_strided((tensor.numel(),), (1,))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half-precision tensors are computed in float32, float64 in itself."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# -- Stochastic Weight Perturbation (section 2.2) ----------------------------------------------------------------------


def philox(counter: Tensor, step: Tensor | int, seed: Tensor | int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., 2011): four 32-bit words for each 64-bit ``counter``, held in int64.

    The key is the 64-bit ``seed``; the 128-bit counter is (counter, step), low word first.
    """
    counter, step, seed = (torch.as_tensor(value, device=counter.device) for value in (counter, step, seed))
    c0, c1 = counter & _LOW32, (counter >> 32) & _LOW32
    c2, c3 = step & _LOW32, (step >> 32) & _LOW32
    k0, k1 = seed & _LOW32, (seed >> 32) & _LOW32
    for _ in range(PHILOX_ROUNDS):
        # int64 products wrap, which leaves all 64 bits of an unsigned 32 x 32 product in place
        product0, product1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _LOW32) ^ c1 ^ k0,
            product1 & _LOW32,
            ((product0 >> 32) & _LOW32) ^ c3 ^ k1,
            product0 & _LOW32,
        )
        k0, k1 = (k0 + PHILOX_WEYL[0]) & _LOW32, (k1 + PHILOX_WEYL[1]) & _LOW32
    return c0, c1, c2, c3


def element_mask(numel: int, offset: int, random_state: Tensor) -> Tensor:
    """m of Eq. 5 for the elements ``offset .. offset + numel`` of the whole model, as booleans in memory order.

    ``random_state`` is int64 (seed, step, bound). Element i takes word i % 4 of counter i // 4, and is kept where that
    word, as an unsigned integer, is at most ``bound``.
    """
    seed, step, bound = random_state.unbind()
    counters = torch.arange(offset // 4, -(-(offset + numel) // 4), device=random_state.device)
    words = torch.stack(philox(counters, step, seed), dim=1).flatten()
    first = offset % 4
    return words[first : first + numel] <= bound


def _scaling(param: Tensor, adaptive: bool, eta: float) -> Tensor | float:
    """T(w): the identity, or |w| + eta (Kwon et al., 2021)."""
    return param.abs() + eta if adaptive else 1.0


def norm_partials(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    groups: Sequence[int],
    adaptive: Sequence[bool],
    eta: float,
) -> Tensor:
    """Partial sums that add up to ||T(w) g||^2: float64, shape (NUM_PARTIALS,). Here the first slot holds all.

    Each backend adds in an order of its own, always the same. Any order is right to 2^-53, relative, for each addition
    that a square passes. Here it is torch's order, where they grow with the largest tensor.
    """
    partials = torch.zeros(NUM_PARTIALS, dtype=torch.float64, device=grads[0].device)
    for param, grad, group in zip(params, grads, groups, strict=True):
        scaled = grad.double() * _scaling(param.double(), True, eta) if adaptive[group] else grad
        norm = torch.linalg.vector_norm(scaled, dtype=torch.float64)
        partials[0] += norm.square().to(partials.device)
    return partials


def perturb_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    backups: Sequence[Tensor],
    groups: Sequence[int],
    offsets: Sequence[int],
    partials: Tensor,
    scale: Tensor,
    adaptive: Sequence[bool],
    eta: float,
    norm_factor: float,
    eps: float,
    random_state: Tensor | None,
) -> None:
    """w <- w + scale m T(w)^2 g / (norm_factor ||T(w) g|| + eps), and the old w into the backup (or the gradient)."""
    norm = norm_factor * partials.sum().sqrt()
    usable = torch.isfinite(norm) & (norm > 0)
    for i, (param, grad, group, offset) in enumerate(zip(params, grads, groups, offsets, strict=True)):
        w, g = storage_order(param), storage_order(grad)
        dtype, device = compute_dtype(w.dtype), w.device
        factor = (scale[group] / (norm + eps)).to(device, dtype)
        x = w.to(dtype)
        direction = g.to(dtype)
        if adaptive[group]:
            direction = direction * _scaling(x, True, eta) ** 2
        moved = usable.to(device)
        if random_state is not None:
            moved = moved & element_mask(w.numel(), offset, random_state.to(device))
        perturbed = torch.where(moved, (x + factor * direction).to(w.dtype), w)
        storage_order(backups[i] if backups else grad).copy_(w)
        w.copy_(perturbed)


def restore_(params: Sequence[Tensor], backups: Sequence[Tensor]) -> None:
    """w <- backup, bit for bit."""
    torch._foreach_copy_(list(params), list(backups))


def restore_sgd_(
    params: Sequence[Tensor],
    backups: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    first: bool,
    lr: float,
    lr_tensor: Tensor | None,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    """w <- backup, then ``torch.optim.SGD``'s update. ``first``: the momentum buffers are yet to be written."""
    restore_(params, backups)
    buffers: list[Tensor | None] = [None] * len(params) if first else list(momentum_buffers)
    sgd(
        list(params),
        list(grads),
        buffers,
        foreach=False,
        fused=False,
        lr=lr if lr_tensor is None else lr_tensor,  # type: ignore[arg-type]
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        maximize=maximize,
    )
    if first and momentum != 0:
        torch._foreach_copy_(list(momentum_buffers), buffers)  # type: ignore[arg-type]


def restore_adam_(
    params: Sequence[Tensor],
    backups: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: float,
    lr_tensor: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    amsgrad: bool,
    maximize: bool,
    decoupled_weight_decay: bool,
) -> None:
    """w <- backup, then the update of ``torch.optim.Adam`` (or AdamW, with ``decoupled_weight_decay``)."""
    restore_(params, backups)
    adam(
        list(params),
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        list(max_exp_avg_sqs),
        list(steps),
        foreach=False,
        fused=False,
        capturable=steps[0].is_cuda,
        decoupled_weight_decay=decoupled_weight_decay,
        amsgrad=amsgrad,
        beta1=beta1,
        beta2=beta2,
        lr=lr if lr_tensor is None else lr_tensor,
        weight_decay=weight_decay,
        eps=eps,
        maximize=maximize,
    )


# -- Sharpness-sensitive Data Selection (section 2.3) ------------------------------------------------------------------


def cross_entropy_forward(
    logits: Tensor, target: Tensor, label_smoothing: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Losses (rows,) and ``softmax_normalizer`` (2, rows) of (rows, classes) logits, in float32 (or float64).

    Of a class index out of range: NaN on a GPU, IndexError on the CPU.
    """
    x = logits.to(compute_dtype(logits.dtype))
    target, misnamed = _without_misnamed(target, x, ignore_index)
    losses = F.cross_entropy(
        x,
        target if target.dtype == torch.int64 else target.to(x.dtype),
        reduction="none",
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
    )
    return losses if misnamed is None else losses.masked_fill(misnamed, torch.nan), softmax_normalizer(x)


def _without_misnamed(target: Tensor, x: Tensor, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """On a GPU, the target with ``ignore_index`` for classes out of range, and which rows these are.

    torch's kernels would end all work on that GPU ("device-side assert"), and the host cannot look without waiting.
    """
    if not x.is_cuda or target.dtype != torch.int64:
        return target, None
    misnamed = ((target < 0) | (target >= x.shape[1])) & (target != ignore_index)
    return target.masked_fill(misnamed, ignore_index), misnamed


def softmax_normalizer(x: Tensor) -> Tensor:
    """Each row's maximum and log sum exp(x - maximum), as (2, rows): softmax(x) = exp(x - maximum - log sum).

    They are kept apart because their sum, rounded, would lose the digits of the second beside a large maximum.
    """
    maxima = x.detach().amax(dim=1)
    return torch.stack((maxima, torch.exp(x - maxima[:, None]).sum(dim=1).log()))


def cross_entropy_backward(
    grad_losses: Tensor,
    logits: Tensor,
    target: Tensor,
    normalizer: Tensor,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    """d loss / d logits = sum(q) softmax(logits) - q, where q is the smoothed target distribution; 0 where ignored."""
    x = logits.to(normalizer.dtype)
    maxima, log_sums = normalizer[:, :, None]
    classes = x.shape[1]
    target, misnamed = _without_misnamed(target, x, ignore_index)
    if target.dtype == torch.int64:
        kept = target != ignore_index
        q = torch.zeros_like(x).scatter_(1, target.where(kept, 0)[:, None], 1.0)
    else:
        kept = torch.ones((), dtype=torch.bool, device=x.device)
        q = target.to(x.dtype)
    q = q * (1 - label_smoothing) + label_smoothing / classes
    gradient = torch.exp(x - maxima - log_sums) * q.sum(dim=1, keepdim=True) - q
    gradient = torch.where(kept.unsqueeze(-1), gradient * grad_losses[:, None], 0.0).to(logits.dtype)
    return gradient if misnamed is None else gradient.masked_fill(misnamed[:, None], torch.nan)


def select(loss_before: Tensor, loss_after: Tensor, k: int) -> Tensor:
    """The k samples whose loss rises most (Eq. 6), as ascending int64 indices.

    Ties go to the lower index, NaN ranks last.
    """
    dtype = torch.promote_types(compute_dtype(loss_before.dtype), compute_dtype(loss_after.dtype))
    rise = loss_after.to(dtype) - loss_before.to(dtype)
    undefined = rise.isnan()
    by_rise = torch.argsort(rise.masked_fill(undefined, -torch.inf), descending=True, stable=True)
    defined_first = torch.argsort(undefined[by_rise].to(torch.uint8), stable=True)
    return by_rise[defined_first[:k]].sort().values


def gather(tensors: Sequence[Tensor], indices: Tensor) -> list[Tensor]:
    """The rows ``indices`` of each tensor. A dense tensor keeps its memory format."""
    rows = []
    for tensor in tensors:
        index = indices.to(tensor.device)
        order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
        if order[0] == 0:
            inverse = [order.index(dim) for dim in range(tensor.dim())]
            rows.append(tensor.permute(order).index_select(0, index).permute(inverse))
        else:
            rows.append(tensor.index_select(0, index))
    return rows
