"""What is installed, which backends can run here, and whether each computes what the reference computes."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from importlib import metadata

import torch
from torch import Tensor

from esam_kernels import backends
from esam_kernels.backends import extensions
from esam_kernels.backends.protocol import Backend

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Sizes around the vector widths, one over a block, and a matrix.
_SHAPES = ((1,), (7,), (64,), (33, 65))
# What the record of a build holds, and how it reads.
_FACTS = {"torch": "for torch", "architectures": "with", "compiler": "by", "sources": "from sources"}
_SEED, _STEP, _BOUND = 5, 3, round(0.6 * 2**32) - 1


def main() -> int:
    """Print the report. Returns 0 if every backend that is present is right, else 1."""
    print("To report a problem, paste this, from the first line to the last:\n\n```")
    for name, version in _versions():
        print(f"{name:<14}{version}")
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for name in ("native", "cuda"):
        print(f"{'_' + name:<14}{_build(name)}")
    failures = 0
    for device in devices:
        print(f"\n{device}: {_describe(device)}")
        failures += _report_default(device)
        for name in backends.NAMES:
            failures += _report(name, device)
    print(f"\n{'all that is present is right' if failures == 0 else f'{failures} checks failed'}\n```")
    return 0 if failures == 0 else 1


def _versions() -> Iterator[tuple[str, str]]:
    yield "system", platform.platform()
    yield "python", platform.python_version()
    for package in ("esam_kernels", "torch", "triton"):
        try:
            # torch.__version__ names the build too: the metadata of some wheels do not.
            yield package, torch.__version__ if package == "torch" else metadata.version(package)
        except metadata.PackageNotFoundError:
            yield package, "not installed" if package != "esam_kernels" else "run from its source folder"
    yield "CUDA", torch.version.cuda or "not in this build of torch"
    for variable, value in sorted(os.environ.items()):
        if variable.startswith("ESAM_KERNELS_") or variable == "TRITON_INTERPRET":
            yield "variable", f"{variable}={value}"


def _build(name: str) -> str:
    """What was built of the extension ``name``, on any machine, or the reason that its build has recorded."""
    if not extensions.is_present(name):
        return f"not built: {extensions.why_missing(name) or 'the build has recorded no reason'}"
    record = extensions.record(name)
    facts = [f"{label} {record[key]}" for key, label in _FACTS.items() if key in record]
    built = f"built {', '.join(facts)}" if facts else "built, without a record of how"
    _, reason = extensions.load(name)
    return built if reason is None else f"{built}, and of no use: {reason}"


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def _name(backend: Backend) -> str:
    return backend.__name__.removeprefix(f"{backends.__name__}.")


def _report_default(device: torch.device) -> int:
    try:
        print(f"  default backend: {_name(backends.resolve(None, device))}")
    except (ValueError, RuntimeError) as error:
        print(f"  no default backend: {error}")
        return 1
    return 0


def _report(name: str, device: torch.device) -> int:
    reason = backends.unavailable(name, device)
    if reason is not None:
        print(f"  {name:<11}not available: {reason}")
        return 0
    wrong = self_check(backends.load(name), device)
    print(f"  {name:<11}{'ok' if not wrong else 'WRONG: ' + ', '.join(wrong)}")
    return len(wrong)


def self_check(backend: Backend, device: torch.device) -> list[str]:
    """The operators of ``backend`` that disagree with the reference on ``device``, each with what was seen."""
    reference = backends.load("reference")
    wrong = []
    for name, check in _CHECKS.items():
        for dtype in _DTYPES:
            try:
                found, expected = (check(module, device, dtype) for module in (backend, reference))
                if not all(map(_agree, found, expected)):
                    wrong.append(f"{name} {dtype}: differs from the reference")
            except Exception as error:
                wrong.append(f"{name} {dtype}: {type(error).__name__}: {error}")
    return wrong


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Equal where nothing is rounded (integers), else to a few units in the last place."""
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    tolerance = 8 * torch.finfo(expected.dtype).eps
    return torch.allclose(found.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


def _tensors(device: torch.device, dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in _SHAPES]


def _perturb(backend: Backend, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    params, grads = _tensors(device, dtype, 0), _tensors(device, dtype, 1)
    groups, offsets = [0, 1, 0, 1], [0, 4, 12, 76]
    adaptive = [False, True]
    partials = backend.norm_partials(params, grads, groups, adaptive, 0.01)
    scale = torch.tensor([0.05, 0.5], dtype=torch.float64, device=device)
    random_state = torch.tensor([_SEED, _STEP, _BOUND], device=device)
    backend.perturb_(params, grads, [], groups, offsets, partials, scale, adaptive, 0.01, 1.0, 1e-12, random_state)
    moved = [param != old for param, old in zip(params, grads)]
    perturbed = [param.clone() for param in params]
    backend.restore_(params, grads)
    return [partials.sum().float(), *moved, *perturbed, *params]


def _sgd(backend: Backend, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    params, saved, grads, momentum = (_tensors(device, dtype, seed) for seed in range(4))
    backend.restore_sgd_(params, saved, grads, momentum, False, 0.1, None, 0.9, 0.0, 1e-3, True, False)
    return [*params, *momentum]


def _adam(backend: Backend, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    params, saved, grads = (_tensors(device, dtype, seed) for seed in range(3))
    first, second = ([torch.zeros_like(param) for param in params] for _ in range(2))
    steps = [torch.zeros((), device=device) for _ in params]
    eps = 1e-3  # float16 rounds torch's default, 1e-8, to 0, and some of the squares too
    backend.restore_adam_(
        params, saved, grads, first, second, [], steps, 0.01, None, 0.9, 0.999, eps, 0.01, False, False, True
    )
    return [*params, *first, *second, *steps]


def _cross_entropy(backend: Backend, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    logits = _tensors(device, dtype, 0)[3]
    target = torch.arange(33, device=device)
    target[5] = -100
    losses, normalizer = backend.cross_entropy_forward(logits, target, 0.1, -100)
    gradient = backend.cross_entropy_backward(torch.ones_like(losses), logits, target, normalizer, 0.1, -100)
    return [losses, normalizer, gradient]


def _select_and_gather(backend: Backend, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    rows = _tensors(device, dtype, 0)[3]
    before, after = rows[:, 0].float().round(), rows[:, 1].float().round()
    after[3] = torch.nan
    indices = backend.select(before, after, 17)
    # As integers, so that a single wrong bit counts.
    return [indices, *(row.view(torch.uint8) for row in backend.gather([rows], indices))]


_CHECKS: dict[str, Callable[[Backend, torch.device, torch.dtype], list[Tensor]]] = {
    "perturb and restore": _perturb,
    "SGD": _sgd,
    "Adam": _adam,
    "cross-entropy": _cross_entropy,
    "select and gather": _select_and_gather,
}
