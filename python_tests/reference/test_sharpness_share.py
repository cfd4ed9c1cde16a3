"""``sharpness_share``: SAM's gradient, of which what the perturbation adds is measured on a part of the batch."""

import copy

import oracles
import pytest
import torch
from torch import nn

from esam_kernels import ESAM, SAM, normalization_groups
from esam_kernels.schedules import LinearSchedule

SAMPLES = 16


def network(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(dropout), nn.Linear(12, 3))


def build(params=None, share=0.25, dropout=0.0, **kwargs):
    model = network(dropout)
    settings = {"lr": 0.1, "momentum": 0.9, "rho": 0.2, "beta": 1.0, "gamma": 1.0, "model": model, **kwargs}
    groups = model.parameters() if params is None else params(model)
    return model, ESAM(groups, torch.optim.SGD, sharpness_share=share, **settings)


def gradients_of(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def step_by_hand(model, optimizer, parts, total=SAMPLES):
    """grad L_R(w) weighted, + grad L_Q(w + e) - (1 - a) grad L_Q(w), for each part (Q, R) of the batch."""
    losses, params = oracles.losses_of(model), list(model.parameters())
    summed = [torch.zeros_like(param) for param in params]
    for number, (first, others) in enumerate(parts):
        if number:
            optimizer.restore()
        count, rest = len(first[0]), len(others[0])
        at_w = gradients_of(model, losses(*first).mean())
        of_others = gradients_of(model, losses(*others).mean())
        optimizer.zero_grad()
        for param, grad in zip(params, at_w):
            param.grad = grad.clone()
        optimizer.first_step(zero_grad=True)
        perturbed = gradients_of(model, losses(*first).mean())
        share = rest / (count + rest)
        for total_grad, other, own, new in zip(summed, of_others, at_w, perturbed):
            total_grad += (count + rest) / total * (new + share * (other - own))
    for param, grad in zip(params, summed):
        param.grad = grad
    optimizer.second_step(zero_grad=True)


def cut(batch, count):
    return tuple(each[:count] for each in batch), tuple(each[count:] for each in batch)


def assert_close(model, other):
    for ours, theirs in zip(model.state_dict().values(), other.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kwargs", [{}, {"beta": 0.6}, {"mask": "element", "beta": 0.6}, {"adaptive": True}])
@pytest.mark.parametrize(("share", "count"), [(0.25, 4), (0.5, 8), (0.2, 3)])
def test_the_update_is_that_of_the_equation(kwargs, share, count):
    (model, optimizer), (other, plain) = build(share=share, **kwargs), build(share=1.0, **kwargs)
    for step in range(4):
        batch = oracles.batch(SAMPLES, seed=step)
        optimizer.step(oracles.losses_of(model), *batch)
        step_by_hand(other, plain, [cut(batch, count)])
        assert_close(model, other)


def test_on_normalization_layers_the_others_are_updated_from_the_whole_batch_too():
    (model, optimizer), (other, plain) = (build(lambda m: normalization_groups(m, 0.5), share) for share in (0.25, 1.0))
    for step in range(3):
        batch = oracles.batch(SAMPLES, seed=step)
        optimizer.step(oracles.losses_of(model), *batch)
        step_by_hand(other, plain, [cut(batch, 4)])
        assert_close(model, other)


def test_parts_of_a_batch_add_up():
    (model, optimizer), (other, plain) = build(share=0.5), build(share=1.0)
    for step in range(3):
        batch = oracles.batch(SAMPLES, seed=step)
        optimizer.step(oracles.losses_of(model), *batch, micro_batch=10)
        step_by_hand(other, plain, [cut(cut(batch, 10)[0], 5), cut(cut(batch, 10)[1], 3)])
        assert_close(model, other)


def test_without_a_radius_and_with_all_samples_it_is_the_base_step_and_sam():
    for kwargs, samples in (({"rho": 0.0}, SAMPLES), ({}, 2)):
        (model, optimizer), (other, plain) = build(**kwargs), build(share=1.0, **kwargs)
        for step in range(3):
            batch = oracles.batch(samples, seed=step)
            ours, theirs = (i.step(oracles.losses_of(m), *batch) for m, i in ((model, optimizer), (other, plain)))
            assert torch.equal(ours, theirs)
        assert oracles.same_bits(oracles.weights_of(model), oracles.weights_of(other))


def test_over_the_parts_of_a_batch_its_mean_gradient_is_that_of_sam_on_each_part():
    """No quarter is preferred: the mean over the four is SAM's gradient with a perturbation for each quarter."""

    def gradient(batch, **kwargs):
        model = nn.Linear(6, 3)
        with torch.no_grad():
            model.weight.copy_(torch.linspace(-1, 1, 18).reshape(3, 6))
            model.bias.zero_()
        optimizer = SAM(model.parameters(), torch.optim.SGD, lr=1.0, rho=0.2, **kwargs.pop("built", {}))
        before = model.weight.detach().clone()
        optimizer.step(oracles.losses_of(model), *batch, **kwargs)
        return before - model.weight.detach()

    batch = oracles.batch(SAMPLES)
    turned = [tuple(each.roll(-4 * i, 0) for each in batch) for i in range(4)]
    mean = sum(gradient(each, built={"sharpness_share": 0.25}) for each in turned) / 4
    torch.testing.assert_close(mean, gradient(batch, micro_batch=4), rtol=1e-5, atol=1e-6)


# -- What the closure sees and returns ---------------------------------------------------------------------------------


def test_the_closure_sees_a_quarter_then_the_rest_then_the_quarter_again_as_views():
    model, optimizer = build()
    inputs, target = oracles.batch(SAMPLES)
    seen = []

    def losses(batch):
        seen.append(batch["x"][0])
        return oracles.losses_of(model)(batch["x"][0], batch["y"])

    optimizer.step(losses, {"x": [inputs], "y": target, "name": "kept"})
    assert [each.data_ptr() for each in seen] == [inputs.data_ptr(), inputs[4:].data_ptr(), inputs.data_ptr()]
    assert [len(each) for each in seen] == [4, 12, 4]


def test_loss_and_rest_are_those_at_w():
    model, optimizer = build()
    returned = []

    def losses(*batch):
        returned.append(oracles.losses_of(model)(*batch))
        return returned[-1], len(batch[0])

    loss, rest = optimizer.step(losses, *oracles.batch(SAMPLES))
    assert rest == [4, 12]
    torch.testing.assert_close(loss, torch.cat(returned[:2]).mean().detach())
    assert not loss.requires_grad


def test_both_forwards_of_the_quarter_see_the_same_noise_and_the_next_step_another():
    model, optimizer = build(dropout=0.5, rho=1e-9)
    dropped = []
    model[3].register_forward_hook(lambda _, args, output: dropped.append((output == 0) & (args[0] != 0)))
    for step in range(2):
        optimizer.step(oracles.losses_of(model), *oracles.batch(SAMPLES, seed=step))
    first, _, again, next_first, _, next_again = dropped
    assert torch.equal(first, again)
    assert torch.equal(next_first, next_again)
    assert not torch.equal(first, next_first)


def test_batch_norm_statistics_move_at_w_only():
    model, optimizer = build()
    batch = oracles.batch(SAMPLES)
    other = copy.deepcopy(model)
    for part in cut(batch, 4):
        other(part[0])
    optimizer.step(oracles.losses_of(model), *batch)
    assert model[1].num_batches_tracked == 2
    assert torch.equal(model[1].running_mean, other[1].running_mean)
    assert torch.equal(model[1].running_var, other[1].running_var)


@pytest.mark.parametrize("call", [1, 2, 3])
def test_an_exception_in_any_forward_leaves_the_weights_and_the_step_can_be_taken_again(call):
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
    optimizer.step(oracles.losses_of(model), *oracles.batch(SAMPLES))
    plain.step(oracles.losses_of(other), *oracles.batch(SAMPLES))
    assert oracles.same_bits(oracles.weights_of(model), oracles.weights_of(other))


def test_parameters_that_only_a_part_of_the_batch_uses_and_frozen_ones():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 3) for _ in range(4)]
    layers[3].requires_grad_(False)
    optimizer = SAM(
        [p for layer in layers for p in layer.parameters()], torch.optim.SGD, lr=0.1, rho=0.2, sharpness_share=0.25
    )
    inputs, target = oracles.batch(SAMPLES)

    def losses(x, y):  # the first layer sees the quarter, the second the rest, the third nothing
        logits = layers[0](x) if len(x) == 4 else layers[1](x)
        return nn.functional.cross_entropy(logits + layers[3](x), y, reduction="none")

    before = [oracles.weights_of(layer) for layer in layers]
    optimizer.step(losses, inputs, target)
    after = [oracles.weights_of(layer) for layer in layers]
    assert [oracles.same_bits(*pair) for pair in zip(before, after)] == [False, False, True, True]
    assert layers[2].weight.grad is None
    # The quarter: grad L_Q(w + e) - 0.75 grad L_Q(w), with e = 0.2 g / ||g|| over its own two tensors.
    params = [before[0][0].requires_grad_(), before[0][1].requires_grad_()]

    def of_quarter(weight, bias):
        logits = nn.functional.linear(inputs[:4], weight, bias) + layers[3](inputs[:4])
        return torch.autograd.grad(nn.functional.cross_entropy(logits, target[:4]), [weight, bias])

    own = of_quarter(*params)
    norm = torch.cat([grad.flatten() for grad in own]).norm()
    perturbed = of_quarter(*[param + 0.2 * grad / norm for param, grad in zip(params, own)])
    for got, param, new, old in zip(after[0], params, perturbed, own):
        torch.testing.assert_close(got, param.detach() - 0.1 * (new - 0.75 * old))
    # The rest: 12 of 16 samples, at w.
    layer = nn.Linear(6, 3)
    layer.load_state_dict({"weight": before[1][0], "bias": before[1][1]})
    nn.functional.cross_entropy(layer(inputs[4:]) + layers[3](inputs[4:]), target[4:]).mul(0.75).backward()
    torch.testing.assert_close(after[1][0], before[1][0] - 0.1 * layer.weight.grad)


