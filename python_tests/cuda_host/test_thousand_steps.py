"""What 1,000 steps of mask="tensor" hand to the CUDA extension: each of them perturbs other tensors."""

from __future__ import annotations

import gc

import pytest
import torch

from benchmarks.cases import resnet50
from esam_kernels import uploads
from esam_kernels.backends.cuda import extension

STEPS = 1000
LISTS = {"ResNet-50": resnet50(), "a billion weights": [(4096, 4096)] * 60}
SCALE = torch.ones(1, dtype=torch.float64)


class Extension:
    """Counts the numbers that it is given, and computes nothing."""

    MAX_GROUPS = 64

    def __init__(self):
        self.numbers = self.calls = 0

    def __getattr__(self, name):
        def call(*arguments):
            self.calls += 1
            self.numbers += _count(arguments)

        return call


def _count(value):
    return sum(map(_count, value)) if isinstance(value, (list, tuple)) else 1


def tensors_of(shapes):
    """Tensors whose memory is never touched, so that there may be more of it than the machine has."""
    storage = torch.UntypedStorage(4 * max(torch.Size(shape).numel() for shape in shapes))
    return [torch.empty(0).set_(storage, 0, torch.Size(shape)) for shape in shapes]


def run_steps(backend, shapes, steps):
    params, generator = tensors_of(shapes), torch.Generator().manual_seed(0)
    for _ in range(steps):
        drawn = (torch.rand(len(params), generator=generator) < 0.6).nonzero().flatten().tolist()
        w, groups, offsets = [params[i] for i in drawn], [0] * len(drawn), [4 * i for i in drawn]
        partials = backend.norm_partials(w, w, groups, [False], 0.0)
        backend.perturb_(w, w, [], groups, offsets, partials, SCALE, [False], 0.0, 1.0, 1e-12, None)
        backend.restore_sgd_(params, params, params, params, False, 0.1, None, 0.9, 0.0, 0.0, False, False)


@pytest.mark.parametrize("name", LISTS)
def test_a_thousand_steps_upload_and_keep_nothing_and_hand_over_some_numbers_for_each_tensor(
    backend, monkeypatch, name
):
    """As many for large tensors as for such of one element: the host's work goes with the number of tensors alone."""
    uploaded = []
    monkeypatch.setattr(uploads, "staged", lambda values, device: uploaded.append(values.nbytes) or values)
    given = []
    for shapes in (LISTS[name], [(1,)] * len(LISTS[name])):
        monkeypatch.setattr(extension, "kernels", Extension())
        run_steps(backend, shapes, 1)
        gc.collect()
        before = len(gc.get_objects())
        run_steps(backend, shapes, STEPS)
        gc.collect()
        assert len(gc.get_objects()) - before < STEPS // 10
        given.append((extension.kernels.calls, extension.kernels.numbers))
    assert given[0] == given[1]
    assert given[0][0] == 3 * (STEPS + 1)
    assert uploaded == []
