"""Schedulers of rho, beta and gamma in the shape of torch's LR schedulers."""

import io
import math

import numpy as np
import oracles
import pytest
import torch

from esam_kernels import ESAM, SAM
from esam_kernels.schedules import ConstantSchedule, CosineSchedule, LinearSchedule, PhaseSchedule, RhoProportionalToLR


def build(**kwargs):
    return ESAM(oracles.mlp().parameters(), torch.optim.SGD, lr=0.1, **kwargs)


def read(optimizer, name):
    return optimizer.param_groups[0]["rho"] if name == "rho" else getattr(optimizer, name)


def course(optimizer, schedule, name, steps):
    values = [read(optimizer, name)]
    for _ in range(steps):
        schedule.step()
        values.append(read(optimizer, name))
        assert schedule.get_last_value() == values[-1]
    return values


@pytest.mark.parametrize("name", ["rho", "beta", "gamma"])
def test_linear_goes_straight_from_start_to_end_and_stays(name):
    optimizer = build()
    schedule = LinearSchedule(optimizer, name, 1.0, 0.5, total_iters=4)
    assert course(optimizer, schedule, name, 6) == [1.0, 0.875, 0.75, 0.625, 0.5, 0.5, 0.5]


def test_end_is_reached_exactly():
    """1.0 + (0.1 - 1.0) is not 0.1 in floating point."""
    for kind in (LinearSchedule, CosineSchedule):
        optimizer = build()
        schedule = kind(optimizer, "gamma", 1.0, 0.1, total_iters=3)
        assert course(optimizer, schedule, "gamma", 3)[-1] == 0.1


def test_cosine_goes_along_half_a_cosine():
    optimizer = build()
    schedule = CosineSchedule(optimizer, "gamma", 0.2, 1.0, total_iters=4)
    expected = [0.2 + 0.8 * (1 - math.cos(math.pi * min(t, 4) / 4)) / 2 for t in range(7)]
    assert course(optimizer, schedule, "gamma", 6) == pytest.approx(expected, rel=1e-12)


def test_constant_switches_after_total_iters():
    optimizer = build()
    schedule = ConstantSchedule(optimizer, "gamma", 1.0, end=0.5, total_iters=2)
    assert course(optimizer, schedule, "gamma", 4) == [1.0, 1.0, 0.5, 0.5, 0.5]
    assert course(optimizer, ConstantSchedule(optimizer, "beta", 0.3), "beta", 2) == [0.3] * 3


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [
        (2, 4, [0.0, 0.0, 0.3, 0.3, 0.0, 0.0]),
        (0, 1, [0.3, 0.0, 0.0, 0.0, 0.0, 0.0]),
        (3, None, [0.0, 0.0, 0.0, 0.3, 0.3, 0.3]),
        (0, None, [0.3] * 6),
        (9, 12, [0.0] * 6),
    ],
)
def test_a_phase_is_inside_from_start_to_before_stop(start, stop, expected):
    optimizer = build()
    assert course(optimizer, PhaseSchedule(optimizer, "rho", 0.3, start, stop), "rho", 5) == expected


def test_a_phase_works_where_rho_is_zero_from_the_start():
    optimizer = build(rho=0.0)
    assert course(optimizer, PhaseSchedule(optimizer, "rho", 0.3, start=1), "rho", 2) == [0.0, 0.3, 0.3]


def two_groups(first=0.5, second=0.0):
    params = list(oracles.mlp().parameters())
    groups = [{"params": params[:2], "rho": first}, {"params": params[2:], "rho": second}]
    return SAM(groups, torch.optim.SGD, lr=0.1)


def radii(optimizer):
    return [group["rho"] for group in optimizer.param_groups]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda o: PhaseSchedule(o, "rho", 0.3, start=1, stop=2), [0.0, 0.3, 0.0]),
        (lambda o: LinearSchedule(o, "rho", 0.0, 0.2, total_iters=2), [0.0, 0.1, 0.2]),
        (lambda o: ConstantSchedule(o, "rho", 0.1, 0.7, total_iters=1), [0.1, 0.7, 0.7]),
        (lambda o: RhoProportionalToLR(o), [0.5, 0.5, 0.5]),
    ],
)
def test_a_group_whose_own_rho_is_zero_stays_at_zero(make, expected):
    optimizer = two_groups()
    schedule = make(optimizer)
    for value in expected:
        assert radii(optimizer) == pytest.approx([value, 0.0])
        schedule.step()


