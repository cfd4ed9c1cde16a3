"""Flattened storage: values, identities, formats and ties kept; 64-byte alignment; moves noticed."""

import gc
import itertools
import pickle

import oracles
import pytest
import torch
from torch import nn

from esam_kernels import ESAM, SAM
from esam_kernels.perturbation.flat_buffer import FlatBuffers, is_dense, owners


def make_params():
    return [
        nn.Parameter(torch.randn(3)),
        nn.Parameter(torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last)),
        nn.Parameter(torch.randn(5, 4).t()),
        nn.Parameter(torch.randn(7, dtype=torch.float64)),
        nn.Parameter(torch.randn(5).to(torch.bfloat16)),
        nn.Parameter(torch.tensor(1.5)),
        nn.Parameter(torch.empty(0, 2)),
        nn.Parameter(torch.randn(6)),
    ]


def is_inside(param, flat):
    buffer = flat.buffers[param.dtype]
    return buffer.data_ptr() <= param.data_ptr() <= buffer.data_ptr() + buffer.nbytes - param.nbytes


def test_flattening_keeps_values_shapes_strides_and_identity():
    params = make_params()
    expected = [(p.detach().clone(), p.shape, p.stride(), p.dtype, p.requires_grad, id(p)) for p in params]
    FlatBuffers(params)
    for param, (values, shape, stride, dtype, requires_grad, identity) in zip(params, expected):
        assert torch.equal(param, values)
        assert (param.shape, param.stride(), param.dtype, param.requires_grad) == (shape, stride, dtype, requires_grad)
        assert id(param) == identity
        assert param.is_leaf


def test_parameters_lie_side_by_side_in_one_buffer_a_dtype_each_on_a_64_byte_boundary():
    params = [p for p in make_params() if p.numel()]
    flat = FlatBuffers(params)
    assert set(flat.buffers) == {torch.float32, torch.float64, torch.bfloat16}
    for param in params:
        assert param.data_ptr() % 64 == 0
        assert is_inside(param, flat)
    spans = sorted((p.data_ptr(), p.data_ptr() + p.nbytes) for p in params)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert flat.buffers[torch.float32].numel() == 16 + 32 + 32 + 16 + 16


def test_parameters_on_another_device_than_the_current_one_are_flattened(monkeypatch):
    """torch refuses to export such a tensor, a parameter on cuda:1 in a program that never sets its device."""

    def refused(tensor, **_):
        raise BufferError("Can't export tensors on a different CUDA device index. Expected: 1. Current device: 0.")

    monkeypatch.setattr(torch.Tensor, "__dlpack__", refused)
    params = [nn.Parameter(torch.arange(5.0)), nn.Parameter(torch.ones(3))]
    buffers = FlatBuffers(params)
    assert [param.tolist() for param in params] == [[0.0, 1.0, 2.0, 3.0, 4.0], [1.0] * 3]
    assert buffers.buffers[torch.float32].sum() == 13.0


def test_ties_are_kept():
    weight = nn.Parameter(torch.randn(3, 2))
    params = [nn.Parameter(torch.randn(3)), weight, nn.Parameter(weight.data), nn.Parameter(weight.data.t())]
    FlatBuffers(params)
    with torch.no_grad():
        weight[2, 1] = 42.0
    assert params[2][2, 1] == 42.0
    assert params[3][1, 2] == 42.0


def test_refresh_notices_parameters_that_were_moved():
    params = make_params()
    flat = FlatBuffers(params)
    assert not flat.refresh()
    params[0].data = torch.full((3,), 9.0)
    assert flat.refresh()
    assert not flat.refresh()
    assert torch.equal(params[0], torch.full((3,), 9.0))
    assert is_inside(params[0], flat)


@pytest.mark.parametrize(
    ("tensor", "dense"),
    [
        (torch.empty(3, 4), True),
        (torch.empty(3, 4).t(), True),
        (torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last), True),
        (torch.empty(3, 1, 4).expand(3, 1, 4), True),
        (torch.empty(3, 4)[:, ::2], False),
        (torch.empty(3, 4)[:, :2], False),
        (torch.empty(1).expand(3), False),
        (torch.empty(()), True),
        (torch.empty(0, 3), True),
        (torch.empty(3, 0), True),
        (torch.empty(2, 0, 3), True),
    ],
)
def test_is_dense(tensor, dense):
    assert is_dense(tensor) is dense


@pytest.mark.parametrize("flatten", [False, True])
def test_a_weight_without_elements_changes_nothing(flatten):
    """Of nn.Linear(0, 3), for one: (3, 0)."""

    def train(extra):
        model = oracles.mlp()
        optimizer = ESAM([*model.parameters(), *extra], torch.optim.SGD, lr=0.1, momentum=0.9, flatten=flatten)
        for step in range(3):
            optimizer.step(oracles.losses_of(model), *oracles.batch(seed=step))
        return oracles.weights_of(model)

    assert oracles.same_bits(train([nn.Parameter(torch.empty(3, 0))]), train([]))


