"""ranking="random": every B+ is as likely, drawn from seed and step. On average the second gradient is SAM's."""

import math

import oracles
import pytest
import torch
from torch import nn

from esam_kernels import ESAM, SAM
from esam_kernels.backends import reference
from esam_kernels.ranking.base import RankingContext
from esam_kernels.ranking.random import Random

# Samples count from here on, above elements and tensors.
SAMPLE_STREAM = 3 << 61


def build(model, seed=0, **kwargs):
    return ESAM(model.parameters(), torch.optim.SGD, lr=0.0, ranking="random", seed=seed, model=model, **kwargs)


def drawn(optimizer, samples=12):
    """B+ of one step, by index."""
    seen = []
    parameter = optimizer.param_groups[0]["params"][0]

    def losses(indices):
        seen.append(indices.tolist())
        return parameter.sum() * torch.ones(len(indices))

    optimizer.step(losses, torch.arange(samples))
    return seen[-1]


def wanted(seed, step, samples, k):
    words = [oracles.word(seed, step, 4 * SAMPLE_STREAM + i) for i in range(samples)]
    return oracles.ranked([0.0] * samples, words, k)


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 1])
def test_b_plus_is_drawn_by_philox_from_seed_and_step(seed):
    optimizer = build(oracles.mlp(), seed=seed, gamma=0.4)
    assert [drawn(optimizer) for _ in range(4)] == [wanted(seed, step, 12, 5) for step in range(4)]


def test_scores_are_the_ranks_of_the_words():
    context = RankingContext(torch.zeros(9), (), None, seed=5, step=3)
    scores = Random().scores(context)
    words = [oracles.word(5, 3, 4 * SAMPLE_STREAM + i) for i in range(9)]
    assert scores.tolist() == [sum(other <= word for other in words) for word in words]
    assert scores.dtype == torch.float32


def test_of_two_equal_words_the_earlier_has_the_higher_rank(monkeypatch):
    words = torch.tensor([[7], [9], [7], [9]]).unbind()
    monkeypatch.setattr(reference, "philox", lambda *_: words)
    assert Random().scores(RankingContext(torch.zeros(4), (), None, seed=0, step=0)).tolist() == [2.0, 4.0, 1.0, 3.0]


def test_a_resumed_run_draws_what_the_first_one_would_have():
    first = build(oracles.mlp(), seed=3)
    before = [drawn(first) for _ in range(3)]
    saved = first.state_dict()
    second = build(oracles.mlp())
    second.load_state_dict(saved)
    assert drawn(second) == drawn(first) == wanted(3, 3, 12, 6)
    assert before == [wanted(3, step, 12, 6) for step in range(3)]


def test_the_parts_of_a_batch_draw_differently():
    optimizer = build(oracles.mlp())
    seen = []
    parameter = optimizer.param_groups[0]["params"][0]

    def losses(indices):
        seen.append(indices.tolist())
        return parameter.sum() * torch.ones(len(indices))

    optimizer.step(losses, torch.arange(24), micro_batch=12)
    assert [seen[1], [i - 12 for i in seen[3]]] == [wanted(0, 0, 12, 6), wanted(0, 1, 12, 6)]


def test_every_sample_is_drawn_as_often():
    optimizer, steps = build(oracles.mlp(), gamma=0.25), 600
    counts = torch.zeros(12)
    for _ in range(steps):
        counts[drawn(optimizer)] += 1
    deviation = math.sqrt(steps * 0.25 * 0.75)
    assert counts.sum() == 3 * steps
    assert (counts - steps / 4).abs().max() < 4 * deviation


def test_the_second_gradient_is_sams_on_average():
    inputs, target = oracles.batch(12)

    def second_gradient(optimizer, model):
        optimizer.step(oracles.losses_of(model), inputs, target)
        return torch.cat([param.grad.flatten().double() for param in model.parameters()])

    model = oracles.mlp()
    sam = second_gradient(SAM(model.parameters(), torch.optim.SGD, lr=0.0, rho=0.5), model)
    model = oracles.mlp()
    optimizer = build(model, beta=1.0, gamma=0.5, rho=0.5)
    drawn_gradients = torch.stack([second_gradient(optimizer, model) for _ in range(400)])
    error = drawn_gradients.std(dim=0) / math.sqrt(400)
    assert ((drawn_gradients.mean(dim=0) - sam).abs() <= 4.5 * error + 1e-7).all()
    assert error.max() < 0.1 * sam.abs().max()
    assert (drawn_gradients[0] - sam).abs().max() > 10 * error.max()


def test_the_batch_and_the_losses_have_no_part_in_it_and_torchs_random_numbers_are_not_used():
    before = torch.get_rng_state()
    model = nn.Sequential(nn.Linear(6, 3))
    torch.set_rng_state(before)
    optimizer = build(model)
    optimizer.step(oracles.losses_of(model), *oracles.batch())
    assert torch.equal(before, torch.get_rng_state())
    assert drawn(optimizer) == wanted(0, 1, 12, 6)
