"""Code written for the common two-step SAM class, and for torch's step(closure), with only the import changed."""

import oracles
import pytest
import torch
from torch import nn

from esam_kernels import ESAM, SAM

RHO = 0.3
STEPS = 6


class TwoStepSAM(torch.optim.Optimizer):
    """The behaviour of the common two-step class, written anew: what its users' code expects."""

    def __init__(self, params, base_optimizer, rho=0.05, adaptive=False, **kwargs):
        super().__init__(params, {"rho": rho, "adaptive": adaptive, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups
        self.old = {}

    def trained(self):
        return [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        def scaled(group, p):
            return p.abs() if group["adaptive"] else torch.ones_like(p)

        norms = [(scaled(group, p) * p.grad).norm() for group, p in self.trained()]
        norm = torch.stack(norms).norm()
        for group, p in self.trained():
            self.old[p] = p.clone()
            p.add_(scaled(group, p) ** 2 * p.grad * (group["rho"] / (norm + 1e-12)))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for _, p in self.trained():
            p.copy_(self.old[p])
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        closure = torch.enable_grad()(closure)
        self.first_step(zero_grad=True)
        closure()
        self.second_step()


def readme_loop(SAM, model, adaptive, zero_grad=True):
    """The loop of its README."""
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=RHO, adaptive=adaptive)
    for step in range(STEPS):
        inputs, target = oracles.batch(seed=step)
        loss = oracles.losses_of(model)(inputs, target).mean()
        loss.backward()
        optimizer.first_step(zero_grad=zero_grad)
        optimizer.zero_grad()
        oracles.losses_of(model)(inputs, target).mean().backward()
        optimizer.second_step(zero_grad=zero_grad)
        optimizer.zero_grad()


def closure_loop(SAM, model, adaptive):
    """Its other loop: gradients first, and a closure for the second pass."""
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=RHO, adaptive=adaptive)
    calls = []
    for step in range(STEPS):
        inputs, target = oracles.batch(seed=step)

        def closure():
            calls.append(1)
            loss = oracles.losses_of(model)(inputs, target).mean()
            loss.backward()
            return loss

        loss = oracles.losses_of(model)(inputs, target).mean()
        loss.backward()
        optimizer.step(closure)
        optimizer.zero_grad()
    assert len(calls) == STEPS


def assert_close(left, right):
    for a, b in zip(left.parameters(), right.parameters()):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("loop", [readme_loop, closure_loop])
def test_its_loops_run_with_only_the_import_changed(loop, adaptive):
    models = [oracles.mlp(), oracles.mlp()]
    for kind, model in zip((TwoStepSAM, SAM), models):
        loop(kind, model, adaptive)
    assert_close(*models)


def test_its_loop_runs_without_zero_grad_in_the_steps():
    models = [oracles.mlp(), oracles.mlp()]
    for kind, model in zip((TwoStepSAM, SAM), models):
        readme_loop(kind, model, False, zero_grad=False)
    assert_close(*models)


def test_gradients_accumulate_in_the_second_pass_where_the_user_keeps_them():
    models = [oracles.mlp(), oracles.mlp()]
    for kind, model in zip((TwoStepSAM, SAM), models):
        optimizer = kind(model.parameters(), torch.optim.SGD, lr=0.1, rho=RHO)
        oracles.losses_of(model)(*oracles.batch()).mean().backward()
        optimizer.first_step(zero_grad=False)
        oracles.losses_of(model)(*oracles.batch()).mean().backward()
        optimizer.second_step(zero_grad=False)
    assert_close(*models)


def test_its_constructor_takes_rho_and_adaptive_by_position_and_groups():
    model = oracles.mlp()
    optimizer = SAM(
        [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2].parameters()}],
        torch.optim.SGD,
        0.2,
        True,
        lr=0.1,
    )
    assert [(g["rho"], g["adaptive"], g["lr"]) for g in optimizer.param_groups] == [(0.2, True, 0.5), (0.2, True, 0.1)]


