"""What each plan launches on a GPU's default backend, step by step, and what it compiles and uploads on the way."""

from __future__ import annotations

import block_memory
import pytest
import torch
from stand_in import Pointer
from steps import BATCH, batches, model_on

from esam_kernels import ESAM, backends, cross_entropy, normalization_groups
from esam_kernels.perturbation.fused_update import plan_update

WARM_UP, STEADY = 3, 10
SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.25, "momentum": 0.9}


class Training:
    """ESAM with ``options`` over a small model, and its step. The gradients of the model lie in ``memory``."""

    def __init__(self, memory, groups=lambda model: model.parameters(), **options):
        self.model = model_on(torch.device("cpu"))
        memory.hold_gradients(self.model)
        self.optimizer = ESAM(groups(self.model), model=self.model, **options)

    def losses(self, inputs, targets, *_):
        return cross_entropy(self.model(inputs), targets)

    def run(self, steps=1, size=BATCH):
        for batch in batches(torch.device("cpu"), steps, size):
            self.optimizer.step(self.losses, *batch)


@pytest.fixture
def memory(monkeypatch):
    return block_memory.install(monkeypatch)


def test_adamw_starts_a_program_for_each_block_and_sgd_takes_1024_shares(stand_in):
    backend = backends.load("triton")
    lists = [[torch.empty(1030 * 2048)] for _ in range(5)]
    backend.restore_sgd_(*lists[:4], False, 0.1, None, 0.9, 0.0, 0.0, False, False)
    steps = [torch.zeros(())]
    for dtype, programs in ((torch.float32, 1030), (torch.bfloat16, 1030), (torch.float64, 2060)):
        typed = [[tensors[0].to(dtype)] for tensors in lists]
        backend.restore_adam_(*typed, [], steps, 0.1, None, 0.9, 0.99, 0.0, 0.0, False, False, True)
        assert stand_in.launches[-1].grid == (programs, 1, 1)
    assert stand_in.launches[0].grid == (1024, 1, 1)


# -- The update --------------------------------------------------------------------------------------------------------

BASES = {
    "SGD": (torch.optim.SGD, {}, "restore_sgd"),
    "SGD momentum": (torch.optim.SGD, {"momentum": 0.9}, "restore_sgd"),
    "SGD fused": (torch.optim.SGD, {"momentum": 0.9, "fused": True}, "restore_sgd"),
    "Adam": (torch.optim.Adam, {}, "restore_adam"),
    "Adam fused": (torch.optim.Adam, {"fused": True}, "restore_adam"),
    "Adam capturable": (torch.optim.Adam, {"capturable": True}, "restore_adam"),
    "AdamW": (torch.optim.AdamW, {}, "restore_adam"),
    "AdamW fused": (torch.optim.AdamW, {"fused": True}, "restore_adam"),
    "AdamW capturable": (torch.optim.AdamW, {"capturable": True}, "restore_adam"),
}


@pytest.mark.parametrize("base", BASES)
def test_the_update_is_one_launch_with_the_restore_and_takes_lr_as_it_is_given(stand_in, memory, base):
    kind, options, kernel = BASES[base]
    rate = torch.tensor(0.25)
    for lr in (0.25, rate):
        training = Training(memory, base_optimizer=kind, lr=lr, gamma=1.0, **options)
        training.run(2)
        assert plan_update(training.optimizer.base_optimizer, "", training.optimizer._perturbation.params) is not None
        updates = [launch for launch in stand_in.launches if launch.kernel.startswith("restore")]
        assert [update.kernel for update in updates] == [f"{kernel}_kernel"] * 2
        for arguments in (update.arguments for update in updates):
            if lr is rate:
                assert arguments["LR_TENSOR"]
                assert arguments["lr_ptr"] == Pointer(rate.data_ptr(), torch.float32)
            else:
                assert not arguments["LR_TENSOR"]
                assert arguments["lr"] == 0.25
        stand_in.forget()


# -- The launches of a step --------------------------------------------------------------------------------------------


def hardest(context):
    return context.losses


