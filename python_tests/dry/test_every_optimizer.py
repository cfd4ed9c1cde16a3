"""Every base optimizer in every plan, with its learning rate as a number and as a tensor: what a late step does.

After the warm-up nothing is compiled or uploaded, the host reads no value of the device, and all steps launch the same.
"""

from __future__ import annotations

import importlib
import itertools

import block_memory
import pytest
import test_launches
import torch
from host_memory import watched
from test_launches import WARM_UP, Training

from esam_kernels.backends.triton import adam

STEPS = 3
BASES = test_launches.BASES | {
    "SGD nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, "restore_sgd"),
    "AdamW amsgrad": (torch.optim.AdamW, {"amsgrad": True}, "restore_adam"),
}
SAM = {"beta": 1.0, "gamma": 1.0}
# The options of each plan, and what it launches before the update.
PLANS = {
    "SAM": (SAM, test_launches.PLANS["whole batch"][1][:-1]),
    **{
        name: (options, launches[:-1])
        for name, (options, launches) in test_launches.PLANS.items()
        if name in ("rise", "first_order", "sharpness of a part", "momentum")
    },
}
CASES = [
    (plan, base, lr)
    for plan, base, lr in itertools.product(PLANS, BASES, ("number", "tensor"))
    if (plan, base) != ("momentum", "SGD")  # it keeps no momentum to go along
]


@pytest.fixture
def memory(monkeypatch):
    return block_memory.install(monkeypatch)


@pytest.mark.parametrize(("plan", "base", "lr"), CASES)
def test_a_late_step_launches_what_its_plan_says_and_nothing_else_happens(
    stand_in, memory, monkeypatch, plan, base, lr
):
    kind, options, update = BASES[base]
    settings, launches = PLANS[plan]
    is_on_device = bool(options.get("fused") or options.get("capturable"))
    monkeypatch.setattr(adam, "_are_on", lambda device, steps: is_on_device)
    # Where nothing is known of the ascent yet, the step is torch's own.
    monkeypatch.setattr(
        importlib.import_module("torch.optim.adam"), "_get_capturable_supported_devices", lambda *_, **__: ["cpu"]
    )
    rate = 0.25 if lr == "number" else torch.tensor(0.25)
    training = Training(memory, base_optimizer=kind, lr=rate, mask="element", **options, **settings)
    training.run(WARM_UP)
    stand_in.forget()
    for _ in range(STEPS):
        training.run()
        assert stand_in.take() == [*launches, update]
    assert (stand_in.compilations, stand_in.loads, stand_in.uploads) == ([], [], [])
    states = training.optimizer.base_optimizer.state.values()
    counters = [state["step"] for state in states if "step" in state and not is_on_device]
    with watched(monkeypatch, *counters) as watch:
        training.run(STEPS)
    assert (watch.reads, watch.copies) == ([], [])
