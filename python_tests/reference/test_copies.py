"""Copies of a model and its optimizer, and models that are loaded into or converted after construction."""

import copy
import pickle

import oracles
import pytest
import torch
from torch import nn

from esam_kernels import ESAM, SAM

BASES = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-2}),
}


def build(base="SGD", mask="tensor", seed=0, **kwargs):
    model = oracles.noisy_mlp()
    kind, options = BASES[base]
    optimizer = ESAM(model.parameters(), kind, mask=mask, seed=seed, model=model, rho=0.5, **options, **kwargs)
    return model, optimizer


def run(model, optimizer, first, last):
    """Steps first to last, with dropout noise that depends on the step only."""
    for step in range(first, last):
        torch.manual_seed(100 + step)
        optimizer.step(oracles.losses_of(model), *oracles.batch(16, seed=step))


def everything(model, optimizer):
    """Weights, buffers and the base optimizer's tensors."""
    state = [value for param in model.parameters() for value in optimizer.state[param].values()]
    return [*model.state_dict().values(), *[s for s in state if isinstance(s, torch.Tensor)]]


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("mask", ["tensor", "element"])
def test_a_copy_goes_on_bitwise_and_independently(way, base, mask):
    model, optimizer = build(base, mask)
    run(model, optimizer, 0, 4)
    pair = (model, optimizer)
    other, other_optimizer = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    params = {id(p) for p in other.parameters()}
    assert {id(p) for group in other_optimizer.param_groups for p in group["params"]} == params
    before = [t.clone() for t in everything(model, optimizer)]
    run(other, other_optimizer, 4, 8)
    assert oracles.same_bits(before, everything(model, optimizer))
    run(model, optimizer, 4, 8)
    assert oracles.same_bits(everything(model, optimizer), everything(other, other_optimizer))
    other_optimizer.param_groups[0]["rho"] = 3.0
    assert optimizer.param_groups[0]["rho"] == 0.5


def test_a_copied_optimizer_freezes_the_batch_norm_of_the_copied_model():
    model, optimizer = build()
    other, other_optimizer = copy.deepcopy((model, optimizer))
    run(other, other_optimizer, 0, 2)
    assert other[1].num_batches_tracked == 2
    assert model[1].num_batches_tracked == 0


def test_a_copy_of_tied_parameters_is_perturbed_as_it_is_tied():
    """Two Parameters on the same memory are tied no more when torch has copied them."""
    weight = nn.Parameter(torch.ones(4))
    pair = [weight, nn.Parameter(weight.data)]
    params, optimizer = copy.deepcopy((pair, SAM(pair, torch.optim.SGD, lr=0.1, rho=2.0)))
    assert params[0].data_ptr() != params[1].data_ptr()
    for param in params:
        param.grad = torch.ones(4)
    optimizer.first_step()
    for param in params:
        torch.testing.assert_close(param.detach(), torch.ones(4) + 2 / 8**0.5)


def test_model_load_state_dict_after_construction_is_what_the_next_step_starts_from():
    model, optimizer = build()
    run(model, optimizer, 0, 2)
    other = oracles.noisy_mlp(seed=9)
    model.load_state_dict(other.state_dict())
    before = oracles.weights_of(model)
    assert oracles.same_bits(before, oracles.weights_of(other))
    oracles.losses_of(model)(*oracles.batch()).mean().backward()
    optimizer.first_step()
    optimizer.restore()
    assert oracles.same_bits(before, oracles.weights_of(model))


def test_model_load_state_dict_with_assign_is_followed():
    """assign=True puts other memory under the parameters, or other parameters into the model."""
    model, optimizer = build()
    other = oracles.noisy_mlp(seed=9)
    for param, loaded in zip(model.parameters(), other.parameters()):
        param.data = loaded.data.clone()
    run(model, optimizer, 0, 2)
    assert not oracles.same_bits(oracles.weights_of(model), oracles.weights_of(other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_model_to_another_dtype_after_construction_is_followed(dtype):
    model = oracles.mlp()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=1.0)
    model.to(dtype)
    fresh = oracles.mlp().to(dtype)
    fresh_optimizer = ESAM(fresh.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=1.0)
    for step in range(3):
        for each, its in ((model, optimizer), (fresh, fresh_optimizer)):
            its.step(oracles.losses_of(each), *oracles.batch(dtype=dtype, seed=step))
    assert all(p.dtype == dtype for p in model.parameters())
    assert oracles.same_bits(oracles.weights_of(model), oracles.weights_of(fresh))
