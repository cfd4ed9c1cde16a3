"""ESAM with the CUDA backend, emulated: fused updates, both masks, against the same steps on the reference."""

from __future__ import annotations

import pytest
import torch
from steps import Training, batches

from esam_kernels import backends


@pytest.fixture
def available(backend, monkeypatch):
    monkeypatch.setattr(backend, "unavailable", lambda device: None)
    monkeypatch.setattr(backends, "_resolved", {})


@pytest.mark.usefixtures("available")
@pytest.mark.parametrize("base", ["SGD", "AdamW"])
@pytest.mark.parametrize("mask", ["tensor", "element"])
def test_steps_agree_with_the_reference(device, emulated, mask, base):
    ours, reference = (Training(device, name, base, mask=mask, gamma=0.5) for name in ("cuda", "reference"))
    emulated.take_launches()
    for batch in batches(device, 4):
        for training in (ours, reference):
            training.step(batch)
    # Norm, perturb, select, update; Adam's steps. Losses and gathering run on the device's default backend.
    assert emulated.take_launches() >= 4 * (4 if base == "SGD" else 5)
    for a, b in zip(ours.weights(), reference.weights()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)
