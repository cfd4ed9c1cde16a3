"""The stand-in for CUDA graphs does what a graph does, and refuses what a capture forbids."""

from __future__ import annotations

import cuda_graph
import graph_checks
import pytest
import torch


@pytest.fixture
def gpu(monkeypatch):
    return cuda_graph.install(monkeypatch)


def captured(call):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def test_a_capture_computes_nothing_and_replays_hold_its_numbers_and_addresses(gpu):
    x, factor = torch.ones(3), 2.0
    graph, y = captured(lambda: x.mul_(factor) + 1.0)
    assert x.tolist() == [1.0] * 3
    factor = 5.0
    graph.replay()
    assert (x.tolist(), y.tolist()) == ([2.0] * 3, [3.0] * 3)
    x.fill_(10.0)
    graph.replay()
    assert y.tolist() == [21.0] * 3


def test_memory_outside_is_not_kept_alive_and_a_replay_that_touches_it_raises(gpu):
    x = torch.ones(3)
    graph, _ = captured(lambda: x + 1.0)
    graph.replay()
    x.data = torch.zeros(3)
    with pytest.raises(graph_checks.FreedMemoryError, match="freed memory"):
        graph.replay()


def test_random_numbers_are_drawn_anew_in_every_replay_and_as_without_a_graph(gpu):
    graph, drawn = captured(lambda: torch.rand(4))
    state = torch.get_rng_state()
    found = []
    for _ in range(2):
        graph.replay()
        found.append(drawn.clone())
    torch.set_rng_state(state)
    assert torch.equal(found[0], torch.rand(4))
    assert torch.equal(found[1], torch.rand(4))


def on_another_stream(x):
    with torch.cuda.stream(torch.cuda.Stream()):
        return x + 1.0


FORBIDDEN = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "pageable copy": lambda x: x.copy_(torch.tensor([1.0, 2.0, 3.0])),
    "pinning": lambda x: torch.empty(3, pin_memory=True),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "query": lambda x: torch.cuda.Event().query(),
    "memory outside the pool": on_another_stream,
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_what_a_capture_forbids_breaks_it(gpu, what):
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="due to a previous error") as broken:
        captured(lambda: FORBIDDEN[what](x.mul_(2.0)))
    assert "not permitted when stream is capturing" in str(broken.value.__context__)
    assert x.tolist() == [1.0] * 3
    assert gpu.generator.state.is_capturing
    assert gpu.open_pools == 1


def test_a_pool_serves_several_graphs_and_is_refused_when_all_are_gone(gpu):
    pool = torch.cuda.graph_pool_handle()
    graphs = [torch.cuda.CUDAGraph() for _ in range(3)]
    for graph in graphs[:2]:
        with torch.cuda.graph(graph, pool=pool):
            torch.ones(3)
    assert gpu.pools == {pool: 2}
    del graph, graphs[:2]
    with pytest.raises(RuntimeError, match="use_count > 0"), torch.cuda.graph(graphs[0], pool=pool):
        pass


def test_a_stream_that_waits_for_the_captured_one_is_captured_too(gpu):
    x, main = torch.ones(3), torch.cuda.current_stream()
    main.wait_stream(torch.cuda.Stream())

    def forked():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            y = x + 1.0
        torch.cuda.current_stream().wait_stream(side)
        return y * 2.0

    graph, y = captured(forked)
    x.fill_(4.0)
    graph.replay()
    assert y.tolist() == [10.0] * 3
    assert torch.cuda.current_stream() is main
