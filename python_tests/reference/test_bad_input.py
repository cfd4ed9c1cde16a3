"""Contract point 15: bad input is refused at once, with what was wrong, and nothing is changed by it."""

import copy
import functools
import math
from dataclasses import fields

import oracles
import pytest
import torch
from torch import nn

from esam_kernels import ESAM, SAM
from esam_kernels.settings import Settings


def trained(**kwargs):
    model = oracles.noisy_mlp()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, model=model, **kwargs)
    optimizer.step(oracles.losses_of(model), *oracles.batch())
    return model, optimizer


# -- the constructor ---------------------------------------------------------------------------------------------------

SHARES = [0.0, -0.1, 1.0001, math.nan, math.inf, "0.5", None, True]


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        *[({"beta": value}, ValueError, rf"beta must lie in \(0, 1\], got {value!r}") for value in SHARES],
        *[({"gamma": value}, ValueError, rf"gamma must lie in \(0, 1\], got {value!r}") for value in SHARES],
        ({"rho": -0.05}, ValueError, r"rho must be finite and not negative, got -0.05"),
        ({"rho": math.nan}, ValueError, r"rho must be finite and not negative, got nan"),
        ({"rho": math.inf}, ValueError, r"rho must be finite"),
        ({"rho": "0.1"}, ValueError, r"rho must be finite and not negative, got '0.1'"),
        ({"adaptive": 1}, TypeError, r"adaptive must be True or False, got 1"),
        ({"eta": -1.0}, ValueError, r"eta must be finite and not negative, got -1.0"),
        ({"eps": math.nan}, ValueError, r"eps must be finite and not negative, got nan"),
        ({"eps": (None, 1e-3)}, ValueError, r"eps must be finite.* to set the base optimizer's eps, pass an instance"),
        ({"mask": "row"}, ValueError, r"mask must be one of \('tensor', 'element'\), got 'row'"),
        ({"radius": "half"}, ValueError, r"radius must be one of \('paper', 'released'\), got 'half'"),
        *[
            ({"ascent": value}, ValueError, r"ascent must be one of \('current', 'previous', 'momentum'\), got ")
            for value in (None, 1, ["current"], "sideways")
        ],
        ({"flatten": "yes"}, ValueError, r"flatten must be True, False or None, got 'yes'"),
        ({"flatten": 1}, ValueError, r"flatten must be True, False or None, got 1"),
        ({"seed": -1}, ValueError, r"seed must be an integer in \[0, 2\^63\), got -1"),
        ({"seed": 2**63}, ValueError, r"seed must be an integer"),
        ({"seed": 0.5}, ValueError, r"seed must be an integer"),
        ({"model": "model"}, TypeError, r"model must be a torch.nn.Module, got str"),
        ({"backend": "fast"}, ValueError, r"unknown backend 'fast': choose one of"),
        ({"backend": "cuda"}, RuntimeError, r"backend 'cuda' is not available for cpu tensors"),
        ({"momentun": 0.9}, TypeError, r"neither ESAM nor SGD has an argument momentun"),
        ({"lr": -1.0}, ValueError, r"[Ll]earning rate"),
    ],
)
@pytest.mark.parametrize("given_as", ["class", "instance"])
def test_the_constructor_refuses_arguments_outside_their_range(kwargs, error, message, given_as):
    model = oracles.noisy_mlp()
    if given_as == "class":
        oracles.assert_refused(
            lambda: ESAM(model.parameters(), torch.optim.SGD, **{"lr": 0.1, **kwargs}), error, message, model
        )
        return
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    groups = copy.deepcopy(base.state_dict()["param_groups"])
    if "lr" in kwargs:
        error, message = TypeError, r"the base optimizer is an instance already"
    params = [{"params": list(model.parameters()), "rho": 0.5}]
    oracles.assert_refused(lambda: ESAM(params, base, **kwargs), error, message, model)
    if "rho" not in kwargs:
        assert base.state_dict()["param_groups"] == groups


