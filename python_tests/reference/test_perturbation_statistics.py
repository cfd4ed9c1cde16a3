"""Contract points 2 and 3: what the masks draw, and what e is on average."""

import itertools
import math

import oracles
import pytest
import torch
from torch import nn

from esam_kernels import ESAM

DRAWS = 2000
RHO = 0.05


def draws_of_e(params, count=DRAWS, **kwargs):
    """``count`` draws of e, shape (count, weights), for the gradients in ``.grad``."""
    optimizer = ESAM(params, torch.optim.SGD, lr=0.1, rho=RHO, **kwargs)
    before = torch.cat([p.detach().flatten() for p in params])
    draws = []
    for _ in range(count):
        optimizer.first_step()
        draws.append(torch.cat([p.detach().flatten() for p in params]) - before)
        optimizer.restore()
    return torch.stack(draws)


def params_of_lengths(lengths):
    """Tensors of three weights whose gradients have these lengths, at 0 (so that w + e is e)."""
    params = []
    for length in lengths:
        param = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        direction = torch.randn(3, dtype=torch.float64)
        param.grad = direction * length / direction.norm()
        params.append(param)
    return params


def sams_e(params):
    gradient = torch.cat([p.grad for p in params])
    return RHO * gradient / gradient.norm()


def assert_mean(draws, mean):
    error = draws.std(dim=0) / math.sqrt(len(draws))
    assert ((draws.mean(dim=0) - mean).abs() <= 4 * error + 1e-15).all()


@pytest.mark.parametrize("beta", [0.25, 0.6])
def test_mean_of_e_over_element_masks_is_sams_e(beta):
    params = params_of_lengths([1.0, 0.3])
    assert_mean(draws_of_e(params, mask="element", beta=beta), sams_e(params))


def expected_e(params, beta):
    """E[e] over tensor masks with radius="paper": all subsets by their probability.

    Where none is drawn the tensor that came nearest is taken: each with the same probability.
    """
    lengths = [p.grad.norm().item() for p in params]
    n = len(params)
    weight = [0.0] * n
    for subset in itertools.product((False, True), repeat=n):
        probability = math.prod(beta if s else 1 - beta for s in subset)
        subsets = [(probability, subset)]
        if not any(subset):
            subsets = [(probability / n, tuple(i == j for j in range(n))) for i in range(n)]
        for share, chosen in subsets:
            norm = math.sqrt(sum(length**2 for length, s in zip(lengths, chosen) if s)) / math.sqrt(beta)
            for i in range(n):
                weight[i] += share * chosen[i] * RHO / beta / norm
    return torch.cat([w * p.grad for w, p in zip(weight, params)])


@pytest.mark.parametrize("beta", [0.4, 0.7])
def test_mean_of_e_over_tensor_masks_is_its_expectation_over_all_subsets(beta):
    params = params_of_lengths([1.0, 0.3, 2.0, 1.5, 0.8])
    assert_mean(draws_of_e(params, mask="tensor", radius="paper", beta=beta), expected_e(params, beta))


def test_mean_of_e_over_tensor_masks_tends_to_sams_e_with_many_tensors():
    """E[e] is SAM's up to the spread of the estimated norm, of relative order 1 / tensors."""
    params = params_of_lengths([1.0] * 80)
    draws = draws_of_e(params, count=600, mask="tensor", radius="paper", beta=0.6)
    along = draws @ sams_e(params) / RHO**2
    error = along.std() / math.sqrt(600)
    assert abs(along.mean() - 1.0) < 4 * error + 1.0 / 80


def test_mean_of_e_over_tensor_masks_is_not_sams_e_with_the_released_radius():
    params = params_of_lengths([1.0] * 80)
    draws = draws_of_e(params, count=200, mask="tensor", radius="released", beta=0.6)
    along = draws @ sams_e(params) / RHO**2
    assert along.mean().item() == pytest.approx(1 / math.sqrt(0.6), rel=0.02)


def test_rate_of_drawn_tensors_is_beta_within_four_standard_deviations():
    params = params_of_lengths([1.0] * 40)
    draws = draws_of_e(params, count=500, mask="tensor", beta=0.6)
    drawn = draws.reshape(500, 40, 3).ne(0).any(dim=2)
    n = drawn.numel()
    assert abs(int(drawn.sum()) - n * 0.6) < 4 * math.sqrt(n * 0.6 * 0.4)
    for tensor in range(40):
        assert abs(int(drawn[:, tensor].sum()) - 300) < 5 * math.sqrt(500 * 0.6 * 0.4)


def test_draws_of_tensors_are_the_oracles_for_seeds_and_steps_far_out():
    params = params_of_lengths([1.0] * 9)
    for seed, step in ((0, 0), (2**63 - 1, 10**6), (12345, 63)):
        optimizer = ESAM(params, torch.optim.SGD, lr=0.1, beta=0.5, seed=seed)
        state = optimizer.state_dict()
        state["esam"]["step"] = step
        optimizer.load_state_dict(state)
        for following in range(step, step + 3):
            optimizer.first_step()
            drawn = [i for i, p in enumerate(params) if p.any()]
            optimizer.restore()
            assert drawn == oracles.drawn_tensors(seed, following, 0.5, 9)


def test_a_loaded_seed_counts_from_the_next_draw_on():
    params = params_of_lengths([1.0] * 9)
    optimizer = ESAM(params, torch.optim.SGD, lr=0.1, beta=0.5, seed=1)
    optimizer.first_step()
    optimizer.restore()
    state = optimizer.state_dict()
    state["esam"]["seed"] = 2
    optimizer.load_state_dict(state)
    optimizer.first_step()
    assert [i for i, p in enumerate(params) if p.any()] == oracles.drawn_tensors(2, 1, 0.5, 9)
