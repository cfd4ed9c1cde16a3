"""The questions about lists of tensors get the same answers in C++ and in Python."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esam_kernels import tensor_lists
from esam_kernels.backends import native


def params():
    frozen = nn.Parameter(torch.ones(4), requires_grad=False)
    whole = nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False)
    return [nn.Parameter(torch.ones(2, 3)), frozen, whole, nn.Parameter(torch.ones(5, dtype=torch.bfloat16))]


def test_trained_leaves_out_the_frozen_and_the_whole_numbers():
    assert native.extension.trained(params()) == tensor_lists._trained(params()) == [0, 3]


def test_addresses_are_where_the_memory_begins():
    tensors = [*params(), torch.arange(6.0)[2:], torch.empty(0)]
    assert native.extension.addresses(tensors) == tensor_lists._addresses(tensors)


NAMES = ("alike", "none", "another shape", "transposed", "empty", "another dtype", "requires grad", "one too many")


@pytest.mark.parametrize("name", NAMES)
def test_only_what_is_plainly_alike_is_said_to_be(name):
    weights = [torch.ones(2, 3), torch.ones(4, 4)]
    grads = {
        "alike": [torch.ones(2, 3), torch.ones(4, 4)],
        "none": [torch.ones(2, 3), None],
        "another shape": [torch.ones(2, 3), torch.ones(16)],
        "transposed": [torch.ones(2, 3), torch.ones(4, 4).t()],
        "empty": [torch.ones(2, 3), torch.ones(0)],
        "another dtype": [torch.ones(2, 3), torch.ones(4, 4, dtype=torch.float64)],
        "requires grad": [torch.ones(2, 3), torch.ones(4, 4, requires_grad=True)],
        "one too many": [torch.ones(2, 3), torch.ones(4, 4), torch.ones(1)],
    }[name]
    if name == "empty":
        weights[1] = torch.ones(0)
    for function in (native.extension.are_plainly_alike, tensor_lists._are_plainly_alike):
        assert function(grads, weights) is (name == "alike")


def test_tensors_are_parallel_where_all_have_their_memory():
    def freed():
        tensor = torch.ones(2, 3)
        tensor.untyped_storage().resize_(20)
        return tensor

    empty, whole = torch.ones(0), torch.ones(2, 3)
    for function in (native.extension.are_parallel, tensor_lists._are_parallel):
        assert function([whole, empty], [whole, empty])
        assert not function([whole], [whole.t()])
        assert not function([freed()], [whole])
        assert not function([whole], [freed()])


class Marked(torch.Tensor):
    """A subclass: what it means to an operator is torch's dispatcher's business."""


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        (1, True),
        (1.5, True),
        (True, True),
        (None, True),
        ([], True),
        ([1, 2], True),
        (torch.ones(2), True),
        (nn.Parameter(torch.ones(2)), True),
        ([torch.ones(2), nn.Parameter(torch.ones(2))], True),
        ((torch.ones(2),), False),
        ("text", False),
        (torch.ones(2).as_subclass(Marked), False),
        ([torch.ones(2), torch.ones(2).as_subclass(Marked)], False),
        (torch.ones(2, dtype=torch.complex64).conj(), False),
        ([torch.ones(2), torch.ones(2, dtype=torch.complex64).conj().imag], False),
    ],
)
def test_only_what_the_dispatcher_would_not_change_is_plain(argument, expected):
    for function in (native.extension.are_plain, tensor_lists._are_plain):
        assert function((1, argument, [2.0])) is expected


def test_a_number_beyond_the_list_is_refused():
    for i in (-1, 1, 1 << 40):
        with pytest.raises(IndexError, match=r"there is no such tensor in the list: number -?\d+ of \d"):
            native.extension.holders([torch.ones(2)], i)
