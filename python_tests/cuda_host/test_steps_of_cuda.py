"""Whole steps on the backend "cuda", as a GPU's default: what each plan launches, with what, and that nothing waits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from recorder import Recorder
from torch import nn

sys.path.append(str(Path(__file__).parent.parent / "dry"))

import cuda_graph
from host_memory import watched

from esam_kernels import ESAM, backends, cross_entropy, make_graphed_step, normalization_groups, uploads
from esam_kernels.backends.cuda import extension, perturbation
from esam_kernels.graphs import WARMUP_STEPS

CPU = torch.device("cpu")
SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.25, "momentum": 0.9}
WARM_UP = 2
# Small: the emulator takes some 10 ms for a launch.
BATCH, FEATURES, CLASSES = 12, 8, 5


@pytest.fixture
def calls(backend, emulated, monkeypatch):
    """CPU tensors are on a GPU where Triton does not start."""
    recorder = Recorder(emulated)
    monkeypatch.setattr(extension, "kernels", recorder)
    monkeypatch.setattr(backend, "unavailable", lambda device: None)
    monkeypatch.setattr(backends, "_resolved", {})
    monkeypatch.setitem(backends._DEFAULT_ORDER, "cpu", ("cuda", "reference"))
    return recorder


class Training:
    def __init__(self, groups=lambda model: model.parameters(), dtype=torch.float32, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(FEATURES, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, CLASSES)).to(
            dtype
        )
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(1)
        self.optimizer = ESAM(groups(self.model), model=self.model, **options)

    def losses(self, inputs, targets):
        return cross_entropy(self.model(inputs.to(self.dtype)), targets)

    def run(self, steps=1):
        for _ in range(steps):
            self.optimizer.step(self.losses, *self.batch())

    def batch(self):
        inputs = torch.randn(BATCH, FEATURES, generator=self.generator)
        return inputs, torch.randint(CLASSES, (BATCH,), generator=self.generator)

    @property
    def params(self):
        return [param for group in self.optimizer.param_groups for param in group["params"]]


def hardest(context):
    return context.losses


LOSSES = ["cross_entropy_forward", "cross_entropy_backward"]
PERTURB = ["norm_partials", "perturb"]
SELECT = ["losses_select_gather"]
UPDATE = ["restore_sgd"]
PLANS = {
    "base step": ({"rho": 0.0}, LOSSES),
    "momentum": ({"ascent": "momentum", "gamma": 1.0}, [*PERTURB, *LOSSES, *UPDATE]),
    "previous": ({"ascent": "previous", "gamma": 1.0}, [*PERTURB, *LOSSES, *UPDATE]),
    "whole batch": ({"gamma": 1.0}, [*LOSSES, *PERTURB, *LOSSES, *UPDATE]),
    "short pass 1": ({"gamma": 1.0, "ascent_share": 0.25}, [*LOSSES, *PERTURB, *LOSSES, *UPDATE]),
    "rise": ({}, [*LOSSES, *PERTURB, "cross_entropy_forward", *SELECT, *LOSSES, *UPDATE]),
    "first_order": ({"ranking": "first_order"}, [*LOSSES, *PERTURB, *SELECT, *LOSSES, *UPDATE]),
    "random": ({"ranking": "random"}, [*LOSSES, *PERTURB, *SELECT, *LOSSES, *UPDATE]),
    "callable": ({"ranking": hardest}, [*LOSSES, *PERTURB, *SELECT, *LOSSES, *UPDATE]),
    "normalization": (
        {"groups": lambda model: normalization_groups(model, 0.1)},
        [*LOSSES, *PERTURB, "cross_entropy_forward", *SELECT, *LOSSES, *UPDATE, *UPDATE],
    ),
}


@pytest.mark.parametrize("mask", ["element", "tensor"])
@pytest.mark.parametrize("plan", PLANS)
def test_a_step_launches_what_its_plan_says_waits_for_nothing_and_uploads_nothing(
    calls, emulated, monkeypatch, plan, mask
):
    options, expected = PLANS[plan]
    training = Training(**{**SGD, **options, "mask": mask})
    uploaded = []
    monkeypatch.setattr(uploads, "staged", lambda values, device: uploaded.append(values.nbytes) or values)
    training.run(WARM_UP)
    uploaded.clear()
    calls.take()
    emulated.take_launches()
    with watched(monkeypatch) as watch:
        training.run()
    assert [call.name for call in calls.take()] == expected
    assert emulated.take_launches() == len(expected), "a call is a launch"
    assert (watch.reads, watch.copies) == ([], [])
    # ranking="random": a float32 number for each sample
    assert uploaded == ([BATCH * 4] if plan == "random" else [])


BASES = {
    "SGD": ({"base_optimizer": torch.optim.SGD}, ["restore_sgd"], 3),
    "SGD momentum": ({"base_optimizer": torch.optim.SGD, "momentum": 0.9}, ["restore_sgd"], 4),
    "SGD fused": ({"base_optimizer": torch.optim.SGD, "momentum": 0.9, "fused": True}, ["restore_sgd"], 4),
    "Adam": ({"base_optimizer": torch.optim.Adam}, ["restore_adam"], 5),
    "AdamW": ({"base_optimizer": torch.optim.AdamW}, ["restore_adam"], 5),
    "AdamW amsgrad": ({"base_optimizer": torch.optim.AdamW, "amsgrad": True}, ["restore_adam"], 6),
    "AdamW capturable": (
        {"base_optimizer": torch.optim.AdamW, "capturable": True},
        ["increment_steps", "restore_adam"],
        5,
    ),
}


@pytest.mark.parametrize("lr", [0.25, torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64)], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_the_update_is_one_launch_with_the_restore_and_takes_lr_as_it_is_given(calls, monkeypatch, base, lr):
    options, names, lists = BASES[base]
    if not options.get("capturable"):
        monkeypatch.setattr(perturbation, "_are_on", lambda device, steps: False)
    training = Training(lr=lr, gamma=1.0, mask="element", **options)
    training.run(WARM_UP)
    made = [call for call in calls.take() if call.name.startswith(("restore", "increment"))]
    assert [call.name for call in made] == names * WARM_UP
    update = made[-1]
    params, states = training.params, [training.optimizer.state[param] for param in training.params]
    assert (len(update.lists), update.numels) == (lists, [param.numel() for param in params])
    assert update.lists[0] == [param.data_ptr() for param in params]
    for name, row in (("momentum_buffer", 3), ("exp_avg", 3), ("exp_avg_sq", 4), ("max_exp_avg_sq", 5)):
        if name in states[0]:
            assert update.lists[row] == [state[name].data_ptr() for state in states], name
    # after the lists and sizes: whether it is the first step, or where the counters are and how far
    at = 5 if update.name == "restore_sgd" else 6
    value, address, is_float64 = update.arguments[at : at + 3]
    if isinstance(lr, torch.Tensor):
        assert (address, is_float64) == (lr.data_ptr(), lr.dtype == torch.float64)
    else:
        assert (value, address) == (0.25, 0)
    if update.name == "restore_adam":
        counters, steps = update.arguments[4:6]
        on_device = [state["step"].data_ptr() for state in states]
        assert (counters, steps) == ((on_device, []) if options.get("capturable") else ([], [2.0] * len(params)))


@pytest.mark.parametrize(("dtype", "code"), [(torch.float32, 0), (torch.bfloat16, 1), (torch.float16, 2)])
def test_every_launch_is_told_the_dtype_and_the_addresses_of_the_step(calls, dtype, code):
    training = Training(**SGD, dtype=dtype, beta=1.0, rho=0.01)
    training.run(WARM_UP)
    calls.take()
    training.run()
    made = calls.take()
    addresses = [param.data_ptr() for param in training.params]
    by_name = {call.name: call for call in made}
    norm, perturb, update = (by_name[name] for name in ("norm_partials", "perturb", "restore_sgd"))
    assert [call.arguments[1] for call in (norm, perturb, update)] == [code] * 3
    assert norm.lists[1] == perturb.lists[0] == update.lists[0] == addresses
    assert norm.lists[0] == perturb.lists[1], "the gradients of the norm and of the perturbation"
    assert perturb.lists[2] == update.lists[1], "the saved weights"
    assert perturb.lists[2] == perturb.lists[1], "which lie where the first gradients did"


@pytest.mark.parametrize(
    ("plan", "base"), [*((plan, "SGD momentum") for plan in PLANS), ("rise", "AdamW"), ("momentum", "AdamW")]
)
def test_steps_of_every_plan_give_the_weights_of_the_reference(calls, plan, base):
    options = {**BASES[base][0], "lr": 0.01, **PLANS[plan][0], "mask": "element"}
    ours, reference = Training(**options), Training(**options, backend="reference")
    for training in (ours, reference):
        training.run(3)
    for a, b in zip(ours.params, reference.params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


GRAPHED = ["rise", "first_order", "random", "whole batch", "momentum", "base step"]


@pytest.mark.parametrize(
    ("plan", "base"), [*((plan, "SGD momentum") for plan in GRAPHED), ("rise", "AdamW capturable")]
)
def test_a_replayed_step_launches_what_an_eager_one_does_and_gives_its_weights(calls, monkeypatch, plan, base):
    gpu = cuda_graph.install(monkeypatch)
    gpu.launches = calls.calls
    options = {**BASES[base][0], "lr": 0.01, **PLANS[plan][0], "mask": "element"}
    graphed, eager = Training(**options), Training(**options)
    step = make_graphed_step(graphed.optimizer, graphed.losses, *graphed.batch())
    eager.batch()
    for _ in range(WARMUP_STEPS + 3):
        calls.take()
        step(*graphed.batch())
        names = [call.name for call in calls.take()]
        eager.optimizer.step(eager.losses, *eager.batch())
    assert (len(gpu.captures), gpu.replays) == (1, 3)
    update = BASES[base][1]
    # at rho = 0 a graph holds a fused update, where an eager step leaves it to torch
    expected = [*LOSSES, *update] if plan == "base step" else [*PLANS[plan][1][: -len(UPDATE)], *update]
    assert names == expected
    for a, b in zip(graphed.params, eager.params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
