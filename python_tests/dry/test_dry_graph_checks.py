"""What is looked at before each replay finds the faults that it is there for: each is made on purpose."""

from __future__ import annotations

import copy

import cuda_graph
import pytest
import torch
from graph_checks import FreedMemoryError, StaleArgumentError, UnownedMemoryError
from graph_pairs import CPU, training_for_graphs
from steps import Training, batches
from test_dry_graph_kernels import install_both

from esam_kernels import captures, graphs, make_graphed_step, uploads
from esam_kernels.backends import unavailable
from esam_kernels.backends.triton import blocks
from esam_kernels.device_numbers import DeviceNumbers
from esam_kernels.graphs import WARMUP_STEPS

needs_native = pytest.mark.skipif(unavailable("native", CPU) is not None, reason="no backend on the CPU fuses updates")
GIVEN = batches(CPU, 1)[0]


def replayed(training, replays=1):
    """A step of which some were replays."""
    step = make_graphed_step(training.optimizer, training.losses, *GIVEN)
    for _ in range(WARMUP_STEPS + replays):
        step(*GIVEN)
    return step


# -- Operators, on the native backend ----------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    return cuda_graph.install(monkeypatch)


def compares_no_addresses(gpu, monkeypatch):
    def find(kept, key, memory):
        gpu.compared = list(memory)
        return kept._by_key.get(key)

    monkeypatch.setattr(captures.Captures, "find", find)


@needs_native
def test_state_that_the_step_does_not_compare_is_found(gpu, monkeypatch):
    training = training_for_graphs(mask="element")
    step = replayed(training)
    whole = graphs.memory_of
    momentum = {id(state["momentum_buffer"]) for state in training.optimizer.state.values()}
    monkeypatch.setattr(
        graphs, "memory_of", lambda *given: [tensor for tensor in whole(*given) if id(tensor) not in momentum]
    )
    compares_no_addresses(gpu, monkeypatch)
    with pytest.raises(UnownedMemoryError, match=r"restore_sgd_\.default reads torch\.float32"):
        step(*GIVEN)


@needs_native
def test_a_tensor_that_only_the_closure_holds_is_found(gpu):
    training = training_for_graphs(mask="element")
    losses_of, factor = training.losses, torch.tensor(2.0)
    training.losses = lambda *given: losses_of(*given) * factor
    with pytest.raises(UnownedMemoryError, match=r"aten\.mul\.Tensor reads torch\.float32 \(\) at"):
        replayed(training)


@needs_native
def test_state_that_moves_without_the_graphs_notice_is_found(gpu, monkeypatch):
    training = training_for_graphs(mask="element")
    step = replayed(training)
    compares_no_addresses(gpu, monkeypatch)
    training.optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))
    with pytest.raises(FreedMemoryError, match="restore_sgd_"):
        step(*GIVEN)


@needs_native
def test_a_learning_rate_that_is_baked_in_is_found(gpu, monkeypatch):
    training = training_for_graphs(mask="element")
    perturbation = type(training.optimizer._perturbation)
    monkeypatch.setattr(perturbation, "lr_tensors", property(lambda self: None, lambda *_: None), raising=False)
    step = replayed(training)
    training.optimizer.param_groups[0]["lr"] = 0.01
    with pytest.raises(StaleArgumentError, match=r"restore_sgd_.*: a graph holds 0.05, and a step passes 0.01 now"):
        step(*GIVEN)


@needs_native
def test_a_number_that_is_missing_in_the_key_of_a_graph_is_found(gpu, monkeypatch):
    monkeypatch.setattr(captures, "_NOT_FIXED", captures._NOT_FIXED | {"weight_decay"})
    training = training_for_graphs(mask="element")
    step = replayed(training)
    training.optimizer.param_groups[0]["weight_decay"] = 0.5
    with pytest.raises(StaleArgumentError, match=r"restore_sgd_.*: a graph holds 0.001, and a step passes 0.5 now"):
        step(*GIVEN)


@needs_native
def test_a_radius_on_the_device_that_moves_is_found(gpu, monkeypatch):
    """Its old memory is still held by somebody: it is alive, and nobody writes to it any more."""
    training = training_for_graphs(mask="element")
    step = replayed(training)
    held, put = [], DeviceNumbers.set

    def moved(self, values, device):
        held.append(self.tensor)
        self._values = []
        put(self, [*values, 0.0], device)
        self.tensor, self._values = self.tensor[: len(values)], list(values)

    compares_no_addresses(gpu, monkeypatch)
    monkeypatch.setattr(DeviceNumbers, "set", moved)
    training.optimizer.param_groups[0]["rho"] = 0.1
    with pytest.raises(UnownedMemoryError, match=r"perturb_\.default reads torch\.float64"):
        step(*GIVEN)


@needs_native
def test_an_operator_that_a_graph_does_not_hold_is_found(gpu):
    training = training_for_graphs(mask="element")
    losses_of, factor = training.losses, []
    training.losses = lambda *given: losses_of(*given) * 2.0 if factor else losses_of(*given)
    step = replayed(training)
    factor.append(2.0)
    with pytest.raises(StaleArgumentError, match=r"and a step calls aten\.mul.* now"):
        step(*GIVEN)


# -- Launches, of the Triton backend -----------------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch, stand_in):
    return install_both(monkeypatch, stand_in)


def triton_training():
    return Training(CPU, "", "SGD", mask="element")


def test_a_table_that_eager_steps_share_is_found(kernels, monkeypatch):
    monkeypatch.setattr(uploads, "capturing", lambda device: False)
    with pytest.raises(UnownedMemoryError, match=r"norm_kernel, argument 1: a table of addresses that is not kept"):
        replayed(triton_training())


def test_a_table_that_nobody_keeps_is_found(kernels, monkeypatch):
    monkeypatch.setattr(uploads, "keep", lambda *_: None)
    with pytest.raises(UnownedMemoryError, match=r"norm_kernel, argument 1: a table of addresses that is not kept"):
        replayed(triton_training())


def test_a_table_that_is_written_over_is_found(kernels, monkeypatch):
    memory = torch.empty(1 << 12, dtype=torch.uint8)

    def reused(values):
        return memory[: values.nbytes].view(values.dtype).view(values.shape).copy_(values)

    monkeypatch.setattr(uploads, "_staged_for_a_graph", reused)
    with pytest.raises(FreedMemoryError, match="a table of addresses was written over"):
        replayed(triton_training())


def test_a_table_with_addresses_of_before_is_found(kernels, monkeypatch):
    """The addresses of the first weights, whatever is asked for."""
    training = triton_training()
    step = replayed(training)
    whole, first = blocks._addresses.__wrapped__, []

    def of_before(device, stream, count, addresses, scalars):
        first[:] = first or addresses
        shift = 64 if addresses[:count] == tuple(first[:count]) else 0
        return whole(device, stream, count, tuple(address + shift for address in addresses), scalars)

    monkeypatch.setattr(blocks._addresses, "__wrapped__", of_before, raising=False)
    with pytest.raises(StaleArgumentError, match=r"norm_kernel, argument \d+: a graph holds an address"):
        step(*GIVEN)


def test_a_number_of_a_launch_that_a_step_would_pass_otherwise_is_found(kernels, monkeypatch):
    training = triton_training()
    step = replayed(training)
    monkeypatch.setattr(blocks, "MAX_PROGRAMS", 2)
    with pytest.raises(StaleArgumentError, match=r"argument 0: a graph holds \(\d+, 1, 1\), .*\(2, 1, 1\)"):
        step(*GIVEN)