def test_a_second_schedule_knows_the_groups_own_rho_outside_the_first_ones_phase():
    optimizer = two_groups()
    PhaseSchedule(optimizer, "rho", 0.3, start=5)
    assert radii(optimizer) == [0.0, 0.0]
    PhaseSchedule(optimizer, "rho", 0.2, start=0)
    assert radii(optimizer) == [0.2, 0.0]


@pytest.mark.parametrize("order", ["schedule first", "optimizer first"])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_phase_goes_on_with_the_groups_it_had(steps, order):
    """Saved outside and inside the phase; loaded into an optimizer built before or after the schedule."""
    optimizer = two_groups()
    schedule = PhaseSchedule(optimizer, "rho", 0.3, start=1)
    for _ in range(steps):
        schedule.step()
    saved = optimizer.state_dict(), schedule.state_dict()
    other = two_groups()
    if order == "optimizer first":
        other.load_state_dict(saved[0])
    resumed = PhaseSchedule(other, "rho", 0.3, start=1)
    if order == "schedule first":
        other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for _ in range(3):
        assert radii(other) == radii(optimizer)
        schedule.step()
        resumed.step()
    assert radii(other) == [0.3, 0.0]


def test_a_group_that_is_added_during_a_schedule_takes_part_by_its_own_rho():
    optimizer = two_groups()
    schedule = PhaseSchedule(optimizer, "rho", 0.3, start=0)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "rho": 0.0})
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "rho": 0.1})
    schedule.step()
    assert radii(optimizer) == [0.3, 0.0, 0.0, 0.3]


def test_the_other_groups_keep_their_own_rho_where_one_is_taken_out():
    params = list(oracles.mlp().parameters())
    groups = [{"params": params[:2]}, {"params": params[2:4], "rho": 0.0}, {"params": params[4:]}]
    optimizer = SAM(groups, torch.optim.SGD, lr=0.1)
    schedule = PhaseSchedule(optimizer, "rho", 0.3, start=1)
    del optimizer.param_groups[1]
    schedule.step()
    assert radii(optimizer) == [0.3, 0.3]


def test_the_groups_keep_their_own_rho_where_the_state_of_a_plain_optimizer_is_loaded():
    optimizer = two_groups()
    schedule = PhaseSchedule(optimizer, "rho", 0.3, start=1)
    groups = [{"params": group["params"]} for group in optimizer.param_groups]
    optimizer.load_state_dict(torch.optim.SGD(groups, lr=0.1).state_dict())
    schedule.step()
    assert radii(optimizer) == [0.3, 0.0]


def test_rho_is_set_in_every_group_and_used_by_the_next_step():
    model = oracles.mlp()
    params = list(model.parameters())
    optimizer = SAM([{"params": params[:2]}, {"params": params[2:]}], torch.optim.SGD, lr=0.1, rho=1.0)
    schedule = LinearSchedule(optimizer, "rho", 0.0, 3.0, total_iters=3)
    for expected in (0.0, 1.0, 2.0, 3.0):
        assert [group["rho"] for group in optimizer.param_groups] == [expected] * 2
        before = oracles.weights_of(model)
        oracles.losses_of(model)(*oracles.batch()).mean().backward()
        optimizer.first_step(zero_grad=True)
        moved = torch.cat([(p - w).flatten() for p, w in zip(params, before)]).norm().item()
        optimizer.restore()
        assert moved == pytest.approx(expected, rel=1e-4)
        schedule.step()


def test_k_follows_a_schedule_of_gamma():
    model = oracles.mlp()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1)
    schedule = LinearSchedule(optimizer, "gamma", 1.0, 0.5, total_iters=2)
    sizes = []

    def losses(inputs, target):
        sizes.append(len(target))
        return oracles.losses_of(model)(inputs, target)

    for _ in range(3):
        optimizer.step(losses, *oracles.batch(16))
        schedule.step()
    assert sizes == [16, 16, 16, 16, 12, 16, 16, 8]


