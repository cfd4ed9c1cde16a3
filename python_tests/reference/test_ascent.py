"""One pass a step: the perturbation along the previous gradient, or against the momentum."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import Tensor, nn

from esam_kernels import ESAM, SAM, cross_entropy
from esam_kernels.perturbation.ascent import DEFAULT_RHO, DEFAULT_RHO_ADAPTIVE

INPUTS = torch.randn(24, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TARGETS = torch.arange(24) % 5
SGD = (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9})
ADAMW = (torch.optim.AdamW, {"lr": 1e-2})
ASCENTS = ["previous", "momentum"]


def build(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 5)).to(dtype)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([param.detach().flatten() for param in model.parameters()])


def one_pass(model: nn.Module, ascent: str, base=SGD, /, **options) -> ESAM:
    kind, arguments = base
    options = {"rho": 0.05, "beta": 1.0, "gamma": 1.0, **options}
    return ESAM(model.parameters(), kind, ascent=ascent, **options, **arguments)


def run(model: nn.Module, optimizer: ESAM, steps: int, calls: list[int] | None = None) -> None:
    def losses(inputs: Tensor, targets: Tensor) -> Tensor:
        if calls is not None:
            calls.append(len(inputs))
        return cross_entropy(model(inputs), targets)

    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        optimizer.step(losses, INPUTS.to(dtype), TARGETS)


def oracle(ascent: str, base, rho: float, steps: int) -> Tensor:
    """Written from the definition: w + e, the gradient there, back to w, the base optimizer's step."""
    model = build()
    params = list(model.parameters())
    optimizer = base[0](params, **base[1])
    last = None
    for _ in range(steps):
        if ascent == "previous":
            along, sign = last, 1.0
        else:
            name = "momentum_buffer" if base is SGD else "exp_avg"
            along, sign = [optimizer.state[param].get(name) for param in params], -1.0
            along = None if along[0] is None else along
        clean = [param.detach().clone() for param in params]
        if along is not None:
            norm = sum(direction.square().sum() for direction in along).sqrt()
            with torch.no_grad():
                for param, direction in zip(params, along):
                    param += sign * rho * direction / (norm + 1e-12)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(INPUTS), TARGETS).backward()
        last = [param.grad.clone() for param in params]
        with torch.no_grad():
            for param, old in zip(params, clean):
                param.copy_(old)
        optimizer.step()
    return weights(model)


@pytest.mark.parametrize("base", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("ascent", ASCENTS)
def test_twenty_steps_follow_the_float64_oracle_in_one_pass_each(ascent, base):
    model, calls = build(), []
    run(model, one_pass(model, ascent, base), 20, calls)
    torch.testing.assert_close(weights(model), oracle(ascent, base, 0.05, 20), rtol=1e-10, atol=1e-12)
    assert calls == [24] * 20


@pytest.mark.parametrize("ascent", ASCENTS)
def test_the_first_step_is_the_base_optimizers(ascent):
    model, plain = build(), build()
    run(model, one_pass(model, ascent), 1)
    base = torch.optim.SGD(plain.parameters(), **SGD[1])
    cross_entropy(plain(INPUTS), TARGETS).mean().backward()
    base.step()
    assert torch.equal(weights(model), weights(plain))


@pytest.mark.parametrize("ascent", ASCENTS)
def test_the_loop_by_hand_equals_step(ascent):
    by_step, by_hand = build(), build()
    run(by_step, one_pass(by_step, ascent), 4)
    optimizer = one_pass(by_hand, ascent)
    for _ in range(4):
        optimizer.first_step()
        optimizer.zero_grad()
        cross_entropy(by_hand(INPUTS), TARGETS).mean().backward()
        optimizer.second_step()
    assert torch.equal(weights(by_step), weights(by_hand))


@pytest.mark.parametrize("ascent", ASCENTS)
def test_a_torch_style_closure_is_called_once_a_step_at_the_perturbed_weights(ascent):
    by_step, by_closure, calls = build(), build(), []
    run(by_step, one_pass(by_step, ascent), 4)
    optimizer = one_pass(by_closure, ascent)

    def closure() -> Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss = cross_entropy(by_closure(INPUTS), TARGETS).mean()
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)
    assert torch.equal(weights(by_step), weights(by_closure))
    assert len(calls) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", ["tensor", "element"])
@pytest.mark.parametrize("ascent", ASCENTS)
def test_restore_is_bitwise_and_the_weights_are_clean_outside_a_step(ascent, mask, dtype):
    model = build(dtype)
    optimizer = one_pass(model, ascent, mask=mask, beta=0.6, rho=0.5)
    run(model, optimizer, 2)
    before, addresses = weights(model), [param.data_ptr() for param in model.parameters()]
    optimizer.first_step()
    assert not torch.equal(weights(model), before)
    optimizer.restore()
    assert torch.equal(weights(model), before)
    assert addresses == [param.data_ptr() for param in model.parameters()]