def test_a_scaler_changes_nothing_and_skips_where_a_gradient_overflows():
    (model, optimizer), (other, scaled) = build(), build()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        for each, its, options in ((model, optimizer, {}), (other, scaled, {"scaler": scaler})):
            its.step(oracles.losses_of(each), *oracles.batch(SAMPLES, seed=step), **options)
        scaler.update()
    assert oracles.same_bits(oracles.weights_of(model), oracles.weights_of(other))
    scale = 1024.0
    for overflowing in (0, 1, 2):
        calls = []

        def losses(*batch, overflowing=overflowing, calls=calls):
            calls.append(batch)
            return oracles.losses_of(other)(*batch) * (1e38 if len(calls) == overflowing + 1 else 1.0)

        before = oracles.weights_of(other)
        scaled.step(losses, *oracles.batch(SAMPLES), scaler=scaler)
        scaler.update()
        scale /= 2
        assert oracles.same_bits(before, oracles.weights_of(other))
        assert scaler.get_scale() == scale


# -- The price, the settings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "kwargs", "cost"), [(0.25, {}, 1.25), (0.5, {"beta": 0.6}, 1.5), (0.25, {"rho": 0.0}, 1)]
)
def test_the_price_is_one_pass_and_the_share_of_another(share, kwargs, cost):
    model, optimizer = build(share=share, **kwargs)
    assert optimizer.relative_cost == pytest.approx(cost)
    seen = []
    optimizer.step(lambda *b: (seen.append(len(b[0])), oracles.losses_of(model)(*b))[1], *oracles.batch(SAMPLES))
    assert sum(seen) / SAMPLES == cost


