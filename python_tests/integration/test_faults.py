"""Kills, exceptions and bad batches in the middle of a run, and what is left of them; long runs that must not grow."""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import random
import signal
import time
import tracemalloc
from pathlib import Path

import checkpointed_run
import pytest
import torch
from small_training import assert_same_bits, batch, losses_of, small_net, snapshot, three_phases
from torch.utils import _pytree as pytree

from esam_kernels import ESAM, ops

# -- kill -9 and resume ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes():
    """Processes that start fast: a server that has imported torch forks each of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "esam_kernels"])
    process = context.Process(target=int)
    process.start()
    process.join()
    return context


def start(processes, folder: Path, base: str, mask: str, **arguments):
    folder.mkdir(exist_ok=True)
    process = processes.Process(target=checkpointed_run.train, args=(folder, base, mask), kwargs=arguments)
    process.start()
    return process


def run_to_the_end(processes, folder: Path, base: str, mask: str) -> dict:
    process = start(processes, folder, base, mask)
    process.join()
    assert process.exitcode == 0
    return torch.load(folder / "final.pt")


def kill(process) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def flat(state: dict) -> dict[str, torch.Tensor]:
    leaves = pytree.tree_flatten_with_path(state)[0]
    return {
        pytree.keystr(path): torch.as_tensor(leaf) for path, leaf in leaves if not isinstance(leaf, (str, type(None)))
    }


@pytest.fixture(scope="module")
def undisturbed(processes, tmp_path_factory):
    """The end of an undisturbed run of each kind, and how long it took; each is run once."""
    ends: dict[tuple[str, str], tuple[dict, float]] = {}

    def end(base: str, mask: str) -> tuple[dict, float]:
        if (base, mask) not in ends:
            began = time.monotonic()
            state = run_to_the_end(processes, tmp_path_factory.mktemp("undisturbed"), base, mask)
            ends[base, mask] = flat(state), time.monotonic() - began
        return ends[base, mask]

    return end


KINDS = pytest.mark.parametrize(("base", "mask"), [(b, m) for b in ("sgd", "adamw") for m in ("tensor", "element")])


@KINDS
def test_killed_at_random_moments_a_run_ends_with_the_same_bits(processes, undisturbed, tmp_path, base, mask):
    seed = random.SystemRandom().randrange(2**32)
    print(f"moments drawn from seed {seed}")
    moments = random.Random(seed)
    expected, duration = undisturbed(base, mask)
    for _ in range(3):
        process = start(processes, tmp_path, base, mask)
        time.sleep(moments.uniform(0.0, duration))
        process.kill()  # it may have ended in this very moment
        process.join()
    assert_same_bits(flat(run_to_the_end(processes, tmp_path, base, mask)), expected)


# Step 13 begins after the checkpoint of step 12: one step is lost. The calls: pass 1, the forward that ranks, pass 2.
@KINDS
@pytest.mark.parametrize("call", [1, 2], ids=["forward that ranks", "second gradient"])
def test_killed_between_first_and_second_step_a_run_ends_with_the_same_bits(
    processes, undisturbed, tmp_path, base, mask, call
):
    paused = processes.Event()
    process = start(processes, tmp_path, base, mask, pause_at=(13, call), paused=paused)
    assert paused.wait(60)
    kill(process)
    assert torch.load(tmp_path / "checkpoint.pt")["step"] == 12
    assert_same_bits(flat(run_to_the_end(processes, tmp_path, base, mask)), undisturbed(base, mask)[0])


def test_no_checkpoint_can_be_taken_of_perturbed_weights():
    model = small_net()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1)
    three_phases(optimizer, losses_of(model), *batch(0))
    with pytest.raises(RuntimeError, match="perturbed"):
        optimizer.state_dict()
    optimizer.second_step()
    optimizer.state_dict()


# -- Checkpoint formats ------------------------------------------------------------------------------------------------


def test_safetensors_saves_and_loads_a_flattened_model(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = small_net()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
    assert optimizer._perturbation.is_flattened
    optimizer.step(losses_of(model), *batch(0))
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    other = small_net(seed=1)
    ESAM(other.parameters(), torch.optim.SGD, lr=0.1)
    safetensors.load_model(other, str(tmp_path / "model.safetensors"))
    assert_same_bits(snapshot(model), snapshot(other))


def test_one_saved_parameter_is_no_larger_than_it_is(tmp_path):
    model = small_net()
    ESAM(model.parameters(), torch.optim.SGD, lr=0.1)
    for param in model.parameters():
        assert param.untyped_storage().nbytes() == param.nbytes


def test_weights_outlive_their_optimizer():
    model = small_net()
    expected = snapshot(model)
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1)
    del optimizer
    gc.collect()
    junk = [torch.full((1000,), math.nan) for _ in range(100)]
    assert_same_bits(expected, snapshot(model))
    del junk


# -- Exceptions and bad batches ----------------------------------------------------------------------------------------


class Stop(BaseException):
    """As KeyboardInterrupt: no Exception."""


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Stop])
@pytest.mark.parametrize("call", range(5))
def test_an_exception_in_the_closure_leaves_everything_as_it_was(error, call):
    model = small_net()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.3, model=model)
    before = {name: value for name, value in snapshot(model).items() if name in dict(model.named_parameters())}
    addresses = [param.data_ptr() for param in model.parameters()]
    calls = iter(range(100))

    def losses(inputs, targets):
        if next(calls) == call:
            raise error("in the closure")
        return losses_of(model)(inputs, targets)

    with pytest.raises(error, match="in the closure"):
        optimizer.step(losses, *batch(0), micro_batch=8)
    after = snapshot(model)
    assert_same_bits(before, {name: after[name] for name in before})
    assert addresses == [param.data_ptr() for param in model.parameters()]
    assert not optimizer.state, "the base optimizer has not stepped"
    assert model[1].track_running_stats
    optimizer.step(losses_of(model), *batch(1))


@pytest.mark.parametrize("call", range(4))
@pytest.mark.parametrize("options", [{"mask": "tensor"}, {"mask": "element"}, {"ranking": "random"}], ids=str)
def test_a_step_that_raised_draws_the_same_when_it_is_tried_again(options, call):
    results = []
    for fails in (True, False):
        model = small_net(dropout=0.0, batch_norm=False)
        optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.3, **options)
        optimizer.step(losses_of(model), *batch(0), micro_batch=8)
        calls = iter(range(100))

        def failing(inputs, targets, model=model, calls=calls):
            if next(calls) == call:
                raise RuntimeError("out of memory")
            return losses_of(model)(inputs, targets)

        if fails:
            with pytest.raises(RuntimeError, match="out of memory"):
                optimizer.step(failing, *batch(1), micro_batch=8)
        optimizer.step(losses_of(model), *batch(1), micro_batch=8)
        results.append(snapshot(model))
        assert optimizer.state_dict()["esam"]["step"] == 4
    assert_same_bits(*results)


@pytest.mark.parametrize("first_gradients", [True, False])
def test_a_closure_that_raised_at_the_perturbed_weights_draws_the_same_again(first_gradients):
    results = []
    for fails in (True, False):
        model = small_net(dropout=0.0, batch_norm=False)
        optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.3, mask="element")
        before = [param.detach().clone() for param in model.parameters()]

        def closure(fails=False, model=model, optimizer=optimizer, before=before):
            if fails and any(not torch.equal(param, old) for param, old in zip(model.parameters(), before)):
                raise RuntimeError("out of memory")
            loss = losses_of(model)(*batch(0)).mean()
            loss.backward()
            return loss

        if fails:
            closure()
            with pytest.raises(RuntimeError, match="out of memory"):
                optimizer.step(lambda closure=closure: closure(fails=True), first_gradients=first_gradients)
            optimizer.zero_grad()
        closure()
        optimizer.step(closure, first_gradients=first_gradients)
        results.append(snapshot(model))
    assert_same_bits(*results)


@pytest.mark.parametrize("fails_in", ["closure", "update"])
def test_a_step_that_ends_a_loop_and_raises_draws_the_same_again(fails_in):
    results = []
    for fails in (True, False):
        model = small_net(dropout=0.0, batch_norm=False)
        optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.3, mask="element")
        losses = losses_of(model)

        def pass_2(losses=losses):
            losses(*batch(0)).mean().backward()

        def fault(*_):
            raise RuntimeError("out of memory")

        for fault_now in (True, False) if fails else (False,):
            optimizer.zero_grad()
            optimizer.backward(losses(*batch(0)).mean())
            optimizer.first_step(zero_grad=True)
            if not fault_now:
                optimizer.step(pass_2)
                continue
            hook = optimizer.base_optimizer.register_step_pre_hook(fault) if fails_in == "update" else None
            with pytest.raises(RuntimeError, match="out of memory"):
                optimizer.step(fault if hook is None else pass_2)
            if hook is not None:
                hook.remove()
        results.append(snapshot(model))
        assert optimizer.state_dict()["esam"]["step"] == 1
    assert_same_bits(*results)


def test_where_the_second_half_of_a_perturbation_fails_the_first_half_is_taken_back(monkeypatch):
    """The weights whose gradient is held by somebody else are perturbed by a call of their own."""
    perturb_, calls = ops.perturb_, []

    def fails_the_second_time(*arguments, **options):
        calls.append(len(arguments[0]))
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return perturb_(*arguments, **options)

    results = []
    for fails in (True, False):
        model = small_net(dropout=0.0, batch_norm=False)
        optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.3, mask="element")
        before = snapshot(model)

        def pass_1(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            losses_of(model)(*batch(0)).mean().backward()
            return next(model.parameters()).grad

        if fails:
            held = pass_1()
            monkeypatch.setattr(ops, "perturb_", fails_the_second_time)
            with pytest.raises(RuntimeError, match="out of memory"):
                optimizer.first_step(zero_grad=True)
            monkeypatch.undo()
            del held
            assert len(calls) == 2
            assert_same_bits(snapshot(model), before)
        held = pass_1()
        optimizer.first_step(zero_grad=True)
        del held
        losses_of(model)(*batch(0)).mean().backward()
        optimizer.second_step()
        results.append(snapshot(model))
    assert_same_bits(*results)


def test_an_exception_in_a_loop_of_three_phases_is_undone_by_restore():
    model = small_net()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.3, model=model)
    before = [param.detach().clone() for param in model.parameters()]

    def fails_in_pass_2(inputs, targets, calls=iter(range(9))):  # noqa: B008
        if next(calls) == 2:
            raise RuntimeError("out of memory")
        return losses_of(model)(inputs, targets)

    def one_step():
        try:
            three_phases(optimizer, fails_in_pass_2, *batch(0))
        finally:
            optimizer.restore()

    with pytest.raises(RuntimeError, match="out of memory"):
        one_step()
    assert all(torch.equal(param, old) for param, old in zip(model.parameters(), before))
    optimizer.step(losses_of(model), *batch(1))


@pytest.mark.parametrize("mask", ["tensor", "element"])
def test_training_goes_on_after_a_nan_batch_in_the_middle(mask):
    """As if the bad batch had not been there, but for the step that SWP has counted."""
    results = []
    for bad in (True, False):
        model = small_net(dropout=0.0, batch_norm=False)
        optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.3, beta=1.0, mask=mask)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for number in range(6):
            inputs, targets = batch(number)
            if number == 3:
                if not bad:
                    continue
                inputs[5] = math.nan
            optimizer.step(losses_of(model), inputs, targets, scaler=scaler)
            scaler.update()
        assert scaler.get_scale() == (512.0 if bad else 1024.0)
        results.append(snapshot(model))
    assert_same_bits(*results)


# -- A long run --------------------------------------------------------------------------------------------------------

LONG = bool(os.environ.get("ESAM_KERNELS_LONG_TESTS"))
SOAK_STEPS = 20_000 if LONG else 500
WARM_UP_STEPS = 100
# Python's own caches fill up over some hundred steps; the process may grow by the slack of malloc.
GROWTH_IN_PYTHON = 96 * 1024
GROWTH_OF_PROCESS = 8 * 1024 * 1024


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mask", ["tensor", "element"])
def test_a_long_run_with_batches_of_all_sizes_does_not_grow(mask):
    model = small_net()
    optimizer = ESAM(model.parameters(), torch.optim.AdamW, lr=1e-3, rho=0.05, mask=mask, model=model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    sizes = random.Random(0)

    def steps(first: int, last: int) -> None:
        for number in range(first, last):
            inputs, targets = batch(number % 97, sizes.randint(8, 64))
            if number % 5 == 0:
                optimizer.step(losses_of(model), inputs, targets, micro_batch=len(targets) // 2 + 1, max_grad_norm=1.0)
            elif number % 5 == 1:
                optimizer.step(losses_of(model), inputs, targets, scaler=scaler)
                scaler.update()
            elif number % 5 == 2:
                optimizer.zero_grad()
                three_phases(optimizer, losses_of(model), inputs, targets)
                optimizer.second_step(zero_grad=True)
            else:
                optimizer.step(losses_of(model), inputs, targets)

    steps(0, WARM_UP_STEPS)
    gc.collect()
    resident = resident_bytes()
    tracemalloc.start()
    try:
        steps(WARM_UP_STEPS, 2 * WARM_UP_STEPS)
        gc.collect()
        traced = tracemalloc.get_traced_memory()[0]
        steps(2 * WARM_UP_STEPS, SOAK_STEPS)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - traced
        process_grown = resident_bytes() - resident
    finally:
        tracemalloc.stop()
    print(f"{SOAK_STEPS} steps: Python +{grown} bytes, process +{process_grown} bytes")
    assert grown < GROWTH_IN_PYTHON
    assert process_grown < GROWTH_OF_PROCESS
    assert all(param.isfinite().all() for param in model.parameters())