def test_a_saved_state_is_not_changed_by_the_schedule_that_it_was_saved_from():
    params = list(oracles.mlp().parameters())

    def schedule_with_another_group(rho, saved=None):
        optimizer = SAM(params[:2], torch.optim.SGD, lr=0.1, rho=0.2)
        schedule = LinearSchedule(optimizer, "rho", 0.2, 0.1, total_iters=2)
        saved = schedule.state_dict() if saved is None else saved
        schedule.load_state_dict(saved)
        optimizer.add_param_group({"params": params[2:], "rho": rho})
        schedule.step()
        return [group["rho"] for group in optimizer.param_groups], saved

    radii, saved = schedule_with_another_group(0.2)
    assert radii == pytest.approx([0.15, 0.15])
    assert schedule_with_another_group(0.0, saved)[0] == pytest.approx([0.15, 0.0])


@pytest.mark.parametrize(
    "make",
    [
        lambda o, value: LinearSchedule(o, "rho", value, value / 2, total_iters=7),
        lambda o, value: ConstantSchedule(o, "rho", value, value / 2, total_iters=4),
        lambda o, value: PhaseSchedule(o, "rho", value, start=0),
        lambda o, value: PhaseSchedule(o, "rho", value, start=np.int64(0), stop=np.int64(5)),
        lambda o, value: LinearSchedule(o, "rho", value, value / 2, total_iters=np.int64(7)),
        lambda o, value: o.param_groups[0].update(rho=value) or RhoProportionalToLR(o),
    ],
)
def test_a_schedule_over_numbers_of_numpys_is_saved_as_torch_loads_it(make):
    optimizer, file = build(), io.BytesIO()
    schedule = make(optimizer, np.float64(0.5))
    schedule.step()
    torch.save(schedule.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == schedule.state_dict()
    assert torch.load(io.BytesIO(file.getvalue()))["_last_value"] == pytest.approx(optimizer.param_groups[0]["rho"])


@pytest.mark.parametrize(
    "make",
    [
        lambda o: LinearSchedule(o, "rho", 1.0, 0.0, total_iters=7),
        lambda o: CosineSchedule(o, "gamma", 1.0, 0.5, total_iters=7),
        lambda o: ConstantSchedule(o, "beta", 1.0, 0.5, total_iters=4),
        lambda o: PhaseSchedule(o, "rho", 0.3, start=2, stop=5),
        lambda o: RhoProportionalToLR(o),
    ],
)
def test_a_schedule_goes_on_where_its_state_was_saved(make):
    optimizer = build()
    schedule = make(optimizer)
    for _ in range(3):
        schedule.step()
    saved = schedule.state_dict()
    assert "optimizer" not in saved
    other = build()
    resumed = make(other)
    resumed.load_state_dict(saved)
    assert read(other, schedule.name) == read(optimizer, schedule.name)
    for _ in range(5):
        schedule.step()
        resumed.step()
        assert read(other, schedule.name) == read(optimizer, schedule.name)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda o: LinearSchedule(o, "lr", 1.0, 0.5, total_iters=3), ValueError, "name must be one of"),
        (
            lambda o: LinearSchedule(o, "gamma", 1.0, 0.0, total_iters=3),
            ValueError,
            r"gamma must lie in \(0, 1\], got 0.0",
        ),
        (
            lambda o: LinearSchedule(o, "beta", 1.5, 0.5, total_iters=3),
            ValueError,
            r"beta must lie in \(0, 1\], got 1.5",
        ),
        (lambda o: LinearSchedule(o, "rho", 0.1, -0.1, total_iters=3), ValueError, "rho must be finite.*-0.1"),
        (
            lambda o: LinearSchedule(o, "rho", 0.1, 0.2, total_iters=0),
            ValueError,
            "total_iters must be an integer >= 1",
        ),
        (lambda o: ConstantSchedule(o, "rho", 0.1, total_iters=-1), ValueError, "total_iters must be an integer >= 0"),
        (lambda o: LinearSchedule(o, "rho", 0.1, 0.2, total_iters=2.0), ValueError, "an integer >= 1, got 2.0"),
        (lambda o: LinearSchedule(o, "rho", 0.1, 0.2, total_iters=True), ValueError, "an integer >= 1, got True"),
        (lambda o: LinearSchedule(o.base_optimizer, "rho", 0.1, 0.2, total_iters=2), TypeError, "ESAM or SAM, got SGD"),
        (lambda o: PhaseSchedule(o, "gamma", 0.5, 1), ValueError, 'name must be "rho": .* which gamma cannot be'),
        (lambda o: PhaseSchedule(o, "rho", -0.5, 1), ValueError, "rho must be finite.*-0.5"),
        (lambda o: PhaseSchedule(o, "rho", 0.5, -1), ValueError, "start must be an integer >= 0, got -1"),
        (lambda o: PhaseSchedule(o, "rho", 0.5, 1.5), ValueError, "start must be an integer >= 0, got 1.5"),
        (lambda o: PhaseSchedule(o, "rho", 0.5, 3, 3), ValueError, r"an integer above start \(3\), got 3"),
        (lambda o: PhaseSchedule(o.base_optimizer, "rho", 0.5, 1), TypeError, "ESAM or SAM, got SGD"),
        (lambda o: RhoProportionalToLR(o.base_optimizer), TypeError, "ESAM or SAM, got SGD"),
    ],
)
def test_schedules_outside_the_range_are_refused_when_they_are_built_and_set_nothing(make, error, message):
    optimizer = build()
    with pytest.raises(error, match=message):
        make(optimizer)
    assert [read(optimizer, name) for name in ("rho", "beta", "gamma")] == [0.05, 0.6, 0.5]


