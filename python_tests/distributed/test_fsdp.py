"""FSDP2: the perturbation of sharded parameters against one process that holds them whole."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from training import (
    ADAMW,
    ADAPTIVE,
    ELEMENT,
    SGD,
    TENSOR,
    Scale,
    assert_same,
    batches,
    build_model,
    head_products,
    joined,
    losses_of,
    shard,
    train_alone,
    train_on_joined_batches,
    train_on_ranks,
    weights,
)

from esam_kernels import ESAM


@pytest.mark.parametrize("base", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("swp", [TENSOR, ELEMENT, ADAPTIVE], ids=["tensor", "element", "adaptive"])
def test_ten_steps_equal_one_process(base: dict[str, Any], swp: dict[str, Any]) -> None:
    got = run_ranks(train_on_ranks, "fsdp", {**base, **swp}, 10, {})
    assert_same(got, train_alone({**base, **swp}, 10))


@pytest.mark.parametrize("ascent", ["previous", "momentum"])
def test_one_pass_equals_one_process(ascent: str) -> None:
    options = {**SGD, **TENSOR, "gamma": 1.0, "ascent": ascent}
    got = run_ranks(train_on_ranks, "fsdp", options, 10, {})
    assert_same(got, train_on_joined_batches(options, 10))


@pytest.mark.parametrize("swp", [TENSOR, ADAPTIVE], ids=["tensor", "adaptive"])
def test_first_order_ranks_each_ranks_own_batch(swp: dict[str, Any]) -> None:
    got = run_ranks(train_on_ranks, "fsdp", {**SGD, **swp, "ranking": "first_order"}, 10, {})
    scores = partial(head_products, eta=swp["eta"]) if swp.get("adaptive") else head_products
    assert_same(got, train_alone({**SGD, **swp}, 10, scores=scores))


def test_pass_1_takes_the_first_part_of_each_ranks_batch() -> None:
    options = {**SGD, **ELEMENT, "gamma": 1.0, "ascent_share": 0.5}
    assert_same(run_ranks(train_on_ranks, "fsdp", options, 10, {}), train_alone(options, 10))


def test_random_draws_the_same_samples_on_every_rank() -> None:
    options = {**SGD, **TENSOR}
    got = run_ranks(train_on_ranks, "fsdp", {**options, "ranking": "random"}, 10, {})
    assert_same(got, train_alone({**options, "ranking": "random"}, 10))


def test_three_ranks_with_empty_shards_equal_one_process() -> None:
    options = {**SGD, **ELEMENT}
    got = run_ranks(train_on_ranks, "fsdp", options, 10, {}, ranks=3)
    assert_same(got, train_alone(options, 10, ranks=3))


@pytest.mark.parametrize(
    ("step", "parts"), [({"micro_batch": 4}, 2), ({"max_grad_norm": 0.05}, 1)], ids=["micro_batch", "max_grad_norm"]
)
def test_options_of_step(step: dict[str, Any], parts: int) -> None:
    options = {**SGD, **ELEMENT}
    got = run_ranks(train_on_ranks, "fsdp", options, 10, step)
    assert_same(got, train_alone(options, 10, parts=parts, max_grad_norm=step.get("max_grad_norm")))


# -- one perturbation, taken apart -------------------------------------------------------------------------------------


def _perturb(model: nn.Module, optimizer: ESAM, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
    """e of one first step; the weights are left perturbed."""
    before = weights(model)
    optimizer.backward(losses_of(model)(*batch).mean())
    optimizer.first_step(zero_grad=True)
    return [after - w for after, w in zip(weights(model), before)]


@pytest.mark.parametrize("ranks", [2, 3])
def test_element_masks_are_those_of_the_unsharded_model(ranks: int) -> None:
    options = {**SGD, **ELEMENT}
    alone = build_model()
    expected = _perturb(alone, ESAM(alone.parameters(), **options), joined(next(batches(1, ranks))))
    for sharded in run_ranks(_sharded_perturbation, options, ranks=ranks):
        for e, wanted in zip(sharded, expected):
            assert torch.equal(e != 0, wanted != 0)
            torch.testing.assert_close(e, wanted, rtol=0, atol=1e-6)


def _sharded_perturbation(options: dict[str, Any]) -> list[Tensor]:
    model = shard(build_model())
    optimizer = ESAM(model.parameters(), model=model, **options)
    return _perturb(model, optimizer, next(batches(1, dist.get_world_size()))[dist.get_rank()])


@pytest.mark.parametrize("swp", [TENSOR, ELEMENT], ids=["tensor", "element"])
def test_restore_is_bitwise_and_in_place(swp: dict[str, Any]) -> None:
    assert all(run_ranks(_restored, {**SGD, **swp}))


def _restored(options: dict[str, Any]) -> bool:
    model = shard(build_model())
    optimizer = ESAM(model.parameters(), model=model, **options)
    shards = [param.to_local() for param in model.parameters()]
    places, old = [s.data_ptr() for s in shards], [s.detach().clone() for s in shards]
    e = _perturb(model, optimizer, next(batches(1))[dist.get_rank()])
    optimizer.restore()
    shards = [param.to_local() for param in model.parameters()]
    return (
        any(part.any() for part in e)
        and all(map(torch.equal, shards, old))
        and [s.data_ptr() for s in shards] == places
    )


@pytest.mark.parametrize("where", ["no_grad", "kept after backward"])
def test_no_forward_sees_weights_of_another_phase(where: str) -> None:
    run_ranks(_forwards, where)


def _forwards(where: str) -> None:
    model, alone = shard(build_model()), build_model()
    if where == "kept after backward":
        model.set_reshard_after_backward(False)
    optimizer = ESAM(model.parameters(), model=model, **SGD, **ELEMENT)
    part = next(batches(1))[dist.get_rank()]
    shards = list(model.parameters())  # those of the root become whole ones in a forward, and remain so without care

    def check() -> None:
        with torch.no_grad():
            for param, shard_ in zip(alone.parameters(), shards):
                param.copy_(shard_.full_tensor())
            torch.testing.assert_close(model(part[0]), alone(part[0]), rtol=0, atol=1e-6)

    check()
    _perturb(model, optimizer, part)
    check()
    optimizer.restore()
    check()
    _perturb(model, optimizer, part)
    check()
    losses_of(model)(*part).mean().backward()
    optimizer.second_step()
    check()


@pytest.mark.parametrize("where", ["in the model", "after it"])
def test_an_exception_in_the_closure_leaves_the_weights(where: str) -> None:
    run_ranks(_failing_closure, where)


def _failing_closure(where: str) -> None:
    model = shard(build_model())
    optimizer = ESAM(model.parameters(), model=model, **SGD, **ELEMENT)
    part = next(batches(1))[dist.get_rank()]
    shards, calls = list(model.parameters()), []
    old = [param.full_tensor() for param in shards]
    with torch.no_grad():
        expected = model(part[0])

    def fail_in_second_look(*_: Any) -> None:
        calls.append(where)
        if len(calls) == 2:
            raise KeyError("out of disk")

    def losses(*batch: Tensor) -> Tensor:
        result = losses_of(model)(*batch)
        if where == "after it":
            fail_in_second_look()
        return result

    hook = model[5].register_forward_hook(fail_in_second_look) if where == "in the model" else None
    with pytest.raises(KeyError):
        optimizer.step(losses, *part)
    if hook is not None:
        hook.remove()
    assert all(torch.equal(param.full_tensor(), before) for param, before in zip(shards, old))
    assert torch.equal(model(part[0]), expected)


def test_replicated_parameters_count_once() -> None:
    run_ranks(_with_replicated_parameters)


def _with_replicated_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), Scale(), nn.Linear(5, 2))
    plain = [model[1].scale, model[2].bias]
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), ignored_params=set(plain))
    optimizer = ESAM(model.parameters(), model=model, rho=0.1, beta=1.0, mask="element", **SGD)
    model(torch.ones(3, 6)).square().mean().backward()
    optimizer.first_step()
    grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
    optimizer.restore()
    before = weights(model)
    optimizer.first_step()
    norm = torch.stack([grad.norm() for grad in grads]).norm()
    for w, perturbed, grad in zip(before, weights(model), grads):
        torch.testing.assert_close(perturbed - w, 0.1 * grad / norm, rtol=0, atol=1e-6)


def test_a_parameter_sharded_along_another_dimension_draws_every_weight_by_itself() -> None:
    masks, other = run_ranks(_sharded_columns)
    assert torch.equal(masks, other)
    left, right = masks.chunk(2, dim=1)
    assert not torch.equal(left, right)
    assert 0.4 < masks.float().mean() < 0.6


def _sharded_columns() -> Tensor:
    torch.manual_seed(0)
    model = nn.Linear(62, 31, bias=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), shard_placement_fn=lambda _: Shard(1))
    optimizer = ESAM(model.parameters(), model=model, rho=0.1, beta=0.5, mask="element", **SGD)
    before = weights(model)
    model(torch.ones(1, 62)).sum().backward()
    optimizer.first_step()
    return weights(model)[0] != before[0]


def test_hybrid_sharding_sums_over_the_sharded_dimension_only() -> None:
    options = {**SGD, **ELEMENT}
    expected = train_alone(options, 3)
    for shape in ((2, 1), (1, 2)):
        assert_same(run_ranks(_hybrid, options, shape), expected)


def _hybrid(options: dict[str, Any], shape: tuple[int, int]) -> list[Tensor]:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    return train_on_ranks("fsdp", options, 3, {}, mesh=mesh)


def test_mixed_precision_policy() -> None:
    options = {**SGD, **ELEMENT}
    got = run_ranks(_mixed_precision, options)
    assert_same(got, train_alone(options, 5), atol=3e-2)
    assert not all(map(torch.equal, got[0], train_alone(options, 5)))


def _mixed_precision(options: dict[str, Any]) -> list[Tensor]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    trained = train_on_ranks("fsdp", options, 5, {}, mp_policy=policy)
    assert all(weight.dtype == torch.float32 for weight in trained)
    return trained


@pytest.mark.parametrize("options", [{}, {"gamma": 1.0, "ascent_share": 0.5}], ids=["B+", "pass 1 on a part"])
def test_ranks_with_batches_of_different_size_do_not_wait_for_each_other(options: dict[str, Any]) -> None:
    first, second = run_ranks(_uneven_steps, options)
    assert all(map(torch.equal, first, second))
    assert all(weight.isfinite().all() for weight in first)


def _uneven_steps(options: dict[str, Any]) -> list[Tensor]:
    model = shard(build_model())
    optimizer = ESAM(model.parameters(), model=model, **{**SGD, **ELEMENT, **options})
    for number, parts in enumerate(batches(6)):
        # of one sample there is nothing to select, but the other rank needs its part in the forward
        size = 1 if dist.get_rank() == number % 2 else 8
        optimizer.step(losses_of(model), *(tensor[:size] for tensor in parts[dist.get_rank()]))
    return weights(model)


def test_a_gradient_that_is_not_finite_on_one_rank_moves_no_shard() -> None:
    assert all(run_ranks(_not_finite))


def _not_finite() -> bool:
    model = shard(build_model())
    optimizer = ESAM(model.parameters(), model=model, **SGD, **ELEMENT)
    old = weights(model)
    model(next(batches(1))[0][0]).sum().backward()
    if dist.get_rank() == 1:
        model[0].weight.grad.to_local()[0, 0] = torch.nan
    optimizer.first_step()
    return all(map(torch.equal, old, weights(model)))


def test_what_is_refused() -> None:
    run_ranks(_refusals)


def _refusals() -> None:
    mesh = init_device_mesh("cpu", (2,))
    model = shard(build_model())
    with pytest.raises(ValueError, match="build the optimizer with model=model"):
        ESAM(model.parameters(), **SGD)
    with pytest.raises(ValueError, match="flatten=True"):
        ESAM(model.parameters(), model=model, flatten=True, **SGD)
    tensor_parallel = parallelize_module(nn.Linear(4, 4), mesh, ColwiseParallel())
    with pytest.raises(ValueError, match="tensor parallelism"):
        ESAM(tensor_parallel.parameters(), model=tensor_parallel, **SGD)
    plane = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    both = parallelize_module(nn.Linear(4, 4), plane["tensor"], ColwiseParallel())
    fully_shard(both, mesh=plane["data"])
    with pytest.raises(ValueError, match="tensor parallelism"):
        ESAM(both.parameters(), model=both, **SGD)
    flat = FullyShardedDataParallel(build_model(), device_id=torch.device("cpu"))
    for use in ({"model": flat}, {}):
        with pytest.raises(ValueError, match="FSDP1"):
            ESAM(flat.parameters(), **use, **SGD)