def test_a_step_that_was_given_up_leaves_no_weights_behind_as_history():
    model = build()
    optimizer = one_pass(model, "previous")
    run(model, optimizer, 2)
    optimizer.first_step()
    optimizer.restore()
    before = weights(model)
    optimizer.first_step()  # the history was used up: nothing to go along
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize("base", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("mask", ["tensor", "element"])
@pytest.mark.parametrize("ascent", ASCENTS)
def test_resume_gives_the_same_bits(ascent, mask, base, tmp_path):
    options = {"mask": mask, "beta": 0.6, "seed": 3}
    undisturbed = build(torch.float32)
    run(undisturbed, one_pass(undisturbed, ascent, base, **options), 6)
    model = build(torch.float32)
    optimizer = one_pass(model, ascent, base, **options)
    run(model, optimizer, 3)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint")
    saved = torch.load(tmp_path / "checkpoint")
    model = build(torch.float32)
    optimizer = one_pass(model, ascent, base, **options)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    run(model, optimizer, 3)
    assert torch.equal(weights(model), weights(undisturbed))


@pytest.mark.parametrize("base", [SGD, ADAMW, (torch.optim.SGD, {"lr": 0.05})], ids=["sgd", "adamw", "no momentum"])
def test_the_state_holds_the_last_gradient_and_loads_into_the_plain_optimizer(base):
    model = build()
    optimizer = one_pass(model, "previous", base)
    run(model, optimizer, 2)
    saved = optimizer.state_dict()
    history = optimizer._perturbation.ascent._history
    assert all(saved["state"][i]["previous_gradient"] is last for i, last in history.items())
    assert not any("previous_gradient" in state for state in optimizer.base_optimizer.state_dict()["state"].values())
    loaded = one_pass(build(), "previous", base)
    loaded.load_state_dict(saved)
    assert all(map(torch.equal, loaded._perturbation.ascent._history.values(), history.values()))
    assert loaded.base_optimizer.state_dict()["state"].keys() == optimizer.base_optimizer.state_dict()["state"].keys()
    plain_model = build()
    plain_model.load_state_dict(model.state_dict())
    plain = base[0](plain_model.parameters(), **base[1])
    plain.load_state_dict(copy.deepcopy(saved))
    for weight, other in zip(plain_model.parameters(), model.parameters()):
        weight.grad, other.grad = torch.ones_like(weight), torch.ones_like(other)
    plain.step()
    optimizer.base_optimizer.step()
    assert torch.equal(weights(plain_model), weights(model))


@pytest.mark.parametrize("ascent", ASCENTS)
def test_a_copy_goes_on_by_itself(ascent):
    model = build()
    optimizer = one_pass(model, ascent)
    run(model, optimizer, 3)
    other, other_optimizer = copy.deepcopy((model, optimizer))
    run(model, optimizer, 3)
    run(other, other_optimizer, 3)
    assert torch.equal(weights(model), weights(other))


def test_a_history_that_is_not_finite_perturbs_nothing():
    model = build()
    optimizer = one_pass(model, "previous")
    run(model, optimizer, 1)
    optimizer._perturbation.ascent._history[0][0, 0] = torch.nan
    before = weights(model)
    optimizer.first_step()
    assert torch.equal(weights(model), before)


def test_a_gradient_that_the_user_keeps_is_not_written_over():
    model = build()
    optimizer = one_pass(model, "previous")
    optimizer.first_step()
    cross_entropy(model(INPUTS), TARGETS).mean().backward()
    kept = [param.grad for param in model.parameters()]
    values = [grad.clone() for grad in kept]
    optimizer.second_step()
    optimizer.first_step()
    assert all(map(torch.equal, kept, values))


def test_the_last_gradient_is_kept_where_autograd_put_it():
    model = build()
    optimizer = one_pass(model, "previous")
    run(model, optimizer, 1)
    addresses = []
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(lambda param: addresses.append(param.grad.data_ptr()))
    run(model, optimizer, 1)
    kept = [last.data_ptr() for last in optimizer._perturbation.ascent._history.values()]
    assert sorted(kept) == sorted(addresses)
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize("ascent", ASCENTS)
def test_micro_batches_share_one_perturbation(ascent):
    whole, parts = build(), build()
    run(whole, one_pass(whole, ascent), 4)
    optimizer = one_pass(parts, ascent)
    for _ in range(4):
        optimizer.step(lambda x, y: cross_entropy(parts(x), y), INPUTS, TARGETS, micro_batch=7)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-10, atol=1e-12)


