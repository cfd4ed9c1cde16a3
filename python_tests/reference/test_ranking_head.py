"""What is recorded at the head in pass 1, and what is left of it on the model: nothing."""

import copy
import gc
import pickle
import weakref

import oracles
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from esam_kernels import ESAM, diagnostics


def build(network=None, **kwargs):
    model = oracles.mlp() if network is None else network
    options = {"rho": 0.5, "ranking": "first_order", "model": model, **kwargs}
    return model, ESAM(model.parameters(), torch.optim.SGD, lr=0.1, **options)


def chosen_by(optimizer, losses, *batch):
    """The samples of B+ of one step in phases, by their index."""
    before = losses(*batch)
    optimizer.backward(before.mean())
    optimizer.first_step(zero_grad=True)
    indices = optimizer.select(before, None, torch.arange(len(before)))
    optimizer.restore()
    return indices.tolist()


def hooks_of(layer):
    return len(layer._forward_hooks)


# -- the hook and who holds whom -------------------------------------------------------------------------------------


def test_the_model_does_not_keep_the_optimizer_and_the_hook_goes_with_it():
    model, optimizer = build()
    optimizer.step(oracles.losses_of(model), *oracles.batch())
    assert hooks_of(model[4]) == 1
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    assert hooks_of(model[4]) == 0


def test_a_graph_that_somebody_keeps_does_not_keep_the_recorder():
    model, optimizer = build()
    losses = oracles.losses_of(model)(*oracles.batch())
    recorder = weakref.ref(optimizer._phases._recorder)
    del optimizer
    gc.collect()
    assert recorder() is None
    losses.mean().backward()
    assert model[4].weight.grad is not None


def test_losses_that_are_differentiated_elsewhere_do_not_pile_up():
    model, optimizer = build()
    inputs = [oracles.batch(seed=seed)[0] for seed in range(3)]
    for each in inputs:
        model(each).sum().backward()
    recorder = optimizer._phases._recorder
    kept = [entry for entry in vars(recorder).values() if isinstance(entry, list)]
    assert sum(map(len, kept)) == 1


@pytest.mark.parametrize("ranking", ["rise", "random"])
def test_rankings_that_read_no_head_leave_the_model_alone(ranking):
    model, _ = build(ranking=ranking)
    assert hooks_of(model[4]) == 0


def test_two_optimizers_over_one_model_do_not_disturb_each_other():
    model, first = build(seed=1)
    alone, lonely = build(seed=1)
    second = ESAM(model.parameters(), torch.optim.SGD, lr=0.0, rho=0.5, ranking="first_order", model=model)
    for step in range(3):
        batch = oracles.batch(seed=step)
        first.step(oracles.losses_of(model), *batch)
        second.step(oracles.losses_of(model), *batch)
        lonely.step(oracles.losses_of(alone), *batch)
        wanted = chosen_by(lonely, oracles.losses_of(alone), *batch)
        assert chosen_by(second, oracles.losses_of(model), *batch) == wanted
        assert chosen_by(first, oracles.losses_of(model), *batch) == wanted
    assert oracles.same_bits(oracles.weights_of(model), oracles.weights_of(alone))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_of_model_and_optimizer_goes_on_bitwise(way):
    model, optimizer = build()
    optimizer.step(oracles.losses_of(model), *oracles.batch())
    other, other_optimizer = way((model, optimizer))
    for each, its in ((model, optimizer), (other, other_optimizer)):
        its.step(oracles.losses_of(each), *oracles.batch(seed=2))
    assert oracles.same_bits(oracles.weights_of(model), oracles.weights_of(other))
    assert chosen_by(optimizer, oracles.losses_of(model), *oracles.batch(seed=3)) == chosen_by(
        other_optimizer, oracles.losses_of(other), *oracles.batch(seed=3)
    )


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_alone_is_recorded_by_nobody(way):
    model, optimizer = build()
    other = way(model)
    oracles.losses_of(other)(*oracles.batch(samples=5)).mean().backward()
    assert not optimizer._phases._recorder.has_recorded
    inputs, _ = oracles.batch()
    assert torch.equal(model(inputs), other(inputs))


# -- what counts as pass 1 -------------------------------------------------------------------------------------------


def test_a_loss_differentiated_between_the_steps_has_no_part_in_the_ranking():
    model, optimizer = build()
    batch, losses = oracles.batch(), oracles.losses_of(model)
    wanted = chosen_by(optimizer, losses, *batch)
    for _ in range(2):
        (-losses(*oracles.batch(seed=7)).mean()).backward()
    assert chosen_by(optimizer, losses, *batch) == wanted


