"""``ascent_share``: pass 1 on the first part of the batch, pass 2 on the whole."""

import copy

import oracles
import pytest
import torch
from torch import nn

from esam_kernels import ESAM, SAM, normalization_groups
from esam_kernels.schedules import ConstantSchedule

SAMPLES = 16


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.3), nn.Linear(12, 3))


def build(params=None, share=0.25, **kwargs):
    model = network()
    settings = {"lr": 0.1, "momentum": 0.9, "rho": 0.2, "beta": 1.0, "gamma": 1.0, "model": model, **kwargs}
    groups = model.parameters() if params is None else params(model)
    return model, ESAM(groups, torch.optim.SGD, ascent_share=share, **settings)


def by_hand(model, optimizer, inputs, target, count):
    """The same step as a loop of one's own."""
    losses = oracles.losses_of(model)
    optimizer.backward(losses(inputs[:count], target[:count]).mean())
    optimizer.first_step(zero_grad=True)
    loss = losses(inputs, target).mean()
    loss.backward()
    optimizer.second_step(zero_grad=True)
    return loss.detach()


@pytest.mark.parametrize("kwargs", [{}, {"beta": 0.6}, {"mask": "element", "beta": 0.6}, {"adaptive": True}])
@pytest.mark.parametrize(("share", "count"), [(0.25, 4), (0.5, 8), (0.4, 6), (0.01, 2), (1.0, 16)])
def test_a_step_is_the_loop_with_a_short_pass_1_bit_for_bit(kwargs, share, count):
    model, optimizer = build(share=share, **kwargs)
    other, plain = build(share=1.0, **kwargs)
    for step in range(4):
        batch = oracles.batch(SAMPLES, seed=step)
        torch.manual_seed(step)
        loss = optimizer.step(oracles.losses_of(model), *batch)
        torch.manual_seed(step)
        expected = by_hand(other, plain, *batch, count)
        if share < 1.0:
            assert torch.equal(loss, expected)
    assert oracles.same_bits(list(model.state_dict().values()), list(other.state_dict().values()))


def test_the_step_is_that_of_the_equations():
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    inputs = torch.tensor([[1.0, 0.5], [0.0, 1.0], [2.0, 1.0], [-1.0, 3.0]])
    target = torch.tensor([0.5, 1.0, 0.0, 2.0])

    def gradient(w, x, y):
        return 2.0 * ((x @ w - y)[:, None] * x).mean(dim=0)

    optimizer = SAM([weight], torch.optim.SGD, lr=0.1, rho=0.3, ascent_share=0.5)
    w = weight.detach().clone()
    optimizer.step(lambda x, y: (x @ weight - y) ** 2, inputs, target)
    first = gradient(w, inputs[:2], target[:2])
    torch.testing.assert_close(weight.detach(), w - 0.1 * gradient(w + 0.3 * first / first.norm(), inputs, target))


def test_the_closure_sees_the_first_quarter_and_then_the_whole_batch():
    model, optimizer = build()
    inputs, target = oracles.batch(SAMPLES)
    seen = []

    def losses(batch):
        seen.append(batch["x"]["inputs"])
        assert batch["name"] == "kept"
        return oracles.losses_of(model)(batch["x"]["inputs"], batch["y"])

    optimizer.step(losses, {"x": {"inputs": inputs}, "y": target, "name": "kept"})
    assert [len(each) for each in seen] == [4, SAMPLES]
    assert torch.equal(seen[0], inputs[:4])
    assert seen[0].data_ptr() == inputs.data_ptr()  # a view, nothing is copied
    assert torch.equal(seen[1], inputs)


def test_a_sparse_batch_is_cut_as_a_dense_one_is():
    (model, optimizer), (other, dense) = build(), build()
    inputs, target = oracles.batch(SAMPLES)
    inputs = inputs.relu()
    for each, its, given in ((model, optimizer, inputs.to_sparse()), (other, dense, inputs)):
        torch.manual_seed(0)
        its.step(lambda x, y, each=each: oracles.losses_of(each)(x.to_dense(), y), given, target, micro_batch=6)
    assert oracles.same_bits(oracles.weights_of(model), oracles.weights_of(other))


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize(("share", "kwargs"), [(0.25, {}), (1.0, {"micro_batch": 6})])
def test_a_layout_that_cannot_be_cut_is_refused(share, kwargs):
    model, optimizer = build(share=share)
    inputs, target = oracles.batch(SAMPLES)

    def losses(x, y):
        return oracles.losses_of(model)(x.to_dense(), y)

    message = "has the layout torch.sparse_csr, of which no part can be taken, as gamma or ascent_share below 1"
    given = (losses, inputs.to_sparse_csr(), target)
    oracles.assert_refused(lambda: optimizer.step(*given, **kwargs), ValueError, message, model, optimizer)


