"""Contract points 1 to 3: e, for every mask, radius and scaling, against the equations in float64."""

import math

import oracles
import pytest
import torch
from torch import nn

from esam_kernels import ESAM, SAM

SHAPES = [(5, 3), (7,), (), (2, 3, 2, 2), (0, 4), (11,)]
RHO = 0.07


def make_params(dtype=torch.float64):
    torch.manual_seed(3)
    params = [nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype)) for shape in SHAPES]
    for param in params:
        param.grad = torch.randn(param.shape, dtype=torch.float64).to(dtype)
    return params


def two_groups(params, other):
    return [{"params": params[:2]}, {"params": params[2:], **other}]


def measured(optimizer, params):
    """e, as what first_step adds to the weights."""
    before = [p.detach().double().clone() for p in params]
    optimizer.first_step()
    e = [p.detach().double() - w for p, w in zip(params, before)]
    optimizer.restore()
    return e


def expected(params, optimizer, rho, adaptive, eta=0.0):
    """The oracle's e at the optimizer's next step."""
    state = optimizer.state_dict()["esam"]
    seed, step, beta, mask, radius = (state[name] for name in ("seed", "step", "beta", "mask", "radius"))
    weights = [p.detach().double() for p in params]
    masks = [torch.ones_like(w) for w in weights]
    seen = [True] * len(params)
    factor = 1.0
    if mask == "element":
        offsets = oracles.element_offsets([p.numel() for p in params])
        masks = [
            oracles.element_mask(seed, step, beta, offset, p.numel()).reshape(p.shape).double()
            for p, offset in zip(params, offsets)
        ]
    elif beta < 1.0:
        drawn = oracles.drawn_tensors(seed, step, beta, len(params))
        seen = [i in drawn for i in range(len(params))]
        masks = [m * s for m, s in zip(masks, seen)]
        factor = 1.0 / math.sqrt(beta) if radius == "paper" else 1.0
    seen = [is_seen and radius_of > 0.0 for is_seen, radius_of in zip(seen, rho)]
    return oracles.perturbation(
        weights,
        [p.grad.double() for p in params],
        rho=rho,
        beta=beta,
        mask=masks,
        seen=seen,
        adaptive=adaptive,
        eta=eta,
        norm_factor=factor,
    )


def assert_close(got, want, rtol=1e-9, atol=1e-15):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("beta", [0.35, 0.6, 1.0])
@pytest.mark.parametrize(("mask", "radius"), [("element", "paper"), ("tensor", "paper"), ("tensor", "released")])
def test_e_is_the_equations(mask, radius, beta, adaptive):
    params = make_params()
    optimizer = ESAM(
        params,
        torch.optim.SGD,
        lr=0.1,
        rho=RHO,
        beta=beta,
        mask=mask,
        radius=radius,
        adaptive=adaptive,
        eta=0.01,
        seed=4,
    )
    for _ in range(8):
        want = expected(params, optimizer, [RHO] * len(params), [adaptive] * len(params), eta=0.01)
        assert_close(measured(optimizer, params), want)


@pytest.mark.parametrize("mask", ["element", "tensor"])
def test_one_norm_over_all_groups_and_each_group_its_own_rho_and_scaling(mask):
    params = make_params()
    groups = two_groups(params, {"rho": 0.5, "adaptive": True})
    optimizer = ESAM(groups, torch.optim.SGD, lr=0.1, rho=RHO, beta=0.6, mask=mask, seed=1)
    for _ in range(4):
        rho = [RHO] * 2 + [0.5] * 4
        want = expected(params, optimizer, rho, [False] * 2 + [True] * 4)
        assert_close(measured(optimizer, params), want)


def test_rho_of_a_group_may_change_between_steps():
    params = make_params()
    optimizer = SAM(two_groups(params, {}), torch.optim.SGD, lr=0.1, rho=RHO)
    measured(optimizer, params)
    optimizer.param_groups[1]["rho"] = 0.0
    want = expected(params, optimizer, [RHO] * 2 + [0.0] * 4, [False] * 6)
    got = measured(optimizer, params)
    assert_close(got, want)
    assert all(not e.any() for e in got[2:])


