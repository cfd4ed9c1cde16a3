"""Losses that take a gradient themselves: penalties, force fields, attacks inside the closure."""

import oracles
import pytest
import torch
from torch import nn

from esam_kernels import ESAM, SAM

RHO = 0.3


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)


def gradient_penalty(model, inputs, targets):
    inputs = inputs.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
    return (model(inputs)[:, 0] - targets).square() + (grad.norm(dim=1) - 1.0).square()


def by_backward(model, inputs, targets):
    """The gradient of the inputs by ``backward``, which leaves gradients of the weights behind."""
    inputs = inputs.clone().requires_grad_()
    model(inputs).sum().backward()
    return (model(inputs.detach() + 0.1 * inputs.grad.sign())[:, 0] - targets).square()


def by_hook(model, inputs, targets):
    """An activation's gradient, by a hook on it."""
    hidden = model[:2](inputs)
    hidden.register_hook(lambda grad: grad)
    return (model[2](hidden)[:, 0] - targets).square()


def by_retain_grad(model, inputs, targets):
    hidden = model[:2](inputs)
    hidden.retain_grad()
    return (model[2](hidden)[:, 0] - targets).square()


def second_derivative(model, inputs, targets):
    """As a physics-informed network asks for."""
    inputs = inputs.clone().requires_grad_()
    (first,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
    (second,) = torch.autograd.grad(first[:, 0].sum(), inputs, create_graph=True)
    return (second[:, 0] - targets).square()


def by_functorch(model, inputs, targets):
    def energy(x):
        return model(x).sum()

    force = torch.func.vmap(torch.func.grad(energy))(inputs)
    return (force.sum(dim=1) - targets).square()


LOSSES = [gradient_penalty, by_backward, by_hook, by_retain_grad, second_derivative, by_functorch]


def data(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, generator=generator).to(dtype), torch.randn(8, generator=generator).to(dtype)


def step_by_hand(model, loss, batch, k):
    """Algorithm 1 with beta = 1 and plain SGD."""
    params = list(model.parameters())
    before = loss(model, *batch)
    grads = torch.autograd.grad(before.mean(), params, materialize_grads=True)
    norm = torch.stack([grad.norm() for grad in grads]).norm()
    old = [param.detach().clone() for param in params]
    with torch.no_grad():
        for param, grad in zip(params, grads):
            param.add_(RHO * grad / norm)
    after = loss(model, *batch)
    chosen = (after - before).topk(k).indices.sort().values
    selected = loss(model, *[part[chosen] for part in batch])
    grads = torch.autograd.grad(selected.mean(), params, materialize_grads=True)
    with torch.no_grad():
        for param, weights, grad in zip(params, old, grads):
            param.copy_(weights - 0.05 * grad)


@pytest.mark.parametrize("gamma", [1.0, 0.5])
@pytest.mark.parametrize("loss", LOSSES)
def test_such_a_loss_is_trained_as_by_hand(loss, gamma):
    model, expected = net(), net(torch.float64)
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.05, rho=RHO, beta=1.0, gamma=gamma)
    for step in range(3):
        optimizer.step(lambda x, y: loss(model, x, y), *data(step))
        step_by_hand(expected, loss, data(step, torch.float64), round(8 * gamma))
    for param, other in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(param.detach().double(), other.detach(), rtol=0, atol=5e-6)


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_an_attack_in_the_closure_adds_nothing_to_the_gradients_of_the_base_optimizers_step(micro_batch):
    model, expected = net(), net()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.05, rho=0.0)
    optimizer.step(lambda x, y: by_backward(model, x, y), *data(0), micro_batch=micro_batch)
    grads = torch.autograd.grad(by_backward(expected, *data(0)).mean(), list(expected.parameters()))
    for param, other, grad in zip(model.parameters(), expected.parameters(), grads):
        torch.testing.assert_close(param.detach(), other.detach() - 0.05 * grad)


def test_the_second_look_of_the_first_step_sees_the_same_noise():
    """It is called twice there, without and with gradients."""
    model = nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.5), nn.Linear(16, 1))
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=1e-12, gamma=0.5)
    kept = []
    model[1].register_forward_hook(lambda _, args, out: kept.append(out != 0))

    def losses(inputs, targets):
        inputs = inputs.clone().requires_grad_()
        out = model(inputs)
        (grad,) = torch.autograd.grad(out.sum(), inputs, create_graph=True)
        return (out[:, 0] - targets).square() + grad.square().sum(dim=1)

    for _ in range(2):
        optimizer.step(losses, *data(0))
    first, without, with_grad, _, again, second, _ = kept
    assert torch.equal(first, without)
    assert torch.equal(first, with_grad)
    assert torch.equal(again, second)


def test_the_weights_come_back_from_a_loss_that_raises_in_the_second_look():
    model = net()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.05, rho=RHO)
    before = oracles.weights_of(model)

    def losses(inputs, targets):
        if not torch.is_grad_enabled():
            raise RuntimeError("something else")
        return (model(inputs)[:, 0] - targets).square()

    with pytest.raises(RuntimeError, match="something else"):
        optimizer.step(losses, *data(0))
    assert oracles.same_bits(before, oracles.weights_of(model))