LOSSES = ["forward_tile", "backward_tile"]
PERTURB = ["norm", "perturb"]
SELECT = ["select", "gather", "gather"]  # the gathering of the inputs and of the targets
UPDATE = ["restore_sgd"]
# The options of each plan, and what a step of it launches, in order.
PLANS = {
    "base step": ({"rho": 0.0}, LOSSES),  # and torch's own update, which is no kernel of ours
    "momentum": ({"ascent": "momentum", "gamma": 1.0}, [*PERTURB, *LOSSES, *UPDATE]),
    "previous": ({"ascent": "previous", "gamma": 1.0}, [*PERTURB, *LOSSES, *UPDATE]),
    "whole batch": ({"gamma": 1.0}, [*LOSSES, *PERTURB, *LOSSES, *UPDATE]),
    "short pass 1": ({"gamma": 1.0, "ascent_share": 0.25}, [*LOSSES, *PERTURB, *LOSSES, *UPDATE]),
    "rise": ({}, [*LOSSES, *PERTURB, "forward_tile", *SELECT, *LOSSES, *UPDATE]),
    "first_order": ({"ranking": "first_order"}, [*LOSSES, *PERTURB, *SELECT, *LOSSES, *UPDATE]),
    "random": ({"ranking": "random"}, [*LOSSES, *PERTURB, *SELECT, *LOSSES, *UPDATE]),
    "callable": ({"ranking": hardest}, [*LOSSES, *PERTURB, *SELECT, *LOSSES, *UPDATE]),
    # an update for each of the two groups
    "normalization": (
        {"groups": lambda model: normalization_groups(model, 0.1)},
        [*LOSSES, *PERTURB, "forward_tile", *SELECT, *LOSSES, *UPDATE, *UPDATE],
    ),
}
# The number that a plan draws for each sample, uploaded in one copy.
NUMBERS = {"random": 1}
PERTURBED = [plan for plan in PLANS if plan not in ("base step", "normalization")]


def steady(stand_in, memory, plan, draws=None, **options):
    """A training after its warm-up, with nothing noted yet; the draws of tensors repeat after ``draws`` steps."""
    training = Training(memory, **{**SGD, **PLANS[plan][0], **options})
    training.optimizer._perturbation.draw.pool = draws
    training.run(WARM_UP)
    stand_in.forget()
    return training


def uploads_of_each_step(stand_in, training):
    counts = []
    for _ in range(STEADY):
        training.run()
        counts.append(len(stand_in.uploads))
        stand_in.uploads.clear()
    return counts


@pytest.mark.parametrize("mask", ["element", "tensor"])
@pytest.mark.parametrize("plan", PLANS)
def test_a_step_launches_what_its_plan_says_and_compiles_nothing_after_the_warm_up(stand_in, memory, plan, mask):
    training = steady(stand_in, memory, plan, mask=mask)
    for _ in range(STEADY):
        training.run()
        assert stand_in.take() == PLANS[plan][1]
    assert (stand_in.compilations, stand_in.loads) == ([], [])


@pytest.mark.parametrize("tensors", [1, 2, 3])
def test_a_selection_is_one_launch_and_one_more_for_each_tensor_of_the_batch(stand_in, memory, tensors):
    training = Training(memory, **SGD)
    inputs, targets = batches(torch.device("cpu"), 1)[0]
    batch = (inputs, targets, inputs.clone())[:tensors]

    def losses(inputs, *rest):
        return training.losses(inputs, rest[0] if rest else inputs.argmax(1) % 10)

    training.optimizer.step(losses, *batch)
    counts = stand_in.counts()
    assert (counts["select"], counts["gather"]) == (1, tensors)


# -- Tables ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"mask": "element"}, {"beta": 1.0}], ids=["element mask", "beta 1"])
@pytest.mark.parametrize("plan", PLANS)
def test_a_step_uploads_no_table_where_every_step_perturbs_the_same_tensors(stand_in, memory, plan, options):
    training = steady(stand_in, memory, plan, **options)
    assert uploads_of_each_step(stand_in, training) == [NUMBERS.get(plan, 0)] * STEADY


@pytest.mark.parametrize(("draws", "uploads"), [(2, 0), (None, 5)], ids=["a draw that comes again", "new draws"])
@pytest.mark.parametrize("plan", PERTURBED)
def test_a_step_that_draws_tensors_uploads_five_tables_for_a_new_draw_alone(stand_in, memory, plan, draws, uploads):
    """Addresses and layout for the norm and for the perturbation; the addresses, backups among them, for the update."""
    training = steady(stand_in, memory, plan, draws)
    assert uploads_of_each_step(stand_in, training) == [uploads + NUMBERS.get(plan, 0)] * STEADY


# -- Batches of another size -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [47, 46, 36])
def test_a_last_batch_that_is_somewhat_smaller_compiles_nothing(stand_in, memory, size):
    training = steady(stand_in, memory, "rise")
    training.run(size=size)
    assert stand_in.take() == PLANS["rise"][1]
    assert (stand_in.compilations, stand_in.loads) == ([], [])


def test_a_last_batch_below_another_power_of_two_compiles_one_kernel_the_selection(stand_in, memory):
    training = steady(stand_in, memory, "rise")
    for size, compiled in ((21, ["select_kernel"]), (17, []), (1, [])):
        training.run(size=size)
        assert stand_in.compilations == compiled
        stand_in.forget()
