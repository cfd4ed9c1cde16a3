"""``relative_cost`` is what a step runs, counted by hooks; a step with no radius is the base optimizer's."""

import math

import oracles
import pytest
import torch
from torch import nn

from esam_kernels import ESAM, SAM, normalization_groups
from esam_kernels.schedules import PhaseSchedule

SAMPLES = 16


def network():
    torch.manual_seed(0)
    layers = [
        layer for _ in range(4) for layer in (nn.Linear(6, 6, bias=False), nn.LayerNorm(6, bias=False), nn.Tanh())
    ]
    return nn.Sequential(*layers, nn.Linear(6, 3))


class Count:
    """What ``model`` runs, in forwards over the whole batch.

    A forward is 1, the gradients of the layers' inputs are 1, and those of the weights as much as their share.
    """

    def __init__(self, model):
        self.forwards = self.backwards = self.weight_gradients = 0.0
        self._samples = 0
        weights = sum(param.numel() for param in model.parameters())
        model.register_forward_hook(self._after_forward)
        for param in model.parameters():
            share = param.numel() / weights
            param.register_hook(lambda _, share=share: self._after_gradient(share))

    def _after_forward(self, _, args, output):
        self.forwards += len(args[0]) / SAMPLES
        if output.requires_grad:
            output.register_hook(self._after_backward)

    def _after_backward(self, grad):
        self._samples = len(grad)
        self.backwards += len(grad) / SAMPLES

    def _after_gradient(self, share):
        self.weight_gradients += share * self._samples / SAMPLES

    def taken(self):
        """All since the last call."""
        total = self.forwards + self.backwards + self.weight_gradients
        self.forwards = self.backwards = self.weight_gradients = 0.0
        return total


def build(model, params=None, **kwargs):
    settings = {"lr": 0.1, "momentum": 0.9, "rho": 0.2, "model": model, **kwargs}
    return ESAM(model.parameters() if params is None else params, torch.optim.SGD, **settings)


def assert_counted(model, optimizer, steps=3, **arguments):
    """The count of each step is its ``relative_cost``, asked before it."""
    count = Count(model)
    for step in range(steps):
        expected = optimizer.relative_cost
        optimizer.step(oracles.losses_of(model), *oracles.batch(SAMPLES, seed=step), **arguments)
        assert count.taken() / 3 == pytest.approx(expected, rel=1e-6)


ONE_PASS = [{"ascent": ascent, "gamma": 1.0, "beta": 1.0} for ascent in ("previous", "momentum")]
RANKINGS = {"rise": 5.5, "first_order": 4.5, "random": 4.5, "a function": 4.5}


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("mask", ["tensor", "element"])
def test_two_passes_cost_what_the_ranking_makes_them_cost(ranking, mask):
    model = network()
    given = (lambda context: context.losses) if ranking == "a function" else ranking
    optimizer = build(model, ranking=given, mask=mask, beta=1.0, gamma=0.5)
    assert optimizer.relative_cost == pytest.approx(RANKINGS[ranking] / 3)
    assert_counted(model, optimizer)
    assert_counted(model, optimizer, micro_batch=4)


@pytest.mark.parametrize("ranking", ["rise", "first_order", "random", lambda context: context.losses])
def test_with_the_whole_batch_in_pass_2_no_ranking_costs_anything(ranking):
    model = network()
    optimizer = build(model, ranking=ranking, beta=1.0, gamma=1.0)
    assert optimizer.relative_cost == 2.0
    assert_counted(model, optimizer)


def test_sam_costs_two_steps():
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.2, model=model)
    assert optimizer.relative_cost == 2.0
    assert_counted(model, optimizer)


@pytest.mark.parametrize("kwargs", ONE_PASS, ids=lambda kwargs: kwargs["ascent"])
def test_one_pass_costs_the_base_optimizers_step(kwargs):
    model = network()
    optimizer = build(model, **kwargs)
    assert optimizer.relative_cost == 1.0
    assert_counted(model, optimizer)
    assert_counted(model, optimizer, micro_batch=4)


