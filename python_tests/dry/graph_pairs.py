"""Two trainings alike, of which one is graphed."""

from __future__ import annotations

import contextlib

import pytest
import torch
from steps import BASES, Training, assert_same_weights, batches

from esam_kernels import make_graphed_step

CPU = torch.device("cpu")


def capturable_adamw(params, _):
    return torch.optim.AdamW(params, lr=torch.tensor(1e-3), weight_decay=0.05, capturable=True)


def training_for_graphs(**options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BASES, "AdamW", capturable_adamw)
        return Training(CPU, "native", **options)


def plain_training(**options):
    return Training(CPU, "native", **options)


@contextlib.contextmanager
def nothing_changes(training):
    """Weights, optimizer state, buffers, counters and random state."""

    def all_of_it():
        optimizer = training.optimizer
        state = optimizer.state_dict()
        tensors = [tensor for values in state["state"].values() for tensor in values.values()]
        tensors += [torch.get_rng_state(), *training.model.state_dict().values()]
        draw = optimizer._perturbation.draw.pool
        return [tensor.clone() for tensor in tensors], state["esam"], state["param_groups"], draw

    tensors, *rest = all_of_it()
    yield
    tensors_now, *rest_now = all_of_it()
    assert len(tensors) == len(tensors_now)
    assert all(map(torch.equal, tensors, tensors_now))
    assert rest == rest_now


class Pair:
    """Two trainings alike, one graphed and one eager, compared after each step."""

    def __init__(self, make=training_for_graphs, make_eager=plain_training, **options):
        self.noise = torch.get_rng_state()
        self.graphed, self.eager = make(**options), make_eager(**options)
        self.step = make_graphed_step(self.graphed.optimizer, self.graphed.losses, *batches(CPU, 1)[0])
        self.eager.optimizer._perturbation.draw.pool = self.graphed.optimizer._perturbation.draw.pool

    @property
    def optimizers(self):
        return self.graphed.optimizer, self.eager.optimizer

    def compare(self, given):
        """One step of each, from the same random numbers."""
        torch.set_rng_state(self.noise)
        loss = self.step(*given)
        after = torch.get_rng_state()
        torch.set_rng_state(self.noise)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: False))
            if isinstance(self.eager.optimizer.base_optimizer, torch.optim.AdamW):
                # As in a graph the update is fused in every step: torch's own rounds in another order.
                rates = [torch.as_tensor(group["lr"]) for group in self.eager.optimizer.param_groups]
                self.eager.optimizer._perturbation.lr_tensors = rates
            expected = self.eager.step(given)
        self.noise = torch.get_rng_state()
        assert torch.equal(loss, expected)
        assert_same_weights(self.graphed, self.eager)
        assert torch.equal(after, self.noise)

    def run(self, steps):
        for given in batches(CPU, steps):
            self.compare(given)
