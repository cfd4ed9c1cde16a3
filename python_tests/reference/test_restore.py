"""Contract points 4 to 6: w comes back bit for bit, whatever happens, and nothing else is touched."""

import math

import oracles
import pytest
import torch
from torch import nn

from esam_kernels import ESAM, SAM
from esam_kernels.backends import reference

# For bfloat16 and float16 as large as the weights, so that (w + e) - e would not be w.
RHO = 3.0


def make_params(dtype):
    """Several shapes and memory formats, and values that sums do not keep: tiny, huge, -0.0."""
    torch.manual_seed(5)
    params = [
        nn.Parameter(torch.randn(33, 5).to(dtype)),
        nn.Parameter((torch.randn(4, 3, 3, 3) * 1e-3).to(dtype).to(memory_format=torch.channels_last)),
        nn.Parameter(torch.randn(5, 7).to(dtype).t()),
        nn.Parameter(torch.tensor([-0.0, 0.0, 1e-7, 300.0, -1e4]).to(dtype)),
        nn.Parameter(torch.tensor(0.3).to(dtype)),
        nn.Parameter(torch.empty(0, 3, dtype=dtype)),
    ]
    set_gradients(params)
    return params


def set_gradients(params):
    for param in params:
        param.grad = torch.empty_like(param).copy_(torch.randn(param.shape))


def copies(params):
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize("zero_grad", [False, True])
@pytest.mark.parametrize("mask", ["tensor", "element"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_restore_is_bitwise_and_in_the_same_storage(dtype, mask, zero_grad):
    params = make_params(dtype)
    optimizer = ESAM(params, torch.optim.SGD, lr=0.1, rho=RHO, mask=mask)
    before, pointers, strides = copies(params), [p.data_ptr() for p in params], [p.stride() for p in params]
    for _ in range(5):
        optimizer.first_step(zero_grad=zero_grad)
        assert not oracles.same_bits(before, copies(params))
        optimizer.restore()
        assert oracles.same_bits(before, copies(params))
        assert [p.data_ptr() for p in params] == pointers
        assert [p.stride() for p in params] == strides
        set_gradients(params)


@pytest.mark.parametrize("zero_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_second_step_updates_the_old_weights_bit_for_bit(dtype, zero_grad):
    params, plain = make_params(dtype), make_params(dtype)
    optimizer = SAM(params, torch.optim.SGD, lr=0.1, rho=RHO)
    optimizer.first_step(zero_grad=zero_grad)
    set_gradients(params)
    for one, other in zip(plain, params):
        one.grad = other.grad.clone()
    optimizer.second_step(zero_grad=zero_grad)
    torch.optim.SGD(plain, lr=0.1).step()
    assert oracles.same_bits(copies(params), copies(plain))
    assert all((p.grad is None) == zero_grad for p in params)


def test_weights_of_several_groups_and_dtypes_come_back():
    params = [*make_params(torch.float32), *make_params(torch.bfloat16)]
    groups = [{"params": params[::2]}, {"params": params[1::2], "rho": 7.0, "adaptive": True, "lr": 0.01}]
    optimizer = ESAM(groups, torch.optim.SGD, lr=0.1, rho=RHO, beta=0.7)
    before = copies(params)
    for _ in range(4):
        optimizer.first_step()
        optimizer.restore()
        assert oracles.same_bits(before, copies(params))


def test_one_parameter_used_twice_is_perturbed_once():
    weight = nn.Parameter(torch.randn(3, 3))
    optimizer = SAM([weight], torch.optim.SGD, lr=0.1, rho=1.0)
    before = weight.detach().clone()
    (weight.sum() + 2 * weight.t().sum()).backward()
    optimizer.first_step()
    assert (weight - before).norm().item() == pytest.approx(1.0, rel=1e-5)
    optimizer.restore()
    assert oracles.same_bits([before], [weight])


def tied(transposed):
    weight = nn.Parameter(torch.randn(3, 3))
    other = nn.Parameter(weight.data.t() if transposed else weight.data)
    return weight, other


@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
def test_two_parameters_on_the_same_memory_stay_tied_and_are_perturbed_by_the_sum_of_their_gradients(
    transposed, flatten
):
    weight, other = tied(transposed)
    optimizer = SAM([weight, other], torch.optim.SGD, lr=0.1, rho=1.0, flatten=flatten)
    before = weight.detach().clone()
    (3 * weight[0, 1] + (other[2, 0] if transposed else other[0, 2])).backward()
    optimizer.first_step(zero_grad=True)
    e = torch.zeros(3, 3)
    e[0, 1], e[0, 2] = 3 / math.sqrt(10), 1 / math.sqrt(10)
    torch.testing.assert_close(weight - before, e, rtol=1e-5, atol=1e-6)
    assert weight.data_ptr() == other.data_ptr()
    assert torch.equal(weight, other.t() if transposed else other)
    optimizer.restore()
    assert oracles.same_bits([before], [weight])


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("when", ["before", "after"])
def test_tied_parameters_are_updated_as_by_the_base_optimizer(when, monkeypatch):
    """Tied before the optimizer was built, or after. One pass over both would read what it has written."""
    monkeypatch.setattr(reference, "restore_sgd_", None)
    results = []
    for wrapped in (True, False):
        torch.manual_seed(2)
        weight, other = tied(False) if when == "before" else (nn.Parameter(torch.randn(3, 3)) for _ in range(2))
        make = torch.optim.SGD if not wrapped else lambda p, lr: SAM(p, torch.optim.SGD, lr=lr, rho=1.0)
        optimizer = make([weight, other], lr=0.1)
        other.data = weight.data
        if wrapped:
            weight.grad, other.grad = torch.randn(3, 3), None
            optimizer.first_step(zero_grad=True)
        torch.manual_seed(7)
        weight.grad, other.grad = torch.randn(3, 3), torch.randn(3, 3)
        if wrapped:
            optimizer.second_step()
        else:
            optimizer.step()
        results.append([weight.detach().clone(), other.detach().clone()])
    assert oracles.same_bits(*results)


@pytest.mark.parametrize("keep", ["gradient", "view", "detached", "numpy"])
def test_a_gradient_that_the_user_holds_keeps_its_values(keep):
    param = nn.Parameter(torch.randn(4, 4))
    optimizer = SAM([param], torch.optim.SGD, lr=0.1, rho=RHO)
    param.pow(2).sum().backward()
    held = {
        "gradient": lambda: param.grad,
        "view": lambda: param.grad.view(-1)[3:],
        "detached": lambda: param.grad.detach(),
        "numpy": lambda: param.grad.numpy(),
    }[keep]()
    values, before = torch.as_tensor(held).clone(), param.detach().clone()
    optimizer.first_step(zero_grad=True)
    assert torch.equal(torch.as_tensor(held), values)
    optimizer.second_step()
    assert torch.equal(torch.as_tensor(held), values)
    assert oracles.same_bits([before], [param])


def test_gradients_that_are_views_of_a_bucket_keep_their_values():
    params = [nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(3))]
    optimizer = SAM(params, torch.optim.SGD, lr=0.1, rho=RHO)
    bucket = torch.randn(19)
    values, before = bucket.clone(), copies(params)
    params[0].grad, params[1].grad = bucket[:16].view(4, 4), bucket[16:]
    optimizer.first_step(zero_grad=True)
    optimizer.restore()
    assert torch.equal(bucket, values)
    assert oracles.same_bits(before, copies(params))


def test_a_gradient_that_fills_its_bucket_keeps_its_values():
    param = nn.Parameter(torch.randn(4, 4))
    optimizer = SAM([param], torch.optim.SGD, lr=0.1, rho=RHO)
    bucket = torch.randn(16)
    values = bucket.clone()
    param.grad = bucket.view(4, 4)
    optimizer.first_step(zero_grad=True)
    optimizer.restore()
    assert torch.equal(bucket, values)


def test_a_gradient_that_nobody_holds_becomes_the_backup():
    param = nn.Parameter(torch.randn(64, 64))
    optimizer = SAM([param], torch.optim.SGD, lr=0.1, rho=RHO)
    param.pow(2).sum().backward()
    address = param.grad.data_ptr()
    optimizer.first_step(zero_grad=True)
    assert [backup.data_ptr() for backup in optimizer._perturbation._backups] == [address]


def test_without_zero_grad_the_gradients_stay():
    params = make_params(torch.float32)
    optimizer = SAM(params, torch.optim.SGD, lr=0.1, rho=RHO)
    grads = [p.grad for p in params]
    values = copies(grads)
    optimizer.first_step()
    assert all(p.grad is grad for p, grad in zip(params, grads))
    assert oracles.same_bits(values, grads)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0])
