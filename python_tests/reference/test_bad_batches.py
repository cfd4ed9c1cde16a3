"""Contract point 15: batches and losses that cannot be are refused with what was wrong, and nothing is changed."""

import warnings

import oracles
import pytest
import torch

from esam_kernels import ESAM, SAM, backends, cross_entropy, gather, select

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # nested tensors are a prototype, sparse CSR is in beta
    NESTED = torch.nested.nested_tensor([torch.ones(2, 6), torch.ones(3, 6)])
    JAGGED = torch.nested.nested_tensor([torch.ones(2, 6), torch.ones(3, 6)], layout=torch.jagged)
    CSR = torch.ones(2, 6).to_sparse_csr()


def trained(**kwargs):
    model = oracles.noisy_mlp()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, model=model, **kwargs)
    optimizer.step(oracles.losses_of(model), *oracles.batch())
    return model, optimizer


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ((torch.empty(0, 6), torch.empty(0, dtype=torch.int64)), ValueError, "the batch is empty"),
        ((torch.ones(4, 6), torch.ones(3)), ValueError, r"different numbers of samples: \[4, 3\]"),
        ((torch.ones(4, 6), torch.tensor(1)), ValueError, "no dimensions: the batch must be in front"),
        ((NESTED, torch.ones(2)), ValueError, "a nested tensor that has no sizes: pad it, or build it with"),
        ((JAGGED, torch.ones(2)), ValueError, "has the layout torch.jagged, of which no part can be taken, as gamma"),
        (({"x": CSR}, torch.ones(2)), ValueError, "has the layout torch.sparse_csr, of which no part can be taken"),
        ((1.0, "name"), ValueError, "the batch holds no tensors"),
        (({"x": torch.ones(4, 6)}, {"y": {1, 2}}), TypeError, "the batch holds a set"),
    ],
)
def test_a_bad_batch_is_refused_before_anything_is_computed(batch, error, message):
    model, optimizer = trained()

    def losses(*_):
        raise AssertionError("called")

    oracles.assert_refused(lambda: optimizer.step(losses, *batch), error, message, model, optimizer)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), "1"])
def test_a_bad_max_grad_norm_is_refused_before_anything_is_computed(value):
    """torch takes the numbers: 0 stops the training, a negative one turns its direction, NaN ends it."""
    model = oracles.mlp()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1)

    def losses(*_):
        pytest.fail("the closure was called")

    oracles.assert_refused(
        lambda: optimizer.step(losses, *oracles.batch(), max_grad_norm=value),
        ValueError,
        f"max_grad_norm must be a number above 0, or None to clip nothing, got {value!r}",
        model,
        optimizer,
    )


@pytest.mark.parametrize("micro_batch", [0, -1, 1.5])
def test_a_bad_micro_batch_is_refused_before_anything_is_computed(micro_batch):
    model, optimizer = trained()
    message = f"micro_batch must be a positive integer, got {micro_batch}"

    def step():
        optimizer.step(oracles.losses_of(model), *oracles.batch(), micro_batch=micro_batch)

    oracles.assert_refused(step, ValueError, message, model, optimizer)


def test_options_of_the_batch_without_a_batch_are_refused():
    model, optimizer = trained()

    def step():
        optimizer.step(lambda: None, micro_batch=4)

    oracles.assert_refused(step, ValueError, "need the batch", model, optimizer)


