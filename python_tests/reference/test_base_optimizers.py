"""Contract point 11: beta = gamma = 1 is SAM, rho = 0 is the base optimizer; and any base optimizer works."""

import functools
import types

import oracles
import pytest
import torch
from torch import nn

from esam_kernels import ESAM, SAM

STEPS = 20
BASES = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}),
    "SGD without momentum": (torch.optim.SGD, {"lr": 0.1}),
    "SGD with dampening": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "maximize": True}),
    "Adam": (torch.optim.Adam, {"lr": 1e-2, "weight_decay": 1e-2}),
    "Adam with amsgrad": (torch.optim.Adam, {"lr": 1e-2, "amsgrad": True}),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 1e-2, "momentum": 0.9, "centered": True}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 1e-2}),
    "NAdam": (torch.optim.NAdam, {"lr": 1e-2}),
    "RAdam": (torch.optim.RAdam, {"lr": 1e-2}),
    "Adamax": (torch.optim.Adamax, {"lr": 1e-2}),
    "ASGD": (torch.optim.ASGD, {"lr": 1e-2}),
    "Rprop": (torch.optim.Rprop, {"lr": 1e-2}),
}


def groups(model):
    params = list(model.parameters())
    return [{"params": params[:3]}, {"params": params[3:], "lr": 0.003}]


def make(model, name, given_as, **kwargs):
    base, options = BASES[name]
    if given_as == "class":
        return ESAM(groups(model), base, **options, **kwargs)
    return ESAM(model.parameters(), base(groups(model), **options), **kwargs)


def trained_plainly(name):
    model = oracles.mlp()
    base, options = BASES[name]
    optimizer = base(groups(model), **options)
    for step in range(STEPS):
        optimizer.zero_grad()
        oracles.losses_of(model)(*oracles.batch(seed=step)).mean().backward()
        optimizer.step()
    return model, optimizer


def same_state(left, right):
    assert left["param_groups"] == right["param_groups"]
    assert left["state"].keys() == right["state"].keys()
    for number, entries in left["state"].items():
        assert entries.keys() == right["state"][number].keys()
        for name, value in entries.items():
            other = right["state"][number][name]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


@pytest.mark.parametrize("given_as", ["class", "instance"])
@pytest.mark.parametrize("name", BASES)
def test_rho_zero_is_the_base_optimizer_bit_for_bit(name, given_as):
    plain, plain_optimizer = trained_plainly(name)
    model = oracles.mlp()
    optimizer = make(model, name, given_as, rho=0.0, gamma=1.0)
    for step in range(STEPS):
        optimizer.step(oracles.losses_of(model), *oracles.batch(seed=step))
    assert oracles.same_bits(oracles.weights_of(plain), oracles.weights_of(model))
    state, expected = optimizer.base_optimizer.state_dict(), plain_optimizer.state_dict()
    for group in state["param_groups"]:
        assert group.pop("rho") == 0.0
        assert group.pop("adaptive") is False
        group.pop("esam", None)
    same_state(state, expected)


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("name", ["SGD", "SGD without momentum", "SGD with dampening", "Adam", "AdamW"])
def test_restore_in_one_pass_with_the_update_is_the_base_optimizer_bit_for_bit(name):
    """With e so small that w + e = w: the gradients are those at w, the route is that of a perturbed step."""
    plain, plain_optimizer = trained_plainly(name)
    model = oracles.mlp()
    optimizer = make(model, name, "class", rho=1e-30, beta=1.0, gamma=1.0)
    for step in range(STEPS):
        optimizer.step(oracles.losses_of(model), *oracles.batch(seed=step))
    assert oracles.same_bits(oracles.weights_of(plain), oracles.weights_of(model))
    same_state(
        {**optimizer.base_optimizer.state_dict(), "param_groups": 0},
        {**plain_optimizer.state_dict(), "param_groups": 0},
    )


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_restore_in_one_pass_with_the_update_is_restore_and_then_update(name, request):
    models = []
    for fused in (False, True):
        if fused:
            request.getfixturevalue("fused")
        model = oracles.mlp()
        optimizer = make(model, name, "class", rho=0.5, beta=0.5)
        for step in range(STEPS):
            optimizer.step(oracles.losses_of(model), *oracles.batch(seed=step))
        models.append(oracles.weights_of(model))
    assert oracles.same_bits(*models)


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize(("name", "allocates"), [("SGD with dampening", "empty_like"), ("AdamW", "zeros_like")])
def test_an_update_that_runs_out_of_memory_leaves_no_half_made_state(name, allocates, monkeypatch):
    weights = []
    for fails in (True, False):
        model = oracles.mlp()
        optimizer = make(model, name, "class", rho=0.5, beta=1.0, gamma=1.0)
        losses = oracles.losses_of(model)
        for fails_now in (True, False) if fails else (False,):
            optimizer.backward(losses(*oracles.batch()).mean())
            optimizer.first_step(zero_grad=True)
            losses(*oracles.batch()).mean().backward()
            if fails_now:
                with monkeypatch.context() as patch:
                    patch.setattr(torch, allocates, FailsTheSecondTime(getattr(torch, allocates)))
                    with pytest.raises(torch.OutOfMemoryError):
                        optimizer.second_step()
                optimizer.restore()
                optimizer.zero_grad()
            else:
                optimizer.second_step(zero_grad=True)
        optimizer.step(losses, *oracles.batch(seed=1))
        weights.append(oracles.weights_of(model))
    assert oracles.same_bits(*weights)


