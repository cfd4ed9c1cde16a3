"""diagnostics.ranking_agreement: against B+ and ranks computed by hand, and nothing is left changed."""

import copy
import math

import oracles
import pytest
import torch

from esam_kernels import ESAM, diagnostics
from esam_kernels.diagnostics import ranking_agreement


def build(network=None, **kwargs):
    model = oracles.mlp(dtype=torch.float64) if network is None else network
    settings = {"lr": 0.1, "momentum": 0.9, "rho": 0.5, "gamma": 0.4, "model": model, **kwargs}
    return model, ESAM(model.parameters(), torch.optim.SGD, **settings)


def measured_by_hand(model, optimizer, batch):
    """The rises of a step, and B+, in phases."""
    losses = oracles.losses_of(model)
    optimizer.zero_grad()
    before = losses(*batch)
    optimizer.backward(before.mean())
    optimizer.first_step(zero_grad=True)
    with torch.no_grad():
        after = losses(*batch)
    optimizer.restore()
    return (after - before).tolist()


def ranks(values):
    """From 1, equal values sharing the mean of theirs."""
    return [sum(v < value for v in values) + (sum(v == value for v in values) + 1) / 2 for value in values]


def spearman(left, right):
    left, right = ([rank - (len(left) + 1) / 2 for rank in ranks(values)] for values in (left, right))
    return sum(a * b for a, b in zip(left, right)) / math.hypot(*left) / math.hypot(*right)


def agreement(rises, scores, k):
    named, measured = (set(oracles.ranked([0.0] * len(rises), values, k)) for values in (scores, rises))
    return len(named & measured) / k


@pytest.mark.parametrize("kwargs", [{"beta": 1.0}, {"beta": 0.5, "seed": 3}, {"mask": "element"}, {"adaptive": True}])
def test_it_is_the_overlap_and_spearmans_correlation_with_the_rises_of_the_next_step(kwargs):
    batch = oracles.batch(20, dtype=torch.float64)
    model, optimizer = build(**kwargs)
    for step in range(2):
        optimizer.step(oracles.losses_of(model), *oracles.batch(20, seed=step + 5, dtype=torch.float64))
    targets = batch[1].double() + 0.1 * batch[0][:, 0]
    got = ranking_agreement(optimizer, oracles.losses_of(model), *batch, ranking=lambda context: targets)
    rises = measured_by_hand(model, optimizer, batch)
    assert got.shared == agreement(rises, targets.tolist(), 8)
    assert got.correlation == pytest.approx(spearman(rises, targets.tolist()), abs=1e-12)
    assert got.chance == 0.4


def test_scores_that_are_equal_share_their_rank():
    batch = oracles.batch(20, dtype=torch.float64)
    model, optimizer = build()
    got = ranking_agreement(
        optimizer, oracles.losses_of(model), *batch, ranking=lambda context: context.batch[1].double()
    )
    rises = measured_by_hand(model, optimizer, batch)
    assert got.correlation == pytest.approx(spearman(rises, batch[1].tolist()), abs=1e-12)


def test_the_rises_themselves_agree_in_full_and_their_opposite_not_at_all():
    batch = oracles.batch(20, dtype=torch.float64)
    model, optimizer = build(beta=1.0)
    rises = torch.tensor(measured_by_hand(*build(beta=1.0), batch))
    same = ranking_agreement(optimizer, oracles.losses_of(model), *batch, ranking=lambda context: rises)
    assert same == (1.0, pytest.approx(1.0), 0.4)
    other = ranking_agreement(optimizer, oracles.losses_of(model), *batch, ranking=lambda context: -rises)
    assert other == (0.0, pytest.approx(-1.0), 0.4)


def test_where_the_head_alone_moves_a_little_first_order_names_the_same_samples():
    model = oracles.mlp(dtype=torch.float64)
    groups = [{"params": model[:4].parameters(), "rho": 0.0}, {"params": model[4].parameters(), "rho": 1e-4}]
    optimizer = ESAM(groups, torch.optim.SGD, lr=0.1, beta=1.0, gamma=0.5, model=model)
    got = ranking_agreement(optimizer, oracles.losses_of(model), *oracles.batch(32, dtype=torch.float64))
    assert got == (1.0, pytest.approx(1.0, abs=0.01), 0.5)


def test_constant_scores_have_no_correlation():
    model, optimizer = build()
    batch = oracles.batch(20, dtype=torch.float64)
    got = ranking_agreement(optimizer, oracles.losses_of(model), *batch, ranking=lambda context: 0 * context.losses)
    assert math.isnan(got.correlation)


def test_where_the_base_optimizer_maximizes_the_samples_that_fall_most_are_compared():
    batch = oracles.batch(20, dtype=torch.float64)
    model, optimizer = build(beta=1.0, maximize=True)
    scores = batch[0][:, 0]
    got = ranking_agreement(optimizer, oracles.losses_of(model), *batch, ranking=lambda context: scores)
    rises = measured_by_hand(model, optimizer, batch)
    assert got.shared == agreement([-rise for rise in rises], scores.tolist(), 8)


