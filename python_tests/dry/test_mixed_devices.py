"""Parameters of which some are on a GPU and some on the CPU: the reference takes them, as torch's optimizers do.

"meta" is the other device here: there is none, and the reference is only asked, not run.
"""

from __future__ import annotations

import pytest
import torch

from esam_kernels import ops
from esam_kernels.backends import reference
from esam_kernels.perturbation.fused_update import why_not_fused

SGD = (0.1, None, 0.9, 0.0, 0.0, False, False)
ADAM = (0.1, None, 0.9, 0.99, 1e-8, 0.0, False, False, True)


def mixed():
    return [torch.ones(3), torch.ones(3, device="meta")]


PARTIALS, SCALE = torch.zeros(reference.NUM_PARTIALS, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
CALLS = {
    "norm_partials": lambda: (mixed(), mixed(), [0, 0], [False], 0.0),
    "perturb_": lambda: (mixed(), mixed(), [], [0, 0], [0, 4], PARTIALS, SCALE, [False], 0.0, 1.0, 0.0, None),
    "restore_": lambda: (mixed(), mixed()),
    "restore_sgd_": lambda: (mixed(), mixed(), mixed(), mixed(), False, *SGD),
    "restore_adam_": lambda: (*(mixed() for _ in range(5)), [], [torch.zeros(()), torch.zeros(())], *ADAM),
}


@pytest.mark.parametrize("operator", CALLS)
def test_the_reference_takes_lists_of_several_kinds_of_devices(stand_in, monkeypatch, operator):
    asked = []
    monkeypatch.setattr(reference, operator, lambda *arguments: asked.append(arguments))
    arguments = CALLS[operator]()
    with torch.no_grad():
        getattr(ops, operator)(*arguments, backend="triton")
    assert len(asked) == 1
    assert len(asked[0]) == len(arguments)
    assert all(given is argument for given, argument in zip(asked[0], arguments))
    assert stand_in.launches == []


def test_the_update_is_the_base_optimizers_own_step(stand_in):
    params = [torch.nn.Parameter(tensor) for tensor in mixed()]
    base = torch.optim.SGD(params, lr=0.1)
    assert why_not_fused(base, "triton", params[:1]) is None
    assert why_not_fused(base, "triton", params) == "some parameters are on a GPU and some on the CPU"
