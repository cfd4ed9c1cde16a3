"""What every fast backend promises of its kernels, as functions of (backend, device, dtype).

The GPU tier runs them on the device. The cuda_host tier runs them on the CPU, where an emulator stands in for the GPU.
Nothing rounded is compared bit for bit; what is rounded, with the same operations in float64, rounded where torch
rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from esam_kernels.backends import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Less than an access, odd, a block of each dtype and its neighbours, several blocks and a rest, a matrix, and a
# convolution's weight.
SHAPES: tuple[tuple[int, ...], ...] = ((1,), (7,), (2048,), (2049,), (4095,), (12301,), (33, 65), (8, 3, 3, 3))
MARGIN = 64


# -- Tensors with something to lose ------------------------------------------------------------------------------------


class Guarded:
    """Tensors inside memory full of NaN, ``shift`` elements past an aligned address. The margins must stay NaN."""

    def __init__(self, device: torch.device, dtype: torch.dtype, shift: int) -> None:
        self.device, self.dtype, self.shift = device, dtype, shift
        self._memory: list[tuple[Tensor, int, int]] = []

    def holding(self, values: Tensor) -> Tensor:
        memory = torch.full((values.numel() + 2 * MARGIN + self.shift,), math.nan, device=self.device, dtype=self.dtype)
        first = MARGIN + self.shift
        self._memory.append((memory, first, first + values.numel()))
        inside = memory[first : first + values.numel()].as_strided(values.shape, values.stride(), first)
        return inside.copy_(values)

    def check_margins(self) -> None:
        for memory, first, last in self._memory:
            assert memory[:first].isnan().all(), "memory before a tensor was written"
            assert memory[last:].isnan().all(), "memory behind a tensor was written"


def random_values(seed: int, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    """On the CPU, so that every device sees the same; 4-d ones are channels_last."""
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [value.to(memory_format=torch.channels_last) if value.dim() == 4 else value for value in values]


def tensors(guarded: Guarded, seed: int) -> list[Tensor]:
    return [guarded.holding(values) for values in random_values(seed, guarded.dtype)]


def bits(tensor: Tensor) -> Tensor:
    """In the order of memory, as integers: a single wrong bit counts, and NaN equals itself."""
    return reference.storage_order(tensor).view(INTEGERS[tensor.element_size()])


def assert_same_bits(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(bits(a), bits(b)), (a - b).abs().max()


def assert_close(found: Tensor, expected: Tensor, ulps: float, scale: float = 1.0) -> None:
    """Within so many units in the last place, of the expected value or of ``scale``, whichever is larger."""
    difference = (found.double() - expected.double().to(found.device)).abs()
    size = expected.double().abs().clamp(min=scale).to(found.device)
    allowed = ulps * torch.finfo(found.dtype).eps * size
    assert (difference <= allowed).all(), (difference / size).max()


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """What is left of float64 ``values`` after a trip through memory."""
    return values.to(torch.float32).to(dtype).double()


# -- Stochastic Weight Perturbation ------------------------------------------------------------------------------------


def check_norm(backend: ModuleType, device: torch.device, dtype: torch.dtype, adaptive: bool, shift: int) -> None:
    guarded = Guarded(device, dtype, shift)
    params, grads = tensors(guarded, 0), tensors(guarded, 1)
    groups, flags, eta = [i % 2 for i in range(len(params))], [False, adaptive], 0.01
    partials = backend.norm_partials(params, grads, groups, flags, eta)
    expected = 0.0
    for param, grad, group in zip(params, grads, groups):
        scaling = param.double().abs() + eta if flags[group] else 1.0
        expected += (grad.double() * scaling).square().sum().item()
    assert partials.dtype == torch.float64
    assert partials.shape == (reference.NUM_PARTIALS,)
    assert math.isclose(partials.sum().item(), expected, rel_tol=1e-6)
    again = backend.norm_partials(params, grads, groups, flags, eta)
    assert torch.equal(partials, again)
    guarded.check_margins()


def check_norm_of_extremes(backend: ModuleType, device: torch.device) -> None:
    """Squares that float32 cannot hold."""
    for value in (1e30, 1e-30):
        grads = [torch.full((5000,), value, device=device)]
        partials = backend.norm_partials(grads, grads, [0], [False], 0.0)
        assert math.isclose(partials.sum().sqrt().item(), value * math.sqrt(5000), rel_tol=1e-5)


def check_norm_of_what_is_not_finite(backend: ModuleType, device: torch.device) -> None:
    for value in (math.nan, math.inf, -math.inf):
        grads = [torch.zeros(5000, device=device)]
        grads[0][4999] = value
        assert not backend.norm_partials(grads, grads, [0], [False], 0.0).sum().isfinite()


# The tables of addresses hold 64, 192 and 448 tensors in the CUDA code, which takes as many tables as it needs.
TENSOR_COUNTS = (64, 65, 192, 193, 448, 449, 470)


def check_norm_of_many(backend: ModuleType, device: torch.device, count: int) -> None:
    """Tensors of several dtypes, one of them empty."""
    grads = [torch.full((3,), 2.0, device=device, dtype=DTYPES[max(0, i - count + 20) % 3]) for i in range(count)]
    grads[7] = torch.empty(0, device=device)
    partials = backend.norm_partials(grads, grads, [0] * count, [False], 0.0)
    assert math.isclose(partials.sum().item(), (count - 1) * 12, rel_tol=1e-12)


def exact_partials(device: torch.device) -> Tensor:
    """Partial sums whose sum is exact in every order: 36."""
    partials = torch.zeros(reference.NUM_PARTIALS, dtype=torch.float64, device=device)
    partials[0], partials[1], partials[700], partials[1023] = 1.0, 2.0, 13.0, 20.0
    return partials


def check_perturb_of_many(backend: ModuleType, device: torch.device, count: int) -> None:
    """Each tensor has its own group, offset and mask, whichever table is walked first."""
    counts = [5 if i % 7 else 0 for i in range(count)]
    params, grads, expected, backups = ([torch.full((n,), 1.0, device=device) for n in counts] for _ in range(4))
    groups, offsets = [i % 2 for i in range(count)], [8 * i for i in range(count)]
    scale = torch.tensor([0.5, 0.25], dtype=torch.float64, device=device)
    state = torch.tensor([3, 5, round(0.6 * 2**32) - 1], device=device)
    rest = (groups, offsets, exact_partials(device), scale, [False, True], 0.5, 1.0, 1e-12, state)
    reference.perturb_(expected, grads, [torch.empty_like(w) for w in params], *rest)
    backend.perturb_(params, grads, backups, *rest)
    for ours, theirs in zip(params, expected, strict=True):
        assert torch.equal(ours, theirs)


def check_perturb(
    backend: ModuleType, device: torch.device, dtype: torch.dtype, masked: bool, over_grads: bool, shift: int
) -> None:
    """Bit for bit the reference: the mask, the saved weights, and w + e."""
    guarded = Guarded(device, dtype, shift)
    params, grads = tensors(guarded, 0), tensors(guarded, 1)
    backups = [] if over_grads else [guarded.holding(param) for param in params]
    groups, flags = [i % 3 for i in range(len(params))], [False, True, False]
    offsets = [(1 << 35) + 4 * i * 100003 for i in range(len(params))]
    scale = torch.tensor([0.5, 0.25, 0.0], dtype=torch.float64, device=device)
    state = torch.tensor([(1 << 40) + 17, (1 << 33) + 3, round(0.6 * 2**32) - 1], device=device) if masked else None
    rest = (groups, offsets, exact_partials(device), scale, flags, 0.125, 1.5, 1e-12, state)

    expected_params, expected_grads = ([t.clone() for t in list_] for list_ in (params, grads))
    expected_backups = [] if over_grads else [t.clone() for t in backups]
    reference.perturb_(expected_params, expected_grads, expected_backups, *rest)
    backend.perturb_(params, grads, backups, *rest)
    assert_same_bits(params, expected_params)
    assert_same_bits(grads, expected_grads)
    assert_same_bits(backups, expected_backups)
    guarded.check_margins()


def check_mask_alone(backend: ModuleType, device: torch.device, dtype: torch.dtype) -> None:
    """Every bound: nothing, everything, and the element that is just inside."""
    for bound in (-1, 0, 2**31, 2**32 - 1):
        state = torch.tensor([3, 4, bound], device=device)
        param, grad = torch.zeros(5001, device=device, dtype=dtype), torch.ones(5001, device=device, dtype=dtype)
        scale = torch.ones(1, dtype=torch.float64, device=device)
        backend.perturb_([param], [grad], [], [0], [8], exact_partials(device), scale, [False], 0.0, 1.0, 0.0, state)
        assert torch.equal(param != 0, reference.element_mask(5001, 8, state))
    for offset in (-4, -400, -(2**40)):  # elements before the first: counters are rounded down
        param, grad = torch.zeros(5001, device=device, dtype=dtype), torch.ones(5001, device=device, dtype=dtype)
        state = torch.tensor([3, 4, 2**31], device=device)
        rest = (exact_partials(device), scale, [False], 0.0, 1.0, 0.0, state)
        backend.perturb_([param], [grad], [], [0], [offset], *rest)
        assert torch.equal(param != 0, reference.element_mask(5001, offset, state))
    word = reference.philox(torch.tensor([2]), 4, 3)[1].item()  # element 9
    for bound, moved in ((word - 1, False), (word, True)):
        state = torch.tensor([3, 4, bound], device=device)
        param, grad = torch.zeros(64, device=device, dtype=dtype), torch.ones(64, device=device, dtype=dtype)
        scale = torch.ones(1, dtype=torch.float64, device=device)
        backend.perturb_([param], [grad], [], [0], [0], exact_partials(device), scale, [False], 0.0, 1.0, 0.0, state)
        assert (param[9] != 0).item() is moved


def check_bad_norms(backend: ModuleType, device: torch.device, dtype: torch.dtype) -> None:
    """A norm of 0, infinity or NaN moves nothing, though the gradient may be anything; the old w is saved."""
    for total in (0.0, math.inf, math.nan):
        params = random_values(0, dtype, [(5000,)])
        param, grad = params[0].to(device), torch.full((5000,), math.nan, device=device, dtype=dtype)
        before = param.clone()
        partials = torch.zeros(reference.NUM_PARTIALS, dtype=torch.float64, device=device)
        partials[3] = total
        scale = torch.ones(1, dtype=torch.float64, device=device)
        backend.perturb_([param], [grad], [], [0], [0], partials, scale, [False], 0.0, 1.0, 1e-12, None)
        assert_same_bits([param, grad], [before, before])


def check_restore(backend: ModuleType, device: torch.device, dtype: torch.dtype, shift: int) -> None:
    """Any bits: NaNs with payloads, infinities, -0.0 and subnormals included."""
    guarded = Guarded(device, dtype, shift)
    params = tensors(guarded, 0)
    integers = INTEGERS[dtype.itemsize]
    backups = [guarded.holding(param) for param in params]
    for backup in backups:
        info = torch.iinfo(integers)
        noise = torch.randint(info.min, info.max, (backup.numel(),), dtype=integers).to(device)
        bits(backup).copy_(noise)
    addresses = [param.data_ptr() for param in params]
    backend.restore_(params, backups)
    assert_same_bits(params, backups)
    assert addresses == [param.data_ptr() for param in params]
    guarded.check_margins()


# Numbers that every dtype holds exactly: whether torch rounds them to the tensors' dtype depends on the device.
SGD_VARIANTS: list[dict[str, float]] = [
    {"momentum": momentum, "dampening": dampening, "nesterov": nesterov, "weight_decay": decay, "maximize": maximize}
    for momentum, dampening, nesterov, decay, maximize in (
        (0.0, 0.0, False, 0.0, False),
        (0.0, 0.0, False, 0.0625, True),
        (0.875, 0.0, False, 0.0, False),
        (0.875, 0.0, False, 0.0625, False),
        (0.875, 0.25, False, 0.0625, True),
        (0.5, 0.0, True, 0.0, True),
        (0.5, 0.0, True, 0.0625, False),
    )
]


def check_sgd(
    backend: ModuleType,
    device: torch.device,
    dtype: torch.dtype,
    variant: dict[str, float],
    first: bool,
    lr_dtype: torch.dtype | None,
    shift: int,
) -> None:
    guarded = Guarded(device, dtype, shift)
    params, saved, grads, buffers = (tensors(guarded, seed) for seed in range(4))
    momentum = variant["momentum"]
    expected_params, expected_buffers = [], []
    for w, g, v in zip(saved, grads, buffers):
        w, g, v = w.double(), g.double(), v.double()
        direction = -g if variant["maximize"] else g
        if variant["weight_decay"]:
            direction = rounded(direction + w * variant["weight_decay"], dtype)
        if momentum:
            damped = rounded(direction * (1 - variant["dampening"]) + rounded(v * momentum, dtype), dtype)
            v = direction if first else damped
            direction = rounded(direction + v * momentum, dtype) if variant["nesterov"] else v
        expected_params.append(w - 0.125 * direction)
        expected_buffers.append(v)
    if first and momentum:
        for buffer in buffers:
            bits(buffer).fill_(-1)  # NaN: what was never written must not be read
    lr_tensor = None if lr_dtype is None else torch.tensor(0.125, dtype=lr_dtype, device=device)
    lr = 0.125 if lr_tensor is None else math.nan
    backend.restore_sgd_(params, saved, grads, buffers if momentum else [], first, lr, lr_tensor, **variant)
    for found, expected in zip(params, expected_params):
        assert_close(found, expected, ulps=1)
    if momentum:
        for found, expected in zip(buffers, expected_buffers):
            assert_close(found, expected, ulps=1)
    guarded.check_margins()


def check_adam(
    backend: ModuleType,
    device: torch.device,
    dtype: torch.dtype,
    amsgrad: bool,
    decoupled: bool,
    maximize: bool,
    steps_on: torch.device,
    lr_dtype: torch.dtype | None,
    shift: int,
) -> None:
    guarded = Guarded(device, dtype, shift)
    params, saved, grads, means = (tensors(guarded, seed) for seed in range(4))
    squares = [guarded.holding(values.abs() + 0.25) for values in random_values(4, dtype)]
    largest = [guarded.holding(values.abs() + 0.25) for values in random_values(5, dtype)] if amsgrad else []
    taken = [float(i % 3) for i in range(len(params))]
    steps = [torch.tensor(count, device=steps_on) for count in taken]
    lr, beta1, beta2, eps, decay = 0.125, 0.25 if maximize else 0.875, 0.75, 0.0625, 0.0625  # lerp from both ends

    expected = []
    for i, (w, g, m, v) in enumerate(zip(saved, grads, means, squares)):
        w, g, m, v = w.double(), g.double(), m.double(), v.double()
        t = taken[i] + 1
        g = -g if maximize else g
        if decoupled:
            w = rounded(w * (1 - lr * decay), dtype)
        else:
            g = rounded(g + decay * w, dtype)
        m = rounded(m + (g - m) * (1 - beta1), dtype)
        v = rounded(rounded(v * beta2, dtype) + (1 - beta2) * g * g, dtype)
        top = torch.maximum(largest[i].double(), v) if amsgrad else v
        denominator = rounded(rounded(top.sqrt(), dtype) / math.sqrt(1 - beta2**t), dtype)
        denominator = rounded(denominator + eps, dtype)
        expected.append((w - lr / (1 - beta1**t) * m / denominator, m, v, top))
    lr_tensor = None if lr_dtype is None else torch.tensor(lr, dtype=lr_dtype, device=device)
    arguments = (beta1, beta2, eps, decay, amsgrad, maximize, decoupled)
    lr_number = lr if lr_tensor is None else math.nan
    backend.restore_adam_(params, saved, grads, means, squares, largest, steps, lr_number, lr_tensor, *arguments)
    for i, (w, m, v, top) in enumerate(expected):
        for found, value in ((params[i], w), (means[i], m), (squares[i], v)):
            assert_close(found, value, ulps=4)
        if amsgrad:
            assert_close(largest[i], top, ulps=4)
        assert steps[i].item() == taken[i] + 1
    guarded.check_margins()