def test_esam_with_beta_and_gamma_one_is_sam_bit_for_bit():
    models = [oracles.mlp(), oracles.mlp()]
    optimizers = [
        SAM(models[0].parameters(), torch.optim.SGD, lr=0.1, rho=RHO),
        ESAM(models[1].parameters(), torch.optim.SGD, lr=0.1, rho=RHO, beta=1.0, gamma=1.0, mask="element"),
    ]
    for step in range(STEPS):
        for model, optimizer in zip(models, optimizers):
            optimizer.step(oracles.losses_of(model), *oracles.batch(seed=step))
    assert oracles.same_bits(*map(oracles.weights_of, models))


# -- step(closure) as torch's optimizers take it -----------------------------------------------------------------------


def expected_after(steps):
    """SAM on a batch a step, by the class above."""
    model = oracles.mlp()
    optimizer = TwoStepSAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=RHO)
    for step in range(steps):
        for finish in (optimizer.first_step, optimizer.second_step):
            oracles.losses_of(model)(*oracles.batch(seed=step)).mean().backward()
            finish(zero_grad=True)
    return model


def torch_style(zero_grad_before=None, zero_grad_inside=None, first=None):
    """Trains with step(closure), and returns the model and how often the closure was called."""
    model = oracles.mlp()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=RHO)
    calls = []
    for step in range(STEPS):

        def closure():
            if zero_grad_inside is not None:
                optimizer.zero_grad(set_to_none=zero_grad_inside)
            loss = oracles.losses_of(model)(*oracles.batch(seed=step)).mean()
            loss.backward()
            calls.append(loss.detach())
            return loss

        if zero_grad_before is not None:
            optimizer.zero_grad(set_to_none=zero_grad_before)
        if step == 0 and first is not None:
            first(model, optimizer)
        else:
            assert optimizer.step(closure=closure) is not None
    return model, calls


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("where", ["before", "inside"])
def test_torch_style_closure_is_sam_wherever_the_gradients_are_zeroed(where, set_to_none):
    """As Lightning calls it: zero_grad, loss and backward are all in the closure."""
    model, calls = torch_style(**{f"zero_grad_{where}": set_to_none})
    assert len(calls) == 2 * STEPS
    assert_close(model, expected_after(STEPS))


@pytest.mark.parametrize("way", ["step", "two steps"])
def test_gradients_left_by_another_kind_of_step_are_not_taken_for_new(way):
    def first(model, optimizer):
        losses = oracles.losses_of(model)
        if way == "step":
            optimizer.step(losses, *oracles.batch(seed=0))
            return
        losses(*oracles.batch(seed=0)).mean().backward()
        optimizer.first_step(zero_grad=True)
        losses(*oracles.batch(seed=0)).mean().backward()
        optimizer.second_step()

    model, calls = torch_style(zero_grad_inside=True, first=first)
    assert len(calls) == 2 * (STEPS - 1)
    assert_close(model, expected_after(STEPS))


def test_step_returns_the_closures_first_loss():
    model = oracles.mlp()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=RHO)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = oracles.losses_of(model)(*oracles.batch()).mean()
        loss.backward()
        losses.append(loss)
        return loss

    assert optimizer.step(closure) is losses[0]
    assert losses[1] > losses[0]


def test_the_closure_runs_with_gradients_enabled():
    model = oracles.mlp()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)

    def closure():
        loss = oracles.losses_of(model)(*oracles.batch()).mean()
        loss.backward()
        return loss

    with torch.no_grad():
        optimizer.step(closure)
        optimizer.step(oracles.losses_of(model), *oracles.batch())


@pytest.mark.parametrize("steps_before", [0, 1])
def test_a_closure_that_computes_no_gradients_is_refused(steps_before):
    """Also where a step before has left its gradients behind."""
    model = oracles.mlp()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    for _ in range(steps_before):
        optimizer.step(oracles.losses_of(model), *oracles.batch())
    before = oracles.weights_of(model)
    with pytest.raises(RuntimeError, match=r"loss.backward\(\).*step\(losses, \*batch\)"):
        optimizer.step(lambda: oracles.losses_of(model)(*oracles.batch()).mean())
    assert oracles.same_bits(before, oracles.weights_of(model))


@pytest.mark.parametrize("closure", [None, 3.0])
def test_step_without_a_closure_says_what_it_needs(closure):
    optimizer = SAM([nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1)
    with pytest.raises(
        RuntimeError, match=r"step needs a closure: step\(losses, \*batch\), or first_step and second_step"
    ):
        optimizer.step(closure)
