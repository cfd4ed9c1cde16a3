"""Every public function and class begins with an example, and the examples run."""

import doctest
import inspect
from importlib import import_module

import pytest
import torch
from torch import nn

import esam_kernels
from esam_kernels import ESAM, cross_entropy

MODULES = ("esam_kernels", "esam_kernels.diagnostics", "esam_kernels.schedules")
# What a function returns, and the base of the schedules: shown by what makes them.
WITHOUT = {
    *("GradientCosine", "Linearity", "LossLandscape", "RankingAgreement", "Sharpness", "SplitLosses", "TopEigenvalue"),
    "Schedule",
}


def public():
    found = {}
    for module in map(import_module, MODULES):
        for name in module.__all__:
            value = getattr(module, name)
            if name not in WITHOUT and not inspect.ismodule(value):
                found[f"{module.__name__}.{name}"] = value
    return found


PUBLIC = public()


@pytest.fixture
def names():
    """What the examples may use."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))
    loader = [(torch.randn(16, 8), torch.randint(4, (16,))) for _ in range(2)]
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)

    def losses(inputs, targets):
        return cross_entropy(model(inputs), targets)

    everything = {name: getattr(esam_kernels, name) for name in esam_kernels.__all__}
    given = {"torch": torch, "model": model, "loader": loader, "optimizer": optimizer, "losses": losses, "steps": 20}
    return everything | given | {"inputs": loader[0][0], "targets": loader[0][1], "new_layer": nn.Linear(3, 3)}


@pytest.mark.parametrize("name", PUBLIC)
def test_the_examples_of_a_docstring_run(name, names):
    value = PUBLIC[name]
    module = import_module(getattr(value, "__module__", None) or name.rpartition(".")[0])
    names |= {key: found for key, found in vars(module).items() if key in (value.__name__, *esam_kernels.__all__)}
    (test, *_) = doctest.DocTestFinder(recurse=False).find(value, name, module=module, globs=names)
    assert test.examples, f"{name} has no example"
    said = []
    assert doctest.DocTestRunner().run(test, out=said.append).failed == 0, "".join(said)


def test_the_examples_of_the_phases_are_a_step_from_top_to_bottom(names):
    """One namespace for all: what one phase defines, the next one uses."""
    for phase in ("relative_cost", "add_param_group", "backward", "first_step", "select", "second_step", "step"):
        value = inspect.getattr_static(ESAM, phase)
        text = inspect.getdoc(value)
        test = doctest.DocTestParser().get_doctest(text, names, phase, None, None)
        assert test.examples, f"{phase} has no example"
        said = []
        assert doctest.DocTestRunner().run(test, out=said.append, clear_globs=False).failed == 0, "".join(said)
        names = test.globs
    assert names["optimizer"].state_dict()["esam"]["step"] == 2


@pytest.mark.parametrize("module", [esam_kernels.schedules, esam_kernels.ops])
def test_the_page_of_a_module_begins_with_an_example_that_runs(module, names):
    names |= vars(module) if module is esam_kernels.schedules else {}
    test = doctest.DocTestParser().get_doctest(module.__doc__, names, module.__name__, None, None)
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0
