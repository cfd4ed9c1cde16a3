"""Random cases, each the reference's: dtypes, sizes, layouts, places in memory, and every number an operator takes.

A case is its seed. A failure names the seed and what was drawn; ``CASES`` of any kind may be set higher for a search.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from native_cases import DTYPES, assert_same_bits, assert_within, extension, misaligned
from torch import Tensor

from esam_kernels import ops, select
from esam_kernels.backends import native, reference

CASES = 50
#: Of tensors, in elements: a chunk of csrc/cpu/blocks.h is 8192.
MOST = 20_000
#: The bound of test_native_perturbation.py is tighter, and of the exact sum: this one has torch's additions in it.
OF_NORM = 1e-12


class Case:
    """What is drawn from a seed, and a record of it."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.random = random.Random(seed)
        self.drawn: dict[str, Any] = {}

    def one_of(self, name: str, values: Sequence[Any]) -> Any:
        return self.note(name, self.random.choice(values))

    def between(self, name: str, least: float, most: float) -> float:
        return self.note(name, self.random.uniform(least, most))

    def size(self, name: str, most: int = MOST, least: int = 1) -> int:
        """As often small as large."""
        return self.note(name, max(least, int(math.exp(self.random.uniform(0, math.log(most))))))

    def note(self, name: str, value: Any) -> Any:
        self.drawn.setdefault(name, []).append(value)
        return value

    def shape(self, most: int = MOST) -> tuple[int, ...]:
        size = self.size("size", most, self.random.choice((0, 1)))
        if size < 64 or self.random.random() < 0.5:
            return (size,)
        return self.random.choice(((size // 8, 8), (size // 30 + 1, 3, 5, 2)))

    def laid_out(self, tensor: Tensor, layouts: Sequence[str]) -> Tensor:
        """The same values, elsewhere in memory."""
        return LAYOUTS[self.one_of("layout", layouts)](tensor)


def _shifted(tensor: Tensor) -> Tensor:
    storage = torch.zeros(tensor.numel() + 9, dtype=tensor.dtype)
    return storage[7 : 7 + tensor.numel()].view(tensor.shape).copy_(tensor)


def _transposed(tensor: Tensor) -> Tensor:
    """Dense, the last dimension outermost."""
    return tensor.movedim(-1, 0).contiguous().movedim(0, -1)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor.clone()


def _with_gaps(tensor: Tensor) -> Tensor:
    storage = torch.zeros(*tensor.shape, 3, dtype=tensor.dtype)
    return storage[..., 1].copy_(tensor)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": torch.clone,
    "shifted": _shifted,
    "misaligned": misaligned,
    "transposed": _transposed,
    "channels last": _channels_last,
    "with gaps": _with_gaps,
}
DENSE = ("plain", "plain", "shifted", "misaligned", "transposed", "channels last")


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same values in the same order of memory, aligned."""
    return [tensor.clone(memory_format=torch.preserve_format) for tensor in tensors]


def parallel(case: Case, count: int, layouts: Sequence[str] = DENSE) -> list[list[Tensor]]:
    """``count`` lists of up to five tensors, alike in dtype, shape and strides, some values out of the ordinary."""
    dtype = case.one_of("dtype", DTYPES)
    lists: list[list[Tensor]] = [[] for _ in range(count)]
    for _ in range(case.random.randint(1, 5)):
        shape, layout = case.shape(), case.one_of("layout", layouts)
        for tensors in lists:
            values = torch.randn(shape).mul_(case.random.choice((1.0, 1e-3, 30.0))).to(dtype)
            if values.numel() and case.random.random() < 0.1:
                values.view(-1)[-1] = case.random.choice((0.0, -0.0, 1e-7))
            tensors.append(LAYOUTS[layout](values))
    return lists


def scaling(case: Case, params: list[Tensor]) -> tuple[list[int], list[bool], float]:
    """The groups of the tensors, which groups are adaptive, and eta."""
    adaptive = [case.random.random() < 0.4 for _ in range(case.random.randint(1, 3))]
    groups = [case.random.randrange(len(adaptive)) for _ in params]
    case.note("groups, adaptive", (groups, adaptive))
    return groups, adaptive, case.one_of("eta", (0.0, 0.01, 1.0))


def check_norm(case: Case) -> None:
    params, grads = parallel(case, 2, (*DENSE, "with gaps"))
    arguments = scaling(case, params)
    expected = reference.norm_partials(params, grads, *arguments).sum()
    torch.testing.assert_close(
        native.norm_partials(params, grads, *arguments).sum(), expected, rtol=OF_NORM, atol=0, equal_nan=True
    )


def check_perturb(case: Case) -> None:
    params, grads, backups = parallel(case, 3)
    groups, adaptive, eta = scaling(case, params)
    offsets = [4 * case.random.choice((0, 7, -3, 2**30 + 1, -(2**33), 2**59)) + 8 * i for i in range(len(params))]
    beta = case.one_of("beta", (None, None, 0.0, 1e-6, 0.3, 0.6, 1.0))
    seed, step = case.random.randrange(2**63), case.random.randrange(2**40)
    state = None if beta is None else torch.tensor([seed, step, round(beta * 2**32) - 1])
    partials = torch.zeros(reference.NUM_PARTIALS, dtype=torch.float64)
    partials[0] = case.one_of("norm", (1.0, 1e-30, 7.3, 0.0, math.nan, math.inf))
    scale = torch.rand(len(adaptive), dtype=torch.float64)
    rest = (groups, case.note("offsets", offsets), partials, scale, adaptive, eta)
    rest += (case.one_of("norm factor", (1.0, 1.3)), case.one_of("eps", (1e-12, 0.0, 0.1)), state)
    backups = backups if case.one_of("has backups", (True, False)) else []
    w, g, b = copies(params), copies(grads), copies(backups)
    reference.perturb_(w, g, b, *rest)
    old = copies(params)
    native.perturb_(params, grads, backups, *rest)
    assert_same_bits(backups, b)
    assert_same_bits(grads, g)
    assert_within(1, params, w, old)


def check_restore(case: Case) -> None:
    params, backups = parallel(case, 2, (*DENSE, "with gaps"))
    native.restore_(params, backups)
    assert_same_bits(params, backups)


def check_select(case: Case) -> None:
    samples = case.size("samples", 700)
    before, after = (torch.randn(samples).round(decimals=case.random.choice((0, 1, 5))) for _ in range(2))
    for losses in (before, after):
        for value in (math.nan, math.inf, -math.inf, -0.0):
            losses[torch.rand(samples) < case.random.choice((0.0, 0.0, 0.2))] = value
    losses = [
        case.laid_out(losses.to(case.one_of("dtype", DTYPES)), ("plain", "shifted", "misaligned", "with gaps"))
        for losses in (before, after)
    ]
    k = case.note("k", case.random.randint(1, samples))
    expected = reference.select(*losses, k)
    assert torch.equal(native.select(*losses, k), expected)
    assert torch.equal(select(*losses, k), expected)


OF_ROWS = (*DTYPES, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64)


def check_gather(case: Case) -> None:
    samples = case.size("samples", 100)
    tensors = []
    for _ in range(case.random.randint(1, 4)):
        shape = (samples, *case.random.choice(((), (3,), (0,), (7, 5), (3, 4, 6))))
        values = torch.randint(-100, 100, shape).to(case.one_of("dtype", OF_ROWS))
        tensors.append(case.laid_out(values, tuple(LAYOUTS)))
    count = case.note("count", case.random.randint(1, 2 * samples))
    indices = case.laid_out(torch.randint(samples, (count,)), ("plain", "shifted", "misaligned", "with gaps"))
    expected = reference.gather(tensors, indices)
    for found in (native.gather(tensors, indices), ops.gather_rows(tensors, indices, "native")):
        for rows, wanted in zip(found, expected, strict=True):
            assert rows.dtype == wanted.dtype
            assert torch.equal(rows, wanted)
            assert rows.numel() <= 1 or rows.stride() == wanted.stride()


def check_cross_entropy(case: Case) -> None:
    dtype = case.one_of("dtype", DTYPES[:3])
    rows, classes = case.size("rows", 40), case.size("classes", 3000)
    smoothing = case.one_of("label_smoothing", (0.0, 0.0, 0.1, 0.7, 1.0))
    values = (case.one_of("spread", (0.1, 3.0, 40.0)) * torch.randn(rows, classes)).to(dtype)
    if case.one_of("offset", (0.0, 0.0, 1.0)):
        values += 4096
    if case.one_of("kind", ("index", "probability")) == "index":
        ignored = case.one_of("ignore_index", (-100, classes - 1, 0))
        target = torch.randint(classes, (rows,))
        target[torch.rand(rows) < 0.2] = ignored
        target = case.laid_out(target, ("plain", "shifted", "misaligned", "with gaps"))
    else:
        ignored = -100
        target = torch.rand(rows, classes) * (torch.rand(rows, classes) < 0.5)
        target = case.laid_out(
            target.to(case.one_of("dtype of target", DTYPES)), ("plain", "misaligned", "transposed", "with gaps")
        )
    logits = case.laid_out(values, ("plain", "shifted", "misaligned", "transposed", "with gaps"))
    exact, labels = logits.double(), target.double() if target.is_floating_point() else target
    if target.dtype == torch.float64:
        labels = target.float().double()  # which the kernels read
    losses, normalizer = native.cross_entropy_forward(logits, target, smoothing, ignored)
    wanted, exact_normalizer = reference.cross_entropy_forward(exact, labels, smoothing, ignored)
    # Each product of a target and a logit is rounded, once, and so is the sum of the exponentials.
    weights = labels * (1 - smoothing) + smoothing / classes if target.is_floating_point() else torch.ones(rows, 1)
    size = 1 + weights.sum(1) * (exact.amax(1) - exact.amin(1) + math.log(classes))
    assert ((losses.double() - wanted).abs() <= 1e-6 * size).all(), (losses.double() - wanted).abs().div(size).max()
    upstream = torch.rand(rows)
    gradient = native.cross_entropy_backward(upstream, logits, target, normalizer, smoothing, ignored)
    wanted = reference.cross_entropy_backward(upstream.double(), exact, labels, exact_normalizer, smoothing, ignored)
    # As in test_native_cross_entropy.py, for every unit of the target's sum.
    rtol, atol = 2e-6 + torch.finfo(dtype).eps / 2, 3e-7 * max(1.0, weights.sum(1).max().item())
    torch.testing.assert_close(gradient.double(), wanted, rtol=rtol, atol=max(atol, torch.finfo(dtype).tiny))


def check_sgd(case: Case) -> None:
    lists = whole_vectors(case, 4)
    momentum = case.one_of("momentum", (0.0, 0.5, 0.9))
    dampening = case.one_of("dampening", (0.0, 0.3))
    nesterov = case.one_of("nesterov", (False, momentum > 0 and dampening == 0))
    rest = (case.one_of("first", (False, True)), case.between("lr", 0, 1), None, momentum, dampening)
    rest += (case.one_of("weight_decay", (0.0, 0.1)), nesterov, case.one_of("maximize", (False, True)))
    compare_updates(lists, lambda backend, given: backend.restore_sgd_(*given, *rest))


def check_adam(case: Case) -> None:
    lists = whole_vectors(case, 6)
    for squares in lists[4:]:
        for tensor in squares:
            tensor.abs_()
    amsgrad, start = case.one_of("amsgrad", (False, True)), case.note("step", case.random.randint(0, 1000))
    rest = (case.between("lr", 0, 1), None, case.between("beta1", 0, 0.99), case.between("beta2", 0.5, 0.9999))
    rest += (case.one_of("eps", (1e-8, 1e-3)), case.one_of("weight_decay", (0.0, 0.1)), amsgrad)
    rest += (case.one_of("maximize", (False, True)), case.one_of("decoupled", (False, True)))

    def update(backend, given):
        steps = [torch.tensor(float(start)) for _ in given[0]]
        backend.restore_adam_(*given[:5], given[5] if amsgrad else [], steps, *rest)
        assert steps == [start + 1] * len(steps)

    compare_updates(lists, update)


def whole_vectors(case: Case, count: int) -> list[list[Tensor]]:
    """Half precision in whole vectors only: torch computes what is left over in another way."""
    lists = parallel(case, count, ("plain", "shifted", "misaligned"))
    if lists[0][0].element_size() == 2:
        lists = [[tensor.flatten()[: tensor.numel() // 64 * 64].clone() for tensor in tensors] for tensors in lists]
    return lists


def compare_updates(lists: list[list[Tensor]], update: Callable[[Any, list[list[Tensor]]], None]) -> None:
    expected, old = [copies(tensors) for tensors in lists], [copies(tensors) for tensors in lists]
    update(reference, expected)
    update(native, lists)
    assert_same_bits(lists[2], old[2])
    # the weights move from the backups
    for found, wanted, before in zip(lists, expected, [old[1], *old[1:]], strict=True):
        assert_within(1, found, wanted, before)


KINDS = (
    check_norm,
    check_perturb,
    check_restore,
    check_select,
    check_gather,
    check_cross_entropy,
    check_sgd,
    check_adam,
)


@pytest.mark.usefixtures("exact_square_roots")
@pytest.mark.parametrize("check", KINDS, ids=lambda check: check.__name__[6:])
def test_random_cases_are_the_references(check: Callable[[Case], None]) -> None:
    before = extension.isa()
    for seed in range(CASES):
        case = Case(seed)
        extension.use_isa(case.one_of("isa", extension.available_isas()))
        try:
            check(case)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {case.drawn}") from error
        finally:
            extension.use_isa(before)
