"""Contract points 5, 6, 8 and 9, and what users expect of a torch optimizer: freezing, noise, schedulers, AMP."""

import warnings
from types import SimpleNamespace

import oracles
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from esam_kernels import ESAM, SAM, RandomState, cross_entropy
from esam_kernels.step import phases

MASKS = ["tensor", "element"]


def run(model, optimizer, steps=4):
    for step in range(steps):
        optimizer.step(oracles.losses_of(model), *oracles.batch(seed=step))


@pytest.mark.parametrize("mask", MASKS)
def test_frozen_layers_stay_frozen_and_unchanged(mask):
    model = oracles.mlp()
    for param in model[2].parameters():
        param.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    frozen = [p.detach().clone() for p in model[2].parameters()]
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, weight_decay=0.1, momentum=0.9, rho=5.0, mask=mask)
    seen = []

    def losses(inputs, target):
        seen.append([p.requires_grad for p in model.parameters()])
        assert oracles.same_bits(frozen, list(model[2].parameters()))
        return oracles.losses_of(model)(inputs, target)

    for step in range(5):
        optimizer.step(losses, *oracles.batch(seed=step))
    assert all(each == flags for each in seen)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model[2].parameters())
    assert not any(len(optimizer.state[p]) for p in model[2].parameters() if p in optimizer.state)


@pytest.mark.parametrize("mask", MASKS)
def test_a_layer_may_be_frozen_and_thawed_between_steps(mask):
    model = oracles.mlp()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=5.0, mask=mask)
    run(model, optimizer)
    model[0].requires_grad_(False)
    frozen = [p.detach().clone() for p in model[0].parameters()]
    run(model, optimizer)
    assert oracles.same_bits(frozen, list(model[0].parameters()))
    model[0].requires_grad_(True)
    run(model, optimizer)
    assert not oracles.same_bits(frozen, list(model[0].parameters()))


class WithUnused(nn.Module):
    """A model of which a part has no share in the loss."""

    def __init__(self, unused=6):
        super().__init__()
        self.used = nn.Linear(oracles.FEATURES, oracles.CLASSES)
        self.unused = nn.ParameterList([nn.Parameter(torch.randn(3)) for _ in range(unused)])

    def forward(self, inputs):
        return self.used(inputs)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("beta", [0.05, 0.6])
def test_parameters_without_a_gradient_are_left_alone(mask, beta):
    """Also in the steps that draw none but those."""
    model = WithUnused()
    unused = [p.detach().clone() for p in model.unused]
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, weight_decay=0.1, rho=5.0, mask=mask, beta=beta)
    run(model, optimizer, steps=30)
    assert oracles.same_bits(unused, list(model.unused))
    assert all(p.grad is None for p in model.unused)


def test_batch_norm_statistics_move_once_a_step_by_the_first_forward():
    model, plain = oracles.noisy_mlp(), oracles.noisy_mlp()
    model[3].p = plain[3].p = 0.0
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.0, rho=5.0, model=model)
    for step in range(3):
        optimizer.step(oracles.losses_of(model), *oracles.batch(seed=step))
        plain(oracles.batch(seed=step)[0])
    assert oracles.same_bits(list(plain.buffers()), list(model.buffers()))
    assert model[1].num_batches_tracked == 3
    assert model[1].track_running_stats
    assert model[1].momentum == 0.1


def test_batch_norm_statistics_are_free_again_after_restore_and_second_step():
    model = oracles.noisy_mlp()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
    for finish in (optimizer.restore, optimizer.second_step):
        oracles.losses_of(model)(*oracles.batch()).mean().backward()
        optimizer.first_step()
        tracked = model[1].num_batches_tracked.clone()
        model(oracles.batch()[0])
        assert model[1].num_batches_tracked == tracked
        finish()
        model(oracles.batch()[0])
        assert model[1].num_batches_tracked == tracked + 1


def dropout_masks(replay):
    """Which units dropout keeps in each forward of one step."""
    torch.manual_seed(0)
    model, kept = oracles.noisy_mlp(), []
    model[3].register_forward_hook(lambda _, args, out: kept.append((out != 0) | (args[0] == 0)))
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=1e-12, model=model)
    optimizer.replay_noise = replay
    optimizer.step(oracles.losses_of(model), *oracles.batch(64))
    return kept