@pytest.mark.parametrize("measure", [diagnostics.sharpness, diagnostics.ranking_agreement])
@pytest.mark.parametrize("is_in_pass_1", [False, True])
def test_a_measurement_has_no_part_in_the_ranking_however_pass_1_is_started(measure, is_in_pass_1):
    model, optimizer = build()
    losses, batch = oracles.losses_of(model), oracles.batch(16)
    expected = chosen_by(optimizer, losses, *batch)
    before = losses(*batch)
    if is_in_pass_1:
        before.mean().backward()
    measure(optimizer if measure is diagnostics.ranking_agreement else model, losses, *batch)
    if not is_in_pass_1:
        before = losses(*batch)
        before.mean().backward()
    optimizer.first_step(zero_grad=True)
    assert optimizer.select(before, None, torch.arange(16)).tolist() == expected


def test_a_retained_graph_that_is_differentiated_twice_counts_once():
    model, optimizer = build()
    batch, losses = oracles.batch(), oracles.losses_of(model)
    wanted = chosen_by(optimizer, losses, *batch)
    before = losses(*batch)
    (3.0 * before).sum().backward(retain_graph=True)
    optimizer.zero_grad()
    optimizer.backward(before.mean())
    optimizer.first_step()
    assert optimizer.select(before, None, torch.arange(12)).tolist() == wanted


def test_a_backward_of_the_users_own_counts_where_there_is_no_other():
    model, optimizer = build(beta=1.0)
    batch, losses = oracles.batch(), oracles.losses_of(model)
    wanted = chosen_by(optimizer, losses, *batch)
    before = losses(*batch)
    before.mean().backward()
    optimizer.first_step(zero_grad=True)
    assert optimizer.select(before, None, torch.arange(12)).tolist() == wanted


def test_the_parts_of_an_accumulated_batch_are_ranked_as_the_whole():
    model, optimizer = build()
    inputs, target = oracles.batch()
    losses = oracles.losses_of(model)
    wanted = chosen_by(optimizer, losses, inputs, target)
    before = []
    for part in zip(inputs.split(5), target.split(5)):
        before.append(losses(*part))
        optimizer.backward(before[-1].sum() / 12)
    optimizer.first_step(zero_grad=True)
    assert optimizer.select(torch.cat(before), None, torch.arange(12)).tolist() == wanted


def test_a_step_after_one_that_raised_ranks_its_own_batch_alone():
    model, optimizer = build()
    losses = oracles.losses_of(model)
    before = losses(*oracles.batch(seed=3))
    optimizer.backward(before.mean())
    optimizer.zero_grad()
    batch = oracles.batch()
    fresh, its = build()
    assert chosen_by(optimizer, losses, *batch) == chosen_by(its, oracles.losses_of(fresh), *batch)


@pytest.mark.parametrize("in_phases", [False, True])
def test_a_step_after_an_update_that_raised_ranks_its_own_batch(in_phases):
    model, optimizer = build()
    losses, batch, other = oracles.losses_of(model), oracles.batch(16), oracles.batch(16, seed=3)
    expected = chosen_by(optimizer, losses, *batch)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = optimizer.base_optimizer.register_step_pre_hook(interrupt)
    if in_phases:
        losses(*other).mean().backward()
        optimizer.first_step()
    with pytest.raises(KeyboardInterrupt):
        optimizer.second_step() if in_phases else optimizer.step(losses, *other)
    handle.remove()
    assert chosen_by(optimizer, losses, *batch) == expected


def test_a_pass_1_that_raised_does_not_count():
    model, optimizer = build(beta=1.0)
    batch, losses = oracles.batch(), oracles.losses_of(model)
    wanted = chosen_by(optimizer, losses, *batch)

    def out_of_memory(_):
        handle.remove()
        raise MemoryError

    handle = model[0].weight.register_hook(out_of_memory)
    before = losses(*batch)
    with pytest.raises(MemoryError):
        optimizer.backward(before.mean())
    assert chosen_by(optimizer, losses, *batch) == wanted


