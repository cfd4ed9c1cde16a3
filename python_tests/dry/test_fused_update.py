"""The update of the base optimizer is part of the restore: planned, and launched, on a GPU's default backend."""

from __future__ import annotations

import pytest
from steps import Training, batches

from esam_kernels import backends
from esam_kernels.perturbation.fused_update import plan_update

BASES = {"SGD": "restore_sgd", "AdamW": "restore_adam"}


@pytest.mark.parametrize("base", BASES)
def test_the_default_backend_of_a_gpu_fuses_the_update(stand_in, device, base):
    training = Training(device, "", base, gamma=0.5)
    perturbation = training.optimizer._perturbation
    assert backends.resolve(None, device) is backends.load("triton")
    for batch in batches(device, 2):
        training.step(batch)
    assert plan_update(training.optimizer.base_optimizer, "", perturbation.params) is not None
    counts = stand_in.counts()
    assert counts[BASES[base]] == 2
    assert counts["restore"] == 0
