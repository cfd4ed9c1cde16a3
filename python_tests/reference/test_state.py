"""Contract point 10: save, load, go on, with the same bits as never having stopped."""

import copy
import functools
import io

import numpy as np
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


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("mask", ["tensor", "element"])
@pytest.mark.parametrize("fuse", [False, True])
def test_resume_is_bitwise(base, mask, fuse, request):
    if fuse:
        request.getfixturevalue("fused")
    model, optimizer = build(base, mask, seed=5, beta=0.4, gamma=0.3)
    run(model, optimizer, 0, 5)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    run(model, optimizer, 5, 12)

    resumed, resumed_optimizer = build(base, mask)
    run(resumed, resumed_optimizer, 0, 2)
    resumed.load_state_dict(saved["model"])
    resumed_optimizer.load_state_dict(saved["optimizer"])
    assert (resumed_optimizer.beta, resumed_optimizer.gamma) == (0.4, 0.3)
    run(resumed, resumed_optimizer, 5, 12)
    assert oracles.same_bits(everything(model, optimizer), everything(resumed, resumed_optimizer))
    assert resumed_optimizer.state_dict()["esam"] == optimizer.state_dict()["esam"]


def test_state_holds_seed_step_and_hyperparameters_and_no_backups():
    model, optimizer = build(seed=3)
    run(model, optimizer, 0, 2)
    state = optimizer.state_dict()
    assert state["esam"] == {
        "version": 3,
        "ascent": "current",
        "ascent_share": 1.0,
        "ranking": "rise",
        "seed": 3,
        "step": 2,
        "beta": 0.6,
        "gamma": 0.5,
        "mask": "tensor",
        "radius": "paper",
        "eta": 0.0,
        "eps": 1e-12,
    }
    assert {key for entries in state["state"].values() for key in entries} == {"momentum_buffer"}
    assert state["param_groups"][0]["rho"] == 0.5


def test_the_next_draw_after_loading_is_that_of_the_saved_step():
    model, optimizer = build()
    run(model, optimizer, 0, 3)
    state = optimizer.state_dict()
    resumed, resumed_optimizer = build(seed=8)
    resumed_optimizer.load_state_dict(state)
    oracles.losses_of(resumed)(*oracles.batch()).mean().backward()
    before = oracles.weights_of(resumed)
    resumed_optimizer.first_step()
    moved = [i for i, (a, b) in enumerate(zip(before, resumed.parameters())) if not torch.equal(a, b)]
    assert moved == oracles.drawn_tensors(0, 3, 0.6, 6)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("fuse", [False, True])
def test_a_checkpoint_of_the_plain_torch_optimizer_is_taken_over(base, fuse, request):
    if fuse:
        request.getfixturevalue("fused")
    kind, options = BASES[base]
    model = oracles.mlp()
    plain = kind(model.parameters(), **options)
    for step in range(4):
        plain.zero_grad()
        oracles.losses_of(model)(*oracles.batch(seed=step)).mean().backward()
        plain.step()
    other = oracles.mlp(seed=9)
    optimizer = ESAM(other.parameters(), kind, rho=0.125, gamma=1.0, **{**options, "lr": 77.0})
    other.load_state_dict(model.state_dict())
    optimizer.load_state_dict(through_a_file(plain.state_dict()))
    assert optimizer.param_groups[0]["lr"] == options["lr"]
    assert optimizer.param_groups[0]["rho"] == 0.125
    optimizer.param_groups[0]["rho"] = 0.0
    plain.zero_grad()
    oracles.losses_of(model)(*oracles.batch(seed=5)).mean().backward()
    plain.step()
    optimizer.step(oracles.losses_of(other), *oracles.batch(seed=5))
    assert oracles.same_bits(oracles.weights_of(model), oracles.weights_of(other))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("fuse", [False, True])
