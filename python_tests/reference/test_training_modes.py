"""frozen_batch_norm and the replay of random numbers, used on their own."""

import math

import oracles
import pytest
import torch
from torch import nn

from esam_kernels import RandomState, frozen_batch_norm


def batch_norm_model(**kwargs):
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, **kwargs), nn.Dropout(0.5))


def buffers(model):
    return [b.clone() for b in model.buffers()]


@pytest.mark.parametrize("momentum", [0.1, None, 0.0])
def test_running_statistics_stay_bit_for_bit(momentum):
    model = batch_norm_model(momentum=momentum)
    model(torch.randn(9, 6))
    before = buffers(model)
    with frozen_batch_norm(model):
        model(torch.randn(9, 6) * 100)
    assert oracles.same_bits(before, buffers(model))
    assert model[1].momentum == momentum


def test_a_nan_in_the_batch_does_not_reach_the_statistics():
    model = batch_norm_model()
    before = buffers(model)
    with frozen_batch_norm(model):
        model(torch.full((9, 6), math.nan))
    assert oracles.same_bits(before, buffers(model))


def test_outputs_inside_are_those_of_training_mode():
    model = batch_norm_model()
    model[2].p = 0.0
    inputs = torch.randn(9, 6)
    with frozen_batch_norm(model):
        frozen = model(inputs)
    assert torch.equal(frozen, model(inputs))


def test_uses_may_be_nested_and_repeated():
    model = batch_norm_model()
    before = buffers(model)
    for _ in range(2):
        with frozen_batch_norm(model):
            with frozen_batch_norm(model):
                model(torch.randn(9, 6))
            model(torch.randn(9, 6))
        assert oracles.same_bits(before, buffers(model))
    model(torch.randn(9, 6))
    assert model[1].num_batches_tracked == 1
    assert not oracles.same_bits(before, buffers(model))


def test_an_exception_leaves_everything_as_it_was():
    model = batch_norm_model()
    with pytest.raises(KeyboardInterrupt), frozen_batch_norm(model):
        raise KeyboardInterrupt
    assert model[1].track_running_stats
    model(torch.randn(9, 6))
    assert model[1].num_batches_tracked == 1


def test_a_layer_in_evaluation_mode_goes_on_using_its_statistics():
    model = batch_norm_model()
    model(torch.randn(9, 6))
    model.eval()
    inputs = torch.randn(9, 6)
    expected = model(inputs)
    with frozen_batch_norm(model):
        assert torch.equal(model(inputs), expected)
    model.train()
    with frozen_batch_norm(model):
        model.eval()
        assert torch.equal(model(inputs), expected)


def test_a_layer_without_statistics_stays_without():
    model = batch_norm_model(track_running_stats=False)
    with frozen_batch_norm(model):
        model(torch.randn(9, 6))
    assert model[1].running_mean is None
    assert not model[1].track_running_stats


def test_a_model_without_batch_norm_is_left_alone():
    model = nn.Linear(2, 2)
    with frozen_batch_norm(model):
        model(torch.randn(3, 2))


def test_replay_repeats_the_noise_and_returns_the_generator_to_where_it_was():
    torch.rand(3)
    noise = RandomState()
    first = torch.rand(4)
    after = torch.get_rng_state()
    for _ in range(2):
        with noise.replay():
            assert torch.equal(torch.rand(4), first)
            torch.rand(100)
        assert torch.equal(torch.get_rng_state(), after)


def test_an_exception_inside_the_replay_returns_the_generator_too():
    noise = RandomState([torch.device("cpu")])
    torch.rand(1)
    after = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), noise.replay():
        1 // int(torch.rand(5)[0])
    assert torch.equal(torch.get_rng_state(), after)