def test_beta_may_change_between_steps():
    params = make_params()
    optimizer = ESAM(params, torch.optim.SGD, lr=0.1, rho=RHO, beta=0.9, mask="element")
    measured(optimizer, params)
    optimizer.beta = 0.3
    want = expected(params, optimizer, [RHO] * 6, [False] * 6)
    assert_close(measured(optimizer, params), want)


@pytest.mark.parametrize("adaptive", [False, True])
def test_e_in_float32_is_the_float64_one(adaptive):
    params = make_params(torch.float32)
    optimizer = SAM(params, torch.optim.SGD, lr=0.1, rho=5.0, adaptive=adaptive)
    want = expected(params, optimizer, [5.0] * 6, [adaptive] * 6)
    assert_close(measured(optimizer, params), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_perturbed_as_computed_in_float32_and_rounded_once(dtype):
    params = make_params(dtype)
    optimizer = SAM(params, torch.optim.SGD, lr=0.1, rho=5.0)
    want = expected(params, optimizer, [5.0] * 6, [False] * 6)
    exact = [p.detach().double() + e for p, e in zip(params, want)]
    optimizer.first_step()
    for param, target in zip(params, exact):
        unit = torch.finfo(dtype).eps * target.abs() / 2
        assert ((param.double() - target).abs() <= unit * 1.001 + 1e-7).all()


def test_norm_of_float16_gradients_does_not_overflow():
    param = nn.Parameter(torch.zeros(1000, dtype=torch.float16))
    param.grad = torch.full((1000,), 3e4, dtype=torch.float16)
    optimizer = SAM([param], torch.optim.SGD, lr=0.1, rho=1.0)
    optimizer.first_step()
    torch.testing.assert_close(param.double().norm().item(), 1.0, rtol=1e-3, atol=0.0)


def test_norm_is_accumulated_in_float32_or_better():
    """In float32, one after the other, a million squares of 1e-4 beside a 1 would vanish."""
    param = nn.Parameter(torch.zeros(1_000_001, dtype=torch.float32))
    param.grad = torch.full_like(param, 1e-4)
    param.grad[0] = 1.0
    optimizer = SAM([param], torch.optim.SGD, lr=0.1, rho=1.0)
    optimizer.first_step()
    torch.testing.assert_close(param[0].item(), 1 / math.sqrt(1.01), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("mask", ["element", "tensor"])
def test_two_runs_give_the_same_bits(mask):
    runs = []
    for _ in range(2):
        params = make_params(torch.float32)
        optimizer = ESAM(params, torch.optim.SGD, lr=0.1, mask=mask, seed=9)
        optimizer.first_step()
        runs.append([p.detach().clone() for p in params])
    assert oracles.same_bits(*runs)


def test_released_radius_has_length_rho_over_beta():
    params = make_params()
    optimizer = ESAM(params, torch.optim.SGD, lr=0.1, rho=RHO, beta=0.5, radius="released")
    for _ in range(5):
        length = torch.cat([e.flatten() for e in measured(optimizer, params)]).norm().item()
        assert length == pytest.approx(RHO / 0.5, rel=1e-9)


def test_sam_has_length_rho():
    params = make_params()
    optimizer = SAM(params, torch.optim.SGD, lr=0.1, rho=RHO)
    length = torch.cat([e.flatten() for e in measured(optimizer, params)]).norm().item()
    assert length == pytest.approx(RHO, rel=1e-9)


@pytest.mark.parametrize("mask", ["element", "tensor"])
def test_masks_do_not_depend_on_flattening(mask):
    results = []
    for flatten in (True, False):
        params = make_params(torch.float32)
        optimizer = ESAM(params, torch.optim.SGD, lr=0.1, mask=mask, flatten=flatten)
        optimizer.first_step()
        results.append([p.detach().clone() for p in params])
    assert oracles.same_bits(*results)


def element_choice(params, **kwargs):
    """Which weights an element mask moves, in one row."""
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = ESAM(params, torch.optim.SGD, lr=0.1, rho=100.0, beta=0.5, mask="element", **kwargs)
    return torch.cat([(e != 0).flatten() for e in measured(optimizer, params)])


def test_element_masks_do_not_depend_on_the_split_into_tensors_and_dtypes():
    """Each tensor begins at a whole counter of four elements, so this holds for splits at multiples of four."""
    whole = element_choice([nn.Parameter(torch.ones(64))])
    parts = [nn.Parameter(torch.ones(n)) for n in (12, 4, 48)]
    assert torch.equal(element_choice(parts), whole)
    kinds = [nn.Parameter(torch.ones(8, 2, dtype=d)) for d in (torch.float16, torch.float64, torch.bfloat16)]
    assert torch.equal(element_choice([*kinds, nn.Parameter(torch.ones(16))]), whole)
    assert 10 < whole.sum() < 54


def test_element_masks_follow_the_seed_and_the_step():
    params = [nn.Parameter(torch.ones(64))]
    params[0].grad = torch.ones(64)
    optimizer = ESAM(params, torch.optim.SGD, lr=0.1, rho=100.0, beta=0.5, mask="element", seed=3)
    drawn = [measured(optimizer, params)[0] != 0 for _ in range(3)]
    for step, moved in enumerate(drawn):
        assert torch.equal(moved, oracles.element_mask(3, step, 0.5, 0, 64))
    assert not torch.equal(drawn[0], drawn[1])


def test_element_mask_counts_in_memory_order():
    """So a channels_last weight is cut as the memory lies."""
    flat = element_choice([nn.Parameter(torch.ones(2 * 4 * 3 * 3))])
    weight = nn.Parameter(torch.ones(2, 4, 3, 3).to(memory_format=torch.channels_last))
    weight.grad = torch.ones_like(weight)
    optimizer = ESAM([weight], torch.optim.SGD, lr=0.1, rho=100.0, beta=0.5, mask="element")
    moved = measured(optimizer, [weight])[0] != 0
    assert torch.equal(moved.permute(0, 2, 3, 1).flatten(), flat)


def test_tensor_mask_computes_the_gradients_of_the_drawn_tensors_only():
    model = oracles.mlp()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, beta=0.5, seed=2)
    losses = oracles.losses_of(model)
    for step in range(6):
        optimizer.zero_grad()
        optimizer.backward(losses(*oracles.batch()).mean())
        drawn = oracles.drawn_tensors(2, step, 0.5, 6)
        assert [i for i, p in enumerate(model.parameters()) if p.grad is not None] == drawn
        optimizer.first_step()
        optimizer.restore()


def test_at_least_one_tensor_is_always_drawn():
    params = make_params()
    optimizer = ESAM(params[:2], torch.optim.SGD, lr=0.1, beta=1e-9)
    for _ in range(20):
        moved = [bool(e.any()) for e in measured(optimizer, params[:2])]
        assert sum(moved) == 1


def test_gradients_of_tensors_that_are_not_drawn_have_no_part_in_the_norm():
    params = make_params()
    optimizer = ESAM(params, torch.optim.SGD, lr=0.1, beta=0.5, seed=1)
    drawn = oracles.drawn_tensors(1, 0, 0.5, len(params))
    for i, param in enumerate(params):
        if i not in drawn:
            param.grad.fill_(math.nan)
    assert all(torch.isfinite(e).all() for e in measured(optimizer, params))


def test_zero_gradients_of_drawn_tensors_leave_e_zero():
    params = make_params()
    for param in params:
        param.grad.zero_()
    for mask in ("element", "tensor"):
        optimizer = ESAM(params, torch.optim.SGD, lr=0.1, mask=mask)
        assert all(not e.any() for e in measured(optimizer, params))
