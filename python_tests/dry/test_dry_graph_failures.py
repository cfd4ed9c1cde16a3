"""A step that cannot be captured: what is said, and that everything goes on as if it had not been tried."""

from __future__ import annotations

import contextlib
import gc
import weakref

import cuda_graph
import pytest
import torch
import torch.nn.functional as F
from graph_pairs import CPU, Pair, training_for_graphs
from steps import Training, batches
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from esam_kernels import ESAM, captures, cross_entropy, make_graphed_step
from esam_kernels.backends import unavailable
from esam_kernels.captures import HostState
from esam_kernels.graphs import WARMUP_STEPS

pytestmark = pytest.mark.skipif(unavailable("native", CPU) is not None, reason="no backend on the CPU fuses updates")


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(captures, "_broken", [])
    return cuda_graph.install(monkeypatch)


@contextlib.contextmanager
def nothing_changes(training):
    """Weights, optimizer state, buffers, counters and random state."""

    def all_of_it():
        optimizer = training.optimizer
        state = optimizer.state_dict()
        tensors = [tensor for values in state["state"].values() for tensor in values.values()]
        tensors += [torch.get_rng_state(), *training.model.state_dict().values()]
        draw = optimizer._perturbation.draw.pool
        return [tensor.clone() for tensor in tensors], state["esam"], state["param_groups"], draw

    tensors, *rest = all_of_it()
    yield
    tensors_now, *rest_now = all_of_it()
    assert len(tensors) == len(tensors_now)
    assert all(map(torch.equal, tensors, tensors_now))
    assert rest == rest_now


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
            graphs.append(weakref.ref(gpu.captures.pop()))
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


# -- refused at once ---------------------------------------------------------------------------------------------------


class OwnSGD(torch.optim.SGD):
    pass


def tied(params):
    twin = nn.Parameter(params[0].detach())
    twin.data = params[0].data
    return [*params, twin]


def hooked(base):
    base.register_step_pre_hook(lambda *_: None)
    return base