def test_batch_norm_moves_once_a_step():
    model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)).double()
    run(model, one_pass(model, "momentum", model=model), 3)
    assert model[1].num_batches_tracked == 3


@pytest.mark.parametrize(("ascent", "rho"), [("current", 0.05), ("previous", 0.05), ("momentum", 1.0)])
def test_without_a_rho_each_ascent_takes_its_own(ascent, rho):
    assert DEFAULT_RHO[ascent] == rho
    model = build()
    options = {"gamma": 1.0, "ascent": ascent, **SGD[1]}
    first, second = (list(part.parameters()) for part in (model[0], model[2]))
    for kind in (ESAM, SAM):
        arguments = {name: value for name, value in options.items() if kind is ESAM or name != "gamma"}
        optimizer = kind([{"params": first}, {"params": second, "rho": 0.2}], SGD[0], **arguments)
        assert [group["rho"] for group in optimizer.param_groups] == [rho, 0.2]
        assert optimizer.defaults["rho"] == rho
    given = ESAM(build().parameters(), SGD[0], rho=0.05, **options)
    assert given.param_groups[0]["rho"] == 0.05


@pytest.mark.parametrize(("ascent", "rho"), [("current", 0.05), ("previous", 0.05), ("momentum", 3.0)])
def test_without_a_rho_an_adaptive_ascent_takes_its_own(ascent, rho):
    assert DEFAULT_RHO_ADAPTIVE[ascent] == rho
    first, second, third = (list(part.parameters()) for part in (build()[0], build()[0], build()[0]))
    groups = [{"params": first}, {"params": second, "rho": 0.2}, {"params": third, "adaptive": False}]
    for kind in (ESAM, SAM):
        options = {"ascent": ascent, **SGD[1], **({"gamma": 1.0} if kind is ESAM else {})}
        optimizer = kind([dict(group) for group in groups], SGD[0], adaptive=True, **options)
        assert [group["rho"] for group in optimizer.param_groups] == [rho, 0.2, DEFAULT_RHO[ascent]]
        assert optimizer.defaults["rho"] == rho
    given = ESAM(build().parameters(), SGD[0], rho=0.05, adaptive=True, gamma=1.0, ascent=ascent, **SGD[1])
    assert given.param_groups[0]["rho"] == 0.05


def test_the_signature_says_the_papers_rho():
    for kind in (ESAM, SAM):
        assert inspect.signature(kind).parameters["rho"].default == 0.05


@pytest.mark.parametrize("ascent", ASCENTS)
def test_gamma_below_one_is_refused_with_the_reason(ascent):
    with pytest.raises(ValueError, match="before and after the perturbation"):
        one_pass(build(), ascent, gamma=0.5)
    optimizer = one_pass(build(), ascent)
    with pytest.raises(ValueError, match="gamma must be 1"):
        optimizer.gamma = 0.5
    assert optimizer.gamma == 1.0


def test_a_base_optimizer_without_momentum_is_refused():
    with pytest.raises(ValueError, match="needs a base optimizer with momentum"):
        one_pass(build(), "momentum", (torch.optim.SGD, {"lr": 0.1}))
    with pytest.raises(ValueError, match="Adagrad keeps none"):
        one_pass(build(), "momentum", (torch.optim.Adagrad, {"lr": 0.1}))


class WithStateOfItsOwn(torch.optim.Optimizer):
    """As bitsandbytes' Adam: betas as torch has them, and a state under other names."""

    def __init__(self, params, lr=0.1, betas=(0.9, 0.99)):
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["state1"] = param.grad.clone()
                param.sub_(group["lr"] * param.grad)


def test_a_momentum_that_is_kept_under_another_name_is_no_silent_base_step():
    model = build()
    optimizer = one_pass(model, "momentum", (WithStateOfItsOwn, {}))
    run(model, optimizer, 1)
    before = weights(model)
    message = (
        "needs 'exp_avg' in the state of each parameter, as torch.optim keeps it, and WithStateOfItsOwn keeps state1"
    )
    with pytest.raises(RuntimeError, match=message):
        run(model, optimizer, 1)
    assert torch.equal(weights(model), before)


def test_an_unknown_ascent_is_refused():
    with pytest.raises(ValueError, match="ascent must be one of"):
        one_pass(build(), "sideways")


def test_backward_of_the_first_pass_has_no_place_here():
    model = build()
    with pytest.raises(RuntimeError, match="one pass a step"):
        one_pass(model, "previous").backward(cross_entropy(model(INPUTS), TARGETS).mean())
