"""Captured steps of the Triton backend: all that a capture launches was compiled and loaded by its warm-ups."""

from __future__ import annotations

import copy
import gc
import weakref

import cuda_graph
import pytest
import torch
from graph_pairs import capturable_adamw
from steps import BASES, Training, batches, set_lr

from esam_kernels import make_graphed_step, uploads
from esam_kernels.graphs import DRAW_POOL, WARMUP_STEPS

LOSSES = ["forward_tile", "backward_tile"]
PERTURB = ["norm", "perturb"]
GATHER = ["gather", "gather"]  # inputs, targets
# What one step launches, in order, but for the update.
LAUNCHES = {
    "rise": [*LOSSES, *PERTURB, "forward_tile", "select", *GATHER, *LOSSES],
    "first_order": [*LOSSES, *PERTURB, "select", *GATHER, *LOSSES],
    "random": [*LOSSES, *PERTURB, "select", *GATHER, *LOSSES],
    "whole batch": [*LOSSES, *PERTURB, *LOSSES],
    "short pass 1": [*LOSSES, *PERTURB, *LOSSES],
    "momentum": [*PERTURB, *LOSSES],
    "base": LOSSES,
}
PLANS = {
    "rise": {},
    "first_order": {"ranking": "first_order"},
    "random": {"ranking": "random"},
    "whole batch": {"gamma": 1.0},
    "short pass 1": {"gamma": 1.0, "ascent_share": 0.25},
    "momentum": {"ascent": "momentum", "gamma": 1.0},
    "base": {"rho": 0.0},
}
UPDATES = {"SGD": "restore_sgd", "AdamW": "restore_adam"}


def install_both(monkeypatch, stand_in):
    """Both stand-ins: compiling or loading a kernel breaks a capture, and tables go where a graph reads them."""
    gpu = cuda_graph.install(monkeypatch)
    stand_in.reads_tables = True
    gpu.launches, gpu.other_logs = stand_in.launches, [stand_in.uploads]
    monkeypatch.setitem(BASES, "AdamW", capturable_adamw)

    def pinned(nbytes):
        gpu.refuse("pinning memory of the host")
        return torch.empty(nbytes, dtype=torch.uint8)

    monkeypatch.setattr(uploads, "capturing", lambda device: gpu.graph is not None)
    monkeypatch.setattr(uploads, "_pinned", pinned)
    monkeypatch.setattr(uploads, "_keepers", [[]])
    monkeypatch.setattr(uploads, "_staging", [])
    monkeypatch.setattr(uploads, "_needed", [0])
    reserve = uploads.reserve

    def reserve_unless_replaying(nbytes, device):
        if not gpu.is_replaying:
            reserve(nbytes, torch.device("cuda"))

    monkeypatch.setattr(uploads, "reserve", reserve_unless_replaying)

    def forbid(kind, what):
        if kind in ("compile", "load") and gpu.graph is not None:
            gpu.refuse(f"{kind} {what}")

    stand_in.listeners.append(forbid)
    return gpu


@pytest.fixture
def gpu(monkeypatch, stand_in):
    return install_both(monkeypatch, stand_in)


def steps_and_compares(gpu, stand_in, device, plan, base, mask):
    """Runs a training until its steps are replays, and compares the launches of two of them."""
    training = Training(device, "", base, mask=mask, **PLANS[plan])
    given = batches(device, 1)[0]
    step = make_graphed_step(training.optimizer, training.losses, *given)
    warm_ups = WARMUP_STEPS + (2 * DRAW_POOL if mask == "tensor" and plan != "base" else 1)
    for _ in range(warm_ups):
        step(*given)
    compiled = len(stand_in.compilations)
    assert gpu.replays > 0
    stand_in.forget()
    for _ in range(2):
        set_lr(training.optimizer, 0.01)
        step(*given)
        assert stand_in.take() == [*LAUNCHES[plan], UPDATES[base]]
    assert (stand_in.compilations, stand_in.loads) == ([], [])
    # what ranking="random" draws for each sample, in one copy
    assert len(stand_in.uploads) == (2 if plan == "random" else 0)
    return compiled


@pytest.mark.parametrize(("base", "mask"), [("SGD", "tensor"), ("AdamW", "element")])
@pytest.mark.parametrize("plan", ["rise", "base"])
def test_a_capture_launches_what_its_warm_ups_have_loaded(gpu, stand_in, device, plan, base, mask):
    assert steps_and_compares(gpu, stand_in, device, plan, base, mask) > 0


def test_a_replay_of_every_plan_launches_what_the_plan_says(gpu, stand_in, device):
    for plan in PLANS:
        gpu.replays = 0
        steps_and_compares(gpu, stand_in, device, plan, "SGD", "element")


def test_captures_one_after_the_other_take_no_more_pinned_memory_than_there_is(gpu, stand_in, device, monkeypatch):
    """Of a large model: each draw of tensors is captured in turn, and each takes tables of its own."""
    monkeypatch.setattr(uploads, "STAGING_BYTES", 0)
    training = Training(device, "", "SGD", mask="tensor")
    given = batches(device, 1)[0]
    step = make_graphed_step(training.optimizer, training.losses, *given)
    for _ in range(2 * DRAW_POOL + 1):
        step(*given)
    assert (len(gpu.captures), gpu.replays) == (DRAW_POOL, DRAW_POOL + 1)
    assert list(gpu.pools.values()) == [DRAW_POOL], "all in one pool of the device's memory"


def test_tables_go_with_their_graphs(gpu, stand_in, device, monkeypatch):
    """A training that loads a state again and again captures anew each time, and keeps the tables of one graph."""
    kept, keep = [], uploads.keep

    def seen(*memory):
        kept.extend(map(weakref.ref, memory))
        keep(*memory)

    monkeypatch.setattr(uploads, "keep", seen)
    training = Training(device, "", "SGD", mask="element")
    given = batches(device, 1)[0]
    step = make_graphed_step(training.optimizer, training.losses, *given)
    alive = []
    for _ in range(4):
        for _ in range(WARMUP_STEPS + 2):
            step(*given)
        gc.collect()
        alive.append(sum(tensor() is not None for tensor in kept))
        training.optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))
    assert len(gpu.captures) == 4
    # a norm, a perturbation and an update: addresses and layout each, on the device and in pinned memory
    assert alive == [12] * 4
    assert uploads._keepers == [[]]
    del step
    gc.collect()
    assert not any(tensor() is not None for tensor in kept)