def test_a_share_outside_its_range_is_refused():
    for share in (0.0, 1.5, float("nan"), "0.5", True):
        with pytest.raises(ValueError, match=r"sharpness_share must lie in \(0, 1\], got"):
            build(share=share)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"gamma": 0.5}, "sharpness_share < 1 needs gamma = 1, got sharpness_share=0.25 and gamma=0.5"),
        ({"ascent": "momentum"}, 'sharpness_share must be 1 with ascent="momentum", got 0.25'),
    ],
)
def test_what_it_cannot_be_combined_with_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(**kwargs)


def test_a_run_resumes_bitwise():
    model, optimizer = build()
    for step in range(2):
        optimizer.step(oracles.losses_of(model), *oracles.batch(SAMPLES, seed=step))
    other, resumed = build(share=1.0)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.sharpness_share == 0.25
    for each, its in ((model, optimizer), (other, resumed)):
        its.step(oracles.losses_of(each), *oracles.batch(SAMPLES, seed=9))
    assert oracles.same_bits(oracles.weights_of(model), oracles.weights_of(other))


def test_a_schedule_sets_it():
    _, optimizer = build(share=1.0)
    schedule = LinearSchedule(optimizer, "sharpness_share", 1.0, 0.5, total_iters=2)
    schedule.step()
    assert optimizer.sharpness_share == 0.75
