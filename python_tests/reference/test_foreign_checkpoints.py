"""Checkpoints of other SAM optimizers: what they hold is dropped by name, with one warning; nothing is half loaded."""

import functools
import warnings

import oracles
import pytest
import torch

from esam_kernels import ESAM, SAM

BASES = {"SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), "AdamW": (torch.optim.AdamW, {"lr": 0.01})}


def build(base="AdamW", kind=SAM, model=None):
    model = model or oracles.mlp()
    cls, options = BASES[base]
    return model, kind(model.parameters(), cls, **options)


def foreign(base, entries, group=None, only=None):
    """A state of this kind over the parameters of ``oracles.mlp()``."""
    model = oracles.mlp()
    cls, options = BASES[base]
    plain = cls(model.parameters(), **options).state_dict()["param_groups"][0]
    state = {
        i: {name: torch.ones_like(param) for name in entries}
        for i, param in enumerate(model.parameters())
        if only is None or i in only
    }
    return {"state": state, "param_groups": [{**plain, "rho": 0.3, "adaptive": False, **(group or {})}]}


def trained(model, optimizer, steps=2):
    for step in range(steps):
        optimizer.step(oracles.losses_of(model), *oracles.batch(seed=step))
    return oracles.weights_of(model)


KINDS = {
    "the common two-step class": {"entries": ["old_p"]},
    "released ESAM": {"entries": ["e_w"], "group": {"beta": 0.5, "gamma": 0.5}},
    "surrogate gap": {"entries": ["old_p", "old_g"]},
    "a part of the parameters": {"entries": ["old_p"], "only": [0, 3]},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", BASES)
def test_training_goes_on_from_it_as_with_a_new_base_optimizer(base, kind):
    model, optimizer = build(base)
    with pytest.warns(UserWarning, match=f"state of {BASES[base][0].__name__}.*starts anew") as caught:
        optimizer.load_state_dict(foreign(base, **KINDS[kind]))
    assert [warning.filename for warning in caught] == [__file__]
    assert not optimizer.state
    assert optimizer.param_groups[0]["rho"] == 0.3
    other, fresh = build(base)
    fresh.param_groups[0]["rho"] = 0.3
    assert oracles.same_bits(trained(model, optimizer), trained(other, fresh))


def test_what_it_holds_of_the_base_optimizer_is_kept():
    model, optimizer = build("SGD")
    state = foreign("SGD", ["old_p", "momentum_buffer"])
    with pytest.warns(UserWarning, match="old_p"):
        optimizer.load_state_dict(state)
    assert all(set(optimizer.state[param]) == {"momentum_buffer"} for param in model.parameters())
    assert set(state["state"][0]) == {"old_p", "momentum_buffer"}, "what is loaded is not changed"


@pytest.mark.parametrize("kind", [SAM, ESAM])
def test_one_that_cannot_be_is_refused_and_changes_nothing(kind):
    model, optimizer = build("AdamW", kind)
    trained(model, optimizer)
    states = (
        ({**foreign("AdamW", ["old_p"]), "param_groups": []}, "parameter group"),
        (foreign("AdamW", ["old_p"], {"rho": -1.0}), "rho must be"),
        (foreign("AdamW", ["old_p"], {"params": [0, 1]}), "size|parameter group"),
    )
    for state, message in states:
        call = functools.partial(optimizer.load_state_dict, state)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            oracles.assert_refused(call, ValueError, message, model, optimizer)


def test_a_state_of_its_own_warns_of_nothing():
    model, optimizer = build()
    trained(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(optimizer.state_dict())
