"""Contract point 12: what is in param_groups at the time of a step is perturbed and updated, or refused as a whole."""

import copy

import oracles
import pytest
import torch
from torch import nn

from esam_kernels import ESAM, SAM

RHO = 0.5


def loss_of(model):
    return oracles.losses_of(model)(*oracles.batch()).mean()


def closure_of(model, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    return closure


def by_closure(model, optimizer):
    optimizer.step(closure_of(model, optimizer))


def by_phases(model, optimizer):
    loss_of(model).backward()
    optimizer.first_step(zero_grad=True)
    loss_of(model).backward()
    optimizer.second_step(zero_grad=True)


def by_batch(model, optimizer):
    optimizer.step(oracles.losses_of(model), *oracles.batch())


WAYS = {"closure": by_closure, "phases": by_phases, "batch": by_batch}
ways = pytest.mark.parametrize("way", WAYS)


def step_by_hand(model, params, lr=0.1):
    """SAM with plain SGD over ``params``."""
    grads = torch.autograd.grad(loss_of(model), params)
    norm = torch.stack([g.norm() for g in grads]).norm()
    old = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, g in zip(params, grads):
            p.add_(RHO * g / norm)
    grads = torch.autograd.grad(loss_of(model), params)
    with torch.no_grad():
        for p, before, g in zip(params, old, grads):
            p.copy_(before - lr * g)


def assert_close(model, expected):
    for param, other in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(param.detach(), other.detach(), rtol=0, atol=1e-6)


def replace(model, optimizer):
    """As densification does: a new Parameter in the place of another, in the model and in the group."""
    new = nn.Parameter(model[0].weight.detach() * 0.9)
    model[0].weight = new
    if optimizer is not None:
        optimizer.param_groups[0]["params"][0] = new
    return list(model.parameters())


def replace_list(model, optimizer):
    """As Accelerate does for FSDP2: a new list in the group."""
    params = replace(model, None)
    if optimizer is not None:
        optimizer.param_groups[0]["params"] = params
    return params


def replace_by_tuple(model, optimizer):
    params = replace(model, None)
    if optimizer is not None:
        optimizer.param_groups[0]["params"] = tuple(params)
    return params


def take_out(model, optimizer):
    if optimizer is not None:
        del optimizer.param_groups[0]["params"][:2]
    return list(model.parameters())[2:]


def prune(model, optimizer):
    """The same Parameters with other memory and shapes."""
    model[0].weight.data = model[0].weight.data[:4].clone()
    model[0].bias.data = model[0].bias.data[:4].clone()
    model[2].weight.data = model[2].weight.data[:, :4].clone()
    return list(model.parameters())


def move_to_a_group(model, optimizer):
    """One group becomes two, behind the wrapper's back."""
    if optimizer is not None:
        moved = optimizer.param_groups[0]["params"][3:]
        del optimizer.param_groups[0]["params"][3:]
        optimizer.base_optimizer.add_param_group({"params": moved})
    return list(model.parameters())


def add_to_the_group(model, optimizer):
    extra = nn.Linear(oracles.CLASSES, oracles.CLASSES)
    with torch.no_grad():
        extra.weight.fill_(0.3)
        extra.bias.fill_(0.1)
    model.append(extra)
    if optimizer is not None:
        optimizer.param_groups[0]["params"] += list(extra.parameters())
    return list(model.parameters())


CHANGES = [replace, replace_list, replace_by_tuple, take_out, prune, move_to_a_group, add_to_the_group]


@ways
@pytest.mark.parametrize("flatten", [None, False])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_groups_counts_in_the_next_step(change, flatten, way):
    model, expected = oracles.mlp(), oracles.mlp()
    optimizer = ESAM(
        model.parameters(), torch.optim.SGD, lr=0.1, rho=RHO, beta=1.0, gamma=1.0, model=model, flatten=flatten
    )
    WAYS[way](model, optimizer)
    step_by_hand(expected, list(expected.parameters()))
    optimizer.zero_grad()
    change(model, optimizer)
    params = change(expected, None)
    for _ in range(2):
        WAYS[way](model, optimizer)
        step_by_hand(expected, params)
    assert_close(model, expected)


def test_a_popped_group_is_neither_perturbed_nor_updated_nor_zeroed():
    model = oracles.mlp()
    groups = [{"params": model[0].parameters()}, {"params": [*model[2].parameters(), *model[4].parameters()]}]
    optimizer = SAM(groups, torch.optim.SGD, lr=0.1, rho=RHO)
    by_closure(model, optimizer)
    optimizer.param_groups.pop(0)
    before = [p.detach().clone() for p in model[0].parameters()]
    grad = model[0].weight.grad.clone()
    seen = []
    handle = model[0].register_forward_pre_hook(lambda module, _: seen.append(module.weight.detach().clone()))
    optimizer.zero_grad()
    assert torch.equal(model[0].weight.grad, grad)
    by_batch(model, optimizer)
    handle.remove()
    assert all(torch.equal(weight, before[0]) for weight in seen)
    assert oracles.same_bits(before, list(model[0].parameters()))


@pytest.mark.parametrize("ascent", ["previous", "momentum"])
def test_pruned_weights_start_a_new_history(ascent):
    model = oracles.mlp()
    optimizer = ESAM(
        model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=RHO, beta=1.0, gamma=1.0, ascent=ascent
    )
    by_batch(model, optimizer)
    prune(model, optimizer)
    optimizer.state.clear()
    by_batch(model, optimizer)
    assert [tuple(p.shape) for p in model[0].parameters()] == [(4, oracles.FEATURES), (4,)]


def test_pruned_weights_are_masked_as_those_of_a_new_optimizer():
    models = [oracles.mlp(), oracles.mlp()]
    for fresh, model in enumerate(models):
        optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=RHO, mask="element", beta=0.5)
        by_batch(model, optimizer)
        prune(model, optimizer)
        if fresh:
            other = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=RHO, mask="element", beta=0.5)
            other.load_state_dict({**other.state_dict(), "esam": {**other.state_dict()["esam"], "step": 1}})
            optimizer = other
        by_batch(model, optimizer)
    assert oracles.same_bits(*map(oracles.weights_of, models))