def test_the_plain_torch_optimizer_takes_over_a_checkpoint(base, fuse, request):
    if fuse:
        request.getfixturevalue("fused")
    kind, options = BASES[base]
    model = oracles.mlp()
    optimizer = ESAM(model.parameters(), kind, gamma=1.0, **options)
    for step in range(4):
        optimizer.step(oracles.losses_of(model), *oracles.batch(seed=step))
    other = oracles.mlp(seed=9)
    plain = kind(other.parameters(), **options)
    other.load_state_dict(model.state_dict())
    plain.load_state_dict(through_a_file(optimizer.state_dict()))
    optimizer.param_groups[0]["rho"] = 0.0
    optimizer.step(oracles.losses_of(model), *oracles.batch(seed=5))
    oracles.losses_of(other)(*oracles.batch(seed=5)).mean().backward()
    plain.step()
    assert oracles.same_bits(oracles.weights_of(model), oracles.weights_of(other))


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}])
def test_the_state_has_the_entries_that_torchs_own_has(options):
    models = [oracles.mlp(), oracles.mlp()]
    for model in models:
        model[0].weight.requires_grad_(False)
    optimizer = SAM(models[0].parameters(), torch.optim.SGD, lr=0.1, **options)
    plain = torch.optim.SGD(models[1].parameters(), lr=0.1, **options)
    optimizer.step(oracles.losses_of(models[0]), *oracles.batch())
    oracles.losses_of(models[1])(*oracles.batch()).mean().backward()
    plain.step()
    left, right = optimizer.state_dict()["state"], plain.state_dict()["state"]
    assert {n: list(entries) for n, entries in left.items()} == {n: list(entries) for n, entries in right.items()}


def test_state_and_copies_are_refused_while_the_weights_are_perturbed():
    model, optimizer = build()
    oracles.losses_of(model)(*oracles.batch()).mean().backward()
    state = optimizer.state_dict()
    optimizer.first_step()
    for call in (optimizer.state_dict, lambda: optimizer.load_state_dict(state), lambda: copy.deepcopy(optimizer)):
        with pytest.raises(RuntimeError, match=r"perturbed: second_step\(\) or restore\(\)"):
            call()
    optimizer.restore()
    optimizer.load_state_dict(optimizer.state_dict())


def test_a_parameter_group_added_later_is_perturbed_with_its_own_rho():
    model = oracles.mlp()
    params = list(model.parameters())
    optimizer = SAM(params[:4], torch.optim.SGD, lr=0.1, rho=0.5)
    optimizer.step(oracles.losses_of(model), *oracles.batch())
    optimizer.add_param_group({"params": params[4:], "lr": 0.01, "rho": 0.25})
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert [group["rho"] for group in optimizer.param_groups] == [0.5, 0.25, 0.5]
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups
    before = oracles.weights_of(model)
    optimizer.zero_grad()
    oracles.losses_of(model)(*oracles.batch()).mean().backward()
    norm = torch.cat([p.grad.flatten() for p in params]).norm()
    wanted = [w + rho * p.grad / norm for w, p, rho in zip(before, params, [0.5] * 4 + [0.25] * 2)]
    optimizer.first_step()
    for param, want in zip(params, wanted):
        torch.testing.assert_close(param.detach(), want, rtol=1e-5, atol=1e-6)
    optimizer.restore()
    assert oracles.same_bits(before, params)


def test_a_rho_that_numpy_made_is_saved_as_a_number_that_torch_loads():
    """A search over numpy.linspace, or a schedule of one's own."""
    params = list(oracles.mlp().parameters())
    groups = [{"params": params[:2], "rho": np.float32(0.25)}, {"params": params[2:]}]
    optimizer = ESAM(groups, torch.optim.SGD, lr=0.1, rho=np.float64(0.5))
    state = through_a_file(optimizer.state_dict())
    assert [group["rho"] for group in state["param_groups"]] == [0.25, 0.5]
    optimizer.param_groups[1]["rho"] = np.float64(0.75)
    state = through_a_file(optimizer.state_dict())
    assert [group["rho"] for group in state["param_groups"]] == [0.25, 0.75]


