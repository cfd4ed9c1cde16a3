"""A step that cannot be captured: what is said, and that everything goes on as if it had not been tried."""

from __future__ import annotations

import gc

import cuda_graph
import pytest
import torch
from graph_pairs import CPU, Pair, nothing_changes, training_for_graphs
from steps import Training, batches
from torch import nn

from esam_kernels import ESAM, captures, cross_entropy, make_graphed_step
from esam_kernels.backends import unavailable
from esam_kernels.captures import HostState
from esam_kernels.graphs import WARMUP_STEPS

pytestmark = pytest.mark.skipif(unavailable("native", CPU) is not None, reason="no backend on the CPU fuses updates")


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(captures, "_broken", [])
    return cuda_graph.install(monkeypatch)


WHAT = {
    ".item()": lambda losses: losses.mean().item(),
    "if": lambda losses: bool(losses.mean() > 0),
    "a boolean index": lambda losses: losses[losses > 0],
    "a copy from the host": lambda losses: losses.detach().clone().copy_(torch.tensor([1.0])),
    "an error of its own": lambda losses: losses.view(7, 7, 7),
}


class Failing:
    """Two trainings alike. The closure of the graphed one does something forbidden in one of its calls, in captures."""

    def __init__(self, gpu, what, call, **options):
        self.gpu, self.what, self.call = gpu, what, call
        self.calls, self.is_on = 0, True
        self.pair = Pair(self._make, **options)

    def _make(self, **options):
        training = training_for_graphs(**options)
        losses_of = training.losses

        def losses(inputs, targets):
            losses = losses_of(inputs, targets)
            self.calls += 1
            if self.is_on and self.gpu.graph is not None and self.calls % 3 == self.call:
                self.what(losses)
            return losses

        training.losses = losses
        return training


@pytest.mark.parametrize(("what", "call"), [*((what, number % 3) for number, what in enumerate(WHAT)), (".item()", 1)])
def test_after_a_failed_capture_training_goes_on_as_if_it_had_not_been_tried(gpu, what, call):
    failing = Failing(gpu, WHAT[what], call, dropout=0.4, mask="element")
    pair = failing.pair
    pair.run(WARMUP_STEPS)
    stream = gpu.stream
    for _ in range(2):
        failing.calls = 0
        with nothing_changes(pair.graphed), pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
            pair.step(*batches(CPU, 1)[0])
        pair.run(1)  # a warm-up for the next try
    assert gpu.stream is stream
    assert gpu.open_pools == 0
    assert gpu.users_of_pools == 0
    assert not gpu.generator.state.is_capturing
    # Eagerly, and, the culprit gone, as graphs.
    step, pair.step = pair.step, lambda *given: pair.graphed.step(given)
    pair.run(3)
    pair.step, failing.is_on = step, False
    pair.run(4)
    assert gpu.replays >= 2


def test_of_a_broken_capture_an_empty_graph_is_kept_and_of_one_that_was_whole_nothing(gpu):
    """torch's allocator of pinned memory holds the address of a graph whose capture broke."""
    for what, kept in ((".item()", 2), ("an error of its own", 0)):
        captures._broken.clear()
        failing = Failing(gpu, WHAT[what], 1, mask="element")
        failing.pair.run(WARMUP_STEPS)
        graphs, recorded = [], []
        for _ in range(2):
            failing.calls = 0
            with pytest.raises(RuntimeError, match="cannot be captured"):
                failing.pair.step(*batches(CPU, 1)[0])
            graphs.append(gpu.captures.pop())
            recorded.append(len(graphs[-1]().recorder.calls) if graphs[-1]() is not None else 0)
            failing.pair.run(1)
        gc.collect()
        assert len(captures._broken) == kept
        assert sum(graph() is not None for graph in graphs) == kept
        assert recorded == [0, 0]


def test_after_many_broken_captures_no_other_is_tried(gpu, monkeypatch):
    monkeypatch.setattr(captures, "MAX_BROKEN", 2)
    failing = Failing(gpu, WHAT[".item()"], 1, mask="element")
    pair = failing.pair
    pair.run(WARMUP_STEPS)
    for _ in range(2):
        failing.calls = 0
        with pytest.raises(RuntimeError, match="cannot be captured"):
            pair.step(*batches(CPU, 1)[0])
        pair.run(1)
    failing.calls = 0
    message = "2 captures in a CUDA graph have failed in this process.* Call optimizer.step in place of the graphed"
    for _ in range(3):
        with nothing_changes(pair.graphed), pytest.raises(RuntimeError, match=message):
            pair.step(*batches(CPU, 1)[0])
    assert (len(captures._broken), len(gpu.captures), failing.calls) == (2, 2, 0)
    pair.step = lambda *given: pair.graphed.step(given)
    pair.run(2)


