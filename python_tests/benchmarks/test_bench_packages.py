"""The suite that measures installed packages: what is not installed, or fails, costs its own row alone."""

import dataclasses
import sys
import types

import pytest
import torch

from benchmarks.cases import TINY
from benchmarks.suites import Context, packages, step
from esam_kernels import SAM

CONTEXT = Context(torch.device("cpu"), TINY)


pytestmark = pytest.mark.usefixtures("one_thread")


class TwoPasses(SAM):
    """Stands in for an installed optimizer with two passes."""

    def __init__(self, params, base_optimizer, *, foreach, **options):
        super().__init__(params, base_optimizer, **options)


def measured(monkeypatch, found):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: found.get(name))
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    return [{row["implementation"]: row for row in case.run(0.0)} for case in packages.cases(CONTEXT)]


def test_without_the_packages_the_rest_is_measured(monkeypatch):
    part, whole = measured(monkeypatch, {})
    assert part.keys() == {"ours", "foreach", "as released", "SGD alone"}
    assert whole.keys() == part.keys()
    assert not {"failed"} & (part["ours"].keys() | whole["ours"].keys())
    assert all(row["p50"] > 0.0 for row in (*part.values(), *whole.values()))


def test_a_package_that_fails_costs_its_own_row(monkeypatch):
    def refuses(*_, **__):
        raise TypeError("another version")

    works = types.SimpleNamespace(SAM=TwoPasses)
    broken = types.SimpleNamespace(SGD=refuses, SAMWrapper=refuses)
    for rows in measured(monkeypatch, {"pytorch_optimizer": works, "heavyball": broken}):
        assert {"ours", "pytorch_optimizer", "pytorch_optimizer, foreach", "SGD alone"} <= rows.keys()
        assert "HeavyBall" not in rows
        assert "another version" in rows["ours"]["failed"]["HeavyBall"]


@pytest.mark.parametrize(("inductor", "is_measured"), [("with", True), ("without", False)])
def test_the_compiled_peer_is_measured_unless_it_is_left_out(monkeypatch, inductor, is_measured):
    monkeypatch.setattr(packages.peers, "compiled", lambda function: function)
    monkeypatch.setattr(packages, "installed", list)
    context = dataclasses.replace(CONTEXT, sizes=dataclasses.replace(TINY, compiles=True), inductor=inductor)
    part, whole = ({row["implementation"]: row for row in case.run(0.0)} for case in packages.cases(context))
    for rows in (part, whole):
        assert ("compile" in rows) == is_measured
        assert not is_measured or rows["compile"]["ratio"] > 0.0


@pytest.mark.parametrize("name", ["foreach", "compile", "as released"])
def test_a_whole_step_of_each_way_is_that_of_ours(monkeypatch, name):
    monkeypatch.setattr(packages.peers, "compiled", lambda function: function)
    models, make = [], packages.build_model
    for module in (packages, step):
        monkeypatch.setattr(module, "build_model", lambda *sizes: models.append(make(*sizes)) or models[-1])
    for each in ("ours", name):
        [run] = packages.whole_step(CONTEXT, each).runs
        run()
        run()
    ours, peers = (list(model.parameters()) for model in models)
    torch.testing.assert_close(peers, ours, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("name", ["ours", "as released", "foreach"])
def test_what_is_built_takes_sams_step(name):
    """With the same gradient in both passes it is SGD's step: the weights are put back in between."""
    torch.manual_seed(0)
    start, grad = torch.randn(4, 3), torch.full((4, 3), 0.5)
    params, expected = [torch.nn.Parameter(start.clone())], [torch.nn.Parameter(start.clone())]
    expected[0].grad = grad.clone()
    packages.build("SGD alone", expected, None).step()
    optimizer = packages.build(name, params, None)
    params[0].grad = grad.clone()
    optimizer.first_step(zero_grad=True)
    assert not torch.equal(params[0], start)
    params[0].grad = grad.clone()
    optimizer.second_step(zero_grad=True)
    torch.testing.assert_close(params, expected, rtol=0.0, atol=1e-6)
