"""``make_graphed_step`` on a stand-in for CUDA graphs: replays are eager steps, and a graph never goes stale."""

from __future__ import annotations

import copy

import cuda_graph
import pytest
import torch
from graph_pairs import CPU, Pair
from steps import Training, batches, set_lr
from torch import nn

from esam_kernels import ESAM, SAM, cross_entropy, graphs, make_graphed_step
from esam_kernels.backends import unavailable
from esam_kernels.graphs import DRAW_POOL, WARMUP_STEPS
from esam_kernels.schedules import PhaseSchedule

pytestmark = pytest.mark.skipif(unavailable("native", CPU) is not None, reason="no backend on the CPU fuses updates")


@pytest.fixture
def gpu(monkeypatch):
    return cuda_graph.install(monkeypatch)


class Hardest:
    """A ranking that can be compared, and has no hash therefore, as a dataclass has none."""

    def __eq__(self, other):
        return isinstance(other, Hardest)

    def __call__(self, context):
        return context.losses


PLANS = {
    "rise": {},
    "first_order": {"ranking": "first_order"},
    "random": {"ranking": "random"},
    "custom": {"ranking": lambda context: context.losses},
    "custom without a hash": {"ranking": Hardest()},
    "whole batch": {"gamma": 1.0},
    "short pass 1": {"gamma": 1.0, "ascent_share": 0.25},
    "adaptive": {"adaptive": True, "eta": 0.01},
    "previous": {"ascent": "previous", "gamma": 1.0},
    "momentum": {"ascent": "momentum", "gamma": 1.0},
    "base": {"rho": 0.0},
}


@pytest.mark.parametrize(("mask", "base"), [("tensor", "SGD"), ("element", "SGD"), ("element", "AdamW")])
@pytest.mark.parametrize("plan", PLANS)
def test_replays_of_every_plan_are_eager_steps_bit_for_bit(gpu, plan, mask, base):
    pair = Pair(base=base, mask=mask, **PLANS[plan])
    draws = DRAW_POOL if mask == "tensor" and plan != "base" else 1
    steps = WARMUP_STEPS + 2 * draws
    pair.run(steps)
    assert 1 <= len(gpu.captures) <= draws
    assert gpu.replays >= steps - max(WARMUP_STEPS, draws)
    assert set(gpu.modes) == {"thread_local"}


@pytest.mark.parametrize("plan", ["rise", "base"])
@pytest.mark.parametrize("base", ["SGD", "AdamW"])
def test_a_learning_rate_that_changes_changes_the_replayed_update(gpu, base, plan):
    pair = Pair(base=base, mask="element", **PLANS[plan])
    for number, given in enumerate(batches(CPU, WARMUP_STEPS + 5)):
        for optimizer in pair.optimizers:
            set_lr(optimizer, 0.1 / (1 + number))
        pair.compare(given)
    assert (len(gpu.captures), gpu.replays) == (1, 5)


def test_a_learning_rate_in_a_tensor_on_the_host_takes_no_capture_when_it_is_replaced(gpu):
    pair = Pair(mask="element")
    for number, given in enumerate(batches(CPU, WARMUP_STEPS + 5)):
        gpu.on_host.append(torch.tensor(0.1 / (1 + number), dtype=torch.float64))
        for optimizer in pair.optimizers:
            optimizer.param_groups[0]["lr"] = gpu.on_host[-1]
        pair.compare(given)
    assert (len(gpu.captures), gpu.replays) == (1, 5)


def test_dropout_draws_anew_in_every_replay_and_the_same_in_both_forwards(gpu):
    Pair(dropout=0.4, mask="element").run(WARMUP_STEPS + 6)
    assert gpu.replays == 6


def test_a_random_choice_is_drawn_anew_in_every_replay_also_after_a_smaller_batch(gpu):
    pair = Pair(mask="element", ranking="random")
    for number, given in enumerate(batches(CPU, WARMUP_STEPS + 6)):
        pair.compare(given)
        if number % 4 == 3:
            pair.compare(batches(CPU, 1, size=17)[0])
    assert (len(gpu.captures), gpu.replays) == (1, 6)


def test_a_phase_schedule_takes_graphs_of_both_kinds_of_steps(gpu):
    pair = Pair(mask="element")
    schedules = [PhaseSchedule(optimizer, "rho", 0.05, start=6, stop=12) for optimizer in pair.optimizers]
    for given in batches(CPU, 18):
        pair.compare(given)
        for schedule in schedules:
            schedule.step()
    assert len(gpu.captures) == 2
    assert gpu.replays == 18 - WARMUP_STEPS - 1


