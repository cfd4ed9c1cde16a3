"""The order in which the streaming kernels walk over memory, where programs run one after the other."""

from __future__ import annotations

from types import ModuleType

import torch

from esam_kernels.backends.reference import NUM_PARTIALS


def check_perturb_walks_backwards_over_what_the_norm_has_read(backend: ModuleType, tensors: int) -> None:
    """The norm begins at the first tensor and the perturbation at the last one: that is still in the GPU's cache.

    All tensors, of a block each, have one backup: it holds the one that was perturbed last.
    """
    params = [torch.full((5,), float(1 + i)) for i in range(tensors)]
    grads = [torch.full((5,), float(i in (1, tensors - 1))) for i in range(tensors)]
    backup, groups = torch.empty(5), [0] * tensors
    partials = backend.norm_partials(params, grads, groups, [False], 0.0)
    assert partials[:3].tolist() == [0.0, 5.0, 0.0]
    scale = torch.ones(1, dtype=torch.float64)
    offsets = [8 * i for i in range(tensors)]
    norm = torch.zeros(NUM_PARTIALS, dtype=torch.float64)
    norm[0] = 1.0
    backend.perturb_(params, grads, [backup] * tensors, groups, offsets, norm, scale, [False], 0.0, 1.0, 0.0, None)
    assert backup.tolist() == [1.0] * 5
    assert params[-1].tolist() == [tensors + 1.0] * 5