def test_losses_of_another_batch_than_the_closure_was_called_with_are_refused_with_what_to_do():
    model, optimizer = build()
    batch = oracles.batch(SAMPLES)
    message = "hold 16 samples, the batch 4: compute them from the closure's arguments, which may be a part"
    with pytest.raises(ValueError, match=message):
        optimizer.step(lambda *_: oracles.losses_of(model)(*batch), *batch)


def test_loss_and_rest_are_those_of_the_pass_that_sees_the_whole_batch():
    model, optimizer = build()
    inputs, target = oracles.batch(SAMPLES)
    returned = []

    def losses(*batch):
        returned.append(oracles.losses_of(model)(*batch))
        return returned[-1], {"seen": len(batch[0])}

    loss, rest = optimizer.step(losses, inputs, target)
    assert rest == {"seen": SAMPLES}
    assert torch.equal(loss, returned[1].mean().detach())
    assert not loss.requires_grad
    loss, parts = optimizer.step(losses, inputs, target, micro_batch=10)
    assert [part["seen"] for part in parts] == [10, 6]
    assert [len(each) for each in returned[2:]] == [2, 10, 2, 6]
    assert loss.item() == pytest.approx((returned[3].sum() + returned[5].sum()).item() / SAMPLES, rel=1e-6)


def test_without_a_radius_it_is_the_base_step():
    (model, optimizer), (other, plain) = build(rho=0.0), build(rho=0.0, share=1.0)
    for step in range(3):
        for each, its in ((model, optimizer), (other, plain)):
            torch.manual_seed(step)
            its.step(oracles.losses_of(each), *oracles.batch(SAMPLES, seed=step))
    assert oracles.same_bits(oracles.weights_of(model), oracles.weights_of(other))


def test_the_parts_of_a_batch_have_a_perturbation_each():
    def gradient(samples, **kwargs):
        model = nn.Linear(6, 3, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.linspace(-1, 1, 18).reshape(3, 6))
        before = oracles.weights_of(model)
        batch = [tensor[samples] for tensor in oracles.batch(SAMPLES)]
        optimizer = SAM(model.parameters(), torch.optim.SGD, lr=1.0, rho=0.2, ascent_share=0.5)
        optimizer.step(oracles.losses_of(model), *batch, **kwargs)
        return [old - new for old, new in zip(before, oracles.weights_of(model))]

    parts = [gradient(samples) for samples in (slice(0, 6), slice(6, 12), slice(12, 16))]
    expected = [(6 * first + 6 * second + 4 * third) / SAMPLES for first, second, third in zip(*parts)]
    for got, mean in zip(gradient(slice(None), micro_batch=6), expected, strict=True):
        torch.testing.assert_close(got, mean)


@pytest.mark.parametrize("call", [1, 2])
def test_an_exception_in_either_forward_leaves_the_weights_and_the_step_can_be_taken_again(call):
    (model, optimizer), (other, plain) = build(), build()
    calls = 0

    def losses(*batch):
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyError("a fault of the user's")
        return oracles.losses_of(model)(*batch)

    before = oracles.weights_of(model)
    with pytest.raises(KeyError):
        optimizer.step(losses, *oracles.batch(SAMPLES))
    assert oracles.same_bits(before, oracles.weights_of(model))
    for each, its in ((model, optimizer), (other, plain)):
        torch.manual_seed(0)
        its.step(oracles.losses_of(each), *oracles.batch(SAMPLES))
    assert oracles.same_bits(oracles.weights_of(model), oracles.weights_of(other))


