"""The raw operators: torch's own checks of schemas, fakes and mutation, and their argument checks."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from esam_kernels import SAM, ops
from esam_kernels.backends import ENVIRONMENT_VARIABLE, NAMES, load, resolve, unavailable
from esam_kernels.ops import registration

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def tensors(count=2):
    shapes = [(4, 3), (5,)][:count]
    return [torch.randn(shape) for shape in shapes]


def blocks():
    return tensors(), tensors()


SGD = (0.1, None, 0.9, 0.0, 1e-2, True, False)
ADAM = (0.1, None, 0.9, 0.999, 1e-8, 1e-2, True, False, True)


def samples():
    partials = torch.rand(ops.NUM_PARTIALS, dtype=torch.float64)
    scale = torch.tensor([0.1], dtype=torch.float64)
    random_state = torch.tensor([1, 2, 2**31])
    logits, target = torch.randn(6, 5), torch.randint(0, 5, (6,))
    losses, normalizer = ops.cross_entropy_forward(logits, target, 0.1, -100)
    perturb = ([0, 0], [0, 12], partials, scale, [True], 0.1, 1.5, 1e-12)
    return {
        "norm_partials": (*blocks(), [0, 1], [False, True], 0.1),
        "perturb_": (*blocks(), tensors(), *perturb, random_state),
        "perturb_ without backups": (*blocks(), [], *perturb, None),
        "restore_": blocks(),
        "restore_sgd_": (*blocks(), tensors(), tensors(), False, *SGD),
        "restore_sgd_ with a tensor as lr": (*blocks(), tensors(), tensors(), True, 0.0, torch.tensor(0.1), *SGD[2:]),
        "restore_sgd_ without momentum": (*blocks(), tensors(), [], False, 0.1, None, 0.0, 0.0, 0.0, False, True),
        "restore_adam_": (
            *blocks(),
            tensors(),
            tensors(),
            [t.square() for t in tensors()],
            [t.square() for t in tensors()],
            [torch.tensor(3.0), torch.tensor(3.0)],
            *ADAM,
        ),
        "cross_entropy_forward": (logits, target, 0.1, -100),
        "cross_entropy_forward of probabilities": (logits.half(), logits.softmax(1), 0.1, -100),
        "cross_entropy_backward": (losses, logits, target, normalizer, 0.1, -100),
        "select": (losses, torch.rand(6), 3),
        "select_gather": (losses, torch.rand(6), [logits, target], 3),
        "select_gather of logits": (losses, logits, [logits, torch.randn(6, 3, 2, 2)], 3, target, 0.1, 2),
        "gather": ([logits, torch.randn(6, 3, 2, 2).to(memory_format=torch.channels_last)], torch.tensor([1, 4])),
    }


@pytest.mark.parametrize("name", list(samples()))
def test_opcheck(name):
    operator = getattr(torch.ops.esam_kernels, name.split()[0]).default
    torch.library.opcheck(operator, samples()[name], test_utils=CHECKS)


def test_every_operator_is_checked():
    registered = {
        name.removeprefix("esam_kernels::")
        for name in torch._C._dispatch_get_all_op_names()
        if "esam_kernels::" in name
    }
    assert registered == {name.split()[0] for name in samples()}


@pytest.mark.parametrize("name", ["perturb_", "restore_", "restore_sgd_", "restore_adam_"])
def test_what_is_mutated_is_seen_by_autograd(name):
    arguments = samples()[name]
    params = arguments[0]
    versions = [p._version for p in params]
    getattr(ops, name)(*arguments)
    assert all(p._version > version for p, version in zip(params, versions))


def test_restored_updates_are_those_of_torchs_optimizers():
    params, backups, grads, buffers, *rest = samples()["restore_sgd_"]
    expected = [b.clone() for b in backups]
    plain = torch.optim.SGD(expected, lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True)
    for p, grad, buffer in zip(expected, grads, buffers):
        p.grad = grad.clone()
        plain.state[p]["momentum_buffer"] = buffer.clone()
    ops.restore_sgd_(params, backups, grads, buffers, *rest)
    plain.step()
    assert all(torch.equal(a, b) for a, b in zip(params, expected))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("norm_partials", {0: [], 1: [], 2: []}, "params is empty"),
        ("norm_partials", {2: [0]}, "groups has 1 numbers, params has 2"),
        ("norm_partials", {2: [0, 2]}, r"groups must lie in \[0, 2\)"),
        ("norm_partials", {1: [torch.randn(4, 3)]}, "grads has 1 tensors, params has 2"),
        ("norm_partials", {1: [torch.randn(3, 4), torch.randn(5)]}, r"grads\[0\].*\(3, 4\).*does not match"),
        ("norm_partials", {1: [torch.randn(4, 3).double(), torch.randn(5)]}, r"grads\[0\] \(torch.float64"),
        ("perturb_", {4: [0, 13]}, "multiples of 4"),
        ("perturb_", {4: [0]}, "offsets has 1 numbers for 2"),
        ("perturb_", {2: [torch.randn(4, 3)]}, "backups has 1 tensors"),
        ("restore_", {1: []}, "backups has 0 tensors"),
        ("restore_sgd_", {3: []}, "momentum_buffers has 0 tensors"),
        ("restore_adam_", {6: []}, "steps has 0 tensors"),
        ("restore_adam_", {5: []}, "max_exp_avg_sqs has 0 tensors"),
        ("cross_entropy_forward", {0: torch.randn(6, 5, 2)}, "logits must be floating point"),
        ("cross_entropy_forward", {1: torch.zeros(6, dtype=torch.int32)}, "target must be int64"),
        ("select", {2: 7}, r"k must lie in \[1, 6\], got 7"),
        ("select", {2: 0}, "k must lie in"),
        ("select", {1: torch.rand(5)}, "loss_before has 6 samples, loss_after has 5"),
        ("select", {0: torch.rand(6, 1)}, "one loss per sample"),
        ("select_gather", {3: 7}, r"k must lie in \[1, 6\], got 7"),
        ("select_gather", {1: torch.rand(5)}, "before has 6 samples, after has 5"),
        ("select_gather", {1: torch.rand(6, 5)}, r"after must hold one loss per sample"),
        ("select_gather of logits", {4: torch.zeros(6, 2)}, "target must be int64"),
        ("select_gather", {2: [torch.tensor(1.0)]}, r"tensors\[0\] has no batch dimension"),
        ("gather", {1: torch.tensor([1.0])}, "indices must be int64"),
        ("gather", {0: [torch.tensor(1.0)]}, r"tensors\[0\] has no batch dimension"),
    ],
)
def test_wrong_arguments_are_refused(name, change, message):
    arguments = list(samples()[name])
    for position, value in change.items():
        arguments[position] = value
    with pytest.raises(ValueError, match=message):
        getattr(ops, name.split()[0])(*arguments)


def test_a_backend_that_is_not_available_is_an_error_that_says_how_to_get_it(monkeypatch):
    cpu = torch.device("cpu")
    assert unavailable("reference", cpu) is None
    assert unavailable("cuda", cpu)
    with pytest.raises(RuntimeError, match=r"backend 'cuda' is not available for cpu tensors: .") as refusal:
        resolve("cuda", cpu)
    others = ", ".join(name for name in NAMES if unavailable(name, cpu) is None)
    assert str(refusal.value).endswith(f". Name one of those that are ({others}), or none")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cuda")
    by_variable = rf"backend 'cuda' \({ENVIRONMENT_VARIABLE}=cuda\) is not available for cpu tensors: ."
    with pytest.raises(RuntimeError, match=by_variable):
        ops.select(torch.rand(3), torch.rand(3), 1)


def test_an_unknown_backend_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="unknown backend 'fast': choose one of reference, native, triton, cuda"):
        ops.select(torch.rand(3), torch.rand(3), 1, backend="fast")


def test_the_environment_chooses_the_backend_and_the_argument_goes_before_it(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "nonsense")
    assert resolve("reference", torch.device("cpu")) is load("reference")
    refusal = f"^{ENVIRONMENT_VARIABLE} must be one of reference, native, triton, cuda, got 'nonsense'$"
    with pytest.raises(ValueError, match=refusal):
        resolve("", torch.device("cpu"))
    with pytest.raises(ValueError, match=refusal):
        SAM([torch.nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        resolve("fast", torch.device("cpu"))


def test_an_optimizer_reads_the_environment_when_it_is_built(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = SAM([weight], torch.optim.SGD, lr=0.5, rho=0.5)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cuda")  # which serves no tensor of the CPU
    optimizer.step(lambda x: (weight * x).sum(dim=1), torch.tensor([[0.0, 2.0]]))
    assert weight.tolist() == [3.0, 3.0]


class Watching(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function.name())
        return function(*args, **(kwargs or {}))


def test_operators_are_seen_by_who_looks_on():
    arguments = samples()["norm_partials"]
    with torch.no_grad():
        expected = ops.norm_partials(*arguments)
        with Watching() as watching:
            assert torch.equal(ops.norm_partials(*arguments), expected)
        with torch.profiler.profile() as profiled:
            assert torch.equal(ops.norm_partials(*arguments), expected)
    assert "esam_kernels::norm_partials" in watching.seen
    assert "esam_kernels::norm_partials" in {event.key for event in profiled.key_averages()}


def test_operators_go_without_the_dispatcher_where_nobody_looks_on():
    seen = []

    def look(x):
        seen.append(registration._nobody_looks_on())
        return x

    look(None)
    with torch.no_grad():
        look(None)
        with Watching():
            look(None)
        torch.vmap(look)(torch.zeros(2))
        torch.jit.trace(look, torch.zeros(2), check_trace=False)
    assert seen == [False, True, False, False, False]


@pytest.mark.parametrize("container", [tuple, list])
def test_lists_of_tensors_may_be_tuples_and_given_by_name(container):
    weights, saved = tensors(), tensors()
    with torch.no_grad():
        ops.restore_(params=container(weights), backups=container(saved))
        (rows,) = ops.gather(tensors=container([weights[0]]), indices=torch.tensor([1]))
    assert all(torch.equal(w, s) for w, s in zip(weights, saved))
    assert torch.equal(rows, weights[0][1:2])
