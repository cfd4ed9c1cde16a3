"""The parameter lists have the sizes that the networks' authors state."""

from __future__ import annotations

import pytest

from benchmarks import cases
from examples.models import build_model


@pytest.mark.parametrize(
    ("name", "millions", "digits"),
    [
        ("ResNet-18", 11.17, 2),  # 32x32 form, 10 classes
        ("WRN-28-10", 36.5, 1),  # Zagoruyko and Komodakis, table 4
        ("PyramidNet-110", 28.5, 1),  # Han et al., table 4, alpha 270
        ("ResNet-50", 25.56, 2),  # torchvision
        ("ViT-S/16", 22.05, 2),  # timm
    ],
)
def test_networks_have_the_published_number_of_parameters(name, millions, digits):
    assert round(cases.numel(cases.PARAMETERS[name]()) / 1e6, digits) == millions


@pytest.mark.parametrize(("name", "tensors"), [("ResNet-18", 62), ("ResNet-50", 161)])
def test_networks_have_the_known_number_of_tensors(name, tensors):
    assert len(cases.PARAMETERS[name]()) == tensors


def test_resnet18_is_the_network_that_the_step_suite_trains():
    model = build_model("resnet18", 3, 32, 10)
    assert sorted(tuple(p.shape) for p in model.parameters()) == sorted(cases.resnet18())


def test_cases_are_those_of_the_design():
    assert cases.LOGITS == [(128, 10), (512, 1000), (4096, 32000), (64, 131072)]
    assert cases.IMAGES == [(128, 3, 32, 32), (512, 3, 224, 224)]
    assert cases.numel(cases.GPU_PARAMETERS["flat billion"]()) == 10**9
    assert cases.small_tensors() == [(100,)] * 10