def test_a_parameter_that_only_the_others_use_is_updated_without_a_perturbation():
    torch.manual_seed(0)
    of_quarter, of_all = nn.Linear(6, 3), nn.Linear(6, 3)
    params = [*of_quarter.parameters(), *of_all.parameters()]
    optimizer = SAM(params, torch.optim.SGD, lr=0.1, rho=0.2, ascent_share=0.25)
    inputs, target = oracles.batch(SAMPLES)
    before = [weight.requires_grad_() for weight in oracles.weights_of(of_all)]

    def losses(x, y):
        return nn.functional.cross_entropy((of_quarter if len(x) == 4 else of_all)(x), y, reduction="none")

    optimizer.step(losses, inputs, target)
    loss = nn.functional.cross_entropy(nn.functional.linear(inputs, *before), target)
    for old, grad, new in zip(before, torch.autograd.grad(loss, before), oracles.weights_of(of_all), strict=True):
        torch.testing.assert_close(new, (old - 0.1 * grad).detach())


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_of_small_batches_two_samples_are_taken_as_batch_norm_needs(samples):
    model = nn.Linear(6, 3)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.2, ascent_share=0.25)
    sizes, at_both = [], []

    def losses(*batch):
        sizes.append(len(batch[0]))
        each = oracles.losses_of(model)(*batch)
        at_both.append(each.mean().detach())
        return each

    inputs, target = oracles.batch(samples)
    loss = optimizer.step(losses, inputs, target)
    assert sizes == [min(2, samples), samples]
    assert torch.equal(loss, at_both[1])  # also where pass 1 has seen all of them


def test_batch_norm_statistics_move_in_pass_1_only():
    model, optimizer = build()
    inputs, target = oracles.batch(SAMPLES)
    expected = 0.1 * model[0](inputs[:4]).mean(dim=0).detach()
    optimizer.step(oracles.losses_of(model), inputs, target)
    torch.testing.assert_close(model[1].running_mean, expected)
    assert model[1].num_batches_tracked == 1


def test_a_scaler_changes_nothing_and_skips_where_pass_1_overflows():
    (model, optimizer), (other, scaled) = build(), build()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        for each, its, options in ((model, optimizer, {}), (other, scaled, {"scaler": scaler})):
            torch.manual_seed(step)
            its.step(oracles.losses_of(each), *oracles.batch(SAMPLES, seed=step), **options)
        scaler.update()
    assert oracles.same_bits(oracles.weights_of(model), oracles.weights_of(other))

    def overflows_in_pass_1(inputs, target):
        return oracles.losses_of(other)(inputs, target) * (1e38 if len(inputs) < SAMPLES else 1.0)

    before = oracles.weights_of(other)
    scaled.step(overflows_in_pass_1, *oracles.batch(SAMPLES), scaler=scaler)
    scaler.update()
    assert oracles.same_bits(before, oracles.weights_of(other))
    assert scaler.get_scale() == 512.0


# -- The price ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "kwargs", "cost"),
    [
        (0.25, {}, 1.25),
        (0.5, {}, 1.5),
        (0.25, {"beta": 0.6}, 1 + 0.25 * 2.6 / 3),
        (0.25, {"beta": 0.6, "mask": "element"}, 1.25),
        (0.25, {"rho": 0.0}, 1.0),
    ],
)
def test_the_price_counts_the_short_pass_1(share, kwargs, cost):
    _, optimizer = build(share=share, **kwargs)
    assert optimizer.relative_cost == pytest.approx(cost)
    optimizer.ascent_share = 1.0
    assert optimizer.relative_cost == pytest.approx(1.0 + (cost - 1.0) / share)


def test_on_normalization_layers_it_costs_little_more_than_the_base_step():
    model, optimizer = build(lambda model: normalization_groups(model, 0.5))
    share = 24 / sum(param.numel() for param in model.parameters())
    assert optimizer.relative_cost == pytest.approx(1 + 0.25 * (2 + share) / 3)


# -- Settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, float("nan"), "0.5", True, None])
def test_a_share_outside_its_range_is_refused(share):
    with pytest.raises(ValueError, match=r"ascent_share must lie in \(0, 1\], got"):
        build(share=share)
    model, optimizer = build()
    message = r"ascent_share must lie in \(0, 1\], got"
    oracles.assert_refused(lambda: setattr(optimizer, "ascent_share", share), ValueError, message, model, optimizer)
    assert optimizer.ascent_share == 0.25


