"""What a backend has to declare, and that one which does not is refused when it is loaded."""

from __future__ import annotations

import inspect
from types import ModuleType

import pytest

from esam_kernels import backends, ops
from esam_kernels.backends import protocol, reference


def copy_of_reference(**changes):
    module = ModuleType("esam_kernels.backends.another")
    vars(module).update({name: value for name, value in vars(reference).items() if not name.startswith("__")})
    vars(module).update(changes)
    return module


@pytest.mark.parametrize("name", backends.NAMES)
def test_every_backend_declares_all(name):
    backend = backends.load(name)
    assert protocol.check(backend) is backend
    assert backend.FUSES_UPDATES is (name != "reference")
    assert (backend.losses_select_gather is not None) is (name == "cuda")


@pytest.mark.parametrize("missing", ["FUSES_UPDATES", "direct", "losses_select_gather", "restore_sgd_", "unavailable"])
def test_a_backend_that_leaves_something_out_is_refused(missing):
    module = copy_of_reference()
    delattr(module, missing)
    with pytest.raises(TypeError, match=f"another does not declare {missing}"):
        protocol.check(module)


def test_a_backend_that_declares_something_else_is_refused():
    with pytest.raises(TypeError, match=r"FUSES_UPDATES of the backend .*another must be True or False, got 'yes'"):
        protocol.check(copy_of_reference(FUSES_UPDATES="yes"))
    with pytest.raises(TypeError, match=r"gather of the backend .*another must be a function, got None"):
        protocol.check(copy_of_reference(gather=None))


@pytest.mark.parametrize("name", ["reference", "native", "cuda"])
def test_operators_take_the_arguments_that_the_protocol_lists(name):
    backend = backends.load(name)
    for operator in protocol.OPERATORS:
        listed = [p for p in inspect.signature(getattr(protocol.Backend, operator)).parameters if p != "self"]
        assert list(inspect.signature(getattr(backend, operator)).parameters) == listed, operator


def test_the_protocol_lists_the_operators_of_the_reference():
    of_reference = {name for name in ops.__all__ if name in vars(reference)}
    assert set(protocol.OPERATORS) == of_reference - {"NUM_PARTIALS"}