def test_both_forwards_see_the_same_dropout():
    first, second, _ = dropout_masks(replay=True)
    assert torch.equal(first, second)
    assert 0.3 < first.double().mean() < 0.9


def test_the_replay_of_the_noise_can_be_turned_off():
    first, second, _ = dropout_masks(replay=False)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("gamma", "expected"), [(0.5, 1), (1.0, 0)])
def test_the_random_state_is_kept_only_where_it_is_replayed(gamma, expected, monkeypatch):
    kept = []
    monkeypatch.setattr(phases, "RandomState", lambda devices: kept.append(RandomState(devices)) or kept[-1])
    model = nn.Sequential(nn.Linear(6, 4))
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, gamma=gamma, model=model)
    optimizer.step(lambda inputs: model(inputs).square().mean(dim=1), torch.ones(4, 6))
    assert len(kept) == expected


def test_the_noise_is_replayed_on_the_device_that_the_model_was_moved_to(monkeypatch):
    """After ``model.to(...)`` the parameters are the same objects, elsewhere."""
    kept = []
    monkeypatch.setattr(phases, "RandomState", lambda devices: kept.append(set(devices)))
    optimizer = ESAM(oracles.mlp().parameters(), torch.optim.SGD, lr=0.1)
    moved = [SimpleNamespace(device=torch.device("cuda", number)) for number in (1, 2)]
    monkeypatch.setattr(optimizer._perturbation.parameters, "tensors", moved)
    optimizer._phases.noise()
    assert kept == [{torch.device("cuda", 1), torch.device("cuda", 2)}]


def test_the_replay_leaves_the_generator_where_the_first_forward_had_left_it():
    """So the third forward has noise of its own, and the numbers of a step do not depend on the replay's length."""
    model = oracles.noisy_mlp()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1)
    states = []

    def losses(inputs, target):
        states.append(torch.get_rng_state())
        result = oracles.losses_of(model)(inputs, target)
        states.append(torch.get_rng_state())
        return result

    optimizer.step(losses, *oracles.batch())
    first, after_first, second, _, third, after_third = states
    assert torch.equal(first, second)
    assert torch.equal(third, after_first)
    assert torch.equal(torch.get_rng_state(), after_third)
    assert not torch.equal(first, third)


@pytest.mark.parametrize("over", ["optimizer", "base"])
@pytest.mark.parametrize("way", ["step", "two steps", "closure"])
@pytest.mark.parametrize("fuse", [False, True])
def test_learning_rate_schedulers_work_on_either_optimizer_without_warnings(over, way, fuse, request):
    if fuse:
        request.getfixturevalue("fused")
    model = oracles.mlp()
    losses = oracles.losses_of(model)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    scheduled = optimizer if over == "optimizer" else optimizer.base_optimizer

    def closure():
        optimizer.zero_grad()
        loss = losses(*oracles.batch()).mean()
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = torch.optim.lr_scheduler.StepLR(scheduled, step_size=1, gamma=0.5)
        for expected in (0.05, 0.025):
            if way == "step":
                optimizer.step(losses, *oracles.batch())
            elif way == "closure":
                optimizer.step(closure)
            else:
                losses(*oracles.batch()).mean().backward()
                optimizer.first_step(zero_grad=True)
                losses(*oracles.batch()).mean().backward()
                optimizer.second_step(zero_grad=True)
            scheduler.step()
            assert optimizer.param_groups[0]["lr"] == optimizer.base_optimizer.param_groups[0]["lr"] == expected


@pytest.mark.parametrize("scheduler", ["OneCycleLR", "ReduceLROnPlateau"])
def test_other_schedulers_set_what_the_next_step_uses(scheduler):
    model = oracles.mlp()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    if scheduler == "OneCycleLR":
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=5)
    else:
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.0)
    run(model, optimizer, 1)
    schedule.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
    if scheduler == "ReduceLROnPlateau":
        schedule.step(2.0)
        before = oracles.weights_of(model)
        run(model, optimizer, 1)
        assert optimizer.param_groups[0]["lr"] == 0.0
        assert oracles.same_bits(before, oracles.weights_of(model))