def test_a_choice_of_data_needs_pass_1_on_the_whole_batch():
    message = (
        r"ascent_share < 1 needs gamma = 1, got ascent_share=0.25 and gamma=0.5: .*gamma=1.0, .*or ascent_share=1.0$"
    )
    with pytest.raises(ValueError, match=message):
        build(gamma=0.5)
    _, optimizer = build()
    with pytest.raises(ValueError, match="needs gamma = 1"):
        optimizer.gamma = 0.5
    assert (optimizer.gamma, optimizer.ascent_share) == (1.0, 0.25)
    optimizer.ascent_share = 1.0
    optimizer.gamma = 0.5
    with pytest.raises(ValueError, match="needs gamma = 1"):
        optimizer.ascent_share = 0.25
    assert (optimizer.gamma, optimizer.ascent_share) == (0.5, 1.0)


def test_a_closure_that_computes_the_whole_batch_twice_is_refused():
    model, optimizer = build()
    losses, batch = oracles.losses_of(model), oracles.batch(SAMPLES)

    def closure():
        optimizer.zero_grad()
        loss = losses(*batch).mean()
        loss.backward()
        return loss

    message = r"step\(closure\) needs ascent_share = 1, got 0.25: .* step\(losses, \*batch\)"
    oracles.assert_refused(lambda: optimizer.step(closure), RuntimeError, message, model, optimizer)
    optimizer.ascent_share = 1.0
    optimizer.step(closure)


def test_a_closure_may_follow_a_pass_1_of_ones_own():
    (model, optimizer), (other, plain) = build(), build(share=1.0)
    inputs, target = oracles.batch(SAMPLES)
    for each, its in ((model, optimizer), (other, plain)):
        torch.manual_seed(0)
        losses = oracles.losses_of(each)
        its.backward(losses(inputs[:4], target[:4]).mean())
        its.step(lambda losses=losses: losses(inputs, target).mean().backward(), first_gradients=True)
    assert oracles.same_bits(oracles.weights_of(model), oracles.weights_of(other))


@pytest.mark.parametrize("ascent", ["previous", "momentum"])
def test_an_ascent_without_pass_1_is_refused(ascent):
    with pytest.raises(ValueError, match=f'ascent_share must be 1 with ascent="{ascent}", got 0.25'):
        build(ascent=ascent)


def test_a_run_resumes_bitwise_and_an_older_checkpoint_leaves_the_share_as_built():
    model, optimizer = build()
    for step in range(2):
        optimizer.step(oracles.losses_of(model), *oracles.batch(SAMPLES, seed=step))
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["esam"]["ascent_share"] == 0.25
    other, resumed = build(share=1.0)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed.load_state_dict(copy.deepcopy(saved))
    assert resumed.ascent_share == 0.25
    for each, its in ((model, optimizer), (other, resumed)):
        torch.manual_seed(9)
        its.step(oracles.losses_of(each), *oracles.batch(SAMPLES, seed=9))
    assert oracles.same_bits(oracles.weights_of(model), oracles.weights_of(other))

    for noted in (saved["esam"], *(group["esam"] for group in saved["param_groups"])):
        noted["version"] = 2
        del noted["ascent_share"]
    _, older = build(share=0.5)
    older.load_state_dict(saved)
    assert (older.ascent_share, older.state_dict()["esam"]["version"]) == (0.5, 3)


def test_an_older_checkpoint_with_a_choice_of_data_is_refused_and_changes_nothing():
    _, choosing = build(share=1.0, gamma=0.5)
    saved = copy.deepcopy(choosing.state_dict())
    for noted in (saved["esam"], *(group["esam"] for group in saved["param_groups"])):
        noted["version"] = 2
        del noted["ascent_share"]
    model, optimizer = build()
    oracles.assert_refused(lambda: optimizer.load_state_dict(saved), ValueError, "needs gamma = 1", model, optimizer)


def test_a_schedule_sets_it():
    _, optimizer = build(share=1.0)
    schedule = ConstantSchedule(optimizer, "ascent_share", 1.0, end=0.25, total_iters=2)
    shares = []
    for _ in range(4):
        shares.append(optimizer.ascent_share)
        schedule.step()
    assert shares == [1.0, 1.0, 0.25, 0.25]
