"""The captured step: replays give the bits of eager steps, and what may change between replays does."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import train
from busy import AT_ONCE_SECONDS, while_busy
from steps import BATCH, Training, assert_same_weights, batches, set_lr
from torch import nn

from esam_kernels import cross_entropy, make_graphed_step
from esam_kernels.graphs import DRAW_POOL, WARMUP_STEPS
from esam_kernels.schedules import PhaseSchedule

masks = pytest.mark.parametrize("mask", ["tensor", "element"])
bases = pytest.mark.parametrize("base", ["SGD", "AdamW"])

# Every draw of the pool eagerly, captured, and some replayed.
STEPS = WARMUP_STEPS + 2 * DRAW_POOL + 4


def graphed_and_eager(device, backend_name, *args, **esam):
    """Two trainings alike. The eager one draws whole tensors from the same pool."""
    graphed, eager = (Training(device, backend_name, *args, **esam) for _ in range(2))
    step = make_graphed_step(graphed.optimizer, graphed.losses, *batches(device, 1)[0])
    if graphed.optimizer._perturbation.draw.pool is not None:  # the step is captured
        eager.optimizer._perturbation.draw.pool = DRAW_POOL
        groups = eager.optimizer.param_groups
        if all(isinstance(group["lr"], torch.Tensor) for group in groups):
            # As in a graph the update is fused in every step: torch's own rounds in another order.
            eager.optimizer._perturbation.lr_tensors = [group["lr"] for group in groups]
    return step, graphed, eager


@masks
@bases
@pytest.mark.parametrize("autocast", [False, True])
def test_replays_are_eager_steps_bit_for_bit(backend_name, device, mask, base, autocast):
    step, graphed, eager = graphed_and_eager(device, backend_name, base, autocast, mask=mask)
    for batch in batches(device, STEPS):
        loss, expected = step(*batch), eager.step(batch)
        assert torch.equal(loss, expected)
    assert_same_weights(graphed, eager)


@masks
def test_a_replay_returns_at_once_while_the_device_is_busy(backend_name, device, mask):
    step, graphed, _ = graphed_and_eager(device, backend_name, mask=mask)
    given = batches(device, STEPS)
    for number, batch in enumerate(given[:-1]):
        set_lr(graphed.optimizer, 0.05 / (1 + number))
        step(*batch)
    call = while_busy(device, lambda: step(*given[-1]))
    assert call.was_busy, "the step returned when the device was done"
    assert call.seconds < AT_ONCE_SECONDS


@masks
@bases
@pytest.mark.parametrize("ascent", ["previous", "momentum"])
def test_replays_with_one_pass_are_eager_steps_bit_for_bit(backend_name, device, mask, base, ascent):
    options = {"mask": mask, "ascent": ascent, "gamma": 1.0, "rho": 0.5}
    step, graphed, eager = graphed_and_eager(device, backend_name, base, **options)
    for number, batch in enumerate(batches(device, STEPS)):
        loss, expected = step(*batch), eager.step(batch)
        assert torch.equal(loss, expected), number
    assert_same_weights(graphed, eager)


@masks
def test_replays_with_a_short_pass_1_are_eager_steps_bit_for_bit(backend_name, device, mask):
    step, graphed, eager = graphed_and_eager(device, backend_name, mask=mask, gamma=1.0, ascent_share=0.25)
    for number, batch in enumerate(batches(device, STEPS)):
        loss, expected = step(*batch), eager.step(batch)
        assert torch.equal(loss, expected), number
    assert_same_weights(graphed, eager)


@masks
@bases
def test_lr_rho_and_gamma_change_between_replays(backend_name, device, mask, base):
    step, graphed, eager = graphed_and_eager(device, backend_name, base, mask=mask)
    # Three values of gamma and the draws come together again after 3 * DRAW_POOL steps.
    for number, batch in enumerate(batches(device, 6 * DRAW_POOL)):
        for training in (graphed, eager):
            set_lr(training.optimizer, 0.01 / (1 + number))
            for group in training.optimizer.param_groups:
                group["rho"] = 0.02 * (1 + number)
            training.optimizer.gamma = (0.5, 0.25, 1.0)[number % 3]
        step(*batch)
        eager.step(batch)
    assert_same_weights(graphed, eager)


def test_the_element_mask_is_fresh_in_every_replay(backend_name, device):
    """Two steps from the same weights on the same batch end elsewhere."""
    step, graphed, _ = graphed_and_eager(device, backend_name, mask="element", rho=1.0)
    batch = batches(device, 1)[0]
    for _ in range(WARMUP_STEPS + 1):
        step(*batch)
    saved = graphed.weights()
    ends = []
    for _ in range(2):
        with torch.no_grad():
            for param, weights in zip(graphed.model.parameters(), saved, strict=True):
                param.copy_(weights)
        for buffer in graphed.optimizer.state.values():
            buffer["momentum_buffer"].zero_()
        step(*batch)
        ends.append(torch.cat([weights.flatten() for weights in graphed.weights()]))
    assert not torch.equal(*ends)


def test_a_last_batch_of_another_size_runs_eagerly(backend_name, device):
    step, graphed, eager = graphed_and_eager(device, backend_name, mask="element")
    full, rest = batches(device, STEPS), batches(device, 1, size=17)[0]
    for number, batch in enumerate(full):
        for given in [batch, rest] if number % 4 == 3 else [batch]:
            step(*given)
            eager.step(given)
    assert_same_weights(graphed, eager)


def test_dropout_is_replayed_inside_the_graph_and_fresh_in_every_replay(backend_name, device):
    training = Training(device, backend_name, gamma=0.5)
    ones = torch.ones(1000, device=device)
    noise = [torch.zeros_like(ones) for _ in range(3)]
    calls = []

    def losses(inputs, targets):
        noise[len(calls) % 3].copy_(F.dropout(ones))
        calls.append(None)
        return training.losses(inputs, targets)

    batch = batches(device, 1)[0]
    step = make_graphed_step(training.optimizer, losses, *batch)
    before = None
    for _ in range(STEPS):
        step(*batch)
        assert torch.equal(noise[0], noise[1])
        assert not torch.equal(noise[1], noise[2])
        assert before is None or not torch.equal(before, noise[0])
        before = noise[0].clone()


def test_a_closure_that_waits_for_the_device_is_refused(backend_name, device):
    if device.type != "cuda":
        pytest.skip("nothing is captured")
    training = Training(device, backend_name, mask="element", dropout=0.4)

    def losses(inputs, targets):
        found = cross_entropy(training.model(inputs), targets)
        return found * (1.0 if found.mean().item() > 0 else 2.0)

    batch = batches(device, 1)[0]
    step = make_graphed_step(training.optimizer, losses, *batch)
    for _ in range(WARMUP_STEPS):
        step(*batch)
    before = training.weights()
    state, noise = copy.deepcopy(training.optimizer.state_dict()), torch.cuda.get_rng_state(device)
    stream = torch.cuda.current_stream(device)
    with pytest.raises(RuntimeError, match="cannot be captured"):
        step(*batch)
    assert all(map(torch.equal, before, training.weights()))
    assert torch.equal(torch.cuda.get_rng_state(device), noise)
    assert torch.cuda.current_stream(device) == stream
    now = training.optimizer.state_dict()
    assert now["esam"] == state["esam"]
    for number, values in state["state"].items():
        assert all(torch.equal(values[name], now["state"][number][name]) for name in values)
    # Also dropout draws: a capture that fails leaves torch 2.11's generator unable to.
    training.step(batch)
    F.dropout(torch.ones(8, device=device))
    assert all(param.isfinite().all() for param in training.model.parameters())


@pytest.mark.parametrize("index", [0, 1])
def test_two_graphed_runs_give_the_same_bits(backend_name, device, index):
    """Also on a device that is not the current one, where the seed of the dropout has to lie too."""
    if index > 0 and (device.type != "cuda" or torch.cuda.device_count() <= index):
        pytest.skip("there is one device only")
    device = torch.device(device.type, index) if device.type == "cuda" else device
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        training = Training(device, backend_name, dropout=0.2)
        step = make_graphed_step(training.optimizer, training.losses, *batches(device, 1)[0])
        for batch in batches(device, STEPS):
            step(*batch)
        runs.append(training)
    assert_same_weights(*runs)


@pytest.mark.parametrize("ranking", ["first_order", "random", lambda context: context.losses])
def test_replays_with_every_ranking_are_eager_steps_bit_for_bit(backend_name, device, ranking):
    step, graphed, eager = graphed_and_eager(device, backend_name, mask="element", ranking=ranking)
    rest = batches(device, 1, size=17)[0]
    for number, batch in enumerate(batches(device, STEPS)):
        for given in [batch, rest] if number % 4 == 3 else [batch]:
            assert torch.equal(step(*given), eager.step(given)), number
    assert_same_weights(graphed, eager)


def test_a_phase_schedule_takes_graphs_of_both_kinds_of_steps(backend_name, device):
    step, graphed, eager = graphed_and_eager(device, backend_name, mask="element")
    schedules = [PhaseSchedule(training.optimizer, "rho", 0.05, start=6, stop=14) for training in (graphed, eager)]
    for number, batch in enumerate(batches(device, 20)):
        for training in (graphed, eager):
            set_lr(training.optimizer, 0.1 / (1 + number))
        step(*batch)
        eager.step(batch)
        for schedule in schedules:
            schedule.step()
    assert_same_weights(graphed, eager)


def loads_a_checkpoint(training):
    training.optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))


def moves_the_model(training):
    training.model.cpu().to(training.device)


def adds_a_group(training):
    lr = training.optimizer.param_groups[0]["lr"]
    added = nn.Parameter(torch.zeros(3, device=training.device))
    training.optimizer.add_param_group({"params": [added], "lr": copy.deepcopy(lr)})


@pytest.mark.parametrize("change", [loads_a_checkpoint, moves_the_model, adds_a_group])
def test_a_step_is_captured_anew_after_what_a_graph_holds_has_moved(backend_name, device, change):
    step, graphed, eager = graphed_and_eager(device, backend_name, mask="element")
    for number, batch in enumerate(batches(device, 2 * WARMUP_STEPS + 6)):
        if number == WARMUP_STEPS + 3:
            for training in (graphed, eager):
                change(training)
            if device.type == "cuda":  # what was freed is written over
                left = [torch.full((1 << 12,), torch.nan, device=device) for _ in range(64)]
                del left
        assert torch.equal(step(*batch), eager.step(batch)), number
    assert_same_weights(graphed, eager)


def test_a_loader_that_pins_its_batches_does_not_break_a_capture(backend_name, device):
    """Its thread asks for events meanwhile, which a capture in mode "global" would not survive."""
    step, graphed, eager = graphed_and_eager(device, backend_name, mask="tensor")
    inputs, targets = (torch.cat(tensors).cpu() for tensors in zip(*batches(device, STEPS)))
    data = torch.utils.data.TensorDataset(inputs, targets)
    loader = torch.utils.data.DataLoader(data, batch_size=BATCH, pin_memory=device.type == "cuda", num_workers=1)
    for batch in loader:
        on_device = [tensor.to(device, non_blocking=True) for tensor in batch]
        step(*on_device)
        eager.step(on_device)
    assert_same_weights(graphed, eager)


def test_a_base_that_counts_on_the_host_is_refused(backend_name, device):
    if device.type != "cuda":
        pytest.skip("nothing is captured")
    training = Training(device, backend_name)
    params = list(training.model.parameters())
    training.optimizer = type(training.optimizer)(params, torch.optim.AdamW(params), backend=backend_name)
    with pytest.raises(ValueError, match="capturable"):
        make_graphed_step(training.optimizer, training.losses, *batches(device, 1)[0])


def test_the_example_trains_with_a_graph_as_without(device):
    options = ["--data", "synthetic-cifar10", "--limit", "64", "--batch-size", "8", "--epochs", "2", "--seeds", "1"]
    options += ["--optimizer", "sam", "esam", "--device", device.type, "--channels-last"]
    options += ["--mask", "element", "--gamma-warmup", "0"]
    graphed, eager = (train.train(train.parse_options([*options, *graph])) for graph in (["--graph"], []))
    for ours, expected in zip(graphed, eager, strict=True):
        for one, other in zip(ours["history"], expected["history"], strict=True):
            assert {**one, "seconds": 0} == {**other, "seconds": 0}