def test_options_of_the_batch_are_refused_where_step_ends_a_loop_of_ones_own():
    """They would be left out silently: the gradients are the loop's."""
    model, optimizer = trained()
    oracles.losses_of(model)(*oracles.batch()).mean().backward()
    optimizer.first_step()
    message = "max_grad_norm and scaler need the batch"
    with pytest.raises(ValueError, match=message):
        optimizer.step(max_grad_norm=1.0)
    optimizer.restore()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda losses: losses.mean(), r"one floating-point number per sample, shape \(b,\), got torch.float32 \(\)"),
        (lambda losses: losses[:, None], r"got torch.float32 \(12, 1\)"),
        (lambda losses: losses[:5], r"hold 5 samples, the batch 12"),
        (lambda losses: losses.tolist(), r"got list"),
        (lambda losses: losses.long(), r"got torch.int64 \(12,\)"),
        (lambda losses: None, r"got NoneType"),
    ],
)
@pytest.mark.parametrize("call", [1, 2, 3])
def test_losses_that_are_not_one_number_a_sample_are_refused_in_every_pass_and_change_no_weight(change, message, call):
    model, optimizer = trained()
    before, calls = oracles.snapshot(model, optimizer), []
    if call == 3:
        message = message.replace("the batch 12", "the batch 6").replace("12", "6")

    def losses(inputs, target):
        calls.append(1)
        result = oracles.losses_of(model)(inputs, target)
        return change(result) if len(calls) == call else result

    with pytest.raises(ValueError, match=message):
        optimizer.step(losses, *oracles.batch())
    assert len(calls) == call
    weights = len(list(model.parameters()))
    assert oracles.same_bits(before[0][:2], oracles.snapshot(model)[0][:2])
    assert [p.data_ptr() for p in model.parameters()] == [pointer for *_, pointer in before[3]]
    assert oracles.same_bits(oracles.weights_of(model), oracles.weights_of(trained()[0]))
    assert len(optimizer.state) == weights
    assert before[1] == optimizer.base_optimizer.state_dict()["param_groups"]
    optimizer.step(oracles.losses_of(model), *oracles.batch())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3), torch.ones(4), torch.ones(4)), "loss_before hold 3 samples, the batch 4"),
        ((torch.ones(4), torch.ones(3), torch.ones(4)), "loss_after hold 3 samples, the batch 4"),
        ((torch.ones(()), torch.ones(4), torch.ones(4)), "loss_before must be one floating-point number per sample"),
        ((torch.ones(4), torch.ones(4), torch.ones(4), torch.ones(2)), "different numbers of samples"),
        ((torch.ones(4), torch.ones(4)), "no tensors"),
        ((torch.ones(0), torch.ones(0), torch.ones(0)), "empty"),
    ],
)
def test_select_of_the_optimizer_refuses_sizes_that_differ(arguments, message):
    model, optimizer = trained()
    oracles.assert_refused(lambda: optimizer.select(*arguments), ValueError, message, model, optimizer)


@pytest.mark.parametrize("k", [0, -1, 5])
def test_select_refuses_k_outside_the_batch(k):
    with pytest.raises(ValueError, match=rf"k must lie in \[1, 4\], got {k}"):
        select(torch.ones(4), torch.ones(4), k)


def test_gather_refuses_what_cannot_be_indexed_by_sample():
    indices = torch.tensor([0])
    with pytest.raises(TypeError, match="the batch holds a set"):
        gather(indices, torch.ones(3), {1, 2})
    with pytest.raises(ValueError, match="different numbers of samples"):
        gather(indices, torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match="indices must be int64"):
        gather(torch.tensor([0.5]), torch.ones(3))
    for tensor in (JAGGED, CSR):
        with pytest.raises(ValueError, match="of which no part can be taken"):
            gather(indices, tensor)


def test_a_layout_that_cannot_be_cut_is_taken_whole():
    model = oracles.mlp()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)

    def losses(inputs, target):
        return cross_entropy(torch.stack([model(rows).mean(dim=0) for rows in inputs.unbind()]), target)

    assert optimizer.step(losses, JAGGED, torch.tensor([0, 1])).isfinite()


LOGITS, TARGET, LOSSES = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.arange(4.0)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cross_entropy([[0.0, 1.0]], TARGET), "logits must be a tensor, got list"),
        (lambda: cross_entropy(LOGITS, None), "target must be a tensor, got NoneType"),
        (lambda: cross_entropy(LOGITS, TARGET, ignore_index=-100.0), "ignore_index must be an integer, got -100.0"),
        (lambda: cross_entropy(LOGITS, TARGET, ignore_index=None), "ignore_index must be an integer, got None"),
        (lambda: select([1.0, 2.0], LOSSES, 1), "loss_before must be a tensor, got list"),
        (lambda: select(LOSSES, [1.0, 2.0], 1), "loss_after must be a tensor, got list"),
        (lambda: select(LOSSES, LOSSES, 2.0), "k must be an integer, got 2.0"),
        (lambda: gather([0, 1], LOGITS), "indices must be a tensor, got list"),
        (lambda: trained()[1].select_from_logits(LOSSES, LOGITS, [0], LOGITS), "target must be a tensor, got list"),
        (
            lambda: trained()[1].select_from_logits(LOSSES, LOGITS, TARGET, LOGITS, ignore_index=1.0),
            "ignore_index must be an integer, got 1.0",
        ),
    ],
)
def test_what_is_no_tensor_or_no_integer_is_refused_by_name(call, message, backend, monkeypatch):
    if backends.unavailable(backend, torch.device("cpu")) is not None:
        pytest.skip(f"{backend} is not available")
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, backend)
    with pytest.raises(TypeError, match=message):
        call()


def test_numpy_integers_are_integers():
    import numpy as np

    assert select(-LOSSES, LOSSES, np.int64(2)).tolist() == [2, 3]
    expected = cross_entropy(LOGITS, TARGET, ignore_index=0)
    assert torch.equal(cross_entropy(LOGITS, TARGET, ignore_index=np.int64(0)), expected)
    assert expected[0] == 0.0