@pytest.mark.parametrize(
    ("beta", "mask", "forwards"), [(0.6, "tensor", 5.1), (0.3, "tensor", 4.8), (0.6, "element", 5.5)]
)
def test_a_draw_of_whole_tensors_saves_its_share_of_the_weight_gradients_on_average(beta, mask, forwards):
    model, steps = nn.Sequential(*[nn.Linear(6, 6, bias=False) for _ in range(12)]), 150
    optimizer, count = build(model, beta=beta, mask=mask, gamma=0.5), Count(model)
    assert optimizer.relative_cost == pytest.approx(forwards / 3)
    for step in range(steps):
        optimizer.step(oracles.losses_of(model), *oracles.batch(SAMPLES, seed=step % 7))
    deviation = math.sqrt(beta * (1 - beta) / 12 / steps) if mask == "tensor" else 0.0
    assert count.taken() / steps == pytest.approx(forwards, abs=4 * deviation + 1e-6)


@pytest.mark.parametrize("ranking", ["rise", "first_order"])
def test_normalization_layers_alone_cost_their_share_of_the_weight_gradients(ranking):
    model = network()
    share = 4 * 6 / sum(param.numel() for param in model.parameters())
    optimizer = build(model, normalization_groups(model, 0.2), ranking=ranking, beta=1.0, gamma=0.5)
    assert optimizer.relative_cost == pytest.approx((3.5 + share + (ranking == "rise")) / 3)
    assert_counted(model, optimizer)


def test_the_cost_follows_the_phases_of_a_schedule():
    model = network()
    optimizer = build(model, ranking="first_order", beta=1.0, gamma=0.5)
    schedule, count = PhaseSchedule(optimizer, "rho", 0.2, start=2, stop=4), Count(model)
    costs = []
    for step in range(6):
        expected = optimizer.relative_cost
        optimizer.step(oracles.losses_of(model), *oracles.batch(SAMPLES, seed=step))
        costs.append(count.taken() / 3)
        assert costs[-1] == pytest.approx(expected)
        schedule.step()
    assert costs == pytest.approx([1.0, 1.0, 1.5, 1.5, 1.0, 1.0])


# -- no radius -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, {"ranking": "first_order"}, {"gamma": 1.0}, {"mask": "element"}, *ONE_PASS])
@pytest.mark.parametrize("base", [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {})])
def test_without_a_radius_a_step_is_the_base_optimizers_in_bits_and_passes(kwargs, base):
    kind, options = base
    models = [network(), network()]
    plain = kind(models[0].parameters(), lr=0.1, **options)
    settings = {"lr": 0.1, "rho": 0.0, "model": models[1], **options, **kwargs}
    optimizer, count = ESAM(models[1].parameters(), kind, **settings), Count(models[1])
    assert optimizer.relative_cost == 1.0
    for step in range(3):
        inputs, target = oracles.batch(SAMPLES, seed=step)
        plain.zero_grad()
        expected = oracles.losses_of(models[0])(inputs, target).mean()
        expected.backward()
        plain.step()
        loss = optimizer.step(oracles.losses_of(models[1]), inputs, target)
        assert torch.equal(loss, expected.detach())
        assert (count.forwards, count.backwards) == (1.0, 1.0)
        assert count.taken() == pytest.approx(3.0)
    assert oracles.same_bits(oracles.weights_of(models[0]), oracles.weights_of(models[1]))


@pytest.mark.parametrize("ranking", ["rise", "first_order"])
def test_gradients_of_a_group_without_a_radius_are_not_computed_in_pass_1(ranking):
    model = network()
    groups = [{"params": model[0:6].parameters()}, {"params": model[6:].parameters(), "rho": 0.0}]
    optimizer = build(model, groups, ranking=ranking, beta=1.0, gamma=0.5)
    computed = set()
    for name, param in model.named_parameters():
        param.register_hook(lambda _, name=name: computed.add(name))
    optimizer.backward(oracles.losses_of(model)(*oracles.batch(SAMPLES)).mean())
    assert computed == {name for name, _ in model.named_parameters() if int(name.split(".")[0]) < 6}
    assert {name for name, param in model.named_parameters() if param.grad is not None} == computed


@pytest.mark.parametrize("ranking", ["rise", "first_order"])
def test_a_radius_of_frozen_weights_alone_is_none(ranking):
    model = network()
    groups = normalization_groups(model, 0.2)
    for param in groups[0]["params"]:
        param.requires_grad_(False)
    optimizer, before, count = build(model, groups, ranking=ranking, gamma=0.5), oracles.weights_of(model), 0

    def losses(*batch):
        nonlocal count
        count += len(batch[0])
        return oracles.losses_of(model)(*batch)

    assert optimizer.relative_cost == 1.0
    optimizer.step(losses, *oracles.batch(SAMPLES))
    assert count == SAMPLES
    assert not oracles.same_bits(before, oracles.weights_of(model))