@pytest.mark.parametrize("ranking", ["first_order", "random", lambda context: 1 / 0])
def test_nothing_is_left_changed(ranking):
    model, optimizer = build(oracles.noisy_mlp())
    torch.manual_seed(3)
    optimizer.step(oracles.losses_of(model), *oracles.batch(20))
    hooks = len(model[4]._forward_hooks)
    before, state = oracles.snapshot(model, optimizer), copy.deepcopy(optimizer.state_dict())
    try:
        ranking_agreement(optimizer, oracles.losses_of(model), *oracles.batch(20), ranking=ranking)
    except ZeroDivisionError:
        assert callable(ranking)
    oracles.assert_unchanged(before, oracles.snapshot(model, optimizer))
    assert optimizer.state_dict()["esam"] == state["esam"]
    assert len(model[4]._forward_hooks) == hooks
    assert model[1].track_running_stats


def test_parameters_that_are_not_the_models_keep_their_gradients():
    """Those of a loss, of which the optimizer knows and the model does not."""
    model = oracles.mlp(dtype=torch.float64)
    temperature = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    params = [*model.parameters(), temperature]
    optimizer = ESAM(params, torch.optim.SGD, lr=0.1, rho=0.5, gamma=0.4, beta=1.0, model=model)
    grad = temperature.grad = torch.tensor(3.0, dtype=torch.float64)

    def closure(inputs, target):
        return oracles.losses_of(lambda x: model(x) / temperature)(inputs, target)

    ranking_agreement(optimizer, closure, *oracles.batch(20, dtype=torch.float64), ranking="random")
    assert temperature.grad is grad
    assert (float(grad), float(temperature)) == (3.0, 2.0)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_no_hook_is_left_while_the_exception_is_looked_at(where):
    """A notebook keeps the last traceback, and all that its frames hold."""
    model, optimizer = build()

    def closure(inputs, target):
        losses = oracles.losses_of(model)(inputs, target)
        if where == "backward":
            losses.register_hook(lambda grad: 1 / 0)
        return losses if where == "backward" else 1 / 0

    with pytest.raises(ZeroDivisionError) as raised:
        ranking_agreement(optimizer, closure, *oracles.batch(20, dtype=torch.float64))
    assert raised.tb is not None
    assert not model[4]._forward_hooks


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_distributed_model_is_measured_inside_its_wrapper(process_group):
    batch = oracles.batch(20, dtype=torch.float64)
    model, optimizer = build()
    expected = ranking_agreement(optimizer, oracles.losses_of(model), *batch)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    _, optimizer = build(wrapped)
    assert ranking_agreement(optimizer, oracles.losses_of(wrapped.module), *batch) == expected
    assert wrapped.require_backward_grad_sync


def test_both_forwards_see_the_same_dropout():
    model, optimizer = build(oracles.noisy_mlp(), beta=1.0)
    optimizer.param_groups[0]["rho"] = 1e-30
    got = ranking_agreement(
        optimizer, oracles.losses_of(model), *oracles.batch(20), ranking=lambda context: -torch.arange(20.0)
    )
    assert got.shared == 1.0
    assert math.isnan(got.correlation)


@pytest.mark.parametrize(
    ("kwargs", "arguments", "error", "message"),
    [
        ({"model": None}, {}, ValueError, "the optimizer knows no model: build it with model="),
        ({"rho": 0.0}, {}, ValueError, "no group that trains has a radius"),
        ({"gamma": 1.0}, {}, ValueError, "gamma = 1.0 selects all 12 samples"),
        ({}, {"ranking": "rise"}, ValueError, 'ranking="rise" is what the others are compared with'),
        ({}, {"ranking": "loss"}, ValueError, "ranking must be one of"),
    ],
)
def test_what_cannot_be_compared_is_refused(kwargs, arguments, error, message):
    model, optimizer = build(oracles.mlp(), **kwargs)
    oracles.assert_refused(
        lambda: ranking_agreement(optimizer, oracles.losses_of(model), *oracles.batch(), **arguments),
        error,
        message,
        model,
        optimizer,
    )


def test_a_model_or_a_step_that_is_under_way_is_refused():
    model, optimizer = build(oracles.mlp())
    with pytest.raises(TypeError, match="optimizer must be an ESAM, got Sequential"):
        ranking_agreement(model, oracles.losses_of(model), *oracles.batch())
    optimizer.backward(oracles.losses_of(model)(*oracles.batch()).mean())
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="ranking_agreement while the weights are perturbed"):
        diagnostics.ranking_agreement(optimizer, oracles.losses_of(model), *oracles.batch())
