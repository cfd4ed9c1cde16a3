"""The host waits for no device: no value is read there, and nothing is copied from ordinary memory of the host."""

from __future__ import annotations

import gc

import block_memory
import pytest
import steps as plain_trainings
import torch
from host_memory import watched
from steps import batches
from test_launches import PLANS, SGD, WARM_UP, Training

from esam_kernels import ESAM, ops, uploads
from esam_kernels.backends import unavailable
from esam_kernels.backends.triton import adam
from esam_kernels.device_numbers import MOST_FILLS, DeviceNumbers

CPU = torch.device("cpu")


@pytest.fixture
def memory(monkeypatch):
    return block_memory.install(monkeypatch)


def counters(training):
    """Adam's step counters, which are the host's where the optimizer is neither fused nor capturable."""
    states = training.optimizer.base_optimizer.state.values()
    return [state["step"] for state in states if "step" in state]


def waits(monkeypatch, training, steps=3):
    """What waits in some steps."""
    with watched(monkeypatch, *counters(training)) as watch:
        training.run(steps)
    return watch.reads, watch.copies


BASES = {
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
    "Adam": (torch.optim.Adam, {}),
    "AdamW": (torch.optim.AdamW, {"amsgrad": True}),
}


@pytest.mark.parametrize("mask", ["tensor", "element"])
@pytest.mark.parametrize("plan", PLANS)
def test_a_step_of_every_plan_waits_for_nothing(stand_in, memory, monkeypatch, plan, mask):
    training = Training(memory, **{**SGD, **PLANS[plan][0], "mask": mask})
    training.run(WARM_UP)
    assert waits(monkeypatch, training) == ([], [])


@pytest.mark.parametrize("rho", [0.05, 0.0], ids=["perturbed", "base step"])
@pytest.mark.parametrize("base", BASES)
def test_a_step_with_counters_on_the_host_waits_for_nothing(stand_in, memory, monkeypatch, base, rho):
    kind, options = BASES[base]
    monkeypatch.setattr(adam, "_are_on", lambda device, steps: False)
    training = Training(memory, base_optimizer=kind, lr=0.01, rho=rho, mask="element", **options)
    training.run(WARM_UP)
    assert waits(monkeypatch, training) == ([], [])


@pytest.mark.parametrize("base", BASES)
def test_a_bare_update_waits_for_nothing(stand_in, memory, monkeypatch, base):
    """Gradients that the user has computed, and no perturbation: ``second_step`` of an optimizer with rho = 0."""
    kind, options = BASES[base]
    training = Training(memory, base_optimizer=kind, lr=0.01, rho=0.0, **options)
    training.run(WARM_UP)
    for param in training.model.parameters():
        param.grad = torch.ones_like(param)
    with watched(monkeypatch, *counters(training)) as watch:
        training.optimizer.first_step()
        training.optimizer.second_step()
    assert (watch.reads, watch.copies) == ([], [])


SGD_OPTIONS = [{}, {"momentum": 0.9, "weight_decay": 0.1}, {"momentum": 0.9, "nesterov": True}]


@pytest.fixture
def everything_is_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True), raising=False)


@pytest.mark.parametrize("options", SGD_OPTIONS)
def test_a_base_step_of_sgd_reads_its_rate_on_the_device(
    stand_in, memory, monkeypatch, everything_is_on_a_gpu, options
):
    """torch's own SGD would wait for it once for each parameter."""
    training = Training(memory, base_optimizer=torch.optim.SGD, lr=torch.tensor(0.25), rho=0.0, **options)
    training.run(WARM_UP)
    stand_in.forget()
    training.run()
    assert stand_in.take() == ["forward_tile", "backward_tile", "restore_sgd"]
    assert waits(monkeypatch, training) == ([], [])


