"""Diagnostics leave no trace: weights, gradients, buffers, modes and random state are those from before."""

import copy
import subprocess
import sys

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from esam_kernels import ESAM, diagnostics

FUNCTIONS = {
    "sharpness": lambda *a: diagnostics.sharpness(*a, ascent_steps=3),
    "adaptive": lambda *a: diagnostics.sharpness(*a, adaptive=True, micro_batch=4),
    "linearity": lambda *a: diagnostics.linearity(*a, betas=(1.0, 0.5), draws=2),
    "split_losses": diagnostics.split_losses,
    "gradient_cosine": diagnostics.gradient_cosine,
    "at_weights": lambda *a: diagnostics.gradient_cosine(*a, at="weights"),
    "random": lambda *a: diagnostics.loss_landscape(*a, points=3),
    "adversarial": lambda *a: diagnostics.loss_landscape(*a, points=3, directions="adversarial", normalize=None),
    "hessian": lambda *a: diagnostics.top_hessian_eigenvalue(*a, iterations=3),
    "hessian_in_parts": lambda *a: diagnostics.top_hessian_eigenvalue(*a, iterations=3, micro_batch=4),
}
# How often they call the closure, where that is less than three times.
CALLS = {"hessian": 1, "split_losses": 2}
every_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


def noisy_model(dtype=torch.float32):
    """With BatchNorm, dropout, a frozen layer, a layer in evaluation mode, a spectral norm, and gradients."""
    model = oracles.noisy_mlp()
    model.add_module("normed", nn.utils.spectral_norm(nn.Linear(oracles.CLASSES, oracles.CLASSES)))
    model.add_module("frozen", nn.Linear(oracles.CLASSES, oracles.CLASSES).requires_grad_(False).eval())
    model.to(dtype)
    for param in model[:2].parameters():
        param.grad = torch.randn_like(param)
    return model


def everything(model):
    parameters = list(model.parameters())
    return (
        oracles.snapshot(model),
        [id(param.grad) for param in parameters],
        [(id(buffer), buffer.data_ptr()) for buffer in model.buffers()],
        [module.training for module in model.modules()],
    )


def assert_no_trace(before, after):
    oracles.assert_unchanged(before[0], after[0])
    assert before[1:] == after[1:]


def losses_in(model, dtype):
    def losses(inputs, target):
        return F.cross_entropy(model(inputs.to(dtype)).float(), target, reduction="none")

    return losses


@every_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_is_as_it_was(function, dtype):
    model = noisy_model(dtype)
    before = everything(model)
    result = function(model, losses_in(model, dtype), *oracles.batch(16))
    assert_no_trace(before, everything(model))
    assert repr(result) == repr(function(model, losses_in(model, dtype), *oracles.batch(16)))


class Stop(BaseException):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, Stop])
@pytest.mark.parametrize(
    ("function", "call"),
    [(FUNCTIONS[name], call) for name in FUNCTIONS for call in range(1, CALLS.get(name, 3) + 1)],
    ids=[f"{name}-{call}" for name in FUNCTIONS for call in range(1, CALLS.get(name, 3) + 1)],
)
def test_everything_is_as_it_was_after_an_exception(function, error, call):
    model = noisy_model()
    calls = []

    def closure(inputs, target):
        calls.append(None)
        if len(calls) == call:
            for param in model.parameters():
                param.requires_grad_(not param.requires_grad)
                param.grad = None
            model.train(not model.training)
            model[1].running_mean = torch.zeros(8)
            torch.rand(3)
            raise error
        return F.cross_entropy(model(inputs), target, reduction="none")

    before = everything(model)
    with pytest.raises(error):
        function(model, closure, *oracles.batch(16))
    assert len(calls) == call
    assert_no_trace(before, everything(model))


@every_function
def test_losses_that_are_refused_leave_everything_as_it_was(function):
    model = noisy_model()
    closure = oracles.losses_of(model)
    call = lambda: function(model, lambda *batch: closure(*batch).mean(), *oracles.batch(16))  # noqa: E731
    before = everything(model)
    with pytest.raises(ValueError, match="one floating-point number per sample"):
        call()
    assert_no_trace(before, everything(model))


@every_function
def test_losses_may_take_gradients_themselves_and_leave_none(function):
    """An attack on the inputs, by a backward inside the closure, which adds to the gradients of the weights."""
    model, batch = noisy_model(), oracles.batch(16)
    losses = oracles.losses_of(model)

    def by_backward(inputs, target):
        inputs = inputs.clone().requires_grad_()
        losses(inputs, target).sum().backward()
        return losses(inputs.detach() + 0.1 * inputs.grad.sign(), target)

    def by_autograd_grad(inputs, target):
        with torch.enable_grad():
            inputs = inputs.clone().requires_grad_()
            (grad,) = torch.autograd.grad(losses(inputs, target).sum(), inputs)
        return losses(inputs.detach() + 0.1 * grad.sign(), target)

    before = everything(model)
    got = function(model, by_backward, *batch)
    assert_no_trace(before, everything(model))
    assert repr(got) == repr(function(model, by_autograd_grad, *batch))