def test_a_schedule_of_ascent_share_takes_one_graph_for_each_size_of_pass_1(gpu):
    pair = Pair(mask="element", gamma=1.0, ascent_share=0.5)
    given = batches(CPU, 1)[0]
    samples = len(given[0])
    sizes = [samples // 2] * (WARMUP_STEPS + 4) + [samples // 4] * 4
    for number, size in enumerate(sizes):
        for optimizer in pair.optimizers:
            optimizer.ascent_share = (size + 0.01 * number) / samples  # a share that is new in every step
        pair.compare(given)
    assert len(gpu.captures) == 2
    assert gpu.replays == 4 + 3


def test_a_share_that_rounds_to_the_whole_batch_has_a_graph_of_its_own(gpu):
    pair = Pair(mask="element", gamma=1.0, ascent_share=0.999)
    pair.run(WARMUP_STEPS + 1)
    for optimizer in pair.optimizers:
        optimizer.ascent_share = 1.0
    pair.run(2)  # which returns the loss at w, not that at w + e
    assert len(gpu.captures) == 2


# -- graphs go stale ---------------------------------------------------------------------------------------------------


def loads_its_own_state(pair):
    for optimizer in pair.optimizers:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def loads_a_state_without_momentum(pair):
    for optimizer in pair.optimizers:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": {}})


def moves_the_model(pair):
    for training in (pair.graphed, pair.eager):
        training.model.double().float()


def adds_a_group(pair):
    for optimizer in pair.optimizers:
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], "lr": 0.3})


def changes_the_weight_decay(pair):
    for optimizer in pair.optimizers:
        optimizer.param_groups[0]["weight_decay"] = 0.5


def takes_evaluation_mode(pair):
    for training in (pair.graphed, pair.eager):
        training.model.eval()


def freezes_a_layer(pair):
    for training in (pair.graphed, pair.eager):
        training.model[0].requires_grad_(False)


def changes_eps(pair):
    for optimizer in pair.optimizers:
        state = optimizer.state_dict()
        optimizer.load_state_dict({**state, "esam": {**state["esam"], "eps": 0.5}})


CHANGES = [
    loads_its_own_state,
    loads_a_state_without_momentum,
    moves_the_model,
    adds_a_group,
    changes_the_weight_decay,
    takes_evaluation_mode,
    freezes_a_layer,
    changes_eps,
]


@pytest.mark.parametrize(
    ("change", "base"),
    [
        *((change, "SGD") for change in CHANGES),
        (loads_its_own_state, "AdamW"),
        (loads_a_state_without_momentum, "AdamW"),
    ],
)
def test_a_step_is_captured_anew_after_what_a_graph_holds_has_changed(gpu, change, base):
    pair = Pair(base=base, mask="element", dropout=0.2)
    pair.run(WARMUP_STEPS + 2)
    change(pair)
    pair.run(4)
    assert len(gpu.captures) == 2
    assert gpu.replays == 2 + 3


def test_a_history_that_was_loaded_is_the_one_that_is_used(gpu):
    pair = Pair(mask="element", ascent="previous", gamma=1.0)
    pair.run(WARMUP_STEPS + 2)
    loads_its_own_state(pair)
    pair.run(4)
    assert (len(gpu.captures), gpu.replays) == (2, 5)


