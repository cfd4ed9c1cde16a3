"""What people use today: ESAM as its authors publish it, the same with better library calls, and torch's own best.

Written anew from what the published code is known to do (not from its text):

* e = (rho / beta) T^2 g / (||T g|| + 1e-7) in a loop over the tensors, the norm as the norm of the stacked norms, T = 1
  multiplied out, and e multiplied by 1 once more before it is added: six operations a tensor;
* whole tensors are drawn with Python's ``random`` by toggling ``requires_grad``;
* e is kept in the optimizer's state, added to the weights, and subtracted again;
* B+ is what lies strictly above the k-th largest rise, taken by a boolean mask.

Rows and tables call it "as released". Its defects come with it, because they are what users run: the weights do not
return exactly, one sample fewer than k is selected, ``requires_grad`` does not keep what the user set, and BatchNorm
moves in every forward.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

EPS = 1e-7

Perturb = Callable[..., list[Tensor]]
Restore = Callable[[Sequence[Tensor], Sequence[Tensor]], None]


# -- Stochastic Weight Perturbation ------------------------------------------------------------------------------------


def loop_norm(params: Sequence[Tensor], grads: Sequence[Tensor], adaptive: bool = False) -> Tensor:
    """The norm of the stacked norms, tensor by tensor."""
    norms = [((w.abs() if adaptive else 1.0) * g).norm(p=2) for w, g in zip(params, grads)]
    return torch.norm(torch.stack(norms), p=2)


def loop_perturb(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    rho: float,
    beta: float = 1.0,
    adaptive: bool = False,
    element_beta: float = 1.0,
    norm: Tensor | None = None,
) -> list[Tensor]:
    """w <- w + e, tensor by tensor. Returns e.

    ``element_beta`` < 1 draws single weights (Eq. 5), which the published code does not do; the obvious way is taken.
    """
    scale = rho / ((loop_norm(params, grads, adaptive) if norm is None else norm) + EPS) / (beta * element_beta)
    moves = []
    for w, g in zip(params, grads):
        e = (w.pow(2) if adaptive else 1.0) * g * scale.to(w)
        if element_beta < 1.0:
            e = e * torch.bernoulli(torch.full_like(w, element_beta))
        w.add_(e * 1)
        moves.append(e)
    return moves


def loop_restore(params: Sequence[Tensor], moves: Sequence[Tensor]) -> None:
    """w <- w - e, tensor by tensor."""
    for w, e in zip(params, moves):
        w.sub_(e)


def foreach_norm(params: Sequence[Tensor], grads: Sequence[Tensor], adaptive: bool = False) -> Tensor:
    scaled = torch._foreach_mul(grads, torch._foreach_abs(params)) if adaptive else grads
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(scaled)))


def foreach_perturb(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    rho: float,
    beta: float = 1.0,
    adaptive: bool = False,
    element_beta: float = 1.0,
    norm: Tensor | None = None,
) -> list[Tensor]:
    """``loop_perturb`` with ``torch._foreach_*``, and without its multiplications by one."""
    scale = rho / ((foreach_norm(params, grads, adaptive) if norm is None else norm) + EPS) / (beta * element_beta)
    moves = list(torch._foreach_mul(grads, scale))
    if adaptive:
        moves = list(torch._foreach_mul(moves, torch._foreach_pow(params, 2)))
    if element_beta < 1.0:
        moves = list(torch._foreach_mul(moves, [torch.rand_like(g) < element_beta for g in grads]))
    torch._foreach_add_(params, moves)
    return moves


def foreach_restore(params: Sequence[Tensor], moves: Sequence[Tensor]) -> None:
    torch._foreach_sub_(params, moves)


def sgd_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
    lr: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """SGD with momentum, for ``torch.compile`` to fuse with what stands before it."""
    directions = torch._foreach_add(grads, params, alpha=weight_decay)
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_add_(buffers, directions)
    torch._foreach_add_(params, buffers, alpha=-lr)


def restore_and_sgd(
    params: Sequence[Tensor],
    moves: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
    lr: float,
    momentum: float,
    weight_decay: float,
) -> None:
    foreach_restore(params, moves)
    sgd_update(params, grads, buffers, lr, momentum, weight_decay)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` of one of these for one list of tensors; earlier compilations do not count as recompiles."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


# -- Sharpness-sensitive Data Selection --------------------------------------------------------------------------------


def published_select(loss_before: Tensor, loss_after: Tensor, gamma: float, *tensors: Tensor) -> tuple[Tensor, ...]:
    """B+ by a strict comparison with the k-th largest rise, and a boolean mask: it waits for the device."""
    rise = loss_after - loss_before
    threshold = torch.topk(rise, max(1, int(gamma * len(rise)))).values[-1]
    chosen = rise > threshold
    return tuple(tensor[chosen] for tensor in tensors)


def library_select(loss_before: Tensor, loss_after: Tensor, k: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The best library calls: ``torch.topk`` and ``index_select``."""
    indices = torch.topk(loss_after - loss_before, k, sorted=False).indices
    return tuple(tensor.index_select(0, indices) for tensor in tensors)


def library_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, reduction="none")


# -- the whole optimizer -----------------------------------------------------------------------------------------------


class PublishedESAM(Optimizer):
    """ESAM the published way around a base optimizer. beta = gamma = 1 is SAM the published way.

    Args:
        params: parameters.
        base_optimizer: an instance over the same parameters.
        element_beta: < 1 draws single weights as well.
        foreach: with ``torch._foreach_*`` in place of the loops.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Optimizer,
        rho: float = 0.05,
        beta: float = 1.0,
        gamma: float = 1.0,
        adaptive: bool = False,
        element_beta: float = 1.0,
        foreach: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"rho": rho, "adaptive": adaptive})
        self.base_optimizer = base_optimizer
        self.beta, self.gamma, self.element_beta, self.adaptive = beta, gamma, element_beta, adaptive
        self._perturb: Perturb = foreach_perturb if foreach else loop_perturb
        self._restore: Restore = foreach_restore if foreach else loop_restore
        self._random = random.Random(seed)

    def _all(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def draw(self) -> None:
        """SWP: the tensors whose gradients pass 1 computes."""
        for p in self._all():
            p.requires_grad = self._random.random() < self.beta

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        for p in self._all():
            p.requires_grad = True
        drawn = [p for p in self._all() if p.grad is not None]
        grads = [p.grad for p in drawn]
        rho = self.param_groups[0]["rho"]
        moves = self._perturb(drawn, grads, rho, self.beta, self.adaptive, self.element_beta)
        for p, e in zip(drawn, moves):
            self.state[p]["e"] = e
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        moved = [p for p in self._all() if "e" in self.state[p]]
        self._restore(moved, [self.state[p]["e"] for p in moved])
        for p in moved:
            del self.state[p]["e"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    def step(self, losses: Callable[..., Tensor], *batch: Tensor) -> Tensor:  # type: ignore[override]
        """The whole of Algorithm 1 on a batch; ``losses(*batch)`` returns one loss per sample."""
        if self.beta < 1.0:
            self.draw()
        loss_before = losses(*batch)
        loss = loss_before.mean()
        loss.backward()
        self.first_step(zero_grad=True)
        if self.gamma < 1.0:
            with torch.no_grad():
                loss_after = losses(*batch)
            batch = published_select(loss_before.detach(), loss_after, self.gamma, *batch)
        losses(*batch).mean().backward()
        self.second_step(zero_grad=True)
        return loss.detach()
