"""The reference tier: one thread, and the backend that is the specification."""

import pytest
import torch

from esam_kernels.backends import ENVIRONMENT_VARIABLE

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def reference_backend(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")


@pytest.fixture
def fused(monkeypatch):
    """The route of a backend that restores and updates in one pass, run through the reference's operators."""
    from esam_kernels.backends import reference

    monkeypatch.setattr(reference, "FUSES_UPDATES", True, raising=False)