@pytest.mark.parametrize(
    "make",
    [
        lambda o: ConstantSchedule(o, "gamma", 1.0, end=0.5, total_iters=1000),
        lambda o: ConstantSchedule(o, "ascent_share", 1.0, end=0.5, total_iters=1000),
    ],
)
def test_what_an_ascent_cannot_have_later_is_refused_when_the_schedule_is_built(make):
    optimizer = build(gamma=1.0, ascent="previous")
    with pytest.raises(ValueError, match=r'must be 1 with ascent="previous", got 0\.5'):
        make(optimizer)


@pytest.mark.parametrize(
    ("of", "into", "message"),
    [
        (
            lambda o: PhaseSchedule(o, "rho", 0.3, start=2),
            lambda o: LinearSchedule(o, "rho", 0.1, 0.2, total_iters=3),
            "another schedule: it is of 'rho', and lacks end, total_iters, and this is a LinearSchedule of 'rho'",
        ),
        (
            lambda o: LinearSchedule(o, "beta", 1.0, 0.5, total_iters=3),
            lambda o: LinearSchedule(o, "gamma", 1.0, 0.5, total_iters=3),
            "another schedule: it is of 'beta', and this is a LinearSchedule of 'gamma'",
        ),
        (
            lambda o: torch.optim.lr_scheduler.StepLR(o, 3),
            lambda o: RhoProportionalToLR(o),
            "another schedule: it is without a name, and lacks .*ratios",
        ),
    ],
)
def test_the_state_of_another_schedule_is_refused_and_changes_nothing(of, into, message):
    saved, optimizer = of(build()).state_dict(), build()
    schedule = into(optimizer)
    own, values = schedule.state_dict(), [read(optimizer, name) for name in ("rho", "beta", "gamma")]
    with pytest.raises(ValueError, match=message):
        schedule.load_state_dict(saved)
    assert schedule.state_dict() == own
    assert [read(optimizer, name) for name in ("rho", "beta", "gamma")] == values


@pytest.mark.parametrize(
    ("make", "expected"), [(lambda o: ConstantSchedule(o, "rho", 0.3), 0.3), (RhoProportionalToLR, 0.05)]
)
def test_a_group_that_was_added_to_the_base_optimizer_has_the_optimizers_rho(make, expected):
    optimizer = build()
    schedule = make(optimizer)
    optimizer.base_optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})
    schedule.step()
    assert [group["rho"] for group in optimizer.param_groups] == pytest.approx([expected, expected])
