"""The radius that follows the learning rate: each group keeps its own ratio, whatever becomes of the groups."""

import oracles
import pytest
import torch
from test_schedules import build, radii, two_groups

from esam_kernels import SAM
from esam_kernels.schedules import RhoProportionalToLR


def test_rho_follows_the_learning_rate_of_each_group():
    params = list(oracles.mlp().parameters())
    groups = [{"params": params[:2], "rho": 0.5}, {"params": params[2:], "lr": 1.0, "rho": 0.25}]
    optimizer = SAM(groups, torch.optim.SGD, lr=0.1)
    decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    schedule = RhoProportionalToLR(optimizer)
    for power in range(4):
        expected = [0.5 * 0.5**power, 0.25 * 0.5**power]
        assert [group["rho"] for group in optimizer.param_groups] == pytest.approx(expected)
        optimizer._opt_called = True
        decay.step()
        schedule.step()


def test_rho_follows_the_learning_rate_of_a_group_that_is_added_later():
    """Gradual unfreezing: from the next step of the schedule on."""
    params = list(oracles.mlp().parameters())
    optimizer = SAM(params[:2], torch.optim.SGD, lr=0.4, rho=0.2)
    schedule = RhoProportionalToLR(optimizer)
    optimizer.add_param_group({"params": params[2:4], "rho": 0.6, "lr": 0.1})
    schedule.step()
    optimizer.add_param_group({"params": params[4:], "rho": 0.0})
    for group in optimizer.param_groups:
        group["lr"] /= 2
    schedule.step()
    assert [group["rho"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.3, 0.0])
    saved = schedule.state_dict()
    resumed = RhoProportionalToLR(optimizer)
    resumed.load_state_dict(saved)
    optimizer.param_groups[1]["lr"] /= 3
    resumed.step()
    assert [group["rho"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.1, 0.0])


def without_the_first(optimizer):
    del optimizer.param_groups[0]


def with_another_for_the_first(optimizer):
    optimizer.add_param_group({"params": optimizer.param_groups.pop(0)["params"], "rho": 0.125})


def in_reverse(optimizer):
    optimizer.param_groups.reverse()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (without_the_first, [0.125]),
        (with_another_for_the_first, [0.125, 0.0625]),
        (in_reverse, [0.125, 0.25]),
    ],
)
def test_rho_follows_the_learning_rate_of_its_own_group_where_the_groups_change(change, expected):
    optimizer = two_groups(0.5, 0.25)
    schedule = RhoProportionalToLR(optimizer)
    change(optimizer)
    for group in optimizer.param_groups:
        schedule.step()
        group["lr"] /= 2
    schedule.step()
    assert radii(optimizer) == pytest.approx(expected)


def test_rho_keeps_its_ratio_to_the_learning_rate_where_another_training_is_loaded():
    """Also where its learning rate has come down to nearly nothing."""
    optimizer, other = two_groups(0.5, 0.25), two_groups(0.5, 0.25)
    other.param_groups[0]["lr"] = 1e-9
    schedule = RhoProportionalToLR(optimizer)
    optimizer.load_state_dict(other.state_dict())
    optimizer.param_groups[0]["lr"] = 0.2
    schedule.step()
    assert radii(optimizer) == pytest.approx([1.0, 0.25])


def test_a_schedule_that_is_built_anew_takes_the_ratios_of_now():
    optimizer = two_groups(0.5, 0.25)
    RhoProportionalToLR(optimizer)
    optimizer.param_groups[0]["rho"] = 1.0
    schedule = RhoProportionalToLR(optimizer)
    optimizer.param_groups[0]["lr"] /= 4
    schedule.step()
    assert radii(optimizer) == pytest.approx([0.25, 0.25])


def test_the_ratios_of_more_groups_than_there_are_are_refused():
    saved = RhoProportionalToLR(two_groups()).state_dict()
    schedule = RhoProportionalToLR(build())
    own = schedule.state_dict()
    with pytest.raises(ValueError, match="of 2 parameter groups, and the optimizer has 1: build it with the same"):
        schedule.load_state_dict(saved)
    assert schedule.state_dict() == own


def test_rho_cannot_follow_a_learning_rate_of_zero():
    optimizer = build()
    optimizer.param_groups[0]["lr"] = 0.0
    message = r"start above 0, got \[0.0\]: build the schedule of rho before what sets them to 0"
    with pytest.raises(ValueError, match=message):
        RhoProportionalToLR(optimizer)
