"""step(closure): which gradients are those of pass 1, and how often the closure is called."""

import functools
import logging

import oracles
import pytest
import torch
from torch import nn

from esam_kernels import ESAM, SAM

RHO, STEPS = 0.5, 4


def sam_by_hand(steps=STEPS, plain=(), frozen_from=None):
    """SAM with SGD in float64; the steps in ``plain`` are SGD's."""
    model = oracles.mlp(dtype=torch.float64)
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def gradients(step):
        model.zero_grad()
        oracles.losses_of(model)(*oracles.batch(seed=step, dtype=torch.float64)).mean().backward()

    for step in range(steps):
        if step == frozen_from:
            model.zero_grad()
            model[0].requires_grad_(False)
        gradients(step)
        if step not in plain:
            trained = [p for p in model.parameters() if p.grad is not None]
            norm = torch.stack([p.grad.norm() for p in trained]).norm()
            old = [p.detach().clone() for p in trained]
            with torch.no_grad():
                for p in trained:
                    p.add_(RHO * p.grad / norm)
            gradients(step)
            with torch.no_grad():
                for p, before in zip(trained, old):
                    p.copy_(before)
        base.step()
    return model


def assert_close(model, expected):
    for param, other in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(param.detach().double(), other.detach(), rtol=0, atol=2e-6)


def optimizer_of(model, **kwargs):
    return SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=RHO, **kwargs)


# -- closures that compute everything ----------------------------------------------------------------------------------


def set_none_by_hand(model, optimizer):
    for param in model.parameters():
        param.grad = None


ZEROING = {
    "optimizer.zero_grad()": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer.zero_grad(False)": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "base.zero_grad()": lambda model, optimizer: optimizer.base_optimizer.zero_grad(),
    "base.zero_grad(False)": lambda model, optimizer: optimizer.base_optimizer.zero_grad(set_to_none=False),
    "model.zero_grad()": lambda model, optimizer: model.zero_grad(),
    "model.zero_grad(False)": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "grad = None": set_none_by_hand,
}


def clipped(model, optimizer, batch):
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def clipped_twice(model, optimizer, batch):
    clipped(model, optimizer, batch)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-4)


def zeroed_and_clipped(model, optimizer, batch):
    model.zero_grad(set_to_none=False)
    clipped(model, optimizer, batch)


def attacked(model, optimizer, batch):
    """An attack's backward leaves gradients of the weights behind."""
    inputs = batch[0].clone().requires_grad_()
    oracles.losses_of(model)(inputs, batch[1]).mean().backward()


BETWEEN = {
    "nothing": lambda model, optimizer, batch: None,
    "clip": clipped,
    "clip twice": clipped_twice,
    "model.zero_grad(False)": lambda model, optimizer, batch: model.zero_grad(set_to_none=False),
    "zeroed and clipped": zeroed_and_clipped,
    "attack": attacked,
    "optimizer.zero_grad(False)": lambda model, optimizer, batch: optimizer.zero_grad(set_to_none=False),
}


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("zeroing", ZEROING)
def test_a_closure_that_zeroes_the_gradients_is_called_at_w_and_at_w_plus_e(zeroing, between):
    """Whatever happens to the gradients between the steps."""
    model = oracles.mlp()
    optimizer = optimizer_of(model)
    calls = []
    for step in range(STEPS):
        batch = oracles.batch(seed=step)

        def closure():
            calls.append(1)
            ZEROING[zeroing](model, optimizer)
            loss = oracles.losses_of(model)(*batch).mean()
            loss.backward()
            return loss

        BETWEEN[between](model, optimizer, batch)
        optimizer.step(closure)
    assert_close(model, sam_by_hand())
    assert len(calls) <= 2 * STEPS + 1, "one more to see what the closure does with gradients that it finds"


@pytest.mark.parametrize("between", ["nothing", "clip", "model.zero_grad(False)", "optimizer.zero_grad(False)"])
def test_a_closure_that_zeroes_nothing_is_called_twice_where_the_gradients_are_old(between):
    model = oracles.mlp()
    optimizer = optimizer_of(model)
    calls = []
    for step in range(STEPS):

        def closure():
            calls.append(1)
            loss = oracles.losses_of(model)(*oracles.batch(seed=step)).mean()
            loss.backward()
            return loss

        BETWEEN[between](model, optimizer, oracles.batch(seed=step))
        optimizer.step(closure)
    assert_close(model, sam_by_hand())
    assert len(calls) == 2 * STEPS


