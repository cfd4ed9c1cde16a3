"""The differentiable functions inside torch.compile, with no graph break, forward and backward."""

import functools

import oracles
import pytest
import torch

from esam_kernels import cross_entropy, gather, select


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("kind", ["indices", "probabilities", "positions"])
def test_cross_entropy_compiles_forward_and_backward(kind):
    logits = torch.randn(*((4, 5, 3) if kind == "positions" else (6, 5)))
    target = torch.randint(0, 5, (4, 3) if kind == "positions" else (6,))
    if kind == "probabilities":
        target = torch.softmax(torch.randn(6, 5), dim=1)

    def loss(x):
        return cross_entropy(x * 2, target, label_smoothing=0.1)

    results = []
    for function in (loss, compiled(loss)):
        x = logits.clone().requires_grad_()
        losses = function(x)
        losses.sum().backward()
        results.append((losses.detach(), x.grad))
    torch.testing.assert_close(results[1][0], results[0][0])
    torch.testing.assert_close(results[1][1], results[0][1])


@pytest.mark.parametrize("transform", ["grad", "grad of grad", "vmap", "vmap of grad", "jvp"])
def test_transforms_of_torch_func_compile_around_cross_entropy(transform):
    logits, target = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])

    def transformed(losses):
        def of_one(x, y):
            return losses(x[None], y[None])[0]

        return {
            "grad": torch.func.grad(lambda x: losses(x, target).sum()),
            "grad of grad": torch.func.grad(
                lambda x: torch.func.grad(lambda x: losses(x, target).sum())(x).square().sum()
            ),
            "vmap": lambda x: torch.func.vmap(of_one)(x, target),
            "vmap of grad": lambda x: torch.func.vmap(torch.func.grad(of_one))(x, target),
            "jvp": lambda x: torch.func.jvp(lambda x: losses(x, target), (x,), (x.cos(),))[1],
        }[transform]

    expected = transformed(functools.partial(torch.nn.functional.cross_entropy, reduction="none"))(logits)
    torch.testing.assert_close(compiled(transformed(cross_entropy))(logits), expected)


def test_select_and_gather_compile():
    before, after = torch.randn(8), torch.randn(8)
    inputs, target = torch.randn(8, 3, 2, 2).to(memory_format=torch.channels_last), torch.arange(8)

    def chosen(before, after, inputs, target):
        return gather(select(before, after, 5), {"inputs": inputs * 2}, target)

    expected, got = (f(before, after, inputs, target) for f in (chosen, compiled(chosen)))
    assert torch.equal(got[0]["inputs"], expected[0]["inputs"])
    assert torch.equal(got[1], expected[1])


def test_gradients_flow_through_a_compiled_gather():
    def rows(x):
        return gather(torch.tensor([2, 0]), x * 3)

    x = torch.randn(4, 2, requires_grad=True)
    compiled(rows)(x).sum().backward()
    assert x.grad.tolist() == [[3, 3], [0, 0], [3, 3], [0, 0]]


def test_a_compiled_model_trains_like_the_model_and_is_not_compiled_anew():
    from esam_kernels import ESAM

    counter = torch._dynamo.testing.CompileCounter()
    models = [oracles.mlp(), oracles.mlp()]
    torch._dynamo.reset()
    forwards = [models[0], torch.compile(models[1], backend=counter, dynamic=False)]
    for model, forward in zip(models, forwards):
        optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, gamma=0.5)
        for step in range(14):
            optimizer.step(oracles.losses_of(forward), *oracles.batch(seed=step))
            if step == 1:
                graphs = counter.frame_count
    assert oracles.same_bits(*map(oracles.weights_of, models))
    assert counter.frame_count == graphs
