"""The parameters of all groups as one list, with what a step has to know of each: group, ties, place, number."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from esam_kernels import distributed
from esam_kernels.backends import resolve
from esam_kernels.perturbation.flat_buffer import (
    FlatBuffers,
    is_dense,
    owners,
    why_not_all_flattenable,
    why_not_flattenable,
)
from esam_kernels.tensor_lists import addresses, are_same, trained

# Parameters begin at whole Philox counters.
_OFFSET_STEP = 4


class Parameters:
    """The parameters of these groups, moved into flat buffers where that is wanted.

    Args:
        param_groups: as a torch optimizer holds them.
        backend: the name of the backend that has to serve them; "" for the default of their device.
        flatten: whether they are moved into flat buffers; None: where that is possible.

    Raises:
        ValueError: no parameters, one that is there twice, parameters that are complex, on the meta device, not dense
            or partly shared, or that cannot be flattened though ``flatten`` is True. Nothing is moved then.
        RuntimeError: the backend that was asked for is not available.
    """

    def __init__(self, param_groups: Sequence[dict[str, Any]], backend: str, flatten: bool | None) -> None:
        params = listed(param_groups)
        check(params, backend)
        if not params:
            raise ValueError("the parameter groups hold no parameters")
        if len(set(map(id, params))) != len(params):
            raise ValueError("a parameter is in the groups twice: it would be updated twice")
        self.tensors: list[Tensor] = params
        self.is_sharded = any(distributed.is_sharded(param) for param in params)
        self.buffers: FlatBuffers | None = None
        self._find_ties()
        reason = why_not_flattenable(params)
        if flatten and (why := why_not_all_flattenable(params)) is not None:
            raise ValueError(f"flatten=True is not possible: {why}")
        self.groups = [number for number, group in enumerate(param_groups) for _ in group["params"]]
        self._sizes = [len(group["params"]) for group in param_groups]
        self.offsets = _element_offsets(params)
        self.buffers = FlatBuffers(params) if flatten is not False and reason is None else None

    @property
    def devices(self) -> set[torch.device]:
        """Where the parameters lie now: a model may be moved after the optimizer was built."""
        return {param.device for param in self.tensors}

    def are_those_of(self, param_groups: Sequence[dict[str, Any]]) -> bool:
        """Whether the groups still hold these parameters, in the same order and groups."""
        if len(param_groups) == 1 and type(param_groups[0]["params"]) is list:
            return are_same(param_groups[0]["params"], self.tensors)
        lists = [group["params"] for group in param_groups]
        held = itertools.chain.from_iterable(lists)
        return list(map(len, lists)) == self._sizes and all(map(operator.is_, held, self.tensors))

    def refresh(self) -> None:
        """Flatten again if somebody has moved a parameter out of its buffer, and find the ties anew."""
        if self.is_sharded:
            return
        has_moved = addresses(self.tensors) != self._addresses if self.buffers is None else self.buffers.refresh()
        if has_moved:
            self._find_ties()
            self.offsets = _element_offsets(self.tensors)

    def trained(self) -> list[int]:
        """The numbers of the parameters that train."""
        return trained(self.tensors)

    def _find_ties(self) -> None:
        self.tied_to = owners([distributed.local_part(param) for param in self.tensors])
        self.has_ties = self.tied_to != list(range(len(self.tensors)))
        # Flat buffers know their own.
        self._addresses = [] if self.is_sharded or self.buffers is not None else addresses(self.tensors)


def listed(param_groups: Sequence[dict[str, Any]]) -> list[Tensor]:
    """The parameters of all groups, in order."""
    if len(param_groups) == 1:
        return list(param_groups[0]["params"])
    return [param for group in param_groups for param in group["params"]]


def check(params: Sequence[Tensor], backend: str) -> None:
    """Refuse parameters that cannot be perturbed.

    Raises:
        ValueError: lazy ones without a shape, complex ones, ones on the meta device, or ones that are not dense.
        RuntimeError: the backend that was asked for is not available.
    """
    for i, param in enumerate(params):
        if is_lazy(param):
            raise ValueError(f"parameter {i} is lazy and has no shape yet: run the model on a batch first")
        if param.is_complex():
            raise ValueError(f"parameter {i} is complex ({param.dtype}): only real parameters can be perturbed")
        if param.is_meta:
            raise ValueError(f"parameter {i} is on the meta device, without values: give the model memory first")
        if param.layout is not torch.strided or not is_dense(param):
            raise ValueError(f"parameter {i} (shape {tuple(param.shape)}) is not dense: make it contiguous")
        resolve(backend, param.device)


def _element_offsets(params: Sequence[Tensor]) -> list[int]:
    """The number of each parameter's first weight in the whole model."""
    offsets, position = [], 0
    for param in params:
        offsets.append(position + distributed.first_element(param))
        position += -(-param.numel() // _OFFSET_STEP) * _OFFSET_STEP
    return offsets
