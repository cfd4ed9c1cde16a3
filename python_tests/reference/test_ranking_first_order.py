"""ranking="first_order": the scores are the inner products of the head's gradients, and B+ the largest of them."""

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from esam_kernels import ESAM
from esam_kernels.ranking.base import Head, RankingContext
from esam_kernels.ranking.first_order import FirstOrder


def head_of(model):
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


def products(model, losses, *batch, scaling=None):
    """For each sample grad l_i / b . T^2 grad L, over the parameters of the head: by autograd, sample by sample."""
    params = list(head_of(model).parameters())
    each = losses(*batch)
    scaling = scaling or [torch.ones_like(param) for param in params]
    whole = torch.autograd.grad(each.mean(), params, retain_graph=True)
    return torch.stack(
        [
            sum(
                (t**2 * g * own).sum()
                for t, g, own in zip(scaling, whole, torch.autograd.grad(loss / len(each), params, retain_graph=True))
            )
            for loss in each
        ]
    )


def context_of(params, losses, *batch, model, **kwargs):
    """What a ranking sees in a step over these parameters or groups; the weights come back."""
    seen = []

    def ranking(context):
        seen.append(context)
        return context.losses

    chosen(ESAM(params, torch.optim.SGD, lr=0.1, ranking=ranking, model=model, flatten=False, **kwargs), losses, *batch)
    (context,) = seen
    return context


def build(model, **kwargs):
    return ESAM(model.parameters(), torch.optim.SGD, lr=0.1, ranking="first_order", model=model, **kwargs)


def chosen(optimizer, losses, *batch):
    """B+ by index, in phases."""
    before = losses(*batch)
    optimizer.backward(before.mean())
    optimizer.first_step(zero_grad=True)
    indices = optimizer.select(before, None, torch.arange(len(before)))
    optimizer.restore()
    return indices.tolist()


def hinge(logits, target):
    return F.multi_margin_loss(logits, target, reduction="none")


def focal(logits, target):
    losses = F.cross_entropy(logits, target, reduction="none")
    return (1 - torch.exp(-losses)) ** 2 * losses


def squared(logits, target):
    return (logits - F.one_hot(target, 3)).square().mean(dim=1)


LOSSES = {
    "cross-entropy": lambda logits, target: F.cross_entropy(logits, target, reduction="none"),
    "smoothed": lambda logits, target: F.cross_entropy(logits, target, reduction="none", label_smoothing=0.2),
    "squared": squared,
    "hinge": hinge,
    "focal": focal,
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("bias", [True, False])
def test_scores_are_inner_products_with_the_gradient_of_the_head_whatever_the_loss(loss, bias):
    model = oracles.mlp(dtype=torch.float64)
    if not bias:
        model[4] = nn.Linear(5, 3, bias=False, dtype=torch.float64)

    def losses(inputs, target):
        return LOSSES[loss](model(inputs), target)

    batch = oracles.batch(16, dtype=torch.float64)
    wanted = products(model, losses, *batch)
    got = FirstOrder().scores(context_of(model.parameters(), losses, *batch, model=model))
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-15)
    assert chosen(build(model), losses, *batch) == oracles.ranked([0.0] * 16, wanted.tolist(), 8)


@pytest.mark.parametrize("which", [("weight", "bias"), ("weight",), ("bias",)])
def test_scores_of_an_adaptive_head_are_scaled_by_t_squared(which):
    model = oracles.mlp(dtype=torch.float64)
    head = {f"4.{name}" for name in which}
    groups = [
        {"params": [p for n, p in model.named_parameters() if n not in head], "adaptive": False},
        {"params": [p for n, p in model.named_parameters() if n in head], "adaptive": True},
    ]
    losses, batch = oracles.losses_of(model), oracles.batch(16, dtype=torch.float64)
    scaling = [
        p.detach().abs() + 0.3 if n in which else torch.ones_like(p.detach())
        for n, p in head_of(model).named_parameters()
    ]
    wanted = products(model, losses, *batch, scaling=scaling)
    got = FirstOrder().scores(context_of(groups, losses, *batch, model=model, eta=0.3))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-15)
    optimizer = ESAM(groups, torch.optim.SGD, lr=0.1, rho=0.5, ranking="first_order", model=model, eta=0.3)
    assert not torch.allclose(wanted, products(model, losses, *batch))
    assert chosen(optimizer, losses, *batch) == oracles.ranked([0.0] * 16, wanted.tolist(), 8)


