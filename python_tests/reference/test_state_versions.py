"""What a checkpoint says of the version, the ascent and the ranking that wrote it, and what loading makes of it."""

import copy
import io
import warnings

import oracles
import pytest
import torch

from esam_kernels import ESAM


def build(**kwargs):
    model = oracles.mlp()
    settings = {"lr": 0.1, "momentum": 0.9, "rho": 0.5, "gamma": 1.0, "model": model, **kwargs}
    return model, ESAM(model.parameters(), torch.optim.SGD, **settings)


def after_two_steps(**kwargs):
    model, optimizer = build(**kwargs)
    for step in range(2):
        optimizer.step(oracles.losses_of(model), *oracles.batch(seed=step))
    return model, optimizer


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def largest_loss(context):
    return context.losses


class ByTarget:
    def __call__(self, context):
        return context.batch[1].float()


RANKINGS = {"rise": "rise", "first_order": "first_order", "random": "random", "largest_loss": largest_loss}


@pytest.mark.parametrize("name", [*RANKINGS, "ByTarget"])
@pytest.mark.parametrize("where", ["esam", "param_groups"])
def test_the_ranking_is_saved_by_name_and_travels_through_a_file(name, where):
    _, optimizer = after_two_steps(ranking=RANKINGS.get(name, ByTarget()), gamma=0.5)
    saved = through_a_file(optimizer.state_dict())
    noted = saved["esam"] if where == "esam" else saved["param_groups"][0]["esam"]
    assert (noted["ranking"], noted["ascent"], noted["version"]) == (name, "current", 3)


@pytest.mark.parametrize("ranking", RANKINGS)
def test_a_run_with_a_ranking_resumes_bitwise(ranking):
    model, optimizer = after_two_steps(ranking=RANKINGS[ranking], gamma=0.5, seed=7)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    other, resumed = build(ranking=RANKINGS[ranking], gamma=0.5)
    other.load_state_dict(saved["model"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(saved["optimizer"])
    for each, its in ((model, optimizer), (other, resumed)):
        for step in range(2, 5):
            its.step(oracles.losses_of(each), *oracles.batch(seed=step))
    assert oracles.same_bits(oracles.weights_of(model), oracles.weights_of(other))


@pytest.mark.parametrize(("saved_with", "built_with"), [("first_order", "rise"), ("largest_loss", "random")])
def test_another_ranking_is_kept_as_built_and_one_warning_names_both(saved_with, built_with):
    _, optimizer = after_two_steps(ranking=RANKINGS[saved_with], gamma=0.5)
    _, other = build(ranking=built_with, gamma=0.5)
    message = f'saved with ranking="{saved_with}": this optimizer goes on with ranking="{built_with}"'
    with pytest.warns(UserWarning, match=message) as found:
        other.load_state_dict(optimizer.state_dict())
    assert len(found) == 1
    assert found[0].filename == __file__
    assert other.state_dict()["esam"]["ranking"] == built_with
    assert other.state_dict()["esam"]["step"] == 2


@pytest.mark.parametrize(
    ("saved_with", "built_with"), [("previous", "current"), ("current", "previous"), ("momentum", "current")]
)
@pytest.mark.parametrize("where", ["esam", "param_groups"])
def test_a_checkpoint_of_another_ascent_is_refused_with_both_names_and_changes_nothing(saved_with, built_with, where):
    _, optimizer = after_two_steps(ascent=saved_with)
    state = optimizer.state_dict()
    if where == "param_groups":
        del state["esam"]
    other_model, other = after_two_steps(ascent=built_with)
    message = f'saved with ascent="{saved_with}", this optimizer has ascent="{built_with}": build it with the same'
    before = copy.deepcopy(other.state_dict())
    oracles.assert_refused(lambda: other.load_state_dict(state), ValueError, message, other_model, other)
    assert before["esam"] == other.state_dict()["esam"]


def test_the_way_round_the_refusal_that_the_message_names_works():
    _, optimizer = after_two_steps(ascent="momentum")
    state = copy.deepcopy(optimizer.state_dict())
    del state["esam"]["ascent"]
    for group in state["param_groups"]:
        del group["esam"]["ascent"]
    _, other = build(ascent="current")
    other.load_state_dict(state)
    assert other.state_dict()["esam"]["ascent"] == "current"
    assert other.state_dict()["esam"]["step"] == 2


@pytest.mark.parametrize("where", ["esam", "param_groups"])
def test_entries_of_a_newer_version_are_named_with_both_versions_and_change_nothing(where):
    model, optimizer = after_two_steps()
    state = copy.deepcopy(optimizer.state_dict())
    newer = {"version": 4, "warp": 9, "bend": "left"}
    if where == "esam":
        state["esam"].update(newer)
    else:
        del state["esam"]
        for group in state["param_groups"]:
            group["esam"].update(newer)
    message = r"unknown ESAM entries: \['bend', 'warp'\] \(it is of version 4, this package writes 3\)"
    oracles.assert_refused(lambda: optimizer.load_state_dict(state), ValueError, message, model, optimizer)


def test_a_newer_version_without_new_entries_is_taken_over():
    _, optimizer = after_two_steps(seed=4)
    state = copy.deepcopy(optimizer.state_dict())
    state["esam"]["version"] = 4
    _, other = build()
    other.load_state_dict(state)
    assert (other.state_dict()["esam"]["seed"], other.state_dict()["esam"]["version"]) == (4, 3)


def test_a_checkpoint_of_version_1_is_taken_over_without_a_warning():
    """It had neither version nor ascent nor ranking; version 2 had no ascent_share."""
    _, optimizer = after_two_steps(seed=4)
    state = copy.deepcopy(optimizer.state_dict())
    for noted in (state["esam"], *(group["esam"] for group in state["param_groups"])):
        for name in ("version", "ascent", "ranking", "ascent_share"):
            del noted[name]
    _, other = build(ranking="first_order")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(state)
    assert other.state_dict()["esam"] == {**optimizer.state_dict()["esam"], "ranking": "first_order"}