class FailsTheSecondTime:
    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == 2:
            raise torch.OutOfMemoryError("out of memory")
        return self.function(*args, **kwargs)


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_a_weight_without_a_gradient_in_the_second_pass_comes_back(base):
    params = [nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(3))]
    optimizer = SAM(params, base, lr=0.1, rho=1.0)
    before = [p.detach().clone() for p in params]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.first_step(zero_grad=True)
    params[0].grad = torch.randn(4)
    optimizer.second_step()
    assert oracles.same_bits([before[1]], [params[1]])
    assert not oracles.same_bits([before[0]], [params[0]])


class SAMOracle:
    """Algorithm 1 of Foret et al. in float64."""

    def __init__(self, model, update, rho, adaptive=False):
        self.weights = [w.double() for w in oracles.weights_of(model)]
        self.update, self.rho, self.adaptive = update, rho, adaptive

    def gradients(self, weights, data):
        weights = [w.clone().requires_grad_() for w in weights]
        loss = oracles.mlp_losses(weights, *data).mean()
        return list(torch.autograd.grad(loss, weights))

    def step(self, data):
        n = len(self.weights)
        e = oracles.perturbation(
            self.weights,
            self.gradients(self.weights, data),
            rho=[self.rho] * n,
            beta=1.0,
            mask=[torch.ones_like(w) for w in self.weights],
            seen=[True] * n,
            adaptive=[self.adaptive] * n,
        )
        perturbed = [w + d for w, d in zip(self.weights, e)]
        self.weights = self.update(self.weights, self.gradients(perturbed, data))


ORACLES = {
    "SGD": (oracles.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}),
    "AdamW": (oracles.AdamW, torch.optim.AdamW, {"lr": 3e-3, "weight_decay": 0.05}),
}


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("name", ORACLES)
def test_twenty_steps_of_sam_follow_the_float64_oracle(name, fuse, adaptive, request):
    if fuse:
        request.getfixturevalue("fused")
    oracle_update, base, options = ORACLES[name]
    rho = 0.5 if adaptive else 0.1
    model = oracles.mlp()
    oracle = SAMOracle(model, oracle_update(**options).update, rho, adaptive)
    optimizer = SAM(model.parameters(), base, rho=rho, adaptive=adaptive, **options)
    for step in range(STEPS):
        data = oracles.batch(32, seed=step)
        optimizer.step(oracles.losses_of(model), *data)
        oracle.step((data[0].double(), data[1]))
    for weight, expected in zip(model.parameters(), oracle.weights):
        torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-4, atol=1e-6)


def test_the_oracle_tells_sam_from_the_base_optimizer():
    """What the tolerance above is worth: without e the weights end far outside it."""
    _, base, options = ORACLES["SGD"]
    model = oracles.mlp()
    oracle = SAMOracle(model, oracles.SGD(**options).update, 0.1)
    optimizer = SAM(model.parameters(), base, rho=0.0, **options)
    for step in range(STEPS):
        data = oracles.batch(32, seed=step)
        optimizer.step(oracles.losses_of(model), *data)
        oracle.step((data[0].double(), data[1]))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(model[0].weight.double(), oracle.weights[0], rtol=1e-3, atol=1e-4)


def test_an_instance_that_is_wrapped_again_takes_the_new_radius_and_keeps_the_users():
    model = oracles.mlp()
    first, *others = model.parameters()
    base = torch.optim.SGD([{"params": [first], "rho": 0.5}, {"params": others[:1]}, {"params": others[1:]}], lr=0.1)
    ESAM(model.parameters(), base, rho=0.1)
    base.param_groups[1]["rho"] = 0.3
    again = ESAM(model.parameters(), base, rho=0.2, adaptive=True)
    assert [group["rho"] for group in again.param_groups] == [0.5, 0.3, 0.2]
    assert [group["adaptive"] for group in again.param_groups] == [True] * 3


def test_a_refused_constructor_leaves_the_radius_of_the_wrapper_before():
    model = oracles.mlp()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    ESAM(model.parameters(), base, rho=0.1)
    with pytest.raises(ValueError, match="beta"):
        ESAM(model.parameters(), base, rho=0.2, beta=2.0)
    with pytest.raises(RuntimeError, match="backend"):
        ESAM(model.parameters(), base, rho=0.2, backend="cuda")
    assert base.param_groups[0]["rho"] == 0.1