class Sequences(nn.Module):
    """(b, T, D) -> (b, T, C)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.fc = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, inputs):
        return self.fc(torch.tanh(self.body(inputs)))


@pytest.mark.parametrize("dims", [(7,), (3, 2)])
def test_scores_of_sequences_are_inner_products_of_whole_samples(dims):
    """Summed over positions, the products delta_it . (G h_it + g) are those of each sample's whole gradient."""
    model = Sequences().double()
    inputs = torch.randn(10, *dims, 4, dtype=torch.float64)
    target = torch.randint(0, 3, (10, *dims))

    def losses(inputs, target):
        logits = model(inputs).movedim(-1, 1)
        return F.cross_entropy(logits, target, reduction="none").flatten(1).mean(dim=1)

    wanted = products(model, losses, inputs, target)
    got = FirstOrder().scores(context_of(model.parameters(), losses, inputs, target, model=model))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-15)
    assert chosen(build(model), losses, inputs, target) == oracles.ranked([0.0] * 10, wanted.tolist(), 5)


def test_the_score_is_the_rise_of_the_loss_to_first_order():
    """(l_i(w + t G) - l_i(w)) / (b t) as t goes to 0, where only the head moves."""
    model = oracles.mlp(dtype=torch.float64)
    losses, batch = oracles.losses_of(model), oracles.batch(16, dtype=torch.float64)
    scores = FirstOrder().scores(context_of(model.parameters(), losses, *batch, model=model))
    before = losses(*batch)
    gradients = torch.autograd.grad(before.mean(), list(model[4].parameters()))
    with torch.no_grad():
        for param, grad in zip(model[4].parameters(), gradients):
            param += 1e-6 * grad
        rise = (losses(*batch) - before) / 1e-6
    torch.testing.assert_close(scores, rise / 16, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("mask", ["tensor", "element"])
def test_step_is_the_loop_in_phases(mask):
    models = [oracles.noisy_mlp(), oracles.noisy_mlp()]
    whole, phases = (build(model, mask=mask, rho=0.3, momentum=0.9) for model in models)
    for step in range(4):
        batch = oracles.batch(12, seed=step)
        torch.manual_seed(step)
        whole.step(oracles.losses_of(models[0]), *batch)
        torch.manual_seed(step)
        losses = oracles.losses_of(models[1])
        before = losses(*batch)
        phases.backward(before.mean())
        phases.first_step(zero_grad=True)
        losses(*phases.select(before, None, *batch)).mean().backward()
        phases.second_step(zero_grad=True)
    assert oracles.same_bits(list(models[0].state_dict().values()), list(models[1].state_dict().values()))


def test_losses_at_w_plus_e_are_refused_where_none_are_needed():
    model = oracles.mlp()
    optimizer = build(model)
    before = oracles.losses_of(model)(*oracles.batch())
    optimizer.backward(before.mean())
    optimizer.first_step()
    with pytest.raises(ValueError, match="ranking='first_order' needs no losses at the perturbed weights"):
        optimizer.select(before, before, *oracles.batch())
    with pytest.raises(ValueError, match='select_from_logits needs ranking="rise"'):
        optimizer.select_from_logits(before, model(oracles.batch()[0]), oracles.batch()[1], *oracles.batch())


def test_micro_batches_rank_each_part_by_itself():
    model, by_hand = oracles.mlp(), oracles.mlp()
    optimizer, other = build(model, rho=0.3, beta=1.0), build(by_hand, rho=0.3, beta=1.0)
    inputs, target = oracles.batch()
    optimizer.step(oracles.losses_of(model), inputs, target, micro_batch=6)
    losses = oracles.losses_of(by_hand)
    sums = []
    for part in zip(inputs.split(6), target.split(6)):
        other.zero_grad()
        before = losses(*part)
        other.backward(before.mean())
        other.first_step(zero_grad=True)
        (losses(*other.select(before, None, *part)).sum() / 6).backward()
        sums.append([p.grad for p in by_hand.parameters()])
        if len(sums) == 1:
            other.restore()
    for param, *grads in zip(by_hand.parameters(), *sums):
        param.grad = grads[0] + grads[1]
    other.second_step()
    assert oracles.same_bits(oracles.weights_of(model), oracles.weights_of(by_hand))


def scores_of(head):
    return FirstOrder().scores(RankingContext(torch.zeros(len(head.input)), (), head, seed=0, step=0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_multiplied_in_float32(dtype):
    h, delta = torch.randn(32, 64).to(dtype), (1e-3 * torch.randn(32, 10)).to(dtype)
    got = scores_of(Head(h, delta))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, scores_of(Head(h.double(), delta.double())).float(), rtol=1e-4, atol=1e-7)


def test_nan_ranks_last_and_of_equal_scores_the_lower_index_is_taken():
    model = oracles.mlp()
    optimizer = build(model, beta=1.0, gamma=0.5)
    inputs, target = oracles.batch(8)
    inputs, target = inputs[:1].repeat(8, 1), target[:1].repeat(8)
    assert chosen(optimizer, oracles.losses_of(model), inputs, target) == [0, 1, 2, 3]

    def ranking(context):
        scores = context.losses.clone()
        scores[:5] = torch.tensor([float("nan"), 0.0, -0.0, float("nan"), float("-inf")])
        scores[5:] = -1.0
        return scores

    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, ranking=ranking, gamma=0.5)
    assert chosen(optimizer, oracles.losses_of(model), inputs, target) == [1, 2, 5, 6]
    optimizer.gamma = 0.875
    assert chosen(optimizer, oracles.losses_of(model), inputs, target) == [0, 1, 2, 4, 5, 6, 7]


def test_a_gradient_that_is_not_finite_leaves_the_weights():
    model = oracles.mlp()
    optimizer = build(model, beta=1.0)
    before = oracles.weights_of(model)
    inputs, target = oracles.batch(8)
    inputs[3, 0] = float("nan")
    assert chosen(optimizer, oracles.losses_of(model), inputs, target) == [0, 1, 2, 3]
    assert oracles.same_bits(before, oracles.weights_of(model))


def test_a_base_optimizer_that_maximizes_takes_the_samples_that_fall_most():
    """e goes down, along -G: the losses with the largest products fall most."""
    model = oracles.mlp(dtype=torch.float64)
    losses, batch = oracles.losses_of(model), oracles.batch(16, dtype=torch.float64)
    wanted = oracles.ranked([0.0] * 16, products(model, losses, *batch).tolist(), 8)
    assert chosen(build(model, maximize=True), losses, *batch) == wanted


class Experts(nn.Module):
    """A batch goes through one expert; pass 1 of the others has nothing to differentiate."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(6, 5, dtype=torch.float64) for _ in range(3)])
        self.head = nn.Linear(5, 3, dtype=torch.float64)
        self.taken = 0

    def forward(self, inputs):
        return self.head(torch.tanh(self.experts[self.taken](inputs)))


@pytest.mark.parametrize("is_head_frozen", [False, True])
def test_the_samples_are_ranked_where_the_batch_passes_none_of_the_drawn_layers(is_head_frozen):
    model, batch = Experts(), oracles.batch(16, dtype=torch.float64)
    model.head.requires_grad_(not is_head_frozen)
    losses = oracles.losses_of(model)
    groups = [{"params": model.experts[0].parameters()}]
    rest = [*model.experts[1:].parameters(), *model.head.parameters()]
    groups.append({"params": rest, "rho": 0.0})
    optimizer = ESAM(groups, torch.optim.SGD, lr=0.1, rho=0.5, beta=1.0, ranking="first_order", model=model)
    for taken in (1, 0, 2, 1):
        model.taken = taken
        model.head.requires_grad_(True)  # the products are those of its gradients
        wanted = oracles.ranked([0.0] * 16, products(model, losses, *batch).tolist(), 8)
        model.head.requires_grad_(not is_head_frozen)
        optimizer.zero_grad()
        assert chosen(optimizer, losses, *batch) == wanted
        optimizer.backward(losses(*batch).mean())
        own = ["experts.0.weight", "experts.0.bias"] if taken == 0 else []
        assert [name for name, param in model.named_parameters() if param.grad is not None] == own
