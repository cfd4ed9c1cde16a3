"""Groups in which only the normalization layers are perturbed (SAM-ON)."""

import math

import oracles
import pytest
import torch
from torch import nn

from esam_kernels import ESAM, SAM, normalization_groups
from esam_kernels.schedules import PhaseSchedule


class HandWritten(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, inputs):
        return self.scale * inputs / inputs.square().mean(dim=-1, keepdim=True).sqrt()


class Subclass(nn.LayerNorm):
    pass


def model_with_norms():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)
    )


LAYERS = [
    lambda: nn.BatchNorm1d(8),
    lambda: nn.BatchNorm2d(8),
    lambda: nn.BatchNorm3d(8),
    lambda: nn.SyncBatchNorm(8),
    lambda: nn.InstanceNorm2d(8, affine=True),
    lambda: nn.LayerNorm(8),
    lambda: nn.GroupNorm(2, 8),
    lambda: nn.RMSNorm(8),
    lambda: Subclass(8),
]


@pytest.mark.parametrize("make", LAYERS)
def test_weights_and_biases_of_every_kind_of_layer_are_in_the_first_group(make):
    layer = make()
    model = nn.Sequential(nn.Linear(3, 8), nn.Sequential(layer), nn.Linear(8, 2))
    first, second = normalization_groups(model, 0.3)
    assert (first["rho"], second["rho"]) == (0.3, 0.0)
    assert [id(p) for p in first["params"]] == [id(p) for p in layer.parameters()]
    assert [id(p) for p in second["params"]] == [id(p) for p in [*model[0].parameters(), *model[2].parameters()]]


def test_layers_written_by_hand_count_where_they_are_named():
    model = nn.Sequential(nn.Linear(3, 8), HandWritten(8))
    with pytest.raises(ValueError, match="Sequential has no normalization layers with weights or biases"):
        normalization_groups(model, 0.3)
    first, second = normalization_groups(model, 0.3, layers=(HandWritten,))
    assert [id(p) for p in first["params"]] == [id(model[1].scale)]
    assert len(second["params"]) == 2


def test_shared_parameters_are_listed_once_and_with_the_normalization_layer():
    model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    model[2].bias = model[0].bias
    first, second = normalization_groups(model, 0.3)
    assert [id(p) for p in first["params"]] == [id(p) for p in (model[0].weight, model[0].bias, model[1].bias)]
    assert [id(p) for p in second["params"]] == [id(model[2].weight)]


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_torchs_optimizers_take_the_groups(base):
    model = model_with_norms()
    optimizer = base(normalization_groups(model, 0.3), lr=0.1)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_a_model_of_normalization_layers_alone_has_one_group():
    (group,) = normalization_groups(nn.Sequential(nn.LayerNorm(3)), 0.3)
    assert len(group["params"]) == 2


def test_only_the_normalization_layers_move():
    model = model_with_norms()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = SAM(normalization_groups(model, 0.3), torch.optim.SGD, lr=0.1)
    inputs, target = torch.randn(16, 6), torch.randint(0, 4, (16,))
    nn.functional.cross_entropy(model(inputs), target).backward()
    optimizer.first_step(zero_grad=True)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"1.weight", "1.bias", "4.weight", "4.bias"}


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_length_of_the_perturbation_is_the_radius_measured_over_the_normalization_layers_alone(adaptive):
    model = model_with_norms().double()
    optimizer = SAM(
        normalization_groups(model, 0.3), torch.optim.SGD, lr=0.1, adaptive=adaptive, eta=0.01 if adaptive else 0.0
    )
    before = oracles.weights_of(model)
    inputs, target = torch.randn(16, 6, dtype=torch.float64), torch.randint(0, 4, (16,))
    nn.functional.cross_entropy(model(inputs), target).backward()
    gradients = [param.grad.clone() for param in model.parameters()]
    optimizer.first_step(zero_grad=True)
    e = [param.detach() - old for param, old in zip(model.parameters(), before)]
    scaling = [old.abs() + 0.01 if adaptive else torch.ones_like(old) for old in before]
    own = [2, 3, 6, 7]  # BatchNorm's and LayerNorm's weight and bias
    length = sum(float((e[i] / scaling[i]).square().sum()) for i in range(len(e)))
    assert math.sqrt(length) == pytest.approx(0.3, rel=1e-6)
    norm = math.sqrt(sum(float((scaling[i] * gradients[i]).square().sum()) for i in own))
    for i, part in enumerate(e):
        wanted = 0.3 * scaling[i] ** 2 * gradients[i] / norm if i in own else torch.zeros_like(part)
        torch.testing.assert_close(part, wanted, rtol=1e-6, atol=1e-12)


def test_a_phase_leaves_the_other_group_at_zero():
    model = model_with_norms()
    optimizer = ESAM(normalization_groups(model, 0.3), torch.optim.SGD, lr=0.1)
    schedule = PhaseSchedule(optimizer, "rho", 0.2, start=1, stop=3)
    course = []
    for _ in range(5):
        course.append([group["rho"] for group in optimizer.param_groups])
        schedule.step()
    assert course == [[0.0, 0.0], [0.2, 0.0], [0.2, 0.0], [0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: normalization_groups(oracles.mlp(), 0.1), ValueError, "no normalization layers"),
        (lambda: normalization_groups(nn.Sequential(nn.InstanceNorm1d(3)), 0.1), ValueError, "no normalization layers"),
        (lambda: normalization_groups(nn.LayerNorm(3), -0.1), ValueError, "rho must be finite and not negative"),
        (lambda: normalization_groups(nn.LayerNorm(3), math.inf), ValueError, "rho must be finite and not negative"),
        (lambda: normalization_groups(nn.LayerNorm(3).parameters(), 0.1), TypeError, "model must be a torch.nn.Module"),
        (lambda: normalization_groups(nn.LayerNorm(3), 0.1, layers=("Norm",)), TypeError, "layers must be a tuple"),
        (lambda: normalization_groups(nn.LayerNorm(3), 0.1, layers=HandWritten), TypeError, "layers must be a tuple"),
    ],
)
def test_what_cannot_be_grouped_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
