"""Buffers of a model move in the first forward of a step only, whatever kind of layer writes them."""

import copy
import math
from dataclasses import dataclass

import oracles
import pytest
import torch
from torch import nn
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver
from torch.nn.utils import parametrizations

from esam_kernels import ESAM
from esam_kernels.step import replay
from esam_kernels.step.replay import SMALL_BUFFER, ModelBuffers, RandomState


class RunningMean(nn.Module):
    """Written by hand, in place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, inputs):
        with torch.no_grad():
            self.mean.lerp_(inputs.mean(dim=0), 0.1)
        return inputs - self.mean


class ReplacedMean(RunningMean):
    """Written by hand, with a new tensor each time."""

    def forward(self, inputs):
        self.mean = 0.9 * self.mean + 0.1 * inputs.detach().mean(dim=0)
        return inputs - self.mean


class FunctionalBatchNorm(nn.Module):
    """Through the function, whose kernel does not count versions."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("var", torch.ones(6))

    def forward(self, inputs):
        return nn.functional.batch_norm(inputs, self.mean, self.var, training=True)


class OwnBatchNorm(nn.BatchNorm1d):
    """A subclass of torch's layer that does not ask ``track_running_stats``."""

    def forward(self, inputs):
        return nn.functional.batch_norm(inputs, self.running_mean, self.running_var, training=True)