@pytest.mark.parametrize("refused", [torch.optim.LBFGS, torch.optim.Adadelta])
@pytest.mark.parametrize("as_instance", [False, True])
def test_a_base_optimizer_that_cannot_be_wrapped_is_refused_with_a_reason(refused, as_instance):
    model = oracles.mlp()
    base = refused(model.parameters()) if as_instance else refused
    reason = "evaluates the loss several times" if refused is torch.optim.LBFGS else "rho"
    with pytest.raises(TypeError, match=f"{refused.__name__}.*{reason}"):
        ESAM(model.parameters(), base)


def test_the_base_optimizers_groups_and_state_are_the_optimizers_own():
    model = oracles.mlp()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = ESAM(model.parameters(), base)
    assert optimizer.base_optimizer is base
    assert optimizer.param_groups is base.param_groups
    optimizer.step(oracles.losses_of(model), *oracles.batch())
    assert optimizer.state is base.state
    assert len(base.state) == 6


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_step_that_the_user_puts_in_place_of_the_base_optimizers_is_the_one_that_is_taken(name, scheduled):
    model = oracles.mlp()
    optimizer = make(model, name, "class", rho=0.5)
    base, calls = optimizer.base_optimizer, []

    def step(self, closure=None):
        calls.append(self)
        return type(self).step(self, closure)

    base.step = types.MethodType(step, base)
    if scheduled:
        torch.optim.lr_scheduler.ExponentialLR(base, 0.9)
    for number in range(3):
        optimizer.step(oracles.losses_of(model), *oracles.batch(seed=number))
    assert calls == [base] * 3


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_step_that_the_user_puts_in_place_of_the_class_is_the_one_that_is_taken(name, when, monkeypatch):
    kind, calls = getattr(torch.optim, name), []
    own = kind.step

    @functools.wraps(own)
    def step(self, closure=None):
        calls.append(self)
        return own(self, closure)

    if when == "before":
        monkeypatch.setattr(kind, "step", step)
    model = oracles.mlp()
    optimizer = make(model, name, "class", rho=0.5)
    if when == "after":
        monkeypatch.setattr(kind, "step", step)
    for number in range(3):
        optimizer.step(oracles.losses_of(model), *oracles.batch(seed=number))
    assert calls == [optimizer.base_optimizer] * 3


@pytest.mark.usefixtures("fused")
def test_the_step_that_a_scheduler_wraps_is_still_fused():
    optimizer = make(oracles.mlp(), "SGD", "class")
    torch.optim.lr_scheduler.ExponentialLR(optimizer.base_optimizer, 0.9)
    assert optimizer._perturbation.why_not_fused() is None


def test_the_base_optimizers_step_hooks_are_called():
    model = oracles.mlp()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    calls = []
    base.register_step_post_hook(lambda *_: calls.append("base"))
    optimizer = ESAM(model.parameters(), base)
    optimizer.register_step_post_hook(lambda *_: calls.append("whole"))
    optimizer.step(oracles.losses_of(model), *oracles.batch())
    assert calls == ["base", "whole"]


@pytest.mark.parametrize("as_instance", [False, True])
def test_options_that_cannot_be_honoured_are_refused(as_instance):
    model = oracles.mlp()
    for base, options, error, message in (
        (torch.optim.SparseAdam, {}, TypeError, "SparseAdam.*sparse gradients"),
        (torch.optim.SGD, {"differentiable": True}, ValueError, "differentiable=True is not supported"),
        (torch.optim.AdamW, {"differentiable": True}, ValueError, "differentiable=True is not supported"),
    ):
        given = (base(model.parameters(), **options), {}) if as_instance else (base, options)
        call = functools.partial(ESAM, model.parameters(), given[0], **given[1])
        oracles.assert_refused(call, error, message, model)


def test_a_differentiable_group_that_is_added_later_is_refused_and_nothing_is_changed():
    model = oracles.mlp()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1)
    group = {"params": [nn.Parameter(torch.ones(2))], "differentiable": True}
    oracles.assert_refused(
        lambda: optimizer.add_param_group(group), ValueError, "differentiable=True", model, optimizer
    )
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"lr": torch.tensor(0.1)}])
def test_options_that_choose_another_implementation_change_no_step(options):
    weights = []
    for chosen in ({}, options):
        model = oracles.mlp()
        optimizer = ESAM(model.parameters(), torch.optim.SGD, **{"lr": 0.1, **chosen}, rho=0.3)
        for step in range(3):
            optimizer.step(oracles.losses_of(model), *oracles.batch(seed=step))
        weights.append(oracles.weights_of(model))
    for one, other in zip(*weights):
        torch.testing.assert_close(one, other)
