"""What a long training keeps and costs the host, counted: the last step as an early one, in every mode.

Counts in place of times: memory that is allocated in a step, uploads, tensors that are alive, tables and compiled
kernels that are kept.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass

import block_memory
import pytest
import stand_in as stand_ins
import torch
from host_memory import watched
from test_launches import SGD, Training, hardest

from esam_kernels.backends.triton import adam, blocks
from esam_kernels.schedules import CosineSchedule, LinearSchedule, PhaseSchedule, RhoProportionalToLR

# A step costs 2 to 4 ms here: 1,000 of them in one mode, fewer in the others.
# Tables that have to be uploaded again after those in use were dropped, until the addresses repeat.
FIRST_TABLES = 24
EARLY, STEPS, LONG = 10, 150, 1000
ADAMW = {"base_optimizer": torch.optim.AdamW, "lr": 0.01, "mask": "element"}


def gamma_falls(optimizer, steps):
    return LinearSchedule(optimizer, "gamma", 0.9, 0.2, total_iters=steps)


def beta_falls(optimizer, steps):
    return CosineSchedule(optimizer, "beta", 0.9, 0.2, total_iters=steps)


def rho_rises(optimizer, steps):
    return LinearSchedule(optimizer, "rho", 0.01, 0.1, total_iters=steps)


def rho_follows_lr(optimizer, steps):
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2 * steps)
    return Both(rates, RhoProportionalToLR(optimizer))


def phase(optimizer, steps):
    return PhaseSchedule(optimizer, "rho", 0.05, start=steps // 4)


@dataclass
class Both:
    first: object
    second: object

    def step(self):
        self.first.step()
        self.second.step()


# The options of each mode, and what moves a hyperparameter between its steps.
MODES = {
    "tensor mask": ({"draws": 2}, None),
    "element mask": ({"mask": "element"}, None),
    "gamma falls": ({"mask": "element"}, gamma_falls),
    "beta falls": ({"mask": "element"}, beta_falls),
    "rho rises": ({"mask": "element"}, rho_rises),
    "rho follows lr": ({"mask": "element"}, rho_follows_lr),
    "momentum": ({"ascent": "momentum", "gamma": 1.0, "mask": "element"}, None),
    "previous": ({"ascent": "previous", "gamma": 1.0, "mask": "element"}, None),
    "first_order": ({"ranking": "first_order", "mask": "element"}, None),
    "random": ({"ranking": "random", "mask": "element"}, None),
    "callable": ({"ranking": hardest, "mask": "element"}, None),
    "AdamW": (ADAMW, None),
    "AdamW, capturable": ({**ADAMW, "capturable": True}, None),
    "base step": ({"rho": 0.0}, None),
}


@pytest.fixture
def memory(monkeypatch):
    return block_memory.install(monkeypatch)


@pytest.fixture
def only_own_tensors():
    """``gc.get_objects`` leaves out what was alive before the test: another test's FakeTensors have no memory."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def training_in(monkeypatch, memory, draws=None, **options):
    # Adam's counters are on the host where the optimizer does not say otherwise.
    monkeypatch.setattr(adam, "_are_on", lambda device, steps: bool(options.get("capturable")))
    training = Training(memory, **{**SGD, **options} if "base_optimizer" not in options else options)
    training.optimizer._perturbation.draw.pool = draws
    return training


def forget_tables():
    blocks._addresses.cache_clear()
    blocks._layout.cache_clear()


def kept(memory):
    """What is alive between two steps, but for the tables of addresses."""
    forget_tables()
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    return {
        "tensors": len(tensors),
        "bytes": sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()),
        "blocks": sum(map(len, memory.blocks.values())),
        "kernels": sum(len(cache[0]) for kernel in stand_ins.kernels() for cache in kernel.device_caches.values()),
        "counters": len(adam._copies),
    }


def cost(monkeypatch, stand_in, training):
    """What a step asks for: one as it is, and one that is watched, which leaves its gradients at other addresses."""
    training.run(EARLY)
    stand_in.forget()
    training.run()
    events = {"uploads": list(stand_in.uploads), "launches": stand_in.take()}
    forget_tables()  # some of which would be new at the other addresses, and some not
    with watched(monkeypatch) as watch:
        training.run()
    return events | {"allocations": len(watch.allocations), "bytes": sum(watch.allocations)}


@pytest.mark.usefixtures("only_own_tensors")
@pytest.mark.parametrize("mode", MODES)
def test_a_late_step_costs_and_keeps_what_an_early_one_does(stand_in, memory, monkeypatch, mode):
    options, make_schedule = MODES[mode]
    training = training_in(monkeypatch, memory, **options)
    steps = LONG if mode == "element mask" else STEPS
    schedule = make_schedule(training.optimizer, steps) if make_schedule else None

    def run(count):
        for _ in range(count):
            training.run()
            if schedule is not None:
                schedule.step()

    cost(monkeypatch, stand_in, training)
    gamma = training.optimizer.gamma
    early = cost(monkeypatch, stand_in, training), kept(memory)
    stand_in.forget()
    run(steps - 4 * EARLY)
    assert (stand_in.compilations, stand_in.loads) == ([], [])
    assert len(stand_in.uploads) <= FIRST_TABLES + steps * len(early[0]["uploads"])
    training.optimizer.gamma = gamma  # the size of B+ decides how many bytes a step takes
    late = cost(monkeypatch, stand_in, training), kept(memory)
    assert late == early
