"""Hooks that users register on the optimizer, and the names a profiler shows: once each, as torch's optimizers do."""

import oracles
import pytest
import torch
from torch.optim import optimizer as torch_optimizer
from torch.profiler import ProfilerActivity, profile

from esam_kernels import ESAM, SAM


def build(kind=SAM, **kwargs):
    model = oracles.mlp()
    return model, kind(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, model=model, **kwargs)


def loss_of(model):
    return oracles.losses_of(model)(*oracles.batch()).mean()


def by_closure(model, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    optimizer.step(closure)


def up_to_the_second_gradient(model, optimizer, scale=lambda loss: loss):
    scale(loss_of(model)).backward()
    optimizer.first_step(zero_grad=True)
    scale(loss_of(model)).backward()


def by_phases(model, optimizer):
    up_to_the_second_gradient(model, optimizer)
    optimizer.second_step(zero_grad=True)


def by_step_at_the_end(model, optimizer):
    up_to_the_second_gradient(model, optimizer)
    optimizer.step()


def by_scaler(model, optimizer, factor=1.0):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    up_to_the_second_gradient(model, optimizer, lambda loss: scaler.scale(loss) * factor)
    scaler.step(optimizer)
    scaler.update()


WAYS = {
    "step(closure)": by_closure,
    "step(losses, *batch)": lambda model, optimizer: optimizer.step(oracles.losses_of(model), *oracles.batch()),
    "phases": by_phases,
    "step() at the end": by_step_at_the_end,
    "scaler.step": by_scaler,
    "step(scaler=)": lambda model, optimizer: optimizer.step(
        oracles.losses_of(model), *oracles.batch(), scaler=torch.amp.GradScaler("cpu", init_scale=4.0)
    ),
}
ways = pytest.mark.parametrize("way", WAYS)


def observe(optimizer):
    seen = []
    optimizer.register_step_pre_hook(lambda which, args, kwargs: seen.append(("pre", which is args[0])))
    optimizer.register_step_post_hook(lambda which, args, kwargs: seen.append(("post", which is args[0])))
    return seen


@ways
@pytest.mark.parametrize("kind", [SAM, ESAM])
def test_step_hooks_run_once_around_each_step(way, kind):
    """Their arguments begin with the optimizer, as torch's do."""
    model, optimizer = build(kind)
    seen = observe(optimizer)
    for _ in range(2):
        WAYS[way](model, optimizer)
    assert seen == [("pre", True), ("post", True)] * 2


@ways
def test_global_hooks_and_those_of_the_base_run_in_its_own_step(way):
    model, optimizer = build()
    seen = []
    optimizer.base_optimizer.register_step_post_hook(lambda *_: seen.append("base"))
    handles = [
        torch_optimizer.register_optimizer_step_pre_hook(lambda which, *_: seen.append(type(which).__name__)),
        torch_optimizer.register_optimizer_step_post_hook(lambda which, *_: seen.append(type(which).__name__)),
    ]
    try:
        WAYS[way](model, optimizer)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["SGD", "base", "SGD"]


@pytest.mark.parametrize("fused_base", [False, True])
def test_a_step_that_the_scaler_skips_runs_no_hooks_where_torchs_would_not(fused_base):
    """GradScaler calls the step of a fused optimizer in any case: it looks at found_inf on the device."""
    model = oracles.mlp()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, fused=fused_base)
    seen = observe(optimizer)
    before = oracles.weights_of(model)
    by_scaler(model, optimizer, factor=float("inf"))
    assert oracles.same_bits(before, oracles.weights_of(model))
    assert len(seen) == (2 if fused_base else 0)
    by_scaler(model, optimizer)
    assert not oracles.same_bits(before, oracles.weights_of(model))


def test_a_pre_hook_may_change_the_arguments():
    model, optimizer = build()
    other = oracles.batch(seed=7)
    optimizer.register_step_pre_hook(lambda which, args, kwargs: ((*args[:2], *other), {"max_grad_norm": 1e-9}))
    before = oracles.weights_of(model)
    expected = oracles.losses_of(model)(*other).mean()
    assert optimizer.step(oracles.losses_of(model), *oracles.batch()) == expected
    for param, old in zip(model.parameters(), before):
        torch.testing.assert_close(param.detach(), old, rtol=0, atol=1e-9)


def test_a_pre_hook_that_returns_something_else_is_refused():
    model, optimizer = build()
    optimizer.register_step_pre_hook(lambda *_: 3)
    call = lambda: optimizer.step(oracles.losses_of(model), *oracles.batch())  # noqa: E731
    oracles.assert_refused(call, RuntimeError, "must return None or a tuple", model, optimizer)
    with pytest.raises(RuntimeError, match="must return None"):
        call()


def test_a_subclass_with_a_step_of_its_own_runs_the_hooks_once():
    class TwoPhases(SAM):
        def step(self, closure):
            closure()
            self.first_step(zero_grad=True)
            closure()
            self.second_step(zero_grad=True)

    class Inherits(SAM):
        def step(self, closure):
            return super().step(closure)

    for kind in (TwoPhases, Inherits):
        model, optimizer = build(kind)
        seen = observe(optimizer)
        by_closure(model, optimizer)
        by_phases(model, optimizer)
        assert [name for name, _ in seen] == ["pre", "post"] * 2, kind


def test_an_exception_in_a_step_leaves_the_hooks_working():
    model, optimizer = build()
    seen = observe(optimizer)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 // 0)
    by_closure(model, optimizer)
    assert [name for name, _ in seen] == ["pre", "pre", "post"]


def test_state_dict_hooks_run_once_and_may_change_the_state():
    _, optimizer = build()
    seen = []

    def add(_, state):
        seen.append("saved")
        return {**state, "mine": 1}

    def take(_, state):
        seen.append("load")
        assert state.pop("mine") == 1
        return state

    optimizer.register_state_dict_pre_hook(lambda _: seen.append("save"))
    optimizer.register_state_dict_post_hook(add)
    optimizer.register_load_state_dict_pre_hook(take)
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert seen == ["save", "saved", "load", "loaded"]
    assert state["mine"] == 1, "what is loaded is not changed"


@ways
@pytest.mark.parametrize("fuse", [False, True])
def test_a_profiler_shows_one_step_of_each_optimizer(way, fuse, request):
    if fuse:
        request.getfixturevalue("fused")
    model, optimizer = build()
    WAYS[way](model, optimizer)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        WAYS[way](model, optimizer)
    names = {event.key: event.count for event in recorded.key_averages() if event.key.startswith("Optimizer.step")}
    assert names == {"Optimizer.step#SAM.step": 1, "Optimizer.step#SGD.step": 1}


def test_a_profiler_shows_zero_grad():
    _, optimizer = build()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        optimizer.zero_grad()
    assert "Optimizer.zero_grad#SAM.zero_grad" in {event.key for event in recorded.key_averages()}