def loss_at_perturbed(model, optimizer, autocast_around):
    """The mean losses at w and at w + e, when the forward passes run in bfloat16."""
    seen = []

    def losses(inputs, target):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=True):
            result = cross_entropy(model(inputs), target)
        seen.append(result.mean().item())
        return result

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast_around):
        optimizer.step(losses, *oracles.batch(32))
    return seen


@pytest.mark.parametrize("autocast_around", [False, True])
def test_under_autocast_the_later_passes_see_the_perturbed_weights(autocast_around):
    """autocast keeps bfloat16 copies of the weights as long as one is open: those would be the old ones."""
    model = oracles.mlp()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=2.0)
    before, after = loss_at_perturbed(model, optimizer, autocast_around)
    assert after > before + 0.5
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("in_phases", [False, True])
def test_under_autocast_the_look_without_gradients_leaves_those_of_pass_2(in_phases):
    """Older versions of torch keep the bfloat16 copies of a forward under no_grad, which have no gradient."""
    weights = []
    for around in (False, True):
        model = oracles.mlp()
        optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, beta=1.0, gamma=0.5)
        closure, batch = oracles.losses_of(model), oracles.batch(32)

        def losses(*parts, closure=closure):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return closure(*parts)

        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around):
            if in_phases:
                before = losses(*batch)
                optimizer.backward(before.mean())
                optimizer.first_step(zero_grad=True)
                with torch.no_grad():
                    after = losses(*batch)
                losses(*optimizer.select(before, after, *batch)).mean().backward()
                optimizer.second_step(zero_grad=True)
            else:
                optimizer.step(losses, *batch)
        weights.append(oracles.weights_of(model))
    assert oracles.same_bits(*weights)
    assert not oracles.same_bits(weights[0], oracles.weights_of(oracles.mlp()))


@pytest.mark.parametrize("finish", ["second_step", "restore"])
def test_under_autocast_a_forward_after_the_step_sees_the_weights_put_back(finish):
    model = oracles.mlp()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.0, rho=2.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = oracles.losses_of(model)
        before = losses(*oracles.batch())
        before.mean().backward()
        optimizer.first_step()
        assert not torch.equal(losses(*oracles.batch()), before)
        getattr(optimizer, finish)()
        assert torch.equal(losses(*oracles.batch()), before)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("fuse", [False, True])
def test_step_reads_nothing_back_from_the_device(mask, fuse, request):
    if fuse:
        request.getfixturevalue("fused")
    model = oracles.noisy_mlp()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, mask=mask, model=model)

    def losses(inputs, target):
        return cross_entropy(model(inputs), target)

    data = oracles.batch()
    optimizer.step(losses, *data)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(3):
            optimizer.step(losses, *data)
    names = {event.key for event in recorded.key_averages()}
    assert "aten::index_select" in names
    assert not names & {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"}


def test_parameters_keep_identity_storage_and_format_through_steps():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 3)).to(memory_format=torch.channels_last)
    params = list(model.parameters())
    strides = [p.stride() for p in params]
    optimizer = ESAM(params, torch.optim.SGD, lr=0.1, momentum=0.9)
    pointers = [p.data_ptr() for p in params]
    for _ in range(3):
        optimizer.step(oracles.losses_of(model), torch.randn(8, 3, 6, 6), torch.randint(0, 3, (8,)))
    assert all(p is q for p, q in zip(model.parameters(), params))
    assert [p.data_ptr() for p in params] == pointers
    assert [p.stride() for p in params] == strides
    assert all(optimizer.state[p]["momentum_buffer"].stride() == p.stride() for p in params)


def test_a_perturbed_weight_is_seen_by_autograd_as_modified():
    """A backward through the graph of w after first_step is an error of torch's, not a wrong gradient."""
    weight = nn.Parameter(torch.randn(3))
    optimizer = SAM([weight], torch.optim.SGD, lr=0.1)
    loss = (weight**2).sum()
    loss.backward(retain_graph=True)
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_defaults_of_the_constructor_are_the_papers():
    model = oracles.mlp()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1)
    assert (optimizer.param_groups[0]["rho"], optimizer.beta, optimizer.gamma) == (0.05, 0.6, 0.5)
    assert SAM(model.parameters(), torch.optim.SGD, lr=0.1).beta == 1.0
