"""The networks of the examples."""

import pytest
import torch
from models import build_model


def num_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("classes", "expected"), [(10, 11_173_962), (100, 11_220_132)])
def test_resnet18_has_the_known_number_of_parameters(classes, expected):
    assert num_parameters(build_model("resnet18", 3, 32, classes)) == expected


@pytest.mark.parametrize(("name", "channels", "size"), [("cnn", 1, 8), ("cnn", 3, 32), ("resnet18", 3, 32)])
def test_models_return_logits(name, channels, size):
    assert build_model(name, channels, size, 7)(torch.rand(2, channels, size, size)).shape == (2, 7)
