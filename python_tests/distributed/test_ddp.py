"""DistributedDataParallel: which pass is synchronised, and what the ranks agree on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from training import (
    ADAMW,
    ADAPTIVE,
    ELEMENT,
    SGD,
    TENSOR,
    assert_same,
    batches,
    build_model,
    head_products,
    losses_of,
    train_alone,
    train_on_joined_batches,
    train_on_ranks,
    train_replicas,
    weights,
    wrap,
)

from esam_kernels import ESAM, cross_entropy, diagnostics


@pytest.mark.parametrize("base", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("swp", [TENSOR, ELEMENT, ADAPTIVE], ids=["tensor", "element", "adaptive"])
def test_ten_steps_equal_replicas_in_one_process(base: dict[str, Any], swp: dict[str, Any]) -> None:
    got = run_ranks(train_on_ranks, "ddp", {**base, **swp}, 10, {})
    assert_same(got, train_replicas({**base, **swp}, 10))


def test_synchronised_perturbation_is_that_of_the_whole_batch() -> None:
    options = {**SGD, **TENSOR}
    got = run_ranks(train_on_ranks, "ddp", {**options, "sync_perturbation": True}, 10, {})
    assert_same(got, train_alone(options, 10))


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("ascent", ["previous", "momentum"])
def test_one_pass_goes_along_what_the_ranks_have_in_common(ascent: str, sync: bool) -> None:
    options = {**SGD, **ELEMENT, "gamma": 1.0, "ascent": ascent}
    got = run_ranks(train_on_ranks, "ddp", {**options, "sync_perturbation": sync}, 10, {})
    assert_same(got, train_on_joined_batches(options, 10))


@pytest.mark.parametrize("ranking", ["first_order", "random"])
def test_each_rank_ranks_its_own_batch_from_pass_1(ranking: str) -> None:
    options = {**SGD, **TENSOR, "ranking": ranking}
    got = run_ranks(train_on_ranks, "ddp", options, 10, {})
    assert_same(got, train_replicas(options, 10))


@pytest.mark.parametrize("sync", [False, True])
def test_pass_1_takes_the_first_part_of_each_ranks_batch(sync: bool) -> None:
    options = {**SGD, **TENSOR, "gamma": 1.0, "ascent_share": 0.5}
    got = run_ranks(train_on_ranks, "ddp", {**options, "sync_perturbation": sync}, 10, {})
    assert_same(got, train_alone(options, 10) if sync else train_replicas(options, 10))


def test_with_a_synchronised_perturbation_each_rank_still_ranks_its_own_batch() -> None:
    options = {**SGD, **TENSOR}
    got = run_ranks(train_on_ranks, "ddp", {**options, "sync_perturbation": True, "ranking": "first_order"}, 10, {})
    assert_same(got, train_alone(options, 10, scores=head_products))


def test_micro_batches_accumulate_as_in_one_process() -> None:
    options = {**SGD, **ELEMENT}
    got = run_ranks(train_on_ranks, "ddp", options, 10, {"micro_batch": 4})
    assert_same(got, train_replicas(options, 10, parts_per_rank=2))


def test_a_step_reduces_the_gradients_once() -> None:
    counts, _ = run_ranks(_reductions)
    assert counts["plain"] > 0
    assert set(counts.values()) == {counts["plain"]}


def _reductions() -> dict[str, int]:
    """How many buckets were reduced in three steps."""
    counts = {}
    for name, step in {"plain": None, "esam": {}, "micro": {"micro_batch": 4}}.items():
        model = wrap(build_model())
        reduced: list[int] = []
        model.register_comm_hook(reduced, _count)
        optimizer = ESAM(model.parameters(), model=model, **SGD, **TENSOR)
        for parts in batches(3):
            if step is None:
                losses_of(model)(*parts[dist.get_rank()]).mean().backward()
            else:
                optimizer.step(losses_of(model), *parts[dist.get_rank()], **step)
        counts[name] = len(reduced)
    return counts


def _count(reduced, bucket):  # DDP refuses annotations that are strings
    reduced.append(bucket.index())
    return allreduce_hook(dist.group.WORLD, bucket)


@pytest.mark.parametrize("step", [{}, {"micro_batch": 4}], ids=["whole", "micro"])
def test_gradients_that_are_views_of_buckets(step: dict[str, Any]) -> None:
    options = {**SGD, **TENSOR}
    got = run_ranks(_with_bucket_views, options, step)
    assert_same(got, train_replicas(options, 10, parts_per_rank=2 if step else 1))


def _with_bucket_views(options: dict[str, Any], step: dict[str, Any]) -> list[Tensor]:
    return train_on_ranks("ddp", options, 10, step, gradient_as_bucket_view=True)


@pytest.mark.parametrize("bucket_view", [False, True])
@pytest.mark.parametrize("set_to_none", [False, True])
def test_three_phases_with_the_users_own_no_sync(bucket_view: bool, set_to_none: bool) -> None:
    options = {**SGD, **TENSOR}
    assert_same(run_ranks(_three_phases, options, bucket_view, set_to_none), train_replicas(options, 10))


def _three_phases(options: dict[str, Any], bucket_view: bool, set_to_none: bool) -> list[Tensor]:
    model = wrap(build_model(), gradient_as_bucket_view=bucket_view)
    optimizer = ESAM(model.parameters(), model=model, **options)
    losses = losses_of(model)
    for parts in batches(10):
        batch = parts[dist.get_rank()]
        optimizer.zero_grad(set_to_none=set_to_none)  # False: the first gradients go into the buckets
        with model.no_sync():
            before = losses(*batch)
            optimizer.backward(before.mean())
        optimizer.first_step(zero_grad=True)
        with torch.no_grad():
            after = losses(*batch)
        losses(*optimizer.select(before, after, *batch)).mean().backward()
        optimizer.second_step()
    return weights(model)


def test_step_with_a_closure_perturbs_for_the_ranks_own_batch() -> None:
    options = {**SGD, **ELEMENT, "gamma": 1.0}
    assert_same(run_ranks(_closure_steps, options), train_replicas(options, 10))


def _closure_steps(options: dict[str, Any]) -> list[Tensor]:
    model = wrap(build_model())
    optimizer = ESAM(model.parameters(), model=model, **options)
    for inputs, targets in (parts[dist.get_rank()] for parts in batches(10)):

        def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(model(inputs), targets).mean()
            loss.backward()
            return loss

        optimizer.step(closure)
    return weights(model)


@pytest.mark.parametrize("swp", [TENSOR, ELEMENT], ids=["tensor", "element"])
@pytest.mark.parametrize("sync", [False, True])
def test_ranks_draw_the_same_weights(swp: dict[str, Any], sync: bool) -> None:
    first, second = run_ranks(_perturbations, {**SGD, **swp, "sync_perturbation": sync})
    for e, other in zip(first, second):
        assert torch.equal(e != 0, other != 0)
    assert all(map(torch.equal, first, second)) is sync


def _perturbations(options: dict[str, Any]) -> list[Tensor]:
    """e of three steps, one after another."""
    model = wrap(build_model())
    optimizer = ESAM(model.parameters(), model=model, **options)
    found = []
    for parts in batches(3):
        before = weights(model)
        with model.no_sync():
            optimizer.backward(losses_of(model)(*parts[dist.get_rank()]).mean())
        optimizer.first_step(zero_grad=True)
        found += [after - w for after, w in zip(weights(model), before)]
        optimizer.restore()
    return found


def test_synchronised_perturbation_where_a_rank_lacks_a_gradient() -> None:
    first, second = run_ranks(_perturbation_with_unused_parameter)
    assert all(map(torch.equal, first, second))
    assert all(e.any() for e in first)


def _perturbation_with_unused_parameter() -> list[Tensor]:
    model = wrap(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), find_unused_parameters=True)
    optimizer = ESAM(model.parameters(), model=model, beta=1.0, sync_perturbation=True, **SGD)
    before = weights(model)
    layers = list(model.module)[: 1 + dist.get_rank()]
    with model.no_sync():
        optimizer.backward(sum(layer(torch.ones(1, 2)).square().sum() for layer in layers))
    optimizer.first_step()
    return [after - w for after, w in zip(weights(model), before)]


def test_ranks_that_draw_and_select_differently_do_not_wait_for_each_other() -> None:
    first, second = run_ranks(_uneven_steps)
    assert all(map(torch.equal, first, second))


def _uneven_steps() -> list[Tensor]:
    model = wrap(build_model(), find_unused_parameters=True)
    rank = dist.get_rank()
    optimizer = ESAM(model.parameters(), model=model, gamma=0.6, **{**SGD, **TENSOR, "seed": rank})
    for number, parts in enumerate(batches(6)):
        # one sample has nothing to select: this rank runs a forward less
        batch = tuple(tensor[: 1 + 7 * (rank == number % 2)] for tensor in parts[rank])
        optimizer.step(losses_of(model), *batch, micro_batch=4)
    return weights(model)


def test_batch_norm_statistics_move_once_a_step() -> None:
    first, second = run_ranks(_batch_norm_buffers)
    assert all(map(torch.equal, first, second))
    layer = build_model(batch_norm=True)[0]
    mean = torch.zeros(7)
    for parts in batches(3):
        mean = 0.9 * mean + 0.1 * layer(parts[0][0]).mean(0).detach()
    torch.testing.assert_close(first[0], mean)
    assert first[2] == 3


def _batch_norm_buffers() -> list[Tensor]:
    """Mean, variance and count after three steps that leave the weights alone. Rank 0's are those that count."""
    model = wrap(build_model(batch_norm=True))
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.0, rho=0.1, model=model)
    for parts in batches(3):
        optimizer.step(losses_of(model), *parts[dist.get_rank()])
    model.eval()
    model(parts[0][0])  # a forward is what brings them to the other ranks
    return [buffer.clone() for buffer in model.module[1].buffers()]