BAD = {
    "complex": (lambda: nn.Parameter(torch.ones(2, dtype=torch.complex64)), "complex"),
    "meta": (lambda: nn.Parameter(torch.ones(2, device="meta")), "meta device"),
    "not dense": (lambda: nn.Parameter(torch.ones(4)[::2]), "not dense"),
}


@pytest.mark.parametrize("call", ["step", "first_step", "zero_grad", "state_dict", "backward", "load_state_dict"])
@pytest.mark.parametrize("kind", BAD)
def test_one_bad_parameter_among_new_ones_is_refused_and_nothing_changes(kind, call):
    model = oracles.mlp()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    by_batch(model, optimizer)
    saved = optimizer.state_dict()
    make, message = BAD[kind]
    good = nn.Parameter(torch.ones(3))
    place, known = good.data_ptr(), optimizer._perturbation.params
    optimizer.base_optimizer.add_param_group({"params": [good, make()]})
    keys = set(optimizer.param_groups[1])
    calls = {
        "step": lambda: by_batch(model, optimizer),
        "backward": lambda: optimizer.backward(loss_of(model)),
        "load_state_dict": lambda: optimizer.load_state_dict(saved),
    }
    weights = oracles.weights_of(model)
    with pytest.raises(ValueError, match=message):
        calls.get(call, getattr(optimizer, call))()
    assert oracles.same_bits(weights, oracles.weights_of(model))
    assert good.data_ptr() == place
    assert set(optimizer.param_groups[1]) == keys
    assert optimizer._perturbation.params is known
    optimizer.param_groups.pop()
    by_batch(model, optimizer)
    assert not oracles.same_bits(weights, oracles.weights_of(model))


def test_no_parameters_and_the_same_one_twice_are_refused():
    model = oracles.mlp()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    held = optimizer.param_groups[0]["params"]
    optimizer.param_groups[0]["params"] = [*held, held[0]]
    with pytest.raises(ValueError, match="twice"):
        by_batch(model, optimizer)
    optimizer.param_groups[0]["params"] = []
    with pytest.raises(ValueError, match="hold no parameters"):
        by_batch(model, optimizer)
    optimizer.param_groups[0]["params"] = held
    by_batch(model, optimizer)


