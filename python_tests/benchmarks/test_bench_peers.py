"""The peers compute ESAM, up to the defects that the published code is known for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import peers
from benchmarks.suites import SGD

SHAPES = [(8, 3, 3, 3), (8,), (5, 8), (1,)]
RHO = 0.05


def lists(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def oracle(params, grads, beta, adaptive):
    """e of the released code in float64: (rho / beta) T^2 g / ||T g||."""
    scaling = [w.double().abs() if adaptive else torch.ones_like(w).double() for w in params]
    norm = torch.cat([(t * g.double()).flatten() for t, g in zip(scaling, grads)]).norm()
    return [RHO / beta * t**2 * g.double() / norm for t, g in zip(scaling, grads)]


@pytest.mark.parametrize("perturb", [peers.loop_perturb, peers.foreach_perturb])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("beta", [1.0, 0.6])
def test_perturbation_equals_the_equation(perturb, adaptive, beta):
    params, grads = lists(0), lists(1)
    before = [w.clone() for w in params]
    moves = perturb(params, grads, RHO, beta, adaptive)
    for w, old, e, expected in zip(params, before, moves, oracle(before, grads, beta, adaptive)):
        torch.testing.assert_close(e.double(), expected, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(w, old + e, rtol=0, atol=0)


@pytest.mark.parametrize("perturb", [peers.loop_perturb, peers.foreach_perturb])
def test_element_mask_keeps_the_expectation(perturb):
    grads = [torch.ones(200_000)]
    (e,) = perturb([torch.zeros(200_000)], grads, RHO, element_beta=0.6)
    norm = grads[0].norm()
    assert (e != 0).float().mean().item() == pytest.approx(0.6, abs=0.01)
    assert e.mean().item() == pytest.approx((RHO / norm).item(), rel=0.02)


def test_foreach_equals_the_loop():
    results = []
    for perturb, restore in ((peers.loop_perturb, peers.loop_restore), (peers.foreach_perturb, peers.foreach_restore)):
        params = lists(0)
        moves = perturb(params, lists(1), RHO)
        restore(params, moves)
        results.append((params, moves))
    for loop, foreach in zip(results[0], results[1]):
        torch.testing.assert_close(loop, foreach, rtol=1e-6, atol=1e-8)


def test_published_first_step_dispatches_six_operations_a_tensor():
    # 1 * g, its norm, 1 * g, times the scale, e * 1, and the addition; and a few for the norm of the norms.
    class Counter(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            self.calls += 1
            return function(*arguments, **(options or {}))

    tensors = 161  # ResNet-50
    weights, gradients = ([torch.ones(2) for _ in range(tensors)] for _ in range(2))
    with Counter() as counter:
        peers.loop_perturb(weights, gradients, RHO)
    assert 0 <= counter.calls - 6 * tensors <= 6


def test_update_for_compile_is_torch_sgd():
    params = [nn.Parameter(w) for w in lists(0)]
    base = torch.optim.SGD(params, **SGD)
    ours, buffers = lists(0), [torch.zeros_like(w) for w in lists(0)]
    for seed in (1, 2):
        moves = lists(3)
        for param, grad in zip(params, lists(seed)):
            param.grad = grad
        base.step()
        torch._foreach_add_(ours, moves)
        peers.restore_and_sgd(ours, moves, lists(seed), buffers, *SGD.values())
    torch.testing.assert_close(ours, [param.detach() for param in params], rtol=1e-5, atol=1e-6)


def test_published_selection_takes_one_sample_fewer_than_k():
    generator = torch.Generator().manual_seed(0)
    before, after = torch.rand(32, generator=generator), torch.rand(32, generator=generator)
    (chosen,) = peers.published_select(before, after, 0.5, torch.arange(32))
    best = torch.topk(after - before, 15).indices.sort().values
    assert torch.equal(chosen, best)
    (library,) = peers.library_select(before, after, 16, torch.arange(32))
    assert torch.equal(library.sort().values, torch.topk(after - before, 16).indices.sort().values)


def problem(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    inputs, target = torch.randn(12, 6), torch.randint(3, (12,))

    def losses(x, y):
        return F.cross_entropy(model(x), y, reduction="none")

    return model, losses, inputs, target


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_whole_published_step_is_algorithm_1(foreach, gamma):
    """Against the same step written out, with beta = 1 and the selection as the published code makes it."""
    model, losses, inputs, target = problem()
    params = list(model.parameters())
    w = [p.detach().clone() for p in params]
    grads = torch.autograd.grad(losses(inputs, target).mean(), params)
    before = losses(inputs, target).detach()
    moved = [a + e.float() for a, e in zip(w, oracle(w, grads, 1.0, False))]
    with torch.no_grad():
        for p, value in zip(params, moved):
            p.copy_(value)
    rise = losses(inputs, target).detach() - before
    chosen = torch.topk(rise, 5).indices if gamma == 0.5 else torch.arange(12)
    second = torch.autograd.grad(losses(inputs[chosen], target[chosen]).mean(), params)
    expected = [a - 0.1 * g for a, g in zip(w, second)]
    with torch.no_grad():
        for p, value in zip(params, w):
            p.copy_(value)

    optimizer = peers.PublishedESAM(params, torch.optim.SGD(params, lr=0.1), RHO, gamma=gamma, foreach=foreach)
    loss = optimizer.step(losses, inputs, target)
    torch.testing.assert_close(loss, before.mean())
    torch.testing.assert_close([p.detach() for p in params], expected, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in params)


def test_published_draw_computes_only_the_drawn_gradients_and_unfreezes_everything():
    model, losses, inputs, target = problem()
    params = list(model.parameters())
    params[0].requires_grad_(False)
    optimizer = peers.PublishedESAM(params, torch.optim.SGD(params, lr=0.1), RHO, beta=0.5, seed=1)
    optimizer.draw()
    drawn = [p.requires_grad for p in params]
    assert 0 < sum(drawn) < len(params)
    losses(inputs, target).mean().backward()
    assert [p.grad is not None for p in params] == drawn
    optimizer.first_step(zero_grad=True)
    assert all(p.requires_grad for p in params)  # the user's freeze is lost
    moved = [torch.linalg.vector_norm(optimizer.state[p]["e"]) for p in params if "e" in optimizer.state[p]]
    assert torch.stack(moved).norm().item() == pytest.approx(RHO / 0.5, rel=1e-4)  # over the drawn tensors alone
