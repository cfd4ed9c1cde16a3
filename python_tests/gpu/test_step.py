"""Whole steps on the device: nothing waits for it, two runs agree bit for bit, and memory stays near SGD's."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from busy import AT_ONCE_SECONDS, while_busy
from steps import CLASSES, FEATURES, Training, assert_same_weights, batches
from torch import nn

from esam_kernels import ESAM, RandomState, cross_entropy
from esam_kernels.doctor import main as doctor

masks = pytest.mark.parametrize("mask", ["tensor", "element"])
bases = pytest.mark.parametrize("base", ["SGD", "AdamW"])


@contextlib.contextmanager
def no_synchronization(device):
    """An operation that waits for the device raises."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_guard_notices_a_wait(device):
    if device.type != "cuda":
        pytest.skip("there is nothing to wait for")
    with pytest.raises(RuntimeError), no_synchronization(device):
        torch.ones(1, device=device).item()


@masks
@bases
@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_a_step_never_waits_for_the_device(backend_name, device, mask, base, gamma):
    training = Training(device, backend_name, base, mask=mask, gamma=gamma)
    given = batches(device, 8)
    for batch in given[:4]:
        training.step(batch)
    with no_synchronization(device):
        for batch in given[4:]:
            training.step(batch)


def test_a_scaled_step_never_waits_for_the_device(backend_name, device):
    """With a base optimizer that looks at found_inf on the device itself."""
    training = Training(device, backend_name, beta=1.0)
    params = list(training.model.parameters())
    training.optimizer = ESAM(params, torch.optim.AdamW(params, fused=True), backend=backend_name)
    scaler = torch.amp.GradScaler(device.type, init_scale=256.0)
    given = batches(device, 6)
    for batch in given[:3]:
        training.step(batch, scaler=scaler)
        scaler.update()
    with no_synchronization(device):
        for batch in given[3:]:
            training.step(batch, scaler=scaler)
            scaler.update()
    assert all(param.isfinite().all() for param in params)


COUNTERS_ON_THE_HOST = {"base_optimizer": torch.optim.AdamW, "lr": 1e-3}
AT_ONCE = {
    "tensor mask": {},
    "element mask": {"mask": "element"},
    "first_order": {"ranking": "first_order"},
    "random": {"ranking": "random"},
    "momentum": {"ascent": "momentum", "gamma": 1.0},
    "short pass 1": {"gamma": 1.0, "ascent_share": 0.25},
    "base step": {"rho": 0.0},
    "base step, its rate on the device": {"rho": 0.0, "lr": torch.tensor(0.05)},
    "AdamW, counters on the host": COUNTERS_ON_THE_HOST,
    "base step of AdamW": {**COUNTERS_ON_THE_HOST, "rho": 0.0},
}


@pytest.mark.parametrize("mode", AT_ONCE)
def test_a_step_returns_at_once_while_the_device_is_busy(backend_name, device, mode):
    """Copies from pageable memory and the allocation of pinned memory wait too, which the guard above does not see."""
    training = Training(device, backend_name)
    options = {"base_optimizer": torch.optim.SGD, "lr": 0.05, "momentum": 0.9} | AT_ONCE[mode]
    if options["base_optimizer"] is torch.optim.AdamW:
        del options["momentum"]
    if isinstance(options["lr"], torch.Tensor):
        options["lr"] = options["lr"].to(device)
    training.optimizer = ESAM(training.model.parameters(), backend=backend_name, model=training.model, **options)
    given = batches(device, 12)
    for batch in given[:-1]:
        training.step(batch)
    call = while_busy(device, lambda: training.step(given[-1]))
    assert call.was_busy, "the step returned when the device was done"
    assert call.seconds < AT_ONCE_SECONDS


def test_a_call_that_waits_for_a_busy_device_is_noticed(device):
    if device.type != "cuda":
        pytest.skip("there is nothing to wait for")
    one = torch.ones(1, device=device)
    call = while_busy(device, one.item)
    assert not call.was_busy
    assert call.seconds > AT_ONCE_SECONDS


def test_a_scaled_overflow_skips_the_update(backend_name, device):
    training = Training(device, backend_name)
    scaler = torch.amp.GradScaler(device.type, init_scale=float("inf"))
    before = training.weights()
    training.step(batches(device, 1)[0], scaler=scaler)
    assert all(map(torch.equal, before, training.weights()))


@masks
@bases
@pytest.mark.parametrize("autocast", [False, True])
def test_two_runs_give_the_same_bits(backend_name, device, mask, base, autocast):
    runs = [Training(device, backend_name, base, autocast, mask=mask) for _ in range(2)]
    for training in runs:
        for batch in batches(device, 5):
            training.step(batch)
    assert_same_weights(*runs)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "weight_decay": 1e-3}])
