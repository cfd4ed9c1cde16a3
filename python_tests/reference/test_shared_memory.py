"""Memory that somebody else uses stays where it is: shared memory, twins, packed weights, numpy's arrays."""

import copy
import gc

import oracles
import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from esam_kernels import SAM
from esam_kernels.perturbation.flat_buffer import FlatBuffers, why_they_stay
from esam_kernels.tensor_lists import holders_of_memory


def packed(module):
    """The parameters as cuDNN packs an LSTM's: views of one storage, side by side."""
    params = list(module.parameters())
    whole = torch.cat([p.detach().flatten() for p in params])
    start = 0
    for param in params:
        param.data = whole[start : start + param.numel()].view(param.shape)
        start += param.numel()
    return module


def in_shared_memory(model):
    return model.share_memory(), None


def with_a_twin(model):
    twin = copy.deepcopy(model)
    for mine, others in zip(model.parameters(), twin.parameters()):
        others.data = mine.data
    return model, twin


def with_a_view(model):
    return model, [p.detach().view(-1)[:1] for p in model.parameters()]


def with_a_snapshot(model):
    return model, model.state_dict()


def over_numpys_memory(model):
    arrays = [p.detach().numpy().copy() for p in model.parameters()]
    for param, array in zip(model.parameters(), arrays):
        param.data = torch.from_numpy(array)
    return model, arrays


def packed_in_one_storage(model):
    return packed(model), None


KINDS = {
    in_shared_memory: "shared with other processes",
    with_a_twin: "shares its memory with another tensor",
    with_a_view: "shares its memory with another tensor",
    with_a_snapshot: "shares its memory with another tensor",
    over_numpys_memory: "torch did not allocate",
    packed_in_one_storage: "one storage with other parameters",
}


@pytest.mark.parametrize("share", KINDS)
def test_memory_that_others_use_is_not_moved(share):
    model, others = share(oracles.mlp())
    params = list(model.parameters())
    pointers = [p.data_ptr() for p in params]
    reasons = why_they_stay(params)
    assert list(reasons) == list(range(len(params)))
    assert all(KINDS[share] in reason for reason in reasons.values())
    optimizer = SAM(params, torch.optim.SGD, lr=0.1, rho=0.5)
    assert [p.data_ptr() for p in params] == pointers
    optimizer.step(oracles.losses_of(model), *oracles.batch())
    assert [p.data_ptr() for p in params] == pointers
    del others


@pytest.mark.parametrize("share", KINDS)
def test_training_is_the_same_wherever_the_weights_lie(share):
    weights = []
    for model, others in ((oracles.mlp(), None), share(oracles.mlp())):
        optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.5)
        for step in range(3):
            optimizer.step(oracles.losses_of(model), *oracles.batch(seed=step))
        weights.append(oracles.weights_of(model))
        del others
    assert oracles.same_bits(*weights)


def test_a_twin_sees_every_update():
    model, twin = with_a_twin(oracles.mlp())
    before = oracles.weights_of(model)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    optimizer.step(oracles.losses_of(model), *oracles.batch())
    assert not oracles.same_bits(before, oracles.weights_of(twin))
    assert oracles.same_bits(oracles.weights_of(model), oracles.weights_of(twin))


def test_packed_weights_are_perturbed_and_restored_bit_for_bit_in_their_layout():
    torch.manual_seed(0)
    lstm = packed(nn.LSTM(3, 5, num_layers=2))
    params = list(lstm.parameters())
    layout = [(p.data_ptr(), p.storage_offset(), p.stride()) for p in params]
    storage = params[0].untyped_storage().data_ptr()
    before = oracles.weights_of(lstm)
    optimizer = SAM(params, torch.optim.SGD, lr=0.1, rho=0.5)
    lstm(torch.randn(4, 2, 3))[0].square().mean().backward()
    optimizer.first_step(zero_grad=True)
    moved = torch.cat([(p.detach() - w).flatten() for p, w in zip(params, before)]).norm()
    torch.testing.assert_close(moved, torch.tensor(0.5), rtol=1e-4, atol=0.0)
    optimizer.restore()
    assert oracles.same_bits(before, oracles.weights_of(lstm))
    assert [(p.data_ptr(), p.storage_offset(), p.stride()) for p in params] == layout
    assert {p.untyped_storage().data_ptr() for p in params} == {storage}


def test_a_part_stays_while_the_others_are_flattened():
    model = oracles.mlp()
    params = list(model.parameters())
    kept = params[0].detach()
    pointers = [p.data_ptr() for p in params]
    flat = FlatBuffers(params)
    buffer = flat.buffers[torch.float32]
    inside = [buffer.data_ptr() <= p.data_ptr() < buffer.data_ptr() + buffer.nbytes for p in params]
    assert inside == [False] + [True] * (len(params) - 1)
    assert params[0].data_ptr() == pointers[0] == kept.data_ptr()