class Cache(nn.Module):
    """A buffer that the first forward makes, and one that was made in inference mode."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(oracles.FEATURES, oracles.CLASSES)
        self.register_buffer("mean", None)
        with torch.inference_mode():
            self.register_buffer("scale", torch.ones(oracles.FEATURES))

    def forward(self, inputs):
        if self.mean is None:
            self.mean = inputs.mean(dim=0)
        return self.layer((inputs - self.mean) * self.scale)


@every_function
def test_buffers_that_are_none_or_of_inference_mode_are_left_as_they_were(function):
    model = Cache()
    scale = model.scale
    function(model, oracles.losses_of(model), *oracles.batch(16))
    assert model.mean is None
    assert model.scale is scale


@every_function
def test_gradients_are_taken_under_no_grad_and_in_inference_mode(function):
    model, batch = noisy_model(), oracles.batch(16)
    expected = function(model, oracles.losses_of(model), *batch)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = function(model, oracles.losses_of(model), *batch)
            assert torch.is_grad_enabled() is False
        assert repr(got) == repr(expected)


@every_function
def test_training_goes_on_with_the_same_bits(function):
    """With the weights in flat buffers, in the middle of a training."""

    def train(diagnose):
        model = oracles.noisy_mlp()
        optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, model=model, flatten=True)
        torch.manual_seed(5)
        for step in range(4):
            if diagnose and step % 2:
                function(model, oracles.losses_of(model), *oracles.batch(16))
            optimizer.step(oracles.losses_of(model), *oracles.batch(16, seed=step))
        return [*oracles.weights_of(model), *[buffer.clone() for buffer in model.buffers()]]

    assert oracles.same_bits(train(True), train(False))


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@every_function
def test_a_distributed_model_trains_on_afterwards(function, process_group):
    model, batch = oracles.noisy_mlp(), oracles.batch(16)
    expected = function(model, oracles.losses_of(model), *batch)
    wrapped = nn.parallel.DistributedDataParallel(model)
    before = everything(model)
    assert repr(function(wrapped, oracles.losses_of(wrapped), *batch)) == repr(expected)
    assert_no_trace(before, everything(model))
    model.zero_grad()
    noise = torch.get_rng_state()
    oracles.losses_of(wrapped)(*batch).mean().backward()
    grads = [param.grad for param in model.parameters()]
    model.zero_grad()
    torch.set_rng_state(noise)
    oracles.losses_of(model)(*batch).mean().backward()
    assert oracles.same_bits(grads, [param.grad for param in model.parameters()])


@every_function
def test_autocast_sees_the_moved_weights(function):
    """Whether autocast, and its cache of weights, begins inside the closure or around the call."""
    model, batch = oracles.mlp(), oracles.batch(16)
    closure = oracles.losses_of(model)

    def inside(*parts):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return closure(*parts).float()

    expected = function(model, inside, *batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        closure(*batch)
        got = function(model, lambda *parts: closure(*parts).float(), *batch)
    assert repr(got) == repr(expected)


@every_function
def test_the_default_device_may_be_another_than_the_models(function):
    """Of programs that call torch.set_default_device("cuda"); "meta" has no numbers at all."""
    model, batch = oracles.mlp(), oracles.batch(16)
    expected = function(model, oracles.losses_of(model), *batch)
    with torch.device("meta"):
        got = function(model, oracles.losses_of(model), *batch)
    assert repr(got) == repr(expected)


def test_noise_and_buffers_are_the_same_at_every_point():
    model = noisy_model()
    with torch.no_grad():
        noise = torch.get_rng_state()
        expected = float(oracles.losses_of(copy.deepcopy(model))(*oracles.batch(16)).double().mean())
        torch.set_rng_state(noise)
    zeros = [torch.zeros_like(param) for param in model.parameters() if param.requires_grad]
    landscape = diagnostics.loss_landscape(
        model, oracles.losses_of(model), *oracles.batch(16), directions=(zeros, zeros), points=3
    )
    assert landscape.losses.flatten().tolist() == [expected] * 9


@pytest.mark.parametrize("how", ["one Parameter", "one memory"])
def test_tied_weights_move_together(how):
    tied = oracles.mlp(dtype=torch.float64)
    tied[2] = nn.Linear(oracles.HIDDEN, oracles.HIDDEN, dtype=torch.float64)
    tied.insert(3, nn.Linear(oracles.HIDDEN, oracles.HIDDEN, dtype=torch.float64))
    tied[5] = nn.Linear(oracles.HIDDEN, oracles.CLASSES, dtype=torch.float64)
    single = copy.deepcopy(tied)
    tied[3].weight = tied[2].weight if how == "one Parameter" else nn.Parameter(tied[2].weight.data.T)
    single[3].weight = single[2].weight  # the reference: one Parameter, used twice
    if how == "one memory":
        single[3] = _Transposed(single[2].weight, single[3].bias)
    batch = oracles.batch(16, dtype=torch.float64)
    for name, function in FUNCTIONS.items():
        got, expected = (function(model, oracles.losses_of(model), *batch) for model in (tied, single))
        assert _numbers(got) == pytest.approx(_numbers(expected), rel=1e-9), name


class _Transposed(nn.Module):
    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, inputs):
        return F.linear(inputs, self.weight.T, self.bias)


def _numbers(result):
    if isinstance(result, diagnostics.LossLandscape):
        return result.losses.flatten().tolist()
    if isinstance(result, diagnostics.TopEigenvalue):
        return [result.eigenvalue, result.residual]
    return [number for row in (result if isinstance(result, list) else [result]) for number in row]


def test_importing_does_not_import_matplotlib():
    code = "import sys, esam_kernels.diagnostics; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
