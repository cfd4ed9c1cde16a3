"""ranking=callable: what it is given, and what it may return."""

import dataclasses
import gc
import weakref

import oracles
import pytest
import torch
from torch import nn

from esam_kernels import ESAM, RankingContext, ranking


def build(function, network=None, **kwargs):
    model = oracles.mlp() if network is None else network
    return model, ESAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.5, ranking=function, **kwargs)


def chosen(optimizer, losses, *batch):
    """B+ by index, in phases."""
    before = losses(*batch)
    optimizer.backward(before.mean())
    optimizer.first_step(zero_grad=True)
    indices = optimizer.select(before, None, torch.arange(len(before)))
    optimizer.restore()
    return indices.tolist()


def test_it_sees_losses_batch_head_seed_and_step():
    seen = []

    def largest_loss(context):
        seen.append(context)
        return context.losses

    model = oracles.mlp()
    _, optimizer = build(largest_loss, model, model=model, seed=4, beta=1.0)
    batches = [oracles.batch(seed=step) for step in range(2)]
    for step, (inputs, target) in enumerate(batches):
        logits = model(inputs)
        logits.retain_grad()
        losses = nn.functional.cross_entropy(logits, target, reduction="none")
        losses.mean().backward()
        hidden = model[:4](inputs)
        optimizer.step(oracles.losses_of(model), inputs, target)
        context = seen[-1]
        assert isinstance(context, RankingContext)
        assert (context.seed, context.step) == (4, step)
        assert torch.equal(context.losses, losses)
        assert not context.losses.requires_grad
        assert [given is wanted for given, wanted in zip(context.batch, (inputs, target))] == [True, True]
        torch.testing.assert_close(context.head.input, hidden)
        torch.testing.assert_close(context.head.output_grad, logits.grad)
        assert context.head.has_bias
    assert len(seen) == 2


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_samples_with_the_largest_scores_are_taken(sign):
    model, optimizer = build(lambda context: sign * context.losses)
    losses = oracles.losses_of(model)(*oracles.batch()).detach()
    wanted = oracles.ranked([0.0] * 12, (sign * losses).tolist(), 6)
    assert chosen(optimizer, oracles.losses_of(model), *oracles.batch()) == wanted


def test_scores_may_use_targets_of_a_batch_that_is_a_dict():
    model, optimizer = build(lambda context: context.batch[0]["target"].double())
    inputs, target = oracles.batch()

    def losses(batch):
        return oracles.losses_of(model)(batch["inputs"], batch["target"])

    before = losses({"inputs": inputs, "target": target})
    optimizer.backward(before.mean())
    optimizer.first_step()
    kept = optimizer.select(before, None, {"inputs": inputs, "target": target})
    order = oracles.ranked([0.0] * 12, target.tolist(), 6)
    assert torch.equal(kept["target"], target[order])
    assert torch.equal(kept["inputs"], inputs[order])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_scores_of_every_floating_point_type_are_ranked(dtype):
    values = torch.tensor([3.0, -1.0, 2.0, 2.0, -0.0, 0.0, 7.0, 1.0, 5.0, -2.0, 0.5, 4.0], dtype=dtype)
    model, optimizer = build(lambda context: values)
    wanted = oracles.ranked([0.0] * 12, values.tolist(), 6)
    assert chosen(optimizer, oracles.losses_of(model), *oracles.batch()) == wanted


@pytest.mark.parametrize("head", ["no model is given", "the head is used twice", "the head is unused"])
def test_a_function_that_reads_no_head_needs_none(head):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 3), nn.Linear(3, 3)

        def forward(self, inputs):
            hidden = self.first(inputs)
            return hidden if head == "the head is unused" else self.last(self.last(hidden))

    heads = []

    def function(context):
        heads.append(context.head)
        return context.losses

    model = Odd()
    _, optimizer = build(function, model, model=None if head == "no model is given" else model)
    optimizer.step(oracles.losses_of(model), *oracles.batch())
    assert heads == [None]


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        (lambda losses: losses.mean(), r"torch.float32 of shape \(\) on cpu"),
        (lambda losses: losses[:5], r"torch.float32 of shape \(5,\) on cpu"),
        (lambda losses: losses[:, None], r"torch.float32 of shape \(12, 1\) on cpu"),
        (lambda losses: torch.arange(12), r"torch.int64 of shape \(12,\) on cpu"),
        (lambda losses: losses > 0, r"torch.bool of shape \(12,\) on cpu"),
        (lambda losses: losses.to("meta"), r"torch.float32 of shape \(12,\) on meta"),
        (lambda losses: losses.tolist(), "list"),
        (lambda losses: None, "NoneType"),
    ],
)
def test_what_is_not_one_score_a_sample_on_the_device_is_refused_and_the_weights_come_back(returned, got):
    model, optimizer = build(lambda context: returned(context.losses))
    before = oracles.weights_of(model)
    message = rf"the ranking must return one floating-point score per sample, shape \(12,\) on cpu, got {got}"
    with pytest.raises(ValueError, match=message):
        optimizer.step(oracles.losses_of(model), *oracles.batch())
    assert oracles.same_bits(before, oracles.weights_of(model))


def test_an_exception_in_the_function_reaches_the_user_and_the_weights_come_back():
    def broken(context):
        raise KeyError("labels")

    model, optimizer = build(broken)
    before = oracles.weights_of(model)
    with pytest.raises(KeyError, match="labels"):
        optimizer.step(oracles.losses_of(model), *oracles.batch())
    assert oracles.same_bits(before, oracles.weights_of(model))


def test_it_is_called_without_gradients_and_not_at_all_where_all_samples_are_taken():
    modes = []

    def function(context):
        modes.append(torch.is_grad_enabled())
        return context.losses

    model, optimizer = build(function)
    optimizer.step(oracles.losses_of(model), *oracles.batch())
    assert modes == [False]
    optimizer.gamma = 1.0
    optimizer.step(oracles.losses_of(model), *oracles.batch())
    assert modes == [False]


def test_a_new_ranking_is_one_class_and_one_line_in_a_table(monkeypatch):
    class LargestLoss(ranking.Ranking):
        def scores(self, context):
            return context.losses

    monkeypatch.setitem(ranking.RANKINGS, "loss", LargestLoss)
    model, optimizer = build("loss")
    losses = oracles.losses_of(model)(*oracles.batch()).tolist()
    assert chosen(optimizer, oracles.losses_of(model), *oracles.batch()) == oracles.ranked([0.0] * 12, losses, 6)
    assert optimizer.state_dict()["esam"]["ranking"] == "loss"
    assert optimizer.relative_cost == pytest.approx((2 + 0.6 + 3 * 0.5) / 3)


@dataclasses.dataclass
class Below:
    """The hardest of those below a limit. As any dataclass that can be changed, it has no hash."""

    limit: float

    def __call__(self, context):
        return torch.where(context.losses < self.limit, context.losses, -1.0)


def test_an_object_without_a_hash_ranks_and_is_let_go():
    model, optimizer = build(Below(1.2))
    losses = oracles.losses_of(model)(*oracles.batch()).detach()
    scores = torch.where(losses < 1.2, losses, -1.0)
    assert 0 < int((scores < 0.0).sum()) < len(scores)
    wanted = oracles.ranked([0.0] * 12, scores.tolist(), 6)
    assert chosen(optimizer, oracles.losses_of(model), *oracles.batch()) == wanted
    assert optimizer.state_dict()["esam"]["ranking"] == "Below"
    held = weakref.ref(optimizer._perturbation.settings.ranking)
    del optimizer
    gc.collect()
    assert held() is None