def test_a_failed_capture_leaves_the_history_of_the_ascent(gpu):
    failing = Failing(gpu, WHAT[".item()"], 1, mask="element", ascent="previous", gamma=1.0)
    failing.pair.run(WARMUP_STEPS)
    failing.calls = 0
    with nothing_changes(failing.pair.graphed), pytest.raises(RuntimeError, match=r"graph: .*waiting for a value"):
        failing.pair.step(*batches(CPU, 1)[0])
    failing.is_on = False
    failing.pair.run(4)
    assert gpu.replays >= 2


def test_pass_1_is_recorded_again_after_a_capture_that_failed_in_pass_2(gpu):
    failing = Failing(gpu, WHAT[".item()"], 2, mask="element", ranking="first_order")
    failing.pair.run(WARMUP_STEPS)
    failing.calls = 0
    with nothing_changes(failing.pair.graphed), pytest.raises(RuntimeError, match="cannot be captured"):
        failing.pair.step(*batches(CPU, 1)[0])
    failing.is_on = False
    failing.pair.run(4)
    assert gpu.replays == 3


def test_numbers_that_a_failed_capture_has_drawn_on_the_host_are_drawn_again():
    """A DataLoader shuffles by the generator of the host."""
    before = HostState(Training(CPU, "native").optimizer)
    drawn = torch.rand(3)
    before.put_back()
    assert torch.equal(torch.rand(3), drawn)


def test_graphs_of_before_are_captured_anew_after_a_failed_capture(gpu):
    """They hold the state of the random generator that the failed one has spoilt."""
    failing = Failing(gpu, WHAT[".item()"], 1, dropout=0.4, mask="element")
    failing.is_on = False
    failing.pair.run(WARMUP_STEPS + 2)
    failing.is_on = True
    for optimizer in failing.pair.optimizers:
        optimizer.param_groups[0]["weight_decay"] = 0.5
    failing.pair.run(1)
    failing.calls = 0
    with pytest.raises(RuntimeError, match="cannot be captured"):
        failing.pair.step(*batches(CPU, 1)[0])
    failing.is_on = False
    for optimizer in failing.pair.optimizers:
        optimizer.param_groups[0]["weight_decay"] = 1e-3
    failing.pair.run(3)
    assert (len(gpu.captures), gpu.replays) == (3, 4)


def test_an_interrupt_in_a_capture_is_an_interrupt(gpu):
    def interrupt(losses):
        raise KeyboardInterrupt

    failing = Failing(gpu, interrupt, 2, mask="element")
    failing.pair.run(WARMUP_STEPS)
    failing.calls = 0
    with nothing_changes(failing.pair.graphed), pytest.raises(KeyboardInterrupt):
        failing.pair.step(*batches(CPU, 1)[0])
    failing.is_on = False
    failing.pair.run(3)


def test_after_an_error_in_a_warm_up_the_weights_are_back_and_waited_for(gpu):
    training = Training(CPU, "native", mask="element")
    calls = []

    def losses(inputs, targets):
        calls.append(None)
        if len(calls) == 3:
            raise ArithmeticError("an error of its own")
        return training.losses(inputs, targets)

    given = batches(CPU, 1)[0]
    step = make_graphed_step(training.optimizer, losses, *given)
    main, before = gpu.stream, training.weights()
    with pytest.raises(ArithmeticError, match="of its own"):
        step(*given)
    assert all(map(torch.equal, before, training.weights()))
    assert gpu.stream is main
    assert len(main.waits) == 1


def test_a_rate_that_is_no_number_is_refused(gpu):
    training = Training(CPU, "native", mask="element")
    given = batches(CPU, 1)[0]
    step = make_graphed_step(training.optimizer, training.losses, *given)
    for _ in range(WARMUP_STEPS + 1):
        step(*given)
    training.optimizer.param_groups[0]["lr"] = "fast"
    with nothing_changes(training), pytest.raises(TypeError, match="lr of parameter group 0 must be a number"):
        step(*given)


class Replacing(nn.Module):
    """Counts its forwards in a new tensor each time."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, inputs):
        self.count = self.count + 1.0
        return inputs


def test_a_buffer_that_the_forward_replaces_is_refused_and_stays(gpu):
    training = Training(CPU, "native")
    model = nn.Sequential(Replacing(), training.model)
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model, mask="element")
    given = batches(CPU, 1)[0]
    step = make_graphed_step(optimizer, lambda x, y: cross_entropy(model(x), y), *given)
    for _ in range(WARMUP_STEPS):
        step(*given)
    before = model[0].count
    with pytest.raises(RuntimeError, match=r"new tensor in place of the buffer 'count' of Replacing.*self.count.copy_"):
        step(*given)
    assert model[0].count is before
    assert before.item() == WARMUP_STEPS
