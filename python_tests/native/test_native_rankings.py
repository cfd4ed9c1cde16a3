"""Rankings that need no forward at w + e choose the same samples on the native backend as on the reference."""

import pytest
import torch
from torch import nn

from esam_kernels import ESAM, cross_entropy


def chosen(backend, ranking, steps=3, samples=37):
    """B+ of each step, by index; the weights do not move."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 16), nn.ReLU(), nn.Linear(16, 5))
    optimizer = ESAM(
        model.parameters(), torch.optim.SGD, lr=0.0, rho=0.1, seed=3, ranking=ranking, model=model, backend=backend
    )
    seen = []

    def losses(inputs, target, indices):
        seen.append(indices.tolist())
        return cross_entropy(model(inputs), target)

    for _ in range(steps):
        batch = torch.randn(samples, 9), torch.randint(0, 5, (samples,)), torch.arange(samples)
        optimizer.step(losses, *batch)
    return seen[1::2]


@pytest.mark.parametrize("ranking", ["first_order", "random", lambda context: context.losses])
def test_b_plus_is_that_of_the_reference(ranking):
    native = chosen("native", ranking)
    assert native == chosen("reference", ranking)
    assert [len(set(indices)) for indices in native] == [18, 18, 18]
    assert native[0] != native[1]
