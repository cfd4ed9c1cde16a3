"""A base optimizer that maximizes: on f it takes the steps that one that minimizes takes on -f."""

import oracles
import pytest
import torch

from esam_kernels import ESAM, SAM

BASES = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "Adam": (torch.optim.Adam, {"lr": 0.01}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.0}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.05}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.01}),
    "RAdam": (torch.optim.RAdam, {"lr": 0.01}),
    "Adamax": (torch.optim.Adamax, {"lr": 0.01}),
    "ASGD": (torch.optim.ASGD, {"lr": 0.05}),
    "Rprop": (torch.optim.Rprop, {"lr": 0.01}),
    "Adafactor": (torch.optim.Adafactor, {"lr": 0.01}),
}
STEPS = 4
KINDS = {
    "SAM": {"beta": 1.0, "gamma": 1.0},
    "half": {"beta": 1.0, "gamma": 0.5},
    "tensors": {"beta": 0.5, "gamma": 0.5},
    "elements": {"beta": 0.5, "gamma": 0.5, "mask": "element"},
    "first order": {"beta": 1.0, "gamma": 0.5, "ranking": "first_order"},
    "random": {"beta": 1.0, "gamma": 0.5, "ranking": "random"},
    "own ranking": {"beta": 1.0, "gamma": 0.5, "ranking": lambda context: context.batch[0][:, 0]},
    "adaptive": {"beta": 1.0, "gamma": 1.0, "adaptive": True},
    "previous": {"beta": 1.0, "gamma": 1.0, "ascent": "previous"},
    "momentum": {"beta": 1.0, "gamma": 1.0, "ascent": "momentum", "rho": 0.3},
}


def trained(name, kind, maximize):
    model = oracles.mlp()
    base, options = BASES[name]
    sign = -1.0 if maximize else 1.0
    optimizer = ESAM(model.parameters(), base, maximize=maximize, model=model, **{"rho": 0.3, **options, **KINDS[kind]})
    for step in range(STEPS):
        optimizer.step(lambda x, y: sign * oracles.losses_of(model)(x, y), *oracles.batch(seed=step))
    return oracles.weights_of(model)


def assert_close(left, right):
    for one, other in zip(left, right):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["SAM", "half"])
@pytest.mark.parametrize("name", BASES)
def test_maximizing_f_is_minimizing_minus_f_with_every_optimizer(name, kind):
    assert_close(trained(name, kind, True), trained(name, kind, False))


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fuse", [False, True])
def test_maximizing_f_is_minimizing_minus_f_with_every_kind_of_step(kind, name, fuse, request):
    if fuse:
        request.getfixturevalue("fused")
    assert_close(trained(name, kind, True), trained(name, kind, False))


@pytest.mark.parametrize("ascent", ["current", "previous", "momentum"])
def test_each_group_says_for_itself(ascent):
    """Players of a game: one group minimizes f, the other maximizes it."""
    results = []
    for maximize in (False, True):
        x, y = (torch.nn.Parameter(torch.tensor(value)) for value in ([0.3, -0.4], [0.7, 0.2]))
        groups = [{"params": [x]}, {"params": [y], "maximize": maximize}]
        optimizer = SAM(groups, torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.3, ascent=ascent)

        def closure():
            optimizer.zero_grad()
            loss = (x.sin() * y + x * y.square()).sum()
            loss.backward()
            if not maximize:
                y.grad.neg_()
            return loss

        for _ in range(STEPS):
            optimizer.step(closure)
        results.append([x.detach(), y.detach()])
    assert_close(*results)