def test_an_attack_inside_the_closure_is_part_of_it():
    """Its backward comes before zero_grad, so that the first one that adds a gradient finds what was there before."""
    model = oracles.mlp()
    optimizer = optimizer_of(model)
    for step in range(STEPS):

        def closure():
            attacked(model, optimizer, oracles.batch(seed=step))
            model.zero_grad(set_to_none=False)
            loss = oracles.losses_of(model)(*oracles.batch(seed=step)).mean()
            loss.backward()
            return loss

        attacked(model, optimizer, oracles.batch(seed=step + 50))
        optimizer.step(closure)
    assert_close(model, sam_by_hand())


@pytest.mark.parametrize("how", ["grad", "no first layer"])
def test_a_layer_may_be_frozen_between_steps(how):
    model = oracles.mlp()
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        if step == 2:
            model[0].requires_grad_(False)
            for param in model[0].parameters():
                param.grad = None if how == "no first layer" else param.grad
            optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][2:]

        def closure():
            optimizer.zero_grad()
            loss = oracles.losses_of(model)(*oracles.batch(seed=step)).mean()
            loss.backward()
            return loss

        optimizer.step(closure)
    assert_close(model, sam_by_hand(frozen_from=2))


def test_steps_of_the_base_optimizer_in_between_with_the_same_closure():
    model = oracles.mlp()
    optimizer = optimizer_of(model)
    calls = []
    for step in range(6):

        def closure():
            calls.append(1)
            optimizer.zero_grad()
            loss = oracles.losses_of(model)(*oracles.batch(seed=step)).mean()
            loss.backward()
            return loss

        (optimizer.base_optimizer if step % 3 else optimizer).step(closure)
    assert_close(model, sam_by_hand(6, plain=(1, 2, 4, 5)))
    assert len(calls) == 2 * 2 + 4


@pytest.mark.parametrize("wrap", ["partial", "method", "no_grad's decorator"])
def test_wrapped_closures_of_two_kinds_are_told_apart(wrap):
    """One sets the gradients to zero, the other is the second pass of the two-step convention."""
    model = oracles.mlp()
    optimizer = optimizer_of(model)
    calls = []

    class Task:
        def __init__(self, step):
            self.step = step

        def whole(self):
            optimizer.zero_grad()
            return self.second()

        def second(self):
            calls.append(1)
            loss = oracles.losses_of(model)(*oracles.batch(seed=self.step)).mean()
            loss.backward()
            return loss

    def wrapped(method):
        if wrap == "partial":
            return functools.partial(type(method.__self__).__dict__[method.__name__], method.__self__)
        return torch.enable_grad()(method) if wrap == "no_grad's decorator" else method

    for step in range(STEPS):
        task = Task(step)
        if step % 2 == 0:
            attacked(model, optimizer, oracles.batch(seed=step))
            optimizer.step(wrapped(task.whole))
        else:
            optimizer.zero_grad()
            oracles.losses_of(model)(*oracles.batch(seed=step)).mean().backward()
            optimizer.step(wrapped(task.second))
    assert_close(model, sam_by_hand())
    assert len(calls) == 3 + 1 + 2 + 1


# -- the two-step convention: gradients first, the closure for pass 2 --------------------------------------------------


@pytest.mark.parametrize("where", ["none", "after", "after, in place", "clipped", "clipped in the closure", "in parts"])
def test_with_gradients_there_the_closure_is_called_once(where):
    model = oracles.mlp()
    optimizer = optimizer_of(model)
    calls = []
    for step in range(STEPS):

        def closure():
            calls.append(1)
            loss = oracles.losses_of(model)(*oracles.batch(seed=step)).mean()
            if where == "in parts":
                (loss / 2).backward(retain_graph=True)
                (loss / 2).backward()
            else:
                loss.backward()
            if where == "clipped in the closure":
                nn.utils.clip_grad_norm_(model.parameters(), 1e9)
            return loss

        if where == "none":
            optimizer.zero_grad()
        oracles.losses_of(model)(*oracles.batch(seed=step)).mean().backward()
        if where == "clipped":
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step(closure)
        if where != "none":
            optimizer.zero_grad(set_to_none=where != "after, in place")
    assert_close(model, sam_by_hand())
    assert len(calls) == STEPS


