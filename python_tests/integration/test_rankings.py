"""Rankings that need no forward at w + e, under autocast, GradScaler, torch.compile and accumulation."""

from __future__ import annotations

import pytest
import torch
from small_training import assert_same_bits, batch, losses_of, small_net, snapshot
from torch._dynamo.testing import CompileCounterWithBackend

from esam_kernels import ESAM, cross_entropy
from esam_kernels.ranking.first_order import FirstOrder

# A power of two: scaling by it and back is exact.
SCALE = 1024.0
RANKINGS = ["first_order", "random", lambda context: context.losses]


def build(ranking="first_order", **arguments):
    model = small_net()
    settings = {"lr": 0.1, "momentum": 0.9, "rho": 0.3, "ranking": ranking, "model": model, **arguments}
    return model, ESAM(model.parameters(), torch.optim.SGD, **settings)


def train(optimizer, losses, steps=4, **arguments):
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.step(losses, *batch(step), **arguments)


def in_phases(optimizer, losses, inputs, targets, scale=lambda loss: loss):
    """Up to the second backward: the weights are left perturbed."""
    loss_before = losses(inputs, targets)
    optimizer.backward(scale(loss_before.mean()))
    optimizer.first_step(zero_grad=True)
    inputs, targets = optimizer.select(loss_before, None, inputs, targets)
    scale(losses(inputs, targets).mean()).backward()


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# -- mixed precision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranking", RANKINGS)
def test_a_scaler_changes_no_bit(ranking):
    model, optimizer = build(ranking)
    train(optimizer, losses_of(model))
    for way in ("step", "phases"):
        scaled, other = build(ranking)
        scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
        for step in range(4):
            torch.manual_seed(step)
            if way == "step":
                other.step(losses_of(scaled), *batch(step), scaler=scaler)
            else:
                in_phases(other, losses_of(scaled), *batch(step), scaler.scale)
                scaler.step(other)
                other.zero_grad()
            scaler.update()
        assert_same_bits(snapshot(model), snapshot(scaled))


def test_an_overflow_in_pass_1_skips_the_update():
    model, optimizer = build()
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    before = [param.detach().clone() for param in model.parameters()]

    def losses(inputs, targets):
        return cross_entropy(model(inputs), targets) * float("inf")

    optimizer.step(losses, *batch(0), scaler=scaler)
    scaler.update()
    assert all(map(torch.equal, before, model.parameters()))
    assert scaler.get_scale() == SCALE / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_scores_are_those_of_what_the_head_saw_in_float32(dtype):
    heads, scores = [], []

    def ranking(context):
        heads.append(context.head)
        scores.append(FirstOrder().scores(context))
        return scores[-1]

    model, optimizer = build(ranking)
    with torch.autocast("cpu", dtype=dtype):
        optimizer.step(losses_of(model), *batch(0))
    (head,), (got,) = heads, scores
    assert head.output_grad.dtype == dtype
    assert got.dtype == torch.float32
    h, delta = head.input.double(), head.output_grad.double()
    wanted = ((h @ (delta.T @ h).T + delta.sum(dim=0)) * delta).sum(dim=1)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-7)


def test_autocast_around_the_step_trains_as_autocast_around_the_forward():
    model, optimizer = build()
    other, its = build()

    def losses(inputs, targets):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return cross_entropy(other(inputs), targets)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        train(optimizer, losses_of(model))
    train(its, losses)
    assert_same_bits(snapshot(model), snapshot(other))


# -- accumulation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranking", RANKINGS)
def test_one_perturbation_for_all_parts_is_the_step_on_the_whole_batch(ranking):
    model, other = small_net(dropout=0.0, batch_norm=False), small_net(dropout=0.0, batch_norm=False)
    kwargs = {"lr": 0.1, "rho": 0.3, "ranking": ranking}
    whole = ESAM(model.parameters(), torch.optim.SGD, model=model, **kwargs)
    parts = ESAM(other.parameters(), torch.optim.SGD, model=other, **kwargs)
    for step in range(3):
        inputs, targets = batch(step)
        whole.step(losses_of(model), inputs, targets)
        losses, before = losses_of(other), []
        for part in zip(inputs.split(5), targets.split(5)):
            before.append(losses(*part))
            parts.backward(before[-1].sum() / 16)
        parts.first_step(zero_grad=True)
        losses(*parts.select(torch.cat(before), None, inputs, targets)).mean().backward()
        parts.second_step(zero_grad=True)
    for name, value in snapshot(model).items():
        torch.testing.assert_close(snapshot(other)[name], value, rtol=1e-5, atol=1e-6)


# -- torch.compile ---------------------------------------------------------------------------------------------------


def compiled_and_eager(ranking):
    """Two nets alike, without dropout; the weights of the second after training."""
    model, eager = small_net(dropout=0.0), small_net(dropout=0.0)
    train(over(eager, ranking), losses_of(eager))
    return model, snapshot(eager)


def over(model, ranking, given=None):
    given = model if given is None else given
    return ESAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.3, ranking=ranking, model=given)


def assert_trained_alike(model, eager):
    for name, value in eager.items():
        torch.testing.assert_close(snapshot(model)[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("ranking", "order"),
    [
        ("first_order", "compiled first"),
        ("first_order", "optimizer first"),
        ("first_order", "the compiled model is given"),
        ("random", "compiled first"),
        (RANKINGS[2], "compiled first"),
    ],
)
def test_a_compiled_model_trains_as_an_eager_one(ranking, order):
    model, eager = compiled_and_eager(ranking)
    compiled = torch.compile(model, backend="aot_eager") if order != "optimizer first" else None
    optimizer = over(model, ranking, given=compiled if order == "the compiled model is given" else None)
    train(optimizer, losses_of(compiled or torch.compile(model, backend="aot_eager")))
    assert_trained_alike(model, eager)


def test_a_model_compiled_in_place_trains_as_an_eager_one():
    model, eager = compiled_and_eager("first_order")
    model.compile(backend="aot_eager")
    train(over(model, "first_order"), losses_of(model))
    assert_trained_alike(model, eager)


def test_no_graph_is_compiled_after_the_second_step():
    model, optimizer = build()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    graphs = []
    for step in range(8):
        optimizer.step(losses_of(compiled), *batch(step))
        graphs.append(counter.frame_count)
    assert graphs[1] == graphs[-1], f"graphs after each step: {graphs}"


def test_a_model_that_was_compiled_and_run_before_the_optimizer_was_built_is_refused():
    model = small_net()
    compiled = torch.compile(model, backend="aot_eager")
    losses_of(compiled)(*batch(0)).mean().backward()
    model.zero_grad()
    optimizer, before = over(model, "first_order"), snapshot(model)
    with pytest.raises(RuntimeError, match="compiled and run before the optimizer was built: build"):
        optimizer.step(losses_of(compiled), *batch(1))
    assert all(torch.equal(before[name], param) for name, param in model.named_parameters())


@pytest.mark.parametrize("what", ["model", "closure"])
def test_fullgraph_says_why_the_graph_breaks(what):
    model, optimizer = build()
    losses = losses_of(torch.compile(model, backend="aot_eager", fullgraph=True))
    if what == "closure":
        losses = torch.compile(losses_of(model), backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile without fullgraph=True, or take ranking="):
        optimizer.step(losses, *batch(0))