def test_parameters_that_share_a_part_of_their_memory_are_refused():
    whole = torch.randn(8)
    with pytest.raises(ValueError, match=r"parameters 0 \(shape \(6,\)\) and 1 \(shape \(4,\)\) share a part"):
        owners([whole[:6], whole[4:]])
    with pytest.raises(ValueError, match="share a part"):
        owners([whole[:6], whole[:3]])
    with pytest.raises(ValueError, match="share a part"):
        SAM([nn.Parameter(whole[:6]), nn.Parameter(whole[4:])], torch.optim.SGD, lr=0.1)
    assert owners([whole[:4], whole[4:], whole[:4]]) == [0, 1, 0]


def test_flatten_false_leaves_the_memory_where_it_is():
    model = oracles.mlp()
    pointers = [p.data_ptr() for p in model.parameters()]
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, flatten=False)
    optimizer.step(oracles.losses_of(model), *oracles.batch())
    assert [p.data_ptr() for p in model.parameters()] == pointers


class Marked(nn.Parameter):
    pass


def test_subclasses_of_tensors_are_not_flattened_unless_asked_for_and_then_refused():
    params = [Marked(torch.randn(3)), nn.Parameter(torch.randn(2))]
    optimizer = SAM(params, torch.optim.SGD, lr=0.1)
    assert not optimizer._perturbation.is_flattened
    with pytest.raises(ValueError, match="flatten=True is not possible: parameter 0 is a Marked"):
        SAM(params, torch.optim.SGD, lr=0.1, flatten=True)


@pytest.mark.parametrize("flatten", [True, False])
def test_training_does_not_depend_on_flattening(flatten):
    weights = []
    for choice in (None, flatten):
        model = oracles.mlp()
        optimizer = SAM(model.parameters(), torch.optim.AdamW, lr=0.01, rho=0.5, flatten=choice)
        for step in range(5):
            optimizer.step(oracles.losses_of(model), *oracles.batch(seed=step))
        weights.append(oracles.weights_of(model))
    assert oracles.same_bits(*weights)


def large_model():
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(12)])
    return model, sum(p.nbytes for p in model.parameters())


def test_a_pickled_model_holds_every_weight_once():
    """Tensors that share a storage would each take the whole of it along."""
    model, size = large_model()
    SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    pickled = pickle.dumps(model)
    assert len(pickled) < 1.1 * size
    assert oracles.same_bits(oracles.weights_of(pickle.loads(pickled)), oracles.weights_of(model))


def test_a_pickled_optimizer_holds_every_weight_once():
    model, size = large_model()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    assert len(pickle.dumps((model, optimizer))) < 1.1 * size


def test_a_saved_layer_holds_the_layers_weights_alone(tmp_path):
    model, size = large_model()
    SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    torch.save(model[3].state_dict(), tmp_path / "layer.pt")
    assert (tmp_path / "layer.pt").stat().st_size < 1.2 * size / 12
    assert torch.equal(torch.load(tmp_path / "layer.pt")["weight"], model[3].weight)


def test_the_weights_live_on_when_the_optimizer_is_gone():
    model, _ = large_model()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    expected = oracles.weights_of(model)
    del optimizer
    gc.collect()
    torch.full((2**20,), 7.0)
    assert oracles.same_bits(expected, oracles.weights_of(model))


def test_ties_survive_torch_save(tmp_path):
    weight = nn.Parameter(torch.randn(3, 2))
    params = [weight, nn.Parameter(weight.data)]
    SAM(params, torch.optim.SGD, lr=0.1)
    torch.save([p.data for p in params], tmp_path / "tied.pt")
    first, second = torch.load(tmp_path / "tied.pt")
    assert first.data_ptr() == second.data_ptr()


def test_weights_that_are_flattened_in_inference_mode_can_be_trained():
    """The optimizer is built there, or a checkpoint is written in an evaluation after a layer was replaced."""
    inside, outside = oracles.mlp(), oracles.mlp()
    with torch.inference_mode():
        optimizer = SAM(inside.parameters(), torch.optim.SGD, lr=0.1)
    other = SAM(outside.parameters(), torch.optim.SGD, lr=0.1)
    for seed in range(2):
        for model, its in ((inside, optimizer), (outside, other)):
            torch.manual_seed(seed)
            model[4] = nn.Linear(5, oracles.CLASSES)
            its.param_groups[0]["params"][4:] = model[4].parameters()
        with torch.inference_mode():
            optimizer.state_dict()
        assert not any(param.is_inference() for param in inside.parameters())
        for model, its in ((inside, optimizer), (outside, other)):
            its.step(oracles.losses_of(model), *oracles.batch(seed=seed))
    assert oracles.same_bits(oracles.weights_of(inside), oracles.weights_of(outside))
