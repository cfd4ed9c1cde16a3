"""What a CUDA graph cannot hold is refused at once, with what to do, and nothing is changed."""

from __future__ import annotations

import cuda_graph
import pytest
import torch
import torch.nn.functional as F
from graph_pairs import CPU, nothing_changes
from steps import Training, batches
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from esam_kernels import ESAM, captures, make_graphed_step
from esam_kernels.backends import unavailable
from esam_kernels.graphs import WARMUP_STEPS

pytestmark = pytest.mark.skipif(unavailable("native", CPU) is not None, reason="no backend on the CPU fuses updates")


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(captures, "_broken", [])
    return cuda_graph.install(monkeypatch)


class OwnSGD(torch.optim.SGD):
    pass


def tied(params):
    twin = nn.Parameter(params[0].detach())
    twin.data = params[0].data
    return [*params, twin]


def hooked(base):
    base.register_step_pre_hook(lambda *_: None)
    return base


REFUSED = {
    "a subclass": (
        lambda p: OwnSGD(p, lr=0.1),
        {},
        "OwnSGD cannot be .*: OwnSGD is neither SGD nor Adam nor AdamW of torch.optim itself. A graph can hold",
    ),
    "steps on the host": (
        lambda p: torch.optim.AdamW(p),
        {},
        r"AdamW counts its steps on the host \(parameter group 0\).* capturable=True or fused=True, or call opt",
    ),
    "others on the host": (
        lambda p: torch.optim.NAdam(p),
        {},
        r"NAdam counts its steps on the host \(parameter group 0\).*with capturable=True, or call optimizer.step",
    ),
    "a frozen rate": (
        lambda p: torch.optim.NAdam(p, lr=0.1, capturable=True),
        {},
        r"learning rate of parameter group 0 is 0.1, and would be frozen.*lr=torch.tensor\(0.1, device='cuda'\)",
    ),
    "no capture": (
        lambda p: torch.optim.Adagrad(p, lr=0.1),
        {},
        "Adagrad cannot be captured .*is neither SGD nor .*capturable=True. Use one of these, or call optimizer.step",
    ),
    "an unfused backend": (lambda p: torch.optim.SGD(p, lr=0.1), {"backend": "reference"}, "'reference' does not fuse"),
    # torch's own step, which asks for capturable=True before anything else, where it is captured
    "fused only": (
        lambda p: torch.optim.AdamW(tied(p), lr=torch.tensor(1e-3), fused=True),
        {},
        r"AdamW has fused=True without capturable=True \(parameter group 0\).*tied to each other.*with both, or call",
    ),
    "tied weights": (lambda p: torch.optim.SGD(tied(p), lr=0.1), {}, "parameters are tied to each other"),
    "hooks": (
        lambda p: hooked(torch.optim.SGD(p, lr=0.1)),
        {},
        "hooks on the base optimizer.*register them on the ESAM",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_base_optimizer_that_cannot_be_captured_is_refused(gpu, case):
    base, options, message = REFUSED[case]
    training = Training(CPU, "native")
    built = base(list(training.model.parameters()))
    params = [param for group in built.param_groups for param in group["params"]]
    training.optimizer = ESAM(params, built, **{"backend": "native", **options})
    with nothing_changes(training), pytest.raises(ValueError, match=message):
        make_graphed_step(training.optimizer, training.losses, *batches(CPU, 1)[0])


def test_global_hooks_are_refused(gpu):
    training = Training(CPU, "native")
    handle = register_optimizer_step_post_hook(lambda *_: None)
    try:
        with nothing_changes(training), pytest.raises(ValueError, match="or on all optimizers"):
            make_graphed_step(training.optimizer, training.losses, *batches(CPU, 1)[0])
    finally:
        handle.remove()


def test_models_on_several_devices_or_ranks_are_refused(gpu, monkeypatch):
    training = Training(CPU, "native")
    devices = {torch.device("cuda:0"), torch.device("cuda:1")}
    with pytest.MonkeyPatch.context() as patch, nothing_changes(training):
        patch.setattr(type(training.optimizer._perturbation.parameters), "devices", devices)
        with pytest.raises(ValueError, match="the parameters are on cuda:0 and cuda:1"):
            make_graphed_step(training.optimizer, training.losses, *batches(CPU, 1)[0])
    given = batches(CPU, 1)[0]
    for name in ("DistributedDataParallel", "fully_shard"):
        monkeypatch.setattr(type(training.optimizer._parallelism), "spread_by", name)
        message = f"the model is in {name}: a CUDA graph holds the step of one process.* Call optimizer.step"
        with nothing_changes(training), pytest.raises(ValueError, match=message):
            make_graphed_step(training.optimizer, training.losses, *given)
    monkeypatch.setattr(type(training.optimizer._parallelism), "spread_by", None)
    monkeypatch.setattr(type(training.optimizer), "sync_perturbation", True)
    with nothing_changes(training), pytest.raises(ValueError, match="built with sync_perturbation=True: a CUDA graph"):
        make_graphed_step(training.optimizer, training.losses, *given)


def test_a_batch_elsewhere_is_refused(gpu):
    training = Training(CPU, "native")
    inputs, targets = batches(CPU, 1)[0]
    with (
        nothing_changes(training),
        pytest.raises(ValueError, match=r"tensor 1 .* is on meta, the parameters are on cpu"),
    ):
        make_graphed_step(training.optimizer, training.losses, inputs, targets.to("meta"))


def test_an_array_in_a_batch_is_refused_where_the_step_is_made_and_where_it_runs(gpu):
    training = Training(CPU, "native", mask="element")
    inputs, targets = batches(CPU, 1)[0]
    message = "the batch holds a ndarray: give tensors, or .*torch.as_tensor makes a tensor of an array"
    with nothing_changes(training), pytest.raises(TypeError, match=f"sample_batch cannot be used: {message}"):
        make_graphed_step(training.optimizer, training.losses, inputs, targets.numpy())
    step = make_graphed_step(training.optimizer, training.losses, inputs, targets)
    for runs in range(WARMUP_STEPS + 1):
        with nothing_changes(training), pytest.raises(TypeError, match=message):
            step(inputs, targets.numpy())
        step(inputs, targets)
        assert gpu.replays == (runs == WARMUP_STEPS)


@pytest.mark.parametrize("rho", [0.05, 0.0])
def test_an_update_that_comes_to_be_impossible_inside_a_step_is_refused_and_its_rate_is_not_frozen(gpu, rho):
    """The closure adds a hook, after the optimizer has been looked at."""
    training = Training(CPU, "native", mask="element", rho=rho)
    base, handles = training.optimizer.base_optimizer, []

    def losses(inputs, targets):
        handles.append(base.register_step_pre_hook(lambda *_: None))
        return training.losses(inputs, targets)

    given = batches(CPU, 1)[0]
    step = make_graphed_step(training.optimizer, losses, *given)
    message = (
        "the update of SGD cannot be captured, since its learning rate would be frozen in the CUDA graph: there are "
        "step hooks on the base optimizer.* Call optimizer.step in place of the graphed step"
    )
    before = training.weights()
    with pytest.raises(RuntimeError, match=message):
        step(*given)
    assert all(map(torch.equal, before, training.weights()))
    assert not training.optimizer.state
    for handle in handles:
        handle.remove()
    training.step(given)


def test_perturbed_weights_are_refused(gpu):
    training = Training(CPU, "native", mask="element")
    given = batches(CPU, 1)[0]
    step = make_graphed_step(training.optimizer, training.losses, *given)
    training.optimizer.backward(training.losses(*given).mean())
    training.optimizer.first_step()
    with pytest.raises(RuntimeError, match="make_graphed_step while the weights are perturbed"):
        make_graphed_step(training.optimizer, training.losses, *given)
    with pytest.raises(RuntimeError, match="a graphed step while the weights are perturbed"):
        step(*given)
    training.optimizer.restore()
    for _ in range(WARMUP_STEPS + 1):
        step(*given)
    assert gpu.replays == 1


def test_what_comes_to_be_impossible_later_is_refused_before_the_step(gpu):
    training = Training(CPU, "native", mask="element")
    given = batches(CPU, 1)[0]
    step = make_graphed_step(training.optimizer, training.losses, *given)
    for _ in range(WARMUP_STEPS + 1):
        step(*given)
    handle = training.optimizer.base_optimizer.register_step_pre_hook(lambda *_: None)
    with nothing_changes(training), pytest.raises(ValueError, match="a replay runs no Python"):
        step(*given)
    handle.remove()
    step(*given)
    state = training.optimizer.state[training.model[0].weight]
    state["momentum_buffer"] = state["momentum_buffer"].t().contiguous().t()
    with (
        nothing_changes(training),
        pytest.raises(ValueError, match="'momentum_buffer' in the state of parameter group 0"),
    ):
        step(*given)
    assert gpu.replays == 2


def test_a_gradient_of_another_layout_is_copied_and_the_rate_is_still_read_on_the_device(gpu):
    def transpose(param):
        param.grad = param.grad.t().contiguous().t()

    weight = nn.Parameter(torch.randn(4, 5))
    weight.register_post_accumulate_grad_hook(transpose)
    optimizer = ESAM([weight], torch.optim.SGD, lr=0.0, momentum=0.0, mask="element", rho=0.0)
    inputs, targets = torch.randn(6, 5), torch.arange(6) % 4

    def losses(inputs, targets):
        return F.cross_entropy(inputs @ weight.t(), targets, reduction="none")

    step = make_graphed_step(optimizer, losses, inputs, targets)
    for _ in range(WARMUP_STEPS + 1):
        step(inputs, targets)
    moved = []
    for lr in (0.1, 0.2):
        before = weight.detach().clone()
        expected = torch.autograd.grad(losses(inputs, targets).mean(), weight)[0] * lr
        optimizer.param_groups[0]["lr"] = lr
        step(inputs, targets)
        moved.append((before - weight.detach(), expected))
    assert gpu.replays == 3
    for found, expected in moved:
        torch.testing.assert_close(found, expected)