@pytest.mark.parametrize("end", ["second_step", "step"])
def test_parameters_that_change_between_the_phases_are_refused_and_the_weights_come_back(end):
    model = oracles.mlp()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=RHO)
    before, params = oracles.weights_of(model), list(model.parameters())
    loss_of(model).backward()
    optimizer.first_step(zero_grad=True)
    loss_of(model).backward()
    optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(2))
    with pytest.raises(RuntimeError, match="have changed since first_step"):
        getattr(optimizer, end)()
    optimizer.restore()
    assert oracles.same_bits(before, params)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
@pytest.mark.parametrize("end", ["second_step", "step", "restore"])
def test_a_model_that_is_converted_between_the_phases_is_refused_and_nothing_is_lost(end, base):
    model = nn.Sequential(nn.BatchNorm1d(oracles.batch()[0].shape[1]), oracles.mlp())
    optimizer = SAM(model.parameters(), base, lr=0.1, rho=RHO, model=model)
    before, params = oracles.weights_of(model), list(model.parameters())
    loss_of(model).backward()
    optimizer.first_step(zero_grad=True)
    statistics = model[0].running_mean.clone()
    loss_of(model).backward()
    model.to(torch.float64)
    with pytest.raises(RuntimeError, match=r"parameter 0 has .* was torch.float32 on cpu, .* is torch.float64 on cpu,"):
        getattr(optimizer, end)()
    model.to(torch.float32)
    loss_of(model)
    optimizer.restore()
    assert oracles.same_bits(before, params)
    assert torch.equal(model[0].running_mean, statistics)
    by_batch(model, optimizer)


# -- rho and adaptive --------------------------------------------------------------------------------------------------


def with_radii():
    model = oracles.mlp()
    first, rest = list(model[0].parameters()), [*model[2].parameters(), *model[4].parameters()]
    groups = [{"params": first, "rho": 0.0}, {"params": rest, "rho": 0.7, "adaptive": True}]
    return model, SAM(groups, torch.optim.SGD, lr=0.1), [{"params": first}, {"params": rest}]


def radii_of(optimizer):
    return [(group["rho"], group["adaptive"], group["lr"]) for group in optimizer.param_groups]


@pytest.mark.parametrize("through", ["base", "wrapper", "base of a copy"])
def test_radii_survive_the_state_of_a_plain_optimizer(through):
    """Which has none."""
    model, optimizer, groups = with_radii()
    state = torch.optim.SGD(groups, lr=0.2).state_dict()
    if through == "base of a copy":
        model, optimizer = copy.deepcopy((model, optimizer))
    (optimizer if through == "wrapper" else optimizer.base_optimizer).load_state_dict(state)
    assert radii_of(optimizer) == [(0.0, False, 0.2), (0.7, True, 0.2)]
    assert "rho" not in state["param_groups"][0]
    by_batch(model, optimizer)


def test_radii_of_a_loaded_state_are_taken_over_and_may_be_set_afterwards():
    model, optimizer, _ = with_radii()
    state = optimizer.base_optimizer.state_dict()
    state["param_groups"][0]["rho"] = 0.25
    optimizer.base_optimizer.load_state_dict(state)
    assert radii_of(optimizer) == [(0.25, False, 0.1), (0.7, True, 0.1)]
    optimizer.param_groups[1]["rho"] = 0.0
    weights = model[2].weight.detach().clone()
    loss_of(model).backward()
    optimizer.first_step()
    assert torch.equal(model[2].weight, weights)
    optimizer.restore()


def test_a_group_added_to_the_base_gets_the_radius_of_the_constructor_or_its_own():
    model, optimizer, _ = with_radii()
    optimizer.defaults["rho"] = 0.4
    for kwargs in ({}, {"rho": 0.0}, {"adaptive": True}):
        optimizer.base_optimizer.add_param_group({"params": nn.Linear(2, 2).parameters(), **kwargs})
    optimizer.zero_grad()
    assert [values[:2] for values in radii_of(optimizer)[2:]] == [(0.4, False), (0.0, False), (0.4, True)]
    optimizer.base_optimizer.add_param_group({"params": nn.Linear(2, 2).parameters(), "rho": -1.0})
    with pytest.raises(ValueError, match="rho must be"):
        by_batch(model, optimizer)