def test_buffers_that_were_replaced_are_captured_anew(gpu):
    def with_batch_norm(**options):
        training = Training(CPU, "native", **options)
        training.model.insert(1, nn.BatchNorm1d(64))
        training.optimizer = ESAM(training.model.parameters(), torch.optim.SGD, lr=0.1, model=training.model, **options)
        return training

    pair = Pair(with_batch_norm, with_batch_norm, mask="element")
    pair.run(WARMUP_STEPS + 2)
    for training in (pair.graphed, pair.eager):
        training.model[1].running_mean = torch.full((64,), 5.0)
    pair.run(4)
    assert len(gpu.captures) == 2
    for mine, theirs in zip(pair.graphed.model.buffers(), pair.eager.model.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_number_of_graphs_is_bounded_and_the_least_recently_used_goes(gpu, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 4)
    pair = Pair(mask="element")
    given = batches(CPU, 1)[0]

    def captures_of_two_steps_at(decay):
        before = len(gpu.captures)
        for _ in range(2):
            for optimizer in pair.optimizers:
                optimizer.param_groups[0]["weight_decay"] = decay
            pair.compare(given)
        return len(gpu.captures) - before

    for _ in range(2):
        captures_of_two_steps_at(0.1)
    assert [captures_of_two_steps_at(decay) for decay in (0.2, 0.3, 0.4)] == [1, 1, 1]
    assert captures_of_two_steps_at(0.1) == 0
    assert captures_of_two_steps_at(0.5) == 1  # 0.2 goes
    assert len(pair.step._captures) == 4
    assert captures_of_two_steps_at(0.1) == 0
    assert captures_of_two_steps_at(0.2) == 1


# -- what a warm-up runs -----------------------------------------------------------------------------------------------


def test_warm_ups_and_captures_run_on_the_same_memory(gpu):
    """Where a batch lies, a slice at an odd offset or a tensor of its own, changes nothing."""
    training = Training(CPU, "native", mask="element")
    seen = []

    def losses(inputs, targets):
        seen.append((len(inputs), inputs.data_ptr(), inputs.stride()))
        return training.losses(inputs, targets)

    step = make_graphed_step(training.optimizer, losses, *batches(CPU, 1)[0])
    rows, targets = batches(CPU, 1, size=49)[0]
    for _ in range(WARMUP_STEPS + 1):
        step(rows[1:], targets[1:])
    assert len(gpu.captures) == 1
    places = {place for place in seen if place[0] == 48}
    assert len(places) == 1
    assert rows[1:].data_ptr() not in {address for _, address, _ in places}


def test_another_memory_format_is_another_batch(gpu):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
    formats = []

    def losses(images, targets):
        formats.append(images.is_contiguous(memory_format=torch.channels_last))
        return cross_entropy(model(images), targets)

    images, targets = torch.randn(6, 2, 5, 5), torch.arange(6) % 3
    step = make_graphed_step(optimizer, losses, images, targets)
    for _ in range(WARMUP_STEPS + 2):
        step(images, targets)
    assert (len(gpu.captures), gpu.replays) == (1, 2)
    assert not any(formats)
    step(images.to(memory_format=torch.channels_last), targets)
    assert gpu.replays == 2
    assert formats[-1]


def test_what_autocast_kept_of_an_evaluation_is_not_read_by_a_graph(gpu):
    pair = Pair(mask="element", rho=0.0)
    images = batches(CPU, 1)[0][0]
    with torch.autocast("cpu", torch.bfloat16):
        for given in batches(CPU, WARMUP_STEPS + 3):
            pair.compare(given)
            torch.clear_autocast_cache()
            for training in (pair.graphed, pair.eager):
                training.model(images)
            pair.eager.model[0].weight.data_ptr()
    assert gpu.replays == 3


# -- what else a step does ---------------------------------------------------------------------------------------------


def test_what_else_the_closure_returns_comes_out_of_replays_too(gpu):
    training = Training(CPU, "native", mask="element")

    def losses(inputs, targets):
        return training.losses(inputs, targets), {"mean": inputs.mean()}

    step = make_graphed_step(training.optimizer, losses, *batches(CPU, 1)[0])
    for inputs, targets in batches(CPU, WARMUP_STEPS + 3):
        _, rest = step(inputs, targets)
        assert torch.equal(rest["mean"], inputs.mean())
    assert gpu.replays == 3


def test_hooks_of_the_optimizer_are_called_once_around_each_step_replayed_or_not(gpu):
    training = Training(CPU, "native", mask="element")
    calls = []
    training.optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    training.optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    step = make_graphed_step(training.optimizer, training.losses, *batches(CPU, 1)[0])
    for given in batches(CPU, WARMUP_STEPS + 3):
        step(*given)
    assert calls == ["before", "after"] * (WARMUP_STEPS + 3)
    assert gpu.replays == 3


def test_a_checkpoint_between_replays_counts_the_steps(gpu):
    pair = Pair(mask="element")
    pair.run(WARMUP_STEPS + 4)
    # What torch.distributed.checkpoint reads.
    graphed, eager = ([group["esam"] for group in optimizer.param_groups] for optimizer in pair.optimizers)
    assert graphed == eager
    assert graphed[0]["step"] == WARMUP_STEPS + 4
    graphed, eager = (optimizer.state_dict() for optimizer in pair.optimizers)
    assert graphed["esam"] == eager["esam"]


def test_a_loss_that_was_kept_over_a_replay_is_refused_by_autograd(gpu):
    """As after any step: the weights that its backward needs have changed."""
    training = Training(CPU, "native", mask="element")
    step = make_graphed_step(training.optimizer, training.losses, *batches(CPU, 1)[0])
    given = batches(CPU, 1)[0]
    for _ in range(WARMUP_STEPS + 1):
        step(*given)
    kept = training.losses(*given).mean()
    step(*given)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()
