"""Checkpoints of a flattened model through safetensors."""

import oracles
import pytest
import torch
from torch import nn

from esam_kernels import SAM

pytest.importorskip("safetensors")
from safetensors.torch import load_file, load_model, save_file, save_model


def trained():
    model = oracles.noisy_mlp()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
    optimizer.step(oracles.losses_of(model), *oracles.batch())
    assert optimizer._perturbation.is_flattened
    return model


def test_save_file_of_a_flattened_model(tmp_path):
    model = trained()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == model.state_dict().keys()
    assert oracles.same_bits(list(loaded.values()), [model.state_dict()[name] for name in loaded])


def test_save_model_and_load_model_of_a_flattened_model(tmp_path):
    model = trained()
    save_model(model, str(tmp_path / "model.safetensors"))
    other = trained()
    nn.init.zeros_(other[0].weight)
    load_model(other, str(tmp_path / "model.safetensors"))
    assert oracles.same_bits(list(model.state_dict().values()), list(other.state_dict().values()))


def test_save_model_of_a_flattened_model_with_tied_weights(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    save_model(model, str(tmp_path / "model.safetensors"))
    weight = model[0].weight.detach().clone()
    nn.init.zeros_(model[0].weight)
    load_model(model, str(tmp_path / "model.safetensors"))
    assert torch.equal(model[1].weight, weight)
    assert model[1].weight is model[0].weight
