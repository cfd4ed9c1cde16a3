"""Training on many processes, with DistributedDataParallel or FSDP2 (``fully_shard``): what a step does differently.

With DistributedDataParallel the first pass is not synchronised: each rank (process) perturbs for its own batch. With
FSDP2 the parameters are DTensors: each rank perturbs and restores its own shard in place, and only the norm needs the
others. ``norm_partials``, ``perturb_`` and ``restore_`` are then the operators of :mod:`esam_kernels.ops`, with the
same arguments, for lists that hold DTensors. All that knows of process groups and DTensors is here.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from esam_kernels import ops
from esam_kernels.backends.reference import storage_order

# Of Philox4x32: kernels begin where a counter does.
_WORDS_PER_COUNTER = 4

# -- tensors ---------------------------------------------------------------------------------------------------------


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor, of which each rank holds a part."""
    if type(tensor) in (Tensor, nn.Parameter) or not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


@torch.no_grad()
def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of the tensor, in the same memory. A plain tensor is returned as it is."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


def _shard_dims(param: Any) -> tuple[int, int] | None:
    """(dimension of the mesh, dimension of the tensor) of the one sharding there is, if the rest is replication."""
    from torch.distributed.tensor import Replicate, Shard

    shards = [(i, placement) for i, placement in enumerate(param.placements) if not isinstance(placement, Replicate)]
    if len(shards) != 1 or type(shards[0][1]) is not Shard:
        return None
    return shards[0][0], shards[0][1].dim


# -- models ------------------------------------------------------------------------------------------------------------


class Parallelism:
    """How a model is spread over processes, and what follows for a step.

    Args:
        model: the model as it is trained: with its DistributedDataParallel, after ``fully_shard``. None: not spread.
    """

    def __init__(self, model: nn.Module | None) -> None:
        modules = [] if model is None else list(model.modules())
        self._data_parallel = _of_kind(modules, "torch.nn.parallel", "DistributedDataParallel")
        self._fully_sharded = _of_kind(modules, "torch.distributed.fsdp", "FSDPModule")
        self._flat_sharded = _of_kind(modules, "torch.distributed.fsdp", "FullyShardedDataParallel")
        self._is_given = model is not None
        #: Whether a forward needs the other ranks, so that all have to run equally many.
        self.forward_communicates = bool(self._fully_sharded or _of_kind(modules, "torch.nn", "SyncBatchNorm"))

    def check(self, params: Sequence[Tensor]) -> None:
        """Refuse what would silently be wrong.

        Raises:
            ValueError: FSDP1; a DistributedDataParallel with ``static_graph=True``; DTensors that ``fully_shard`` did
                not make (tensor parallelism), on several meshes, or without their model.
        """
        if self._flat_sharded or any(getattr(param, "_fsdp_flattened", False) for param in params):
            raise ValueError("FullyShardedDataParallel (FSDP1) is not supported: use fully_shard (FSDP2)")
        if any(ddp.static_graph for ddp in self._data_parallel):
            raise ValueError(
                "DistributedDataParallel with static_graph=True is not supported: the two passes of a step have "
                "different graphs. Leave static_graph out"
            )
        sharded: dict[int, Any] = {i: param for i, param in enumerate(params) if is_sharded(param)}
        if sharded and not self._is_given:
            raise ValueError("the model is sharded (its parameters are DTensors): build the optimizer with model=model")
        managed = {id(param) for module in self._fully_sharded for param in module.parameters()}
        for i, param in sharded.items():
            if id(param) not in managed or _shard_dims(param) is None:
                raise ValueError(
                    f"parameter {i} is a DTensor with placements {param.placements} on a mesh of shape "
                    f"{tuple(param.device_mesh.shape)}, which is not what fully_shard alone makes: tensor parallelism "
                    "is not supported"
                )
        if len({(param.device_mesh, _shard_dims(param)) for param in sharded.values()}) > 1:
            raise ValueError("the parameters are sharded over several device meshes: only one is supported")

    @contextlib.contextmanager
    def without_synchronization(self) -> Iterator[None]:
        """Inside, forwards and backwards leave each rank its own gradients (``no_sync``; not with FSDP2)."""
        with contextlib.ExitStack() as stack:
            for ddp in self._data_parallel:
                stack.enter_context(ddp.no_sync())
            yield

    @contextlib.contextmanager
    def unreduced(self) -> Iterator[None]:
        """Around a backward whose forward ran inside ``no_sync``.

        DistributedDataParallel decides in its forwards whether the next backward, of whichever forward, is reduced.

        Raises:
            RuntimeError: it was reduced all the same.
        """
        before = [ddp.reducer.get_backward_stats() for ddp in self._data_parallel]
        yield
        if before != [ddp.reducer.get_backward_stats() for ddp in self._data_parallel]:
            raise RuntimeError(
                "DistributedDataParallel has averaged gradients that each rank keeps to itself, those of the first "
                "pass: it was waiting for the backward of an earlier forward. Run a forward that no backward follows "
                "under torch.no_grad(), and the forward of the first pass inside model.no_sync()"
            )

    @property
    def is_spread(self) -> bool:
        """Whether the model is wrapped in DistributedDataParallel, or sharded."""
        return self.spread_by is not None

    @property
    def spread_by(self) -> str | None:
        """What spreads the model over processes, by torch's name; None if nothing does."""
        if self._data_parallel:
            return "DistributedDataParallel"
        return "fully_shard" if self._fully_sharded else None

    @property
    def synchronizes(self) -> bool:
        """Whether DistributedDataParallel would reduce the gradients of a backward now."""
        return any(ddp.require_backward_grad_sync for ddp in self._data_parallel)

    @property
    def process_group(self) -> Any:
        """The process group of DistributedDataParallel; without one, the default group.

        Raises:
            RuntimeError: there is none.
        """
        for ddp in self._data_parallel:
            return ddp.process_group
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("sync_perturbation needs a process group: call init_process_group first")
        return dist.group.WORLD

    def reshard(self) -> None:
        """Free the gathered parameters, so that the next forward sees the shards as they are then.

        A forward under ``no_grad`` leaves those of the root module behind.
        """
        for module in self._fully_sharded:
            module.reshard()

    def leave_forward(self) -> None:
        """Make :meth:`reshard` possible after an exception inside a forward.

        FSDP2 believes itself in that forward still, where modules are resharded only if they are after every forward.
        From here on all are.
        """
        for module in self._fully_sharded:
            module.set_reshard_after_forward(True, recurse=False)