def test_a_base_step_with_its_rate_on_the_device_is_sgds_bit_for_bit(backend_name, device, options):
    ours, theirs = (Training(device, backend_name) for _ in range(2))
    rate = torch.tensor(0.05, device=device)
    params = list(ours.model.parameters())
    ours.optimizer = ESAM(params, torch.optim.SGD, lr=rate, rho=0.0, backend=backend_name, **options)
    plain = torch.optim.SGD(theirs.model.parameters(), lr=rate.item(), **options)
    for batch in batches(device, 5):
        ours.step(batch)
        plain.zero_grad()
        theirs.losses(*batch).mean().backward()
        plain.step()
    assert_same_weights(ours, theirs)


@masks
def test_masks_and_weights_agree_with_the_reference(backend_name, device, mask):
    """The same draws, and weights that differ by rounding only."""
    ours, reference = (Training(device, name, mask=mask) for name in (backend_name, "reference"))
    for batch in batches(device, 5):
        for training in (ours, reference):
            training.step(batch)
    for a, b in zip(ours.weights(), reference.weights()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class _FirstLayerOnTheHost(nn.Module):
    def __init__(self, device: torch.device, first: torch.device) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.rest = nn.Linear(FEATURES, 32).to(first), nn.Linear(32, CLASSES).to(device)

    def forward(self, x):
        return self.rest(self.first(x.to(self.first.weight.device)).relu().to(x.device))


@bases
def test_a_model_that_is_partly_on_the_host_takes_the_steps_of_one_on_the_device(device, base):
    ends = []
    for first in (torch.device("cpu"), device):
        model = _FirstLayerOnTheHost(device, first)
        kind = getattr(torch.optim, base)
        optimizer = ESAM(model.parameters(), kind, lr=0.01, gamma=0.5, beta=1.0, model=model)
        for batch in batches(device, 4):
            optimizer.step(lambda inputs, targets, model=model: cross_entropy(model(inputs), targets), *batch)
        ends.append([param.detach().to(device) for param in model.parameters()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_dropout_is_the_same_in_both_forwards(backend_name, device):
    """Where nothing moves, the losses before and after are the same, dropout and all.

    At rho = 0 there would be one forward only; a rho far below the weights' rounding moves nothing.
    """
    training = Training(device, backend_name, dropout=0.5, rho=1e-30)
    seen = []

    def losses(inputs, targets):
        found = training.losses(inputs, targets)
        seen.append(found.detach().clone())
        return found

    training.optimizer.step(losses, *batches(device, 1)[0])
    assert torch.equal(seen[0], seen[1])
    training.optimizer.step(losses, *batches(device, 1)[0])
    assert not torch.equal(seen[0], seen[3])


def test_a_random_state_without_devices_repeats_the_dropout_of_this_one(device):
    ones, noise = torch.ones(1000, device=device), RandomState()
    first = nn.functional.dropout(ones)
    with noise.replay():
        assert torch.equal(nn.functional.dropout(ones), first)
    assert not torch.equal(nn.functional.dropout(ones), first)


class _ConvNet(nn.Module):
    """Activations outweigh the weights, as in the ResNets."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, 64, 64, 128, 128, 256]
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in itertools.pairwise(widths)
        )
        self.head = nn.Linear(256, 100)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def test_peak_memory_is_within_two_percent_of_sgds(backend_name, device):
    if device.type != "cuda":
        pytest.skip("peak memory is read from the CUDA allocator")
    inputs, targets = torch.randn(128, 3, 64, 64, device=device), torch.randint(100, (128,), device=device)

    def peak(make_step) -> int:
        torch.manual_seed(0)
        model = _ConvNet().to(device)
        step = make_step(model)
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(3):
            step()
        return torch.cuda.max_memory_allocated(device)

    def sgd(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

        def step():
            optimizer.zero_grad()
            cross_entropy(model(inputs), targets).mean().backward()
            optimizer.step()

        return step

    def esam(model):
        settings = {"lr": 0.05, "momentum": 0.9, "gamma": 0.5, "backend": backend_name, "model": model}
        optimizer = ESAM(model.parameters(), torch.optim.SGD, **settings)
        return lambda: optimizer.step(lambda x, y: cross_entropy(model(x), y), inputs, targets)

    assert peak(esam) <= 1.02 * peak(sgd)


def test_doctor_finds_all_right(device, capsys):
    assert doctor() == 0, capsys.readouterr().out