@pytest.mark.parametrize("given", [lambda model: model, lambda model: model.parameters], ids=["model", "method"])
def test_a_model_or_a_method_in_the_place_of_parameters_is_refused(given):
    model = oracles.mlp()
    message = r"params must be parameters, as model.parameters\(\) returns them, got (Sequential|method)"
    oracles.assert_refused(lambda: SAM(given(model), torch.optim.SGD, lr=0.1), TypeError, message, model)


def test_an_argument_that_a_decorator_of_the_constructor_takes_is_no_unknown_one():
    def renamed(constructor):
        @functools.wraps(constructor)
        def decorated(self, *args, learning_rate, **kwargs):
            constructor(self, *args, lr=learning_rate, **kwargs)

        return decorated

    class Renamed(torch.optim.SGD):
        @renamed
        def __init__(self, params, lr):
            super().__init__(params, lr=lr)

    optimizer = SAM(oracles.mlp().parameters(), Renamed, learning_rate=0.3)
    assert optimizer.param_groups[0]["lr"] == 0.3


def test_a_parameter_list_and_a_base_with_arguments_of_any_name_are_taken():
    class Named(torch.optim.SGD):
        def __init__(self, params, **kwargs):
            super().__init__(params, lr=kwargs.pop("rate"))

    weights = nn.ParameterList([nn.Parameter(torch.ones(2))])
    assert SAM(weights, Named, rate=0.5).param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("base", [None, nn.Linear, "SGD", ESAM, SAM, torch.optim.lr_scheduler.StepLR])
def test_a_base_that_is_no_torch_optimizer_is_refused(base):
    model = oracles.mlp()
    oracles.assert_refused(
        lambda: ESAM(model.parameters(), base), TypeError, "base_optimizer must be a torch optimizer", model
    )


def test_wrapping_twice_is_refused():
    model = oracles.mlp()
    inner = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    oracles.assert_refused(
        lambda: ESAM(model.parameters(), inner), TypeError, "base_optimizer must be a torch optimizer", model
    )


@pytest.mark.parametrize("over", ["others", "fewer", "more"])
def test_a_base_optimizer_over_other_parameters_is_refused(over):
    model = oracles.mlp()
    params = list(model.parameters())
    held = {
        "others": list(oracles.mlp().parameters()),
        "fewer": params[:3],
        "more": [*params, nn.Parameter(torch.ones(1))],
    }
    base = torch.optim.SGD(held[over], lr=0.1)
    oracles.assert_refused(
        lambda: ESAM(params, base), ValueError, "base_optimizer holds other parameters than params", model
    )


def test_rho_by_group_over_a_base_optimizer_of_other_groups_is_refused():
    model = oracles.mlp()
    params = list(model.parameters())
    base = torch.optim.SGD(params, lr=0.1)
    groups = [{"params": params[:2], "rho": 0.1}, {"params": params[2:]}]
    oracles.assert_refused(lambda: ESAM(groups, base), ValueError, "its groups are not those of base_optimizer", model)
    assert "rho" not in base.param_groups[0]


@pytest.mark.parametrize("kwargs", [{"beta": 0.5}, {"gamma": 0.5}, {"mask": "element"}, {"radius": "paper"}])
def test_sam_refuses_what_only_esam_has(kwargs):
    model = oracles.mlp()
    name = next(iter(kwargs))
    message = f"SAM has no {name}: use ESAM"
    oracles.assert_refused(
        lambda: SAM(model.parameters(), torch.optim.SGD, lr=0.1, **kwargs), TypeError, message, model
    )