@pytest.mark.parametrize("mask", ["element", "tensor"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_bad_gradient_leaves_the_weights(bad, mask, adaptive):
    params = make_params(torch.float32)
    for param in params:
        param.grad = torch.zeros_like(param) if bad == 0.0 else param.grad
        param.grad.flatten()[:1].fill_(bad)
    params[2].grad = torch.full_like(params[2], bad)
    optimizer = ESAM(params, torch.optim.SGD, lr=0.1, beta=1.0, mask=mask, adaptive=adaptive)
    before = copies(params)
    for zero_grad in (False, True):
        optimizer.first_step(zero_grad=zero_grad)
        assert oracles.same_bits(before, copies(params))
        optimizer.restore()
        assert oracles.same_bits(before, copies(params))


def test_training_goes_on_after_a_bad_gradient():
    model = oracles.mlp()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    losses = oracles.losses_of(model)
    losses(*oracles.batch()).mean().backward()
    model[0].weight.grad[0, 0] = math.nan
    optimizer.first_step(zero_grad=True)
    losses(*oracles.batch()).mean().backward()
    optimizer.second_step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    first = optimizer.step(losses, *oracles.batch())
    for _ in range(20):
        last = optimizer.step(losses, *oracles.batch())
    assert last < first


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_an_exception_in_the_closure_restores(call, error):
    model = oracles.noisy_mlp()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=RHO, model=model)
    before, calls = oracles.weights_of(model), []

    def losses(inputs, target):
        calls.append(1)
        if len(calls) == call:
            raise error("here")
        return oracles.losses_of(model)(inputs, target)

    with pytest.raises(error, match="here"):
        optimizer.step(losses, *oracles.batch())
    assert oracles.same_bits(before, oracles.weights_of(model))
    assert model[1].track_running_stats
    assert all(p.requires_grad for p in model.parameters())
    optimizer.step(oracles.losses_of(model), *oracles.batch())
    assert not oracles.same_bits(before, oracles.weights_of(model))


@pytest.mark.parametrize("call", [1, 2])
def test_an_exception_in_a_torch_style_closure_restores(call):
    model = oracles.mlp()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=RHO)
    before, calls = oracles.weights_of(model), []

    def closure():
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        loss = oracles.losses_of(model)(*oracles.batch()).mean()
        loss.backward()
        return loss

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert oracles.same_bits(before, oracles.weights_of(model))


def test_restore_without_first_step_does_nothing():
    params = make_params(torch.float32)
    optimizer = SAM(params, torch.optim.SGD, lr=0.1)
    before, state = copies(params), optimizer.state_dict()
    optimizer.restore()
    assert oracles.same_bits(before, copies(params))
    assert optimizer.state_dict() == state