class Queue(nn.Module):
    """A buffer larger than what is always kept."""

    def __init__(self):
        super().__init__()
        self.register_buffer("queue", torch.zeros(SMALL_BUFFER // 4 + 6))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs):
        with torch.no_grad():
            self.queue.copy_(self.queue.roll(6))
            self.queue[:6] = inputs.mean(dim=0)
            self.position += 1
        return inputs


class LazyMean(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", None)

    def forward(self, inputs):
        self.mean = inputs.detach().mean(dim=0) if self.mean is None else self.mean + 1.0
        return inputs


def max_amplitude_history():
    """FP8's delayed scaling: a history of the largest magnitudes, rolled in each forward."""

    class History(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("history", torch.zeros(16, 1))
            self.register_buffer("scale", torch.ones(1))

        def forward(self, inputs):
            with torch.no_grad():
                self.history.copy_(self.history.roll(1, 0))
                self.history[0] = inputs.abs().max()
                self.scale.copy_(448.0 / self.history.max())
            return inputs

    return History()


KINDS = {
    "BatchNorm": lambda: nn.BatchNorm1d(6),
    "BatchNorm, cumulative": lambda: nn.BatchNorm1d(6, momentum=None),
    "BatchNorm, scripted": lambda: torch.jit.script(nn.BatchNorm1d(6)),
    "BatchNorm, subclassed": lambda: OwnBatchNorm(6),
    "batch_norm, the function": FunctionalBatchNorm,
    "InstanceNorm": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten()
    ),
    "by hand, in place": RunningMean,
    "by hand, replaced": ReplacedMean,
    "by hand, scripted": lambda: torch.jit.script(RunningMean()),
    "by hand, replaced, scripted": lambda: torch.jit.script(ReplacedMean()),
    "None at first": LazyMean,
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(6, 6)),
    "spectral norm, by hook": lambda: nn.utils.spectral_norm(nn.Linear(6, 6)),
    "observer": MovingAverageMinMaxObserver,
    "fake quantization": lambda: FakeQuantize(MovingAverageMinMaxObserver, quant_min=0, quant_max=255),
    "FP8 history": max_amplitude_history,
    "large queue": Queue,
}


def state(model):
    return [(name, buffer.clone()) for name, buffer in model.named_buffers()]


def same(first, second):
    return [name for name, _ in first] == [name for name, _ in second] and oracles.same_bits(
        [value for _, value in first], [value for _, value in second]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_first_forward_of_each_step_moves_the_buffers(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), KINDS[kind]())
    alone = copy.deepcopy(model)
    buffers = ModelBuffers(model)
    for step in range(4):
        inputs = torch.randn(8, 5)
        before = state(alone)
        assert torch.equal(model(inputs), alone(inputs)), step
        assert not same(before, state(alone)), "the layer does not move: this test would see nothing"
        buffers.remember()
        model(10.0 * torch.randn(8, 5))
        model(10.0 * torch.randn(3, 5))
        buffers.put_back()
        assert same(state(model), state(alone)), step


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_in_a_later_forward_leaves_no_trace(kind):
    if "observer" in kind or "quantization" in kind:
        pytest.skip("torch's observers refuse NaN")
    model = nn.Sequential(nn.Linear(5, 6), KINDS[kind]())
    model(torch.randn(8, 5))
    expected = state(model)
    buffers = ModelBuffers(model)
    buffers.remember()
    model(torch.full((8, 5), math.nan))
    buffers.put_back()
    assert same(state(model), expected)


def test_a_buffer_that_was_replaced_is_the_same_object_again():
    model = nn.Sequential(ReplacedMean())
    model(torch.randn(4, 6))
    held = model[0].mean
    buffers = ModelBuffers(model)
    buffers.remember()
    model(torch.randn(4, 6))
    assert model[0].mean is not held
    buffers.put_back()
    assert model[0].mean is held


def test_buffers_that_two_modules_share_are_put_back_and_still_shared():
    first, second = RunningMean(), RunningMean()
    second.mean = first.mean
    model = nn.Sequential(first, second)
    model(torch.randn(4, 6))
    expected = first.mean.clone()
    buffers = ModelBuffers(model)
    buffers.remember()
    model(torch.randn(4, 6))
    buffers.put_back()
    assert torch.equal(first.mean, expected)
    assert second.mean is first.mean


def copied(monkeypatch, call):
    """The numbers of elements of what ``call`` copies."""
    sizes = []
    copy_ = torch._foreach_copy_

    def counting(into, out_of):
        sizes.extend(tensor.numel() for tensor in out_of)
        copy_(into, out_of)

    monkeypatch.setattr(torch, "_foreach_copy_", counting)
    call()
    monkeypatch.setattr(torch, "_foreach_copy_", copy_)
    return sizes


def test_nothing_is_copied_of_torchs_batch_norm_and_of_large_buffers_that_rest(monkeypatch):
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    model.register_buffer("table", torch.randn(SMALL_BUFFER // 4 + 1))
    model.register_buffer("wide", torch.zeros(1).expand(8))
    buffers = ModelBuffers(model)

    def step():
        model(torch.randn(8, 6))
        buffers.remember()
        model(torch.randn(8, 6))
        buffers.put_back()

    assert copied(monkeypatch, step) == [model.table.numel()] * 2, "kept once, as nothing is known of it at first"
    assert copied(monkeypatch, step) == []
    model.table.add_(1.0)
    assert copied(monkeypatch, step) == [model.table.numel()] * 2
    assert copied(monkeypatch, step) == []


def test_a_large_buffer_that_only_later_forwards_write_is_kept_from_the_next_step_on():
    model = nn.Module()
    model.register_buffer("table", torch.zeros(SMALL_BUFFER // 4 + 1))
    buffers = ModelBuffers(model)
    buffers.remember()
    buffers.put_back()
    for expected in (1.0, 1.0, 1.0):
        buffers.remember()
        model.table.add_(1.0)
        buffers.put_back()
        assert model.table[0] == expected


def test_what_is_remembered_twice_is_put_back_in_between():
    model = nn.Sequential(RunningMean(), nn.BatchNorm1d(6))
    buffers = ModelBuffers(model)
    expected = state(model)
    buffers.remember()
    model(torch.randn(4, 6))
    buffers.remember()
    assert same(state(model), expected)
    buffers.put_back()
    buffers.put_back()
    model(torch.randn(4, 6))
    assert model[1].num_batches_tracked == 1
    assert not same(state(model), expected)


def test_an_abandoned_capture_thaws_and_copies_nothing(monkeypatch):
    model = nn.Sequential(ReplacedMean(), nn.BatchNorm1d(6))
    held = model[0].mean
    buffers = ModelBuffers(model)
    buffers.remember()
    model(torch.randn(4, 6))
    assert copied(monkeypatch, buffers.abandon) == []
    assert model[0].mean is held
    assert model[1].track_running_stats


def test_layers_in_evaluation_mode_stay_as_they_are():
    model = nn.Sequential(nn.BatchNorm1d(6)).eval()
    buffers = ModelBuffers(model)
    inputs = torch.randn(4, 6)
    expected = model(inputs)
    buffers.remember()
    assert torch.equal(model(inputs), expected)
    buffers.put_back()
    assert model[0].track_running_stats


def test_buffers_may_move_to_another_dtype_between_steps():
    model = nn.Sequential(RunningMean(), Queue())
    buffers = ModelBuffers(model)
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        model(torch.randn(4, 6, dtype=dtype))
        expected = state(model)
        buffers.remember()
        model(torch.randn(4, 6, dtype=dtype))
        buffers.put_back()
        assert same(state(model), expected)


def test_no_value_of_a_buffer_is_read_by_the_host():
    """On fake tensors a read raises: what a CUDA graph and the sync-debug mode forbid."""
    with torch._subclasses.FakeTensorMode():
        model = nn.Sequential(RunningMean(), Queue(), ReplacedMean(), nn.BatchNorm1d(6))
        buffers = ModelBuffers(model)
        model(torch.randn(4, 6))
        buffers.remember()
        model(torch.randn(4, 6))
        buffers.put_back()


@dataclass
class On:
    """What lies on a device."""

    device: torch.device


SPLIT = [On(torch.device(name)) for name in ("cuda:1", "cpu", "cuda:0", "cuda:1")]


@pytest.mark.parametrize(
    ("remember", "is_initialized", "expected"),
    [
        (lambda: RandomState.of(SPLIT), True, [0, 1]),
        (lambda: RandomState(), True, [0, 1]),
        (lambda: RandomState(), False, []),
        (lambda: RandomState([torch.device("cuda")]), True, [1]),
        (lambda: RandomState([torch.device("cpu")]), True, []),
    ],
    ids=["of a split model", "of all", "of all, without CUDA in use", "of the current device", "of the CPU"],
)
def test_the_random_state_holds_every_device_that_counts(monkeypatch, remember, is_initialized, expected):
    """Stands in for two GPUs: which generators are saved and replayed is all that differs."""
    states = {0: torch.tensor([10]), 1: torch.tensor([11])}
    written, forked = {}, []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: is_initialized)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda index: states[index])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, index: written.update({index: state}))

    class Fork:
        def __init__(self, devices):
            forked.extend(devices)

        __enter__ = __exit__ = lambda *_: None

    monkeypatch.setattr(replay.torch.random, "fork_rng", Fork)

    with remember().replay():
        pass
    assert written == {index: states[index] for index in expected}
    assert forked == expected


# -- whole steps -------------------------------------------------------------------------------------------------------


def one_step(way, model, optimizer, batch):
    losses = oracles.losses_of(model)
    if way == "batch":
        optimizer.step(losses, *batch)
    elif way == "micro batches":
        optimizer.step(losses, *batch, micro_batch=len(batch[0]))
    elif way == "phases":
        losses(*batch).mean().backward()
        optimizer.first_step(zero_grad=True)
        losses(*batch).mean().backward()
        optimizer.second_step(zero_grad=True)
    else:

        def closure():
            optimizer.zero_grad()
            loss = losses(*batch).mean()
            loss.backward()
            return loss

        optimizer.step(closure)


@pytest.mark.parametrize("way", ["batch", "micro batches", "phases", "closure"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_moves_the_buffers_as_one_forward_does(kind, way):
    """lr = 0: the weights of the next step are those that the lone model has."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), KINDS[kind](), nn.Linear(6, 3))
    alone = copy.deepcopy(model)
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.0, rho=0.5, gamma=0.5, model=model)
    for _ in range(3):
        batch = torch.randn(8, 5), torch.randint(3, (8,))
        alone(batch[0])
        one_step(way, model, optimizer, batch)
        assert same(state(model), state(alone))
