"""What ``make_graphed_step`` does on the host: a stand-in for CUDA graphs replays by running the step again.

When it captures, what it keeps apart, and what it brings up to date before a replay.
What a graph itself does is left to the GPU tier.
"""

from __future__ import annotations

import contextlib
import types

import pytest
import torch
from torch import nn

from esam_kernels import ESAM, cross_entropy, graphs
from esam_kernels.backends import unavailable
from esam_kernels.graphs import DRAW_POOL, WARMUP_STEPS

pytestmark = pytest.mark.skipif(
    unavailable("native", torch.device("cpu")) is not None, reason="no backend on the CPU fuses updates"
)


class Recorded:
    """Runs the step at every replay, with the inputs, the learning rates and the draws that it was captured with."""

    def __init__(self, step):
        self.step, self.draw = step, tuple(step.optimizer._perturbation.drawn())
        self.lr_tensors = None

    def replay(self):
        optimizer = self.step.optimizer
        perturbation = optimizer._perturbation
        assert tuple(perturbation.drawn()) == self.draw
        count = perturbation.step
        perturbation.lr_tensors = self.lr_tensors
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("esam_kernels.perturbation.swp.is_capturing", lambda: True)  # nothing is uploaded in a replay
            self.loss.copy_(optimizer.step(self.step.closure, *self.step._inputs))
        perturbation.lr_tensors = None
        perturbation.step = count  # a graph knows nothing of the host's counter
        self.step.replays.append(self.draw)


class Stepped(graphs._GraphedStep):
    """With captures that compute nothing, as those of a graph, and replays that do."""

    def __init__(self, *arguments):
        self.captures, self.replays = [], []
        super().__init__(*arguments)

    def _capture(self):
        graph = Recorded(self)
        self.captures.append(self._key())
        graph.loss = torch.zeros(())
        graph.lr_tensors = [numbers.tensor.reshape(()) for numbers in self._lrs]
        return graph, graph.loss


@pytest.fixture
def on_cpu(monkeypatch):
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(graphs, "_CapturedNoise", lambda device: types.SimpleNamespace(align=lambda: None))


def training(mask):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))
    options = {"lr": 0.1, "momentum": 0.9, "mask": mask, "rho": 0.2, "backend": "native"}
    optimizer = ESAM(model.parameters(), torch.optim.SGD, **options)
    if mask == "tensor":
        optimizer._perturbation.draw.pool = DRAW_POOL
    return model, optimizer, lambda x, y: cross_entropy(model(x), y)


def batches(count, size=8):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 6, generator=generator), torch.arange(size) % 3) for _ in range(count)]


def both(mask):
    (model, optimizer, losses), (plain_model, plain, plain_losses) = training(mask), training(mask)
    step = Stepped(optimizer, losses, batches(1)[0])

    def compare(batch):
        assert torch.equal(step(*batch), plain.step(plain_losses, *batch))
        for ours, theirs in zip(model.parameters(), plain_model.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        assert optimizer._perturbation.step == plain._perturbation.step

    return step, (optimizer, plain), compare


def test_element_masks_take_one_capture_and_a_fresh_step_in_every_replay(on_cpu):
    step, _, compare = both("element")
    for batch in batches(WARMUP_STEPS + 6):
        compare(batch)
    assert len(step.captures) == 1
    assert len(step.replays) == 6


def test_tensor_masks_are_captured_once_for_each_draw_of_the_pool_after_it_has_run_eagerly(on_cpu):
    step, (optimizer, _), compare = both("tensor")
    for batch in batches(3 * DRAW_POOL):
        compare(batch)
    draws = len(set(step.captures))
    assert len(step.captures) == draws
    assert 1 < draws <= DRAW_POOL
    eager = 3 * DRAW_POOL - len(step.replays)
    assert max(WARMUP_STEPS, draws) <= eager <= DRAW_POOL
    assert optimizer._perturbation.step == 3 * DRAW_POOL


def test_a_change_of_gamma_captures_once_for_each_k_after_one_eager_step(on_cpu):
    step, optimizers, compare = both("element")
    for number, batch in enumerate(batches(24)):
        for optimizer in optimizers:
            optimizer.gamma = (0.5, 0.25, 1.0)[number // 4 % 3]
        compare(batch)
    assert [key[1][0] for key in step.captures] == [4, 2, 8]
    assert len(step.replays) == 24 - WARMUP_STEPS - 2


@pytest.mark.parametrize("as_tensor", [False, True])
def test_lr_and_rho_change_between_replays_without_a_capture(on_cpu, as_tensor):
    """Also where the learning rate is a tensor on the host, which a graph cannot read."""
    step, optimizers, compare = both("element")
    for number, batch in enumerate(batches(10)):
        for optimizer in optimizers:
            lr = 0.1 / (1 + number)
            optimizer.param_groups[0]["lr"] = torch.tensor(lr, dtype=torch.float64) if as_tensor else lr
            optimizer.param_groups[0]["rho"] = 0.1 * (1 + number)
        compare(batch)
    assert len(step.captures) == 1


def test_a_last_batch_of_another_size_runs_eagerly(on_cpu):
    step, _, compare = both("element")
    for number, batch in enumerate(batches(10)):
        compare(batch)
        if number % 3 == 2:
            compare(batches(1, size=5)[0])
    assert len(step.captures) == 1
    assert len(step.replays) == 10 - WARMUP_STEPS


def test_a_layer_that_is_thawed_is_captured_anew(on_cpu):
    step, optimizers, compare = both("element")
    frozen = [optimizer._perturbation.params[0] for optimizer in optimizers]
    for param in frozen:
        param.requires_grad_(False)
    for number, batch in enumerate(batches(12)):
        if number == 6:
            for param in frozen:
                param.requires_grad_(True)
        compare(batch)
    assert len(step.captures) == 2


def test_a_model_spread_over_ranks_is_refused(monkeypatch):
    _, optimizer, _ = training("tensor")
    graphs._check_capturable(optimizer)
    monkeypatch.setattr(type(optimizer._parallelism), "is_spread", True)
    with pytest.raises(ValueError, match="DistributedDataParallel or fully_shard cannot be captured"):
        graphs._check_capturable(optimizer)