def test_a_complex_parameter_is_refused():
    model = nn.ParameterList([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    message = r"parameter 1 is complex \(torch.complex64\)"
    oracles.assert_refused(lambda: SAM(model.parameters(), torch.optim.SGD, lr=0.1), ValueError, message, model)


def test_lazy_parameters_are_refused_until_the_model_has_run():
    model = nn.Sequential(nn.Linear(6, 4), nn.LazyLinear(3))
    with pytest.raises(ValueError, match="parameter 2 is lazy and has no shape yet: run the model on a batch first"):
        SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    model(torch.ones(2, 6))
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    optimizer.step(oracles.losses_of(model), *oracles.batch())
    assert model[1].weight.shape == (3, 4)


def test_parameters_on_the_meta_device_are_refused():
    params = list(nn.Linear(3, 3, device="meta").parameters())
    with pytest.raises(ValueError, match="parameter 0 is on the meta device, without values"):
        ESAM(params, torch.optim.SGD, lr=0.1)
    model, optimizer = trained()
    group = {"params": params}
    oracles.assert_refused(lambda: optimizer.add_param_group(group), ValueError, "meta device", model, optimizer)


def test_a_parameter_with_gaps_in_its_memory_is_refused():
    model = nn.ParameterList([nn.Parameter(torch.ones(4, 4)[:, ::2])])
    message = r"parameter 0 \(shape \(4, 2\)\) is not dense"
    oracles.assert_refused(lambda: SAM(model.parameters(), torch.optim.SGD, lr=0.1), ValueError, message, model)


def test_no_parameters_are_refused():
    with pytest.raises(ValueError, match="empty parameter list"):
        SAM([], torch.optim.SGD, lr=0.1)


# -- between the steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ESAM, SAM])
def test_setting_a_hyperparameter_that_is_no_attribute_is_refused(kind):
    """It would change nothing."""
    model = oracles.mlp()
    optimizer = kind(model.parameters(), torch.optim.SGD, lr=0.1)
    for name, value in {"rho": 0.5, "adaptive": True}.items():
        message = rf'each group has its own {name}: set optimizer.param_groups\[0\]\["{name}"\]'
        oracles.assert_refused(lambda: setattr(optimizer, name, value), AttributeError, message, model, optimizer)
    for name in {field.name for field in fields(Settings)} - {"beta", "gamma", "ascent_share"}:
        message = f"{name} is chosen when the optimizer is built, and cannot be set afterwards"
        oracles.assert_refused(lambda: setattr(optimizer, name, 1), AttributeError, message, model, optimizer)


@pytest.mark.parametrize("name", ["beta", "gamma"])
@pytest.mark.parametrize("value", SHARES)
def test_setting_a_share_outside_its_range_is_refused(name, value):
    model, optimizer = trained()
    oracles.assert_refused(lambda: setattr(optimizer, name, value), ValueError, f"{name} must lie in", model, optimizer)


@pytest.mark.parametrize("rho", [-1.0, math.nan, math.inf, None])
def test_a_bad_rho_in_a_group_is_refused_by_the_next_step(rho):
    model, optimizer = trained()
    optimizer.param_groups[0]["rho"] = rho
    before = oracles.snapshot(model)
    with pytest.raises(ValueError, match="rho must be finite and not negative"):
        optimizer.first_step(zero_grad=True)
    oracles.assert_unchanged(before, oracles.snapshot(model))
    optimizer.param_groups[0]["rho"] = 0.1
    optimizer.first_step()


def test_second_step_before_first_step_is_refused():
    model, optimizer = trained()
    oracles.assert_refused(
        lambda: optimizer.second_step(zero_grad=True), RuntimeError, "second_step without first_step", model, optimizer
    )


def test_first_step_twice_is_refused_and_the_weights_still_come_back():
    model, optimizer = trained()
    before = oracles.weights_of(model)
    optimizer.first_step()
    message = "first_step while the weights are perturbed"
    oracles.assert_refused(lambda: optimizer.first_step(zero_grad=True), RuntimeError, message, model, optimizer)
    optimizer.restore()
    assert oracles.same_bits(before, oracles.weights_of(model))


@pytest.mark.parametrize("call", ["step", "backward", "add_param_group", "state_dict"])
def test_other_calls_between_the_steps_are_refused(call):
    model, optimizer = trained()
    optimizer.first_step()
    losses = oracles.losses_of(model)
    loss = losses(*oracles.batch()).mean()
    calls = {
        "step": lambda: optimizer.step(losses, *oracles.batch()),
        "backward": lambda: optimizer.backward(loss),
        "add_param_group": lambda: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]}),
        "state_dict": optimizer.state_dict,
    }
    message = rf"{call} while the weights are perturbed: second_step\(\) or restore\(\)"
    oracles.assert_refused(calls[call], RuntimeError, message, model, optimizer)