def test_an_overflow_in_one_ranks_first_pass_skips_the_update_on_all() -> None:
    assert run_ranks(_overflow) == [(True, True)] * 2


def _overflow() -> tuple[bool, bool]:
    """Whether the step with the overflow left the weights alone, and whether the next one did not."""
    model = wrap(build_model())
    optimizer = ESAM(model.parameters(), model=model, **SGD, **TENSOR)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    part = next(batches(1))[dist.get_rank()]
    start, calls = weights(model), []

    def losses(inputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(inputs)
        overflows = len(calls) == 1 and dist.get_rank() == 1
        return cross_entropy(model(inputs), targets) * (torch.inf if overflows else 1.0)

    optimizer.step(losses, *part, scaler=scaler)
    scaler.update()
    skipped = all(map(torch.equal, start, weights(model)))
    optimizer.step(losses, *part, scaler=scaler)
    return skipped, not any(map(torch.equal, start, weights(model)))


@pytest.mark.parametrize("swp", [{"beta": 1.0}, TENSOR], ids=["all", "drawn"])
@pytest.mark.parametrize("way", ["step", "closure", "phases", "forward outside no_sync"])
def test_a_first_pass_that_is_averaged_all_the_same_is_refused(way: str, swp: dict[str, Any]) -> None:
    """After a forward with gradients that no backward follows, DDP reduces the next backward, whatever no_sync says."""
    run_ranks(_after_a_look, way, {**SGD, **swp})


def _after_a_look(way: str, options: dict[str, Any]) -> None:
    model = wrap(build_model())
    optimizer = ESAM(model.parameters(), model=model, **options)
    losses, batch = losses_of(model), next(batches(1))[dist.get_rank()]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = losses(*batch).mean()
        loss.backward()
        return loss

    def phases() -> None:
        with model.no_sync():
            optimizer.backward(losses(*batch).mean() if way == "phases" else loss)

    start = weights(model)
    loss = losses(*batch).mean()
    calls = {"step": lambda: optimizer.step(losses, *batch), "closure": lambda: optimizer.step(closure)}
    with pytest.raises(RuntimeError, match=r"backward of an earlier forward.* under torch\.no_grad\(\)"):
        calls.get(way, phases)()
    assert all(map(torch.equal, start, weights(model)))


@pytest.mark.parametrize(
    ("way", "swp"), [("step", {"beta": 1.0, "rho": 0.2}), ("closure", {"beta": 1.0, "rho": 0.2}), ("closure", TENSOR)]
)
def test_a_first_pass_that_is_to_be_averaged_may_be_averaged_earlier(way: str, swp: dict[str, Any]) -> None:
    options = {**SGD, **swp, "gamma": 1.0, "sync_perturbation": True}
    got = run_ranks(_steps_after_looks, way, options)
    del options["sync_perturbation"]
    assert_same(got, train_alone(options, 3))


def _steps_after_looks(way: str, options: dict[str, Any]) -> list[Tensor]:
    model = wrap(build_model())
    optimizer = ESAM(model.parameters(), model=model, **options)
    losses = losses_of(model)
    for parts in batches(3):
        batch = parts[dist.get_rank()]

        def closure(batch: tuple[Tensor, ...] = batch) -> Tensor:
            optimizer.zero_grad()
            loss = losses(*batch).mean()
            loss.backward()
            return loss

        losses(*batch)  # with gradients, and no backward follows
        if way == "step":
            optimizer.step(losses, *batch)
        else:
            optimizer.step(closure)
    return weights(model)


def test_a_measurement_of_the_wrapped_model_is_no_such_forward() -> None:
    options = {**SGD, **TENSOR}
    assert_same(run_ranks(_measured, options), train_replicas(options, 3))


def _measured(options: dict[str, Any]) -> list[Tensor]:
    model = wrap(build_model())
    optimizer = ESAM(model.parameters(), model=model, **options)
    for parts in batches(3):
        diagnostics.sharpness(model, losses_of(model), *parts[dist.get_rank()])
        optimizer.step(losses_of(model), *parts[dist.get_rank()])
    return weights(model)


def test_what_is_refused() -> None:
    run_ranks(_refusals)
    with pytest.raises(RuntimeError, match="process group"):
        ESAM(build_model().parameters(), sync_perturbation=True, **SGD)


def _refusals() -> None:
    inputs, targets = next(iter(batches(1)))[dist.get_rank()]
    model = wrap(build_model())
    optimizer = ESAM(model.parameters(), model=model, **SGD, **TENSOR)
    with pytest.raises(RuntimeError, match="no_sync"):
        optimizer.backward(losses_of(model)(inputs, targets).mean())
    with pytest.raises(ValueError, match="static_graph"):
        ESAM(model.parameters(), model=wrap(build_model(), static_graph=True), **SGD)
    with pytest.raises(ValueError, match="same seed"):
        ESAM(model.parameters(), model=model, sync_perturbation=True, **SGD, seed=dist.get_rank())