def test_group_rho_travels_with_the_state():
    models = [oracles.mlp(), oracles.mlp()]
    groups = [[{"params": list(m.parameters())[:2]}, {"params": list(m.parameters())[2:]}] for m in models]
    first, second = (ESAM(g, torch.optim.SGD, lr=0.1) for g in groups)
    first.param_groups[1]["rho"] = 0.75
    first.param_groups[1]["adaptive"] = True
    second.load_state_dict(first.state_dict())
    assert [(g["rho"], g["adaptive"]) for g in second.param_groups] == [(0.05, False), (0.75, True)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.0}, "beta must lie in"),
        ({"gamma": 1.5}, "gamma must lie in"),
        ({"mask": "column"}, "mask must be one of"),
        ({"radius": "long"}, "radius must be one of"),
        ({"seed": -1}, "seed must be an integer"),
        ({"step": 1.5}, "step must be an integer"),
        ({"eps": float("nan")}, "eps must be finite"),
        ({"warp": 9}, "unknown ESAM entries.*warp"),
    ],
)
def test_a_state_that_cannot_be_is_refused_and_changes_nothing(change, message):
    model, optimizer = build()
    run(model, optimizer, 0, 2)
    before = copy.deepcopy(optimizer.state_dict())
    bad = copy.deepcopy(before)
    bad["param_groups"][0]["lr"] = 55.0
    bad["esam"].update(change)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(bad)
    after = optimizer.state_dict()
    assert after["esam"] == before["esam"]
    assert after["param_groups"] == before["param_groups"]


def test_a_state_of_other_groups_or_with_a_bad_rho_is_refused_and_changes_nothing():
    _, optimizer = build()
    state = copy.deepcopy(optimizer.state_dict())
    state["esam"]["beta"] = 0.25
    state["param_groups"][0]["rho"] = -1.0
    with pytest.raises(ValueError, match="rho must be finite and not negative"):
        optimizer.load_state_dict(state)
    state["param_groups"].append(dict(state["param_groups"][0], rho=0.1))
    state["param_groups"][0]["rho"] = 0.1
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(state)
    assert optimizer.beta == 0.6
    assert optimizer.param_groups[0]["rho"] == 0.5


@pytest.mark.parametrize(
    ("own", "other"), [("SGD", "AdamW"), ("AdamW", "SGD"), ("SGD", "NAdam"), ("RMSprop", "SGD"), ("Adagrad", "Rprop")]
)
def test_a_state_of_another_kind_of_base_optimizer_is_refused_and_changes_nothing(own, other):
    states = []
    for name in (other, own):
        model = oracles.mlp()
        optimizer = ESAM(model.parameters(), getattr(torch.optim, name), lr=0.01, rho=0.5)
        run(model, optimizer, 0, 2)
        states.append(copy.deepcopy(optimizer.state_dict()))
    call = functools.partial(optimizer.load_state_dict, states[0])
    oracles.assert_refused(call, ValueError, f"the state is not that of {own}, the base optimizer", model, optimizer)
    optimizer.load_state_dict(states[1])


def test_what_is_no_state_of_an_optimizer_is_refused_and_changes_nothing():
    model, optimizer = build()
    run(model, optimizer, 0, 2)
    for state in (model.state_dict(), {}, {"state": {}}):
        call = functools.partial(optimizer.load_state_dict, state)
        oracles.assert_refused(call, ValueError, "state_dict must be what state_dict", model, optimizer)


def test_last_gradients_of_another_shape_are_not_taken_over():
    model = oracles.mlp()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, gamma=1.0, ascent="previous")
    run(model, optimizer, 0, 2)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][1]["previous_gradient"] = torch.ones(1)
    state["state"][2]["previous_gradient"] = torch.ones(9, 9)
    optimizer.load_state_dict(state)
    assert [i for i, entries in optimizer.state_dict()["state"].items() if "previous_gradient" in entries] == [
        i for i in range(6) if i not in (1, 2)
    ]
