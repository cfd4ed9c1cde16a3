"""What the released ESAM code and the common SAM class get wrong, each as a test that passes here."""

import copy
import math
import random

import oracles
import pytest
import torch
from torch import nn

from esam_kernels import ESAM, SAM, cross_entropy


def recorded(samples, gamma=0.5, rho=0.5):
    """One step, and the inputs of its forwards."""
    model = oracles.mlp()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, gamma=gamma, rho=rho)
    seen = []

    def losses(inputs, target):
        seen.append(inputs)
        return cross_entropy(model(inputs), target)

    loss = optimizer.step(losses, *oracles.batch(samples))
    return model, loss, seen


def test_half_of_32_samples_are_16_and_not_15():
    assert len(recorded(32)[2][-1]) == 16


def test_ties_select_k_samples_and_not_none():
    model, loss, seen = recorded(32, rho=1e-30)  # no weight moves
    assert len(seen[-1]) == 16
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_last_batch_of_one_sample_is_no_error():
    assert len(recorded(1)[2][-1]) == 1


def test_no_boolean_mask_is_indexed_with():
    model = oracles.mlp()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step(lambda x, y: cross_entropy(model(x), y), *oracles.batch())
    names = {event.key for event in profile.key_averages()}
    assert not names & {"aten::nonzero", "aten::masked_select", "aten::item"}


def test_the_drawn_tensors_are_perturbed_by_the_papers_radius_and_not_rho_over_beta():
    """Of 64 tensors of the same norm, 0.6 are drawn: ||e|| is close to rho / sqrt(beta)."""
    params = [nn.Parameter(torch.zeros(4)) for _ in range(64)]
    for param in params:
        param.grad = torch.ones(4)
    optimizer = ESAM(params, torch.optim.SGD, lr=0.1, rho=1.0, beta=0.6)
    optimizer.first_step()
    length = torch.cat([p.detach() for p in params]).norm().item()
    assert length == pytest.approx(1 / math.sqrt(0.6), rel=1e-5)


def test_requires_grad_is_never_touched_and_pythons_random_numbers_are_not_used():
    model = oracles.mlp()
    model[0].bias.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    random.seed(3)
    state = random.getstate()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, beta=0.3)
    seen = []

    def losses(inputs, target):
        seen.append([p.requires_grad for p in model.parameters()])
        return cross_entropy(model(inputs), target)

    for step in range(10):
        optimizer.step(losses, *oracles.batch(seed=step))
        seen.append([p.requires_grad for p in model.parameters()])
    assert all(each == flags for each in seen)
    assert random.getstate() == state


def test_a_beta_that_draws_nothing_is_no_error():
    model = oracles.mlp()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, beta=1e-9)
    for step in range(10):
        optimizer.step(oracles.losses_of(model), *oracles.batch(seed=step))


def test_resume_keeps_momentum_beta_gamma_and_the_draws():
    model = oracles.mlp()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, beta=0.3, gamma=0.7, seed=4)
    for step in range(3):
        optimizer.step(oracles.losses_of(model), *oracles.batch(seed=step))
    other = oracles.mlp(seed=1)
    resumed = ESAM(other.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert (resumed.beta, resumed.gamma) == (0.3, 0.7)
    for step in range(3, 6):
        for each, its in ((model, optimizer), (other, resumed)):
            its.step(oracles.losses_of(each), *oracles.batch(seed=step))
    assert oracles.same_bits(oracles.weights_of(model), oracles.weights_of(other))


def test_batch_norm_statistics_move_once_a_step_and_not_three_times():
    model = oracles.noisy_mlp()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
    for step in range(4):
        optimizer.step(oracles.losses_of(model), *oracles.batch(seed=step))
    assert model[1].num_batches_tracked == 4


def test_dropout_does_not_rank_the_samples():
    """Where rho is too small to move a weight both forwards give the same losses, whatever dropout does."""
    model = oracles.noisy_mlp()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=1e-30, model=model)
    seen = []

    def losses(inputs, target):
        seen.append(cross_entropy(model(inputs), target))
        return seen[-1]

    optimizer.step(losses, *oracles.batch(16))
    assert torch.equal(seen[0], seen[1])


def test_w_plus_e_minus_e_is_w():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(20_000))
    optimizer = SAM([weight], torch.optim.SGD, lr=0.1, rho=50.0)
    before = weight.detach().clone()
    weight.grad = torch.randn(20_000)
    e = 50.0 * weight.grad / weight.grad.norm()
    subtracted = (before + e) - e
    assert 1e-4 < (subtracted != before).double().mean() < 0.9
    optimizer.first_step()
    optimizer.restore()
    assert oracles.same_bits([before], [weight])


def test_one_nan_in_a_gradient_does_not_destroy_the_weights():
    model = oracles.mlp()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1)
    losses = oracles.losses_of(model)
    loss = losses(*oracles.batch())
    optimizer.backward(loss.mean())
    next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = math.nan
    optimizer.first_step(zero_grad=True)
    losses(*oracles.batch()).mean().backward()
    optimizer.second_step()
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_the_number_of_operations_does_not_grow_with_the_number_of_tensors_drawn_by_python():
    """On 161 tensors the published first_step runs about 970 operations; the fused route must not come near."""
    params = [nn.Parameter(torch.randn(8)) for _ in range(161)]
    optimizer = SAM(params, torch.optim.SGD, lr=0.1)
    for param in params:
        param.grad = torch.randn(8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.first_step(zero_grad=True)
    operators = [event for event in profile.events() if event.name.startswith("esam_kernels::")]
    assert len(operators) == 2


def test_memory_of_the_weights_does_not_move():
    model = oracles.mlp()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    pointers = [p.data_ptr() for p in model.parameters()]
    for step in range(3):
        optimizer.step(oracles.losses_of(model), *oracles.batch(seed=step))
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_batch_norm_momentum_survives_being_frozen_twice():
    model = oracles.noisy_mlp()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
    oracles.losses_of(model)(*oracles.batch()).mean().backward()
    optimizer.first_step()
    with pytest.raises(RuntimeError):
        optimizer.first_step()
    optimizer.restore()
    optimizer.restore()
    assert model[1].momentum == 0.1
    assert model[1].track_running_stats
