"""A model under torch.compile trains with every mask, and is not compiled again after the first two steps."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from small_training import batch, losses_of, small_net, snapshot
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from esam_kernels import ESAM, cross_entropy, gather, select


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def train(compiled, model, optimizer, steps, after_each=lambda step: None, **arguments):
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.step(losses_of(compiled), *batch(step), **arguments)
        after_each(step)


def build(mask: str, **arguments):
    model = small_net(dropout=0.0)
    return model, ESAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.3, mask=mask, model=model, **arguments)


@pytest.mark.parametrize("mask", ["tensor", "element"])
@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_no_graph_is_compiled_after_the_second_step(mask, gamma):
    model, optimizer = build(mask, gamma=gamma)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    graphs = []
    train(compiled, model, optimizer, 12, lambda step: graphs.append(counter.frame_count))
    assert graphs[1] == graphs[-1], f"graphs after each step: {graphs}"
    assert graphs[-1] <= 4

    eager_model, eager = build(mask, gamma=gamma)
    train(eager_model, eager_model, eager, 12)
    for name, value in snapshot(eager_model).items():
        torch.testing.assert_close(snapshot(model)[name], value, rtol=1e-4, atol=1e-5)


def test_batch_norm_statistics_of_a_compiled_model_move_once_a_step():
    model, optimizer = build("tensor")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    train(compiled, model, optimizer, 5)
    assert model[1].num_batches_tracked == 5


def test_a_compiled_model_may_be_given_as_model():
    model = small_net(dropout=0.0)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = ESAM(compiled.parameters(), torch.optim.SGD, lr=0.1, rho=0.3, model=compiled)
    train(compiled, model, optimizer, 3)
    assert model[1].num_batches_tracked == 3


@pytest.mark.parametrize("mask", ["tensor", "element"])
def test_the_closure_itself_compiles_without_a_graph_break(mask):
    model, optimizer = build(mask)
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def losses(inputs, targets):
        return cross_entropy(model(inputs), targets, label_smoothing=0.1)

    graphs = []
    for step in range(6):
        optimizer.step(losses, *batch(step))
        graphs.append(counter.frame_count)
    assert graphs[1] == graphs[-1], f"graphs after each step: {graphs}"
    assert not counters["graph_break"]


def test_select_and_gather_compile_without_a_graph_break():
    def chosen(inputs, targets, loss_before, loss_after):
        return gather(select(loss_before, loss_after, 8), {"inputs": inputs, "targets": targets})

    inputs, targets = batch(0)
    loss_before, loss_after = torch.randn(16), torch.randn(16)
    compiled = torch.compile(chosen, backend="aot_eager", fullgraph=True)
    expected = chosen(inputs, targets, loss_before, loss_after)
    result = compiled(inputs, targets, loss_before, loss_after)
    assert torch.equal(result["inputs"], expected["inputs"])
    assert torch.equal(result["targets"], expected["targets"])
    assert not counters["graph_break"]


@pytest.mark.parametrize("sizes", [(16, 16, 16, 7, 16, 16, 7), (16, 9, 12, 5, 7, 15, 6)])
def test_batches_of_other_sizes_stay_within_the_recompile_limit(sizes):
    model, optimizer = build("tensor")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for step, samples in enumerate(sizes):
        optimizer.step(losses_of(compiled), *batch(step, samples))
    assert counter.frame_count <= 6


@pytest.mark.skipif(not os.environ.get("ESAM_KERNELS_LONG_TESTS"), reason="half a minute: ESAM_KERNELS_LONG_TESTS=1")
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_trains_as_eager_does():
    model, optimizer = build("tensor", gamma=0.5)
    train(torch.compile(model), model, optimizer, 3)
    eager_model, eager = build("tensor", gamma=0.5)
    train(eager_model, eager_model, eager, 3)
    for name, value in snapshot(eager_model).items():
        torch.testing.assert_close(snapshot(model)[name], value, rtol=1e-4, atol=1e-5)
