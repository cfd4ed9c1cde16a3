"""What a graphed step returns keeps no graph of autograd. torch adds gradients up on the stream of the forward that
made the graph: where that is not the stream of a capture, the capture breaks.
"""

from __future__ import annotations

import cuda_graph
import pytest
import torch
from graph_pairs import CPU, training_for_graphs
from steps import batches

from esam_kernels import cross_entropy, held_graphs, make_graphed_step
from esam_kernels.backends import unavailable
from esam_kernels.graphs import WARMUP_STEPS

pytestmark = pytest.mark.skipif(unavailable("native", CPU) is not None, reason="no backend on the CPU fuses updates")

PLANS = {
    "rise": {},
    "first_order": {"ranking": "first_order"},
    "whole batch": {"gamma": 1.0},
    "short pass 1": {"gamma": 1.0, "ascent_share": 0.25},
    "previous": {"ascent": "previous", "gamma": 1.0},
    "base": {"rho": 0.0},
}


@pytest.fixture
def gpu(monkeypatch):
    return cuda_graph.install(monkeypatch)


def graphed(**options):
    training = training_for_graphs(mask="element", **options)

    def losses(inputs, targets):
        logits = training.model(inputs)
        return cross_entropy(logits, targets), logits

    return training, make_graphed_step(training.optimizer, losses, *batches(CPU, 1)[0])


@pytest.mark.parametrize("plan", PLANS)
def test_results_that_are_held_keep_no_graph_of_autograd(gpu, plan):
    training, step = graphed(**PLANS[plan])
    held = []
    for given in [*batches(CPU, WARMUP_STEPS + 2), *batches(CPU, 1, size=17)]:
        held.append(step(*given))
        assert held_graphs.told(training.optimizer._perturbation.params) == ""
    assert gpu.replays == 2
    assert [logits.requires_grad for _, logits in held] == [False] * len(held)
    assert len(held[-1][1]) == 17


def test_a_capture_that_fails_names_a_graph_of_autograd_that_is_still_held(gpu):
    for kept, told in ((True, True), (False, False)):
        training, _ = graphed()

        def losses(inputs, targets, training=training):
            found = cross_entropy(training.model(inputs), targets)
            if gpu.graph is not None:
                found.mean().item()
            return found

        given = batches(CPU, 1)[0]
        step = make_graphed_step(training.optimizer, losses, *given)
        loss = training.losses(*given)
        if not kept:
            del loss
        for _ in range(WARMUP_STEPS):
            step(*given)
        with pytest.raises(RuntimeError, match="cannot be captured") as raised:
            step(*given)
        assert ("a loss or an output of an earlier forward is still held" in str(raised.value)) is told


def test_a_graph_of_autograd_is_noticed_while_it_is_held_and_named_by_its_first_parameter():
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    params[0].requires_grad_(False)
    assert held_graphs.told(params) == ""
    loss = (params[2] * 2).sum()
    assert "the gradient of parameter 2" in held_graphs.told(params)
    loss.backward()
    assert "the gradient of parameter 2" in held_graphs.told(params)
    del loss
    assert held_graphs.told(params) == ""