REFUSED = {
    "a subclass": (
        lambda p: OwnSGD(p, lr=0.1),
        {},
        "OwnSGD cannot be .*: OwnSGD is neither SGD nor Adam nor AdamW of torch.optim itself. A graph can hold",
    ),
    "steps on the host": (
        lambda p: torch.optim.AdamW(p),
        {},
        r"AdamW counts its steps on the host \(parameter group 0\).* capturable=True or fused=True, or call opt",
    ),
    "others on the host": (
        lambda p: torch.optim.NAdam(p),
        {},
        r"NAdam counts its steps on the host \(parameter group 0\).*with capturable=True, or call optimizer.step",
    ),
    "a frozen rate": (
        lambda p: torch.optim.NAdam(p, lr=0.1, capturable=True),
        {},
        r"learning rate of parameter group 0 is 0.1, and would be frozen.*lr=torch.tensor\(0.1, device='cuda'\)",
    ),
    "no capture": (
        lambda p: torch.optim.Adagrad(p, lr=0.1),
        {},
        "Adagrad cannot be captured .*is neither SGD nor .*capturable=True. Use one of these, or call optimizer.step",
    ),
    "an unfused backend": (lambda p: torch.optim.SGD(p, lr=0.1), {"backend": "reference"}, "'reference' does not fuse"),
    "tied weights": (lambda p: torch.optim.SGD(tied(p), lr=0.1), {}, "parameters are tied to each other"),
    "hooks": (
        lambda p: hooked(torch.optim.SGD(p, lr=0.1)),
        {},
        "hooks on the base optimizer.*register them on the ESAM",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_base_optimizer_that_cannot_be_captured_is_refused(gpu, case):
    base, options, message = REFUSED[case]
    training = Training(CPU, "native")
    built = base(list(training.model.parameters()))
    params = [param for group in built.param_groups for param in group["params"]]
    training.optimizer = ESAM(params, built, **{"backend": "native", **options})
    with nothing_changes(training), pytest.raises(ValueError, match=message):
        make_graphed_step(training.optimizer, training.losses, *batches(CPU, 1)[0])


def test_global_hooks_are_refused(gpu):
    training = Training(CPU, "native")
    handle = register_optimizer_step_post_hook(lambda *_: None)
    try:
        with nothing_changes(training), pytest.raises(ValueError, match="or on all optimizers"):
            make_graphed_step(training.optimizer, training.losses, *batches(CPU, 1)[0])
    finally:
        handle.remove()


def test_models_on_several_devices_or_ranks_are_refused(gpu, monkeypatch):
    training = Training(CPU, "native")
    devices = {torch.device("cuda:0"), torch.device("cuda:1")}
    with pytest.MonkeyPatch.context() as patch, nothing_changes(training):
        patch.setattr(training.optimizer._perturbation.parameters, "devices", devices)
        with pytest.raises(ValueError, match="the parameters are on cuda:0 and cuda:1"):
            make_graphed_step(training.optimizer, training.losses, *batches(CPU, 1)[0])
    given = batches(CPU, 1)[0]
    for name in ("DistributedDataParallel", "fully_shard"):
        monkeypatch.setattr(type(training.optimizer._parallelism), "spread_by", name)
        message = f"the model is in {name}: a CUDA graph holds the step of one process.* Call optimizer.step"
        with nothing_changes(training), pytest.raises(ValueError, match=message):
            make_graphed_step(training.optimizer, training.losses, *given)
    monkeypatch.setattr(type(training.optimizer._parallelism), "spread_by", None)
    monkeypatch.setattr(type(training.optimizer), "sync_perturbation", True)
    with nothing_changes(training), pytest.raises(ValueError, match="built with sync_perturbation=True: a CUDA graph"):
        make_graphed_step(training.optimizer, training.losses, *given)


def test_a_batch_elsewhere_is_refused(gpu):
    training = Training(CPU, "native")
    inputs, targets = batches(CPU, 1)[0]
    with (
        nothing_changes(training),
        pytest.raises(ValueError, match=r"tensor 1 .* is on meta, the parameters are on cpu"),
    ):
        make_graphed_step(training.optimizer, training.losses, inputs, targets.to("meta"))


def test_perturbed_weights_are_refused(gpu):
    training = Training(CPU, "native", mask="element")
    given = batches(CPU, 1)[0]
    step = make_graphed_step(training.optimizer, training.losses, *given)
    training.optimizer.backward(training.losses(*given).mean())
    training.optimizer.first_step()
    with pytest.raises(RuntimeError, match="make_graphed_step while the weights are perturbed"):
        make_graphed_step(training.optimizer, training.losses, *given)
    with pytest.raises(RuntimeError, match="a graphed step while the weights are perturbed"):
        step(*given)
    training.optimizer.restore()
    for _ in range(WARMUP_STEPS + 1):
        step(*given)
    assert gpu.replays == 1


def test_what_comes_to_be_impossible_later_is_refused_before_the_step(gpu):
    training = Training(CPU, "native", mask="element")
    given = batches(CPU, 1)[0]
    step = make_graphed_step(training.optimizer, training.losses, *given)
    for _ in range(WARMUP_STEPS + 1):
        step(*given)
    handle = training.optimizer.base_optimizer.register_step_pre_hook(lambda *_: None)
    with nothing_changes(training), pytest.raises(ValueError, match="a replay runs no Python"):
        step(*given)
    handle.remove()
    step(*given)
    state = training.optimizer.state[training.model[0].weight]
    state["momentum_buffer"] = state["momentum_buffer"].t().contiguous().t()
    with (
        nothing_changes(training),
        pytest.raises(ValueError, match="'momentum_buffer' in the state of parameter group 0"),
    ):
        step(*given)
    assert gpu.replays == 2


def test_a_gradient_of_another_layout_is_copied_and_the_rate_is_still_read_on_the_device(gpu):
    def transpose(param):
        param.grad = param.grad.t().contiguous().t()

    weight = nn.Parameter(torch.randn(4, 5))
    weight.register_post_accumulate_grad_hook(transpose)
    optimizer = ESAM([weight], torch.optim.SGD, lr=0.0, momentum=0.0, mask="element", rho=0.0)
    inputs, targets = torch.randn(6, 5), torch.arange(6) % 4

    def losses(inputs, targets):
        return F.cross_entropy(inputs @ weight.t(), targets, reduction="none")

    step = make_graphed_step(optimizer, losses, inputs, targets)
    for _ in range(WARMUP_STEPS + 1):
        step(inputs, targets)
    moved = []
    for lr in (0.1, 0.2):
        before = weight.detach().clone()
        expected = torch.autograd.grad(losses(inputs, targets).mean(), weight)[0] * lr
        optimizer.param_groups[0]["lr"] = lr
        step(inputs, targets)
        moved.append((before - weight.detach(), expected))
    assert gpu.replays == 3
    for found, expected in moved:
        torch.testing.assert_close(found, expected)