def _of_kind(modules: Sequence[nn.Module], package: str, name: str) -> list[Any]:
    """The modules of a class that may not have been imported: then there are none."""
    kind = getattr(sys.modules.get(package), name, None)
    return [] if kind is None else [module for module in modules if isinstance(module, kind)]


# -- DistributedDataParallel: one perturbation for all ranks -----------------------------------------------------------


def check_same_seed(seed: int, device: torch.device, group: Any) -> None:
    """Compare the seed with that of the other ranks of ``group``.

    Raises:
        ValueError: they differ, so that the ranks would draw differently.
    """
    seeds = torch.tensor([seed, -seed], device=device)
    dist.all_reduce(seeds, dist.ReduceOp.MAX, group=group)
    highest, lowest = seeds.tolist()
    if highest != -lowest:
        raise ValueError(f"sync_perturbation needs the same seed on every rank, got {-lowest} to {highest}")


def average_gradients(params: Iterable[Tensor], group: Any) -> None:
    """Replace the gradients of ``params`` by their mean over the ranks: one reduction for each dtype.

    A rank without a gradient for a parameter counts as zero and is given the mean of the others. DTensors are left
    out: their gradients are means already.
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for param in params:
        if not is_sharded(param):
            kinds.setdefault((param.device, param.dtype), []).append(param)
    for members in kinds.values():
        for param in members:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
        grads = [param.grad for param in members if param.grad is not None]
        flat = torch.cat([grad.reshape(-1) for grad in grads]).div_(dist.get_world_size(group))
        dist.all_reduce(flat, group=group)
        means = [mean.view_as(grad) for mean, grad in zip(flat.split([grad.numel() for grad in grads]), grads)]
        torch._foreach_copy_(grads, means)


# -- FSDP2: the operators on shards ------------------------------------------------------------------------------------


def first_element(param: Tensor) -> int:
    """The number, within the whole parameter, of the first weight that this rank holds.

    A parameter that is sharded along another dimension than its first lies interleaved: its weights are numbered rank
    by rank then.
    """
    dims = _shard_dims(param) if is_sharded(param) else None
    if dims is None or param.numel() == 0:
        return 0
    rank: int = param.device_mesh.get_local_rank(dims[0])  # type: ignore[attr-defined]
    if dims[1] != 0:
        return rank * local_part(param).numel()
    rows, ranks = param.shape[0], param.device_mesh.size(dims[0])  # type: ignore[attr-defined]
    return min(rank * -(-rows // ranks), rows) * (param.numel() // rows)


def norm_partials(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    groups: Sequence[int],
    adaptive: Sequence[bool],
    eta: float,
    *,
    backend: str = "",
) -> Tensor:
    """Partial sums of ||T(w) g||^2 over all shards on all ranks, and over the plain tensors once: one reduction."""
    total = torch.zeros(ops.NUM_PARTIALS, dtype=torch.float64, device=grads[0].device)
    for shards in (True, False):
        chosen = [j for j, param in enumerate(params) if is_sharded(param) is shards]
        filled = [j for j in chosen if local_part(params[j]).numel()]
        if filled:
            total += ops.norm_partials(
                [local_part(params[j]) for j in filled],
                [local_part(grads[j]) for j in filled],
                [groups[j] for j in filled],
                adaptive,
                eta,
                backend=backend,
            )
        if shards and chosen:
            total = _sum_over_ranks(total, params[chosen[0]])
    return total


def _sum_over_ranks(tensor: Tensor, param: Any) -> Tensor:
    """The sum of ``tensor`` over the ranks that share ``param``, on the device where their process group works."""
    mesh, dims = param.device_mesh, _shard_dims(param)
    assert dims is not None
    on_mesh = tensor.to(mesh.device_type)
    dist.all_reduce(on_mesh, group=mesh.get_group(dims[0]))
    return on_mesh.to(tensor.device)


def perturb_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    backups: Sequence[Tensor],
    groups: Sequence[int],
    offsets: Sequence[int],
    *arguments: Any,
    backend: str = "",
) -> None:
    """``ops.perturb_`` on what this rank holds. ``offsets`` may be any numbers: those of the shards' first weights."""
    filled = [j for j, param in enumerate(params) if local_part(param).numel()]
    aligned = [j for j in filled if offsets[j] % _WORDS_PER_COUNTER == 0]
    if aligned:
        ops.perturb_(
            [local_part(params[j]) for j in aligned],
            [local_part(grads[j]) for j in aligned],
            [local_part(backups[j]) for j in aligned],
            [groups[j] for j in aligned],
            [offsets[j] for j in aligned],
            *arguments,
            backend=backend,
        )
    between = [j for j in filled if offsets[j] % _WORDS_PER_COUNTER]
    if not between:
        return
    # These shards begin within a Philox counter: copies with zeros in front begin where it does.
    heads = [offsets[j] % _WORDS_PER_COUNTER for j in between]
    copies = [_with_zeros_in_front(local_part(params[j]), head) for j, head in zip(between, heads)]
    old = [_with_zeros_in_front(local_part(grads[j]), head) for j, head in zip(between, heads)]
    starts = [offsets[j] - head for j, head in zip(between, heads)]
    ops.perturb_(copies, old, [], [groups[j] for j in between], starts, *arguments, backend=backend)
    for j, head, new, before in zip(between, heads, copies, old):
        storage_order(local_part(backups[j])).copy_(before[head:])
        storage_order(local_part(params[j])).copy_(new[head:])


def _with_zeros_in_front(tensor: Tensor, zeros: int) -> Tensor:
    return nn.functional.pad(storage_order(tensor), (zeros, 0))


def restore_(params: Sequence[Tensor], backups: Sequence[Tensor], *, backend: str = "") -> None:
    """``ops.restore_`` on what this rank holds."""
    pairs = [(local_part(param), local_part(backup)) for param, backup in zip(params, backups)]
    pairs = [(param, backup) for param, backup in pairs if param.numel()]
    if pairs:
        ops.restore_([param for param, _ in pairs], [backup for _, backup in pairs], backend=backend)
