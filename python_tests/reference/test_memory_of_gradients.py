"""What an optimizer keeps alive: no gradient after zero_grad, and no model after itself."""

import gc
import weakref

import oracles
import pytest
import torch

from esam_kernels import ESAM, SAM

KINDS = {
    "SAM": (SAM, {}),
    "ESAM": (ESAM, {}),
    "elements": (ESAM, {"mask": "element"}),
    "first order": (ESAM, {"ranking": "first_order"}),
    "momentum": (ESAM, {"ascent": "momentum", "gamma": 1.0}),
}


def by_batch(model, optimizer):
    optimizer.step(oracles.losses_of(model), *oracles.batch())


def by_closure(model, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = oracles.losses_of(model)(*oracles.batch()).mean()
        loss.backward()
        return loss

    optimizer.step(closure)


def build(kind, flatten=None):
    model = oracles.mlp()
    cls, options = KINDS[kind]
    return model, cls(
        model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, model=model, flatten=flatten, **options
    )


@pytest.mark.parametrize("flatten", [None, False])
@pytest.mark.parametrize("step", [by_batch, by_closure])
@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_outlives_zero_grad(kind, step, flatten):
    model, optimizer = build(kind, flatten)
    for _ in range(2):
        step(model, optimizer)
        grads = [weakref.ref(param.grad) for param in model.parameters()]
        assert all(grad() is not None for grad in grads)
        optimizer.zero_grad()
        assert [grad() for grad in grads] == [None] * len(grads)


@pytest.mark.parametrize("step", [None, by_batch, by_closure])
@pytest.mark.parametrize("kind", KINDS)
def test_the_optimizer_and_its_model_go_at_once(kind, step):
    """Not at the next collection of cycles: torch's own optimizers hold none either."""
    model, optimizer = build(kind)
    if step is not None:
        step(model, optimizer)
    held = [weakref.ref(optimizer), weakref.ref(optimizer.base_optimizer), weakref.ref(model[0].weight)]
    gc.collect()
    gc.disable()
    try:
        del optimizer
        assert [each() is None for each in held] == [True, True, False]
        del model
        assert held[2]() is None
    finally:
        gc.enable()
