"""What the tests compare with, written from the paper's equations in plain Python and float64, and small models.

No equation here uses the package, so that an error in it cannot hide in both.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORD = 0xFFFFFFFF
# Draws of whole tensors count from here on, above every element.
TENSOR_STREAM = 1 << 62


# -- Philox4x32-10 (Salmon et al., 2011), in Python's integers ---------------------------------------------------------


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        low, high = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (high >> 32) ^ c1 ^ k0, high & WORD, (low >> 32) ^ c3 ^ k1, low & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def word(seed: int, step: int, index: int) -> int:
    """The random word of element ``index`` of the model at ``step``."""
    counter = index // 4
    return philox((counter & WORD, counter >> 32, step & WORD, step >> 32), (seed & WORD, seed >> 32))[index % 4]


def bound(beta: float) -> int:
    return max(1, round(beta * 2**32)) - 1


def element_mask(seed: int, step: int, beta: float, offset: int, numel: int) -> Tensor:
    return torch.tensor([word(seed, step, offset + i) <= bound(beta) for i in range(numel)], dtype=torch.bool)


def element_offsets(sizes: list[int]) -> list[int]:
    """Where each tensor's elements begin: tensor after tensor, each from a whole Philox counter on."""
    offsets, position = [], 0
    for size in sizes:
        offsets.append(position)
        position += math.ceil(size / 4) * 4
    return offsets


def drawn_tensors(seed: int, step: int, beta: float, tensors: int) -> list[int]:
    words = [word(seed, step, 4 * TENSOR_STREAM + i) for i in range(tensors)]
    drawn = [i for i in range(tensors) if words[i] <= bound(beta)]
    return drawn or [min(range(tensors), key=words.__getitem__)]


# -- the paper's equations ---------------------------------------------------------------------------------------------


def perturbation(
    weights: list[Tensor],
    grads: list[Tensor],
    *,
    rho: list[float],
    beta: float,
    mask: list[Tensor],
    seen: list[bool],
    adaptive: list[bool],
    eta: float = 0.0,
    norm_factor: float = 1.0,
    eps: float = 1e-12,
) -> list[Tensor]:
    """e = (rho / beta) m T^2 g / (norm_factor ||T g|| + eps), the norm over the tensors that are ``seen``."""
    scaling = [w.abs() + eta if a else torch.ones_like(w) for w, a in zip(weights, adaptive)]
    square = sum(float(((t * g) ** 2).sum()) for t, g, s in zip(scaling, grads, seen) if s)
    norm = norm_factor * math.sqrt(square)
    if not math.isfinite(norm) or norm == 0.0:
        return [torch.zeros_like(w) for w in weights]
    return [r / beta * m * t**2 * g / (norm + eps) for r, m, t, g in zip(rho, mask, scaling, grads)]


def ranked(before: list[float], after: list[float], k: int) -> list[int]:
    """The k samples of the largest rise: NaN last, ties to the lower index, indices ascending."""
    rises = [a - b for a, b in zip(after, before)]
    order = sorted(
        range(len(rises)), key=lambda i: (math.isnan(rises[i]), 0.0 if math.isnan(rises[i]) else -rises[i], i)
    )
    return sorted(order[:k])


class SGD:
    """torch.optim.SGD's documented update, in float64."""

    def __init__(self, lr: float, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.velocity: list[Tensor] | None = None

    def update(self, weights: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        grads = [g + self.weight_decay * w for w, g in zip(weights, grads)]
        old = self.velocity
        self.velocity = grads if old is None else [self.momentum * v + g for v, g in zip(old, grads)]
        return [w - self.lr * v for w, v in zip(weights, self.velocity)]


class AdamW:
    """Loshchilov and Hutter (2019), Algorithm 2, in float64."""

    def __init__(self, lr: float, weight_decay: float = 0.01) -> None:
        self.lr, self.weight_decay, self.step = lr, weight_decay, 0
        self.first: list[Tensor] = []
        self.second: list[Tensor] = []

    def update(self, weights: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        self.step += 1
        self.first = self.first or [torch.zeros_like(w) for w in weights]
        self.second = self.second or [torch.zeros_like(w) for w in weights]
        self.first = [0.9 * m + 0.1 * g for m, g in zip(self.first, grads)]
        self.second = [0.999 * v + 0.001 * g * g for v, g in zip(self.second, grads)]
        updated = []
        for w, m, v in zip(weights, self.first, self.second):
            direction = (m / (1 - 0.9**self.step)) / ((v / (1 - 0.999**self.step)).sqrt() + 1e-8)
            updated.append(w * (1 - self.lr * self.weight_decay) - self.lr * direction)
        return updated


# -- small models ------------------------------------------------------------------------------------------------------

FEATURES, HIDDEN, CLASSES = 6, 7, 3


def mlp(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Six tensors, some of sizes that are no multiple of four."""
    torch.manual_seed(seed)
    layers = (nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    return nn.Sequential(*layers).to(dtype)


def mlp_losses(weights: list[Tensor], inputs: Tensor, target: Tensor) -> Tensor:
    """The losses of ``mlp``, per sample, as a function of its weights."""
    first, second, third = (F.linear, weights[0:2]), (F.linear, weights[2:4]), (F.linear, weights[4:6])
    hidden = torch.tanh(first[0](inputs, *first[1]))
    hidden = torch.tanh(second[0](hidden, *second[1]))
    log_probabilities = torch.log_softmax(third[0](hidden, *third[1]), dim=1)
    return -log_probabilities.gather(1, target[:, None])[:, 0]


def batch(samples: int = 12, seed: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, FEATURES, generator=generator, dtype=torch.float64)
    return inputs.to(dtype), torch.randint(0, CLASSES, (samples,), generator=generator)


def noisy_mlp(seed: int = 0) -> nn.Sequential:
    """With BatchNorm and dropout."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, CLASSES))


def losses_of(model: nn.Module):
    """One loss per sample, by torch's own cross-entropy."""

    def losses(inputs: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(model(inputs), target, reduction="none")

    return losses


def weights_of(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bit patterns: tells -0.0 from 0.0, and NaN equals itself."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(integer)


def same_bits(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b)) for a, b in zip(left, right)
    )


# -- refusals ----------------------------------------------------------------------------------------------------------


def snapshot(model, optimizer=None):
    """Everything that a refused call might change."""
    tensors = [*model.state_dict().values(), *[p.grad for p in model.parameters() if p.grad is not None]]
    state = None
    if optimizer is not None:
        state = copy.deepcopy(optimizer.base_optimizer.state_dict()["param_groups"])
        tensors += [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    extra = (optimizer._perturbation.step, optimizer.beta, optimizer.gamma) if optimizer is not None else ()
    flags = [(p.requires_grad, p.grad is None, p.data_ptr()) for p in model.parameters()]
    return [t.detach().clone() for t in tensors], state, extra, flags, torch.get_rng_state()


def assert_unchanged(before, after):
    assert same_bits(before[0], after[0])
    assert before[1:4] == after[1:4]
    assert torch.equal(before[4], after[4])


def assert_refused(call, error, message, model, optimizer=None):
    before = snapshot(model, optimizer)
    with pytest.raises(error, match=message):
        call()
    assert_unchanged(before, snapshot(model, optimizer))