def in_place_by_hand(say):
    """The model's own zero_grad in place, which cannot be told from clipping."""
    model = oracles.mlp()
    optimizer = optimizer_of(model)
    calls = []
    for step in range(STEPS):

        def closure():
            calls.append(1)
            loss = oracles.losses_of(model)(*oracles.batch(seed=step)).mean()
            loss.backward()
            return loss

        oracles.losses_of(model)(*oracles.batch(seed=step)).mean().backward()
        optimizer.step(closure, **say)
        model.zero_grad(set_to_none=False)
    assert_close(model, sam_by_hand())
    return len(calls)


def test_where_it_cannot_be_known_the_closure_computes_both_gradients_and_one_warning_says_so(caplog):
    with caplog.at_level(logging.WARNING, logger="esam_kernels"):
        assert in_place_by_hand({}) == 1 + 2 * (STEPS - 1)
    assert [record.message.count("first_gradients=True") for record in caplog.records] == [1]


def test_first_gradients_says_that_the_gradients_are_those_of_pass_1(caplog):
    with caplog.at_level(logging.WARNING, logger="esam_kernels"):
        assert in_place_by_hand({"first_gradients": True}) == STEPS
        assert in_place_by_hand({"first_gradients": False}) == 2 * STEPS
    assert not caplog.records


def test_no_warning_where_the_closure_shows_that_it_zeroes(caplog):
    model = oracles.mlp()
    optimizer = optimizer_of(model)

    def closure():
        model.zero_grad(set_to_none=False)
        loss = oracles.losses_of(model)(*oracles.batch()).mean()
        loss.backward()
        return loss

    with caplog.at_level(logging.WARNING, logger="esam_kernels"):
        for _ in range(3):
            optimizer.step(closure)
            clipped(model, optimizer, None)
    assert not caplog.records


def test_first_gradients_without_gradients_or_with_a_batch_is_refused():
    model = oracles.mlp()
    optimizer = optimizer_of(model)
    call = lambda: optimizer.step(lambda: None, first_gradients=True)  # noqa: E731
    oracles.assert_refused(call, RuntimeError, "no parameter has a gradient", model, optimizer)
    call = lambda: optimizer.step(oracles.losses_of(model), *oracles.batch(), first_gradients=False)  # noqa: E731
    oracles.assert_refused(call, ValueError, "first_gradients belongs to step\\(closure\\)", model, optimizer)


def test_a_parameter_that_the_closure_does_not_reach_is_left_without_a_gradient():
    """Also where its gradient is the one that shows what the closure does."""
    model = oracles.mlp()
    extra = nn.Parameter(torch.ones(1))
    optimizer = ESAM([*model.parameters(), extra], torch.optim.SGD, lr=0.1, weight_decay=0.5, beta=1.0, gamma=1.0)

    def closure():
        loss = oracles.losses_of(model)(*oracles.batch()).mean()
        loss.backward()
        return loss

    (oracles.losses_of(model)(*oracles.batch()).mean() + extra.sum()).backward()
    optimizer.step(closure)
    assert extra.grad is None
    assert extra.item() == 1.0


# -- no parameter that trains has a radius -----------------------------------------------------------------------------


@pytest.mark.parametrize("ascent", ["current", "previous"])
@pytest.mark.parametrize("has_gradients", [False, True])
def test_where_all_that_has_a_radius_is_frozen_the_closure_is_called_once(ascent, has_gradients):
    model, twin = oracles.mlp(), oracles.mlp()
    model[0].requires_grad_(False)
    twin[0].requires_grad_(False)
    groups = [{"params": model[0].parameters()}, {"params": model[2:].parameters(), "rho": 0.0}]
    optimizer = ESAM(groups, torch.optim.SGD, lr=0.1, momentum=0.9, rho=RHO, beta=1.0, gamma=1.0, ascent=ascent)
    base = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    calls = []
    for step in range(STEPS):

        def closure():
            calls.append(1)
            loss = oracles.losses_of(model)(*oracles.batch(seed=step)).mean()
            loss.backward()
            return loss

        if has_gradients:
            oracles.losses_of(model)(*oracles.batch(seed=step + 50)).mean().backward()
        optimizer.step(closure)
        optimizer.zero_grad()
        oracles.losses_of(twin)(*oracles.batch(seed=step)).mean().backward()
        base.step()
        base.zero_grad()
    assert len(calls) == STEPS
    for param, other in zip(model.parameters(), twin.parameters()):
        assert torch.equal(param, other)