@pytest.mark.skipif(unavailable("native", CPU) is not None, reason="no backend on the CPU fuses updates")
@pytest.mark.parametrize("in_two_calls", [False, True])
@pytest.mark.parametrize("options", SGD_OPTIONS)
def test_a_base_step_of_sgd_with_its_rate_on_the_device_has_the_bits_of_torchs_own(
    everything_is_on_a_gpu, monkeypatch, options, in_two_calls
):
    fused, operator = [], ops.restore_sgd_
    monkeypatch.setattr(ops, "restore_sgd_", lambda *args, **kwargs: (fused.append(1), operator(*args, **kwargs)))
    ours, theirs = (plain_trainings.Training(CPU, "native") for _ in range(2))
    rate = torch.tensor(0.3)
    optimizer = ESAM(ours.model.parameters(), torch.optim.SGD, lr=rate, rho=0.0, backend="native", **options)
    plain = torch.optim.SGD(theirs.model.parameters(), lr=rate.item(), **options)
    for batch in batches(CPU, 4):
        plain.zero_grad()
        theirs.losses(*batch).mean().backward()
        plain.step()
        if in_two_calls:
            optimizer.zero_grad()
            ours.losses(*batch).mean().backward()
            optimizer.first_step()
            optimizer.second_step()
        else:
            optimizer.step(ours.losses, *batch)
    plain_trainings.assert_same_weights(ours, theirs)
    assert len(fused) == 4


def test_the_watch_sees_reads_and_copies(monkeypatch):
    on_device = torch.ones(3)
    seen = {
        "item": lambda: on_device.sum().item(),
        "bool": lambda: bool(on_device.sum() > 0),
        "tolist": lambda: on_device.tolist(),
        "as alpha": lambda: on_device.add_(on_device, alpha=on_device.sum()),
        "copy": lambda: on_device.copy_(torch.tensor([1.0, 2.0, 3.0])),
        "to": lambda: torch.tensor([1.0]).to(CPU, non_blocking=True),
    }
    for name, call in seen.items():
        with watched(monkeypatch) as watch:
            call()
        assert len(watch.reads) + len(watch.copies) == 1, name
    with watched(monkeypatch) as watch:
        torch.tensor([1.0, 2.0]).sum().item()
        on_device.copy_(uploads.staged(torch.tensor([1.0, 2.0, 3.0]), CPU))
    assert (watch.reads, watch.copies) == ([], [])


# -- Adam's counters on the host ---------------------------------------------------------------------------------------


def test_counters_on_the_host_are_copied_to_a_place_that_stays(stand_in, memory, monkeypatch):
    monkeypatch.setattr(adam, "_are_on", lambda device, steps: False)
    training = Training(memory, base_optimizer=torch.optim.AdamW, lr=0.01, mask="element")
    training.run(WARM_UP)
    stand_in.forget()
    training.run(5)
    assert (stand_in.uploads, stand_in.compilations) == ([], [])
    numbers = adam._copies[counters(training)[0]].tensor
    assert numbers.tolist() == [8.0] * len(counters(training))


def test_copies_of_counters_go_with_their_optimizer(stand_in, memory, monkeypatch):
    monkeypatch.setattr(adam, "_are_on", lambda device, steps: False)
    before = len(adam._copies)
    training = Training(memory, base_optimizer=torch.optim.AdamW, lr=0.01, mask="element")
    training.run(1)
    assert len(adam._copies) == before + 1
    del training
    gc.collect()
    assert len(adam._copies) == before


# -- Numbers that kernels read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
@pytest.mark.parametrize("changes", range(MOST_FILLS + 3))
def test_few_numbers_that_change_are_filled_in_and_many_are_one_copy(stand_in, monkeypatch, dtype, changes):
    numbers, values = DeviceNumbers(dtype), list(range(20))
    numbers.set(values, CPU)
    place = numbers.tensor.data_ptr()
    stand_in.forget()
    for i in range(changes):
        values[2 * i] += 100
    with watched(monkeypatch) as watch:
        numbers.set(values, CPU)
    assert (watch.reads, watch.copies) == ([], [])
    assert len(stand_in.uploads) == (changes > MOST_FILLS)
    assert (numbers.tensor.tolist(), numbers.tensor.data_ptr()) == (values, place)


def test_numbers_that_all_become_one_are_filled_in(stand_in):
    numbers = DeviceNumbers(torch.float32)
    numbers.set(range(30), CPU)
    stand_in.forget()
    numbers.set([7] * 30, CPU)
    assert (stand_in.uploads, numbers.tensor.tolist()) == ([], [7.0] * 30)