@pytest.mark.parametrize("were_dropped", [False, True])
def test_first_step_without_gradients_is_refused(were_dropped):
    model = oracles.mlp()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1)
    if were_dropped:
        optimizer.backward(oracles.losses_of(model)(*oracles.batch()).mean())
        optimizer.zero_grad()
    oracles.assert_refused(
        optimizer.first_step, RuntimeError, "no parameter has a gradient: call backward", model, optimizer
    )


@pytest.mark.parametrize("mask", ["tensor", "element"])
def test_a_sparse_gradient_is_refused_whether_it_is_drawn_or_not(mask):
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    for seed in range(6):
        optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, mask=mask, beta=0.3, seed=seed)
        model.zero_grad()
        model(torch.tensor([1, 2])).sum().backward()
        before = oracles.weights_of(model)
        with pytest.raises(RuntimeError, match=r"parameter 0 has a sparse gradient \(torch.sparse_coo\)"):
            optimizer.first_step(zero_grad=True)
        assert oracles.same_bits(before, oracles.weights_of(model))
        assert model[0].weight.grad.is_sparse
        assert model[1].weight.grad is not None


def test_a_sparse_gradient_of_a_tensor_that_is_not_drawn_is_refused_before_any_update():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    for seed in range(6):
        optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, beta=0.3, seed=seed)
        before = oracles.weights_of(model)
        with pytest.raises(RuntimeError, match="parameter 0 has a sparse gradient"):
            optimizer.step(oracles.losses_of(model), torch.tensor([1, 2]), torch.tensor([0, 1]))
        assert oracles.same_bits(before, oracles.weights_of(model))


@pytest.mark.parametrize("loss", [torch.ones(3), 1.0, None, torch.ones(0)])
def test_backward_refuses_what_is_not_one_number(loss):
    model, optimizer = trained()
    oracles.assert_refused(
        lambda: optimizer.backward(loss), ValueError, "backward takes the mean loss, one number", model, optimizer
    )


def test_backward_with_everything_frozen_is_refused():
    model, optimizer = trained()
    model.requires_grad_(False)
    loss = torch.ones((), requires_grad=True)
    oracles.assert_refused(
        lambda: optimizer.backward(loss), RuntimeError, "no parameter requires a gradient", model, optimizer
    )


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        ({"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]}, ValueError, "is complex"),
        ({"params": [nn.Parameter(torch.ones(4, 4)[:, ::2])]}, ValueError, "not dense"),
        ({"params": [nn.Parameter(torch.ones(2))], "rho": -1.0}, ValueError, "rho must be finite"),
        ({"params": [nn.Parameter(torch.ones(2))], "adaptive": "yes"}, TypeError, "adaptive must be True or False"),
        ({"params": [torch.ones(2, requires_grad=True) * 2]}, ValueError, "non-leaf"),
    ],
)
def test_a_group_that_cannot_be_added_is_refused(group, error, message):
    model, optimizer = trained()
    oracles.assert_refused(lambda: optimizer.add_param_group(group), error, message, model, optimizer)
    optimizer.step(oracles.losses_of(model), *oracles.batch())


def test_numpy_numbers_are_numbers():
    numpy = pytest.importorskip("numpy")
    model = nn.Linear(3, 2)
    optimizer = ESAM(
        model.parameters(),
        torch.optim.SGD,
        lr=0.1,
        rho=numpy.float32(0.5),
        beta=numpy.float32(0.5),
        gamma=numpy.float64(0.25),
    )
    assert (optimizer.param_groups[0]["rho"], optimizer.beta, optimizer.gamma) == (0.5, 0.5, 0.25)