class Scaled(nn.Module):
    """A network whose last parameter comes after the head."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.body = oracles.mlp()

    def forward(self, inputs):
        return self.scale * self.body(inputs)


def test_the_head_is_recorded_where_only_a_weight_behind_it_is_drawn():
    model = Scaled()
    groups = [{"params": [model.scale]}, {"params": model.body.parameters(), "rho": 0.0}]
    optimizer = ESAM(groups, torch.optim.SGD, lr=0.1, rho=0.5, ranking="first_order", model=model)
    fresh, its = build(oracles.mlp())
    batch = oracles.batch()
    wanted = chosen_by(its, oracles.losses_of(fresh), *batch)
    assert chosen_by(optimizer, oracles.losses_of(model), *batch) == wanted
    optimizer.backward(oracles.losses_of(model)(*batch).mean())
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["scale"]


def test_the_head_is_found_inside_a_checkpointed_block():
    model = oracles.mlp()
    optimizer = ESAM(
        model.parameters(), torch.optim.SGD, lr=0.1, rho=0.5, beta=1.0, ranking="first_order", head=model[4]
    )
    batch = oracles.batch()
    wanted = chosen_by(optimizer, oracles.losses_of(model), *batch)

    def losses(inputs, target):
        logits = checkpoint(model, inputs.requires_grad_(), use_reentrant=True)
        return nn.functional.cross_entropy(logits, target, reduction="none")

    assert chosen_by(optimizer, losses, *batch) == wanted


# -- refusals --------------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 3), nn.Linear(3, 3)

    def forward(self, inputs):
        return self.last(self.last(self.first(inputs)))


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(6, 3), nn.Linear(3, 3)

    def forward(self, inputs):
        return self.used(inputs)


class WithoutGradients(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 3), nn.Linear(3, 3)

    def forward(self, inputs):
        hidden = self.first(inputs)
        with torch.no_grad():
            logits = self.last(hidden)
        return hidden + logits


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Twice, r"was used 2 times in the first pass.*head=model.fc"),
        (Unused, r"was not seen in the first pass.*head=model.fc"),
        (WithoutGradients, r"was run without gradients in the first pass.*torch.no_grad\(\)"),
    ],
)
@pytest.mark.parametrize("in_phases", [False, True])
def test_a_head_that_pass_1_does_not_use_once_is_refused_and_the_weights_come_back(kind, message, in_phases):
    model, optimizer = build(kind())
    before = oracles.weights_of(model)
    call = chosen_by if in_phases else lambda optimizer, losses, *batch: optimizer.step(losses, *batch)
    with pytest.raises(RuntimeError, match=message):
        call(optimizer, oracles.losses_of(model), *oracles.batch())
    optimizer.restore()
    assert oracles.same_bits(before, oracles.weights_of(model))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"model": None}, ValueError, "needs a head, and no model was given: name the network's last linear layer"),
        ({"model": nn.Conv2d(1, 1, 1)}, ValueError, "needs a head, and Conv2d has no torch.nn.Linear"),
        ({"head": nn.Conv2d(1, 1, 1)}, TypeError, "head must be a torch.nn.Linear, got Conv2d"),
        ({"head": "fc"}, TypeError, "head must be a torch.nn.Linear, got str"),
        ({"ranking": "loss"}, ValueError, r"ranking must be one of \('rise', 'first_order', 'random'\) or a function"),
        ({"ranking": None}, ValueError, "ranking must be one of .* got None"),
    ],
)
def test_a_head_or_a_ranking_that_cannot_be_is_refused_at_once(kwargs, error, message):
    model = oracles.mlp()
    with pytest.raises(error, match=message):
        build(model, **kwargs)
    assert hooks_of(model[4]) == 0


def test_losses_of_another_batch_than_pass_1_saw_are_refused():
    model, optimizer = build()
    losses = oracles.losses_of(model)
    optimizer.backward(losses(*oracles.batch()).mean())
    optimizer.first_step()
    with pytest.raises(ValueError, match="saw 12 samples in the first pass, the batch has 10"):
        optimizer.select(torch.zeros(10), None, torch.arange(10))


def test_a_second_select_in_one_step_is_refused_with_what_to_do():
    model, optimizer = build()
    losses = oracles.losses_of(model)
    inputs, target = oracles.batch()
    for _ in range(2):
        loss_before = losses(inputs, target)
        optimizer.backward(loss_before.mean())
        optimizer.first_step(zero_grad=True)
        optimizer.select(loss_before, None, inputs)
        with pytest.raises(RuntimeError, match=r"a second select in one step.*select\(loss_before, None, inputs, tar"):
            optimizer.select(loss_before, None, target)
        optimizer.restore()
        optimizer.zero_grad()


# -- a head whose weight is computed from others -----------------------------------------------------------------------


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_the_buffers_of_a_parametrized_head_move_in_the_first_forward_only(beta):
    model = oracles.mlp()
    parametrizations.spectral_norm(model[4])
    untouched = copy.deepcopy(model)
    _, optimizer = build(model, beta=beta)
    optimizer.step(oracles.losses_of(model), *oracles.batch())
    oracles.losses_of(untouched)(*oracles.batch())
    assert oracles.same_bits(list(model.buffers()), list(untouched.buffers()))


def test_an_adaptive_head_whose_mask_prunes_nothing_ranks_as_one_without_a_mask():
    chosen = []
    for is_pruned in (False, True):
        model = oracles.mlp()
        params = list(model.parameters())
        if is_pruned:
            prune.identity(model[4], "weight")
        with torch.no_grad():
            params[4].mul_(torch.linspace(0.0, 20.0, params[4].numel()).view_as(params[4]))
        _, optimizer = build(model, beta=1.0, adaptive=True)
        losses = oracles.losses_of(model)
        chosen.append([chosen_by(optimizer, losses, *oracles.batch(32, seed=seed)) for seed in range(4)])
    assert chosen[0] == chosen[1]