def test_what_holds_a_parameter_and_not_its_memory_does_not_keep_it_from_moving():
    """The module, another optimizer, gradients, copies (EMA, deepcopy) and checkpoints that were copied."""
    model = oracles.mlp()
    params = list(model.parameters())
    plain = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    oracles.losses_of(model)(*oracles.batch()).mean().backward()
    plain.step()
    average = torch.optim.swa_utils.AveragedModel(model)
    copies = [copy.deepcopy(model), {name: value.clone() for name, value in model.state_dict().items()}]
    assert holders_of_memory(params) == [1] * len(params)
    assert why_they_stay(params) == {}
    pointers = [p.data_ptr() for p in params]
    optimizer = SAM(params, torch.optim.SGD, lr=0.1, flatten=True)
    assert optimizer._perturbation.is_flattened
    assert not set(pointers) & {p.data_ptr() for p in params}
    del average, copies


def test_the_memory_moves_once_its_other_holder_is_gone():
    model, snapshot = with_a_snapshot(oracles.mlp())
    params = list(model.parameters())
    assert holders_of_memory(params) == [2] * len(params)
    del snapshot
    gc.collect()
    assert holders_of_memory(params) == [1] * len(params)
    assert why_they_stay(params) == {}


def test_tied_parameters_that_nobody_else_holds_move_together():
    weight = nn.Parameter(torch.randn(3, 2))
    params = [weight, nn.Parameter(weight.data), nn.Parameter(torch.randn(4))]
    pointer = weight.data_ptr()
    FlatBuffers(params)
    assert params[0].data_ptr() == params[1].data_ptr() != pointer


@pytest.mark.parametrize("flatten", [None, False])
@pytest.mark.parametrize("are_tied_at_first", [False, True])
def test_parameters_that_are_tied_or_untied_after_the_optimizer_was_built_are_noticed(are_tied_at_first, flatten):
    """Perturbed once, along the sum of their gradients, or each along its own; and restored bit for bit."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4, bias=False, dtype=torch.float64) for _ in range(3)]
    first, second, _ = (layer.weight for layer in layers)
    if are_tied_at_first:
        second.data = first.data
    model = nn.Sequential(*layers)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.5, flatten=flatten)
    second.data = second.data.clone() if are_tied_at_first else first.data
    before = oracles.weights_of(model)
    model(torch.randn(5, 4, dtype=torch.float64)).square().mean().backward()
    grads = [param.grad.clone() for param in model.parameters()]
    if not are_tied_at_first:
        grads = [grads[0] + grads[1], grads[2]]
    norm = sum(grad.square().sum() for grad in grads).sqrt()
    optimizer.first_step()
    moved = [now - then for now, then in zip(oracles.weights_of(model), before)]
    torch.testing.assert_close(moved if are_tied_at_first else moved[1:], [0.5 * grad / norm for grad in grads])
    optimizer.restore()
    assert oracles.same_bits(before, oracles.weights_of(model))


def test_a_second_optimizer_leaves_flat_parameters_in_their_place():
    model = oracles.mlp()
    first = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    pointers = [p.data_ptr() for p in model.parameters()]
    second = SAM(model.parameters(), torch.optim.SGD, lr=0.1, flatten=True)
    for optimizer in (first, second, first):
        optimizer.step(oracles.losses_of(model), *oracles.batch())
        assert [p.data_ptr() for p in model.parameters()] == pointers


def test_only_what_was_moved_out_is_moved_back():
    params = list(oracles.mlp().parameters())
    flat = FlatBuffers(params)
    pointers = [p.data_ptr() for p in params]
    params[1].data = torch.ones_like(params[1])
    outside = params[1].data_ptr()
    assert flat.refresh()
    assert [p.data_ptr() for p in params[:1] + params[2:]] == pointers[:1] + pointers[2:]
    assert params[1].data_ptr() not in (outside, pointers[1])
    assert torch.equal(params[1], torch.ones_like(params[1]))


def test_a_twin_made_after_the_optimizer_is_not_moved_away_from():
    model, twin = oracles.mlp(), oracles.mlp()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    for mine, others in zip(model.parameters(), twin.parameters()):
        mine.data = others.data
    optimizer.step(oracles.losses_of(model), *oracles.batch())
    assert oracles.same_bits(oracles.weights_of(model), oracles.weights_of(twin))
    assert [p.data_ptr() for p in model.parameters()] == [p.data_ptr() for p in twin.parameters()]


def test_sharing_between_processes_after_the_optimizer_was_built_lasts():
    model = oracles.mlp()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    model.share_memory()
    optimizer.step(oracles.losses_of(model), *oracles.batch())
    assert all(p.is_shared() for p in model.parameters())


@pytest.mark.parametrize("share", KINDS)
def test_flatten_true_refuses_with_the_reason_and_moves_nothing(share):
    model, others = share(oracles.mlp())
    pointers = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(ValueError, match=f"flatten=True is not possible: parameter 0 .*{KINDS[share]}"):
        SAM(model.parameters(), torch.optim.SGD, lr=0.1, flatten=True)
    assert [p.data_ptr() for p in model.parameters()] == pointers
    del others


def _train(model, share_of_steps):
    torch.set_num_threads(1)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.1)
    for step in range(share_of_steps):
        optimizer.step(oracles.losses_of(model), *oracles.batch(seed=step))


def test_another_process_sees_the_updates_of_a_shared_model():
    model = oracles.mlp().share_memory()
    alone = copy.deepcopy(model)
    process = mp.get_context("fork").Process(target=_train, args=(model, 2))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    _train(alone, 2)
    assert oracles.same_bits(oracles.weights_of(model), oracles.weights_of(alone))
