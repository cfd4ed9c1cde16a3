"""One training of the study: a mode with one choice of hyperparameters, on one seed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from benchmarks.study.modes import BY_NAME, Mode
from benchmarks.study.samples import Samples
from esam_kernels import ESAM, cross_entropy

MOMENTUM = 0.9


@dataclass(frozen=True)
class Trial:
    """The hyperparameters that the search chooses."""

    lr: float
    batch_size: int
    weight_decay: float
    rho: float | None = None

    def __str__(self) -> str:
        return " ".join(f"{name}={value:g}" for name, value in asdict(self).items() if value is not None)


@dataclass(frozen=True)
class Outcome:
    """What a training came to: shares of right answers in percent, the counted cost in units of SGD's step.

    ``wrong_in_selection`` is the percentage of B+, over all steps, whose labels are wrong; None where no data is chosen
    or no label is wrong.
    """

    train_accuracy: float
    validation_accuracy: float
    test_accuracy: float
    cost: float
    seconds: float
    wrong_in_selection: float | None = None


def train(
    mode: Mode | str,
    trial: Trial,
    samples: Samples,
    network: nn.Module,
    epochs: int,
    seed: int,
    bfloat16: bool = False,
) -> Outcome:
    """Train ``network`` in place, with cosine decay of the learning rate to 0.

    The label noise is in ``samples``. A last batch that is smaller than the others is left out. ``bfloat16``: under
    autocast.
    """
    mode = BY_NAME[mode] if isinstance(mode, str) else mode
    inputs, labels = samples.train
    steps = epochs * (len(labels) // trial.batch_size)
    if steps == 0:
        raise ValueError(f"a batch of {trial.batch_size} is more than the {len(labels)} training samples")
    base = {"lr": trial.lr, "momentum": MOMENTUM, "weight_decay": trial.weight_decay}
    optimizer, schedules = mode.optimizer(network, trial.rho, seed, steps, **base)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(seed)

    wrong = torch.zeros(len(labels), dtype=torch.bool) if samples.wrong is None else samples.wrong
    wrong_in_selection: list[float] = []

    def losses(batch: Tensor, target: Tensor, is_wrong: Tensor) -> Tensor:
        if mode.chooses_data and len(target) < trial.batch_size:  # this is B+
            wrong_in_selection.append(is_wrong.float().mean().item())
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            return cross_entropy(network(batch), target)

    start = time.perf_counter()
    cost = 0.0
    network.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels), generator=order).split(trial.batch_size):
            if len(chosen) < trial.batch_size:
                break
            cost += cost_of(optimizer, mode.sharpness_share)
            step(optimizer, losses, (inputs[chosen], labels[chosen], wrong[chosen]), mode.sharpness_share)
            rates.step()
            for schedule in schedules:
                schedule.step()
    seconds = time.perf_counter() - start
    accuracies = (accuracy(network, *part, bfloat16) for part in (samples.train, samples.validation, samples.test))
    chosen_wrong = None
    if wrong_in_selection and samples.wrong is not None:
        chosen_wrong = 100.0 * sum(wrong_in_selection) / len(wrong_in_selection)
    return Outcome(*accuracies, cost=cost / steps, seconds=round(seconds, 2), wrong_in_selection=chosen_wrong)


def cost_of(optimizer: torch.optim.Optimizer, sharpness_share: float = 1.0) -> float:
    """The counted cost of the next step, in units of SGD's."""
    if sharpness_share < 1.0:
        return 1.0 + sharpness_share  # pass 1 computes the gradients of all parameters, on a part of the batch
    return optimizer.relative_cost if isinstance(optimizer, ESAM) else 1.0


def step(
    optimizer: torch.optim.Optimizer,
    losses: Callable[..., Tensor],
    batch: tuple[Tensor, ...],
    sharpness_share: float = 1.0,
) -> None:
    """One step of ESAM, or of the plain base optimizer, on the tensors that ``losses`` takes.

    With a ``sharpness_share`` below 1 the update follows grad L_B(w) + grad L_Q(w + e) - grad L_Q(w), where B is the
    batch, Q its first samples, and e the perturbation of Q: SAM's gradient, with a control variate.
    """
    if isinstance(optimizer, ESAM) and sharpness_share < 1.0:
        few = max(2, round(sharpness_share * len(batch[0])))
        params = [param for group in optimizer.param_groups for param in group["params"]]
        first, others = tuple(part[:few] for part in batch), tuple(part[few:] for part in batch)
        weight = len(others[0]) / len(batch[0])
        (weight * losses(*others).mean()).backward()
        rest = [param.grad for param in params]
        optimizer.zero_grad()
        losses(*first).mean().backward()  # optimizer.backward leaves out the groups with rho = 0
        torch._foreach_add_(rest, [param.grad for param in params], alpha=-weight)
        optimizer.first_step(zero_grad=True)
        losses(*first).mean().backward()
        torch._foreach_add_([param.grad for param in params], rest)
        optimizer.second_step(zero_grad=True)
        return
    if isinstance(optimizer, ESAM):
        optimizer.step(losses, *batch)
        return
    optimizer.zero_grad()
    losses(*batch).mean().backward()
    optimizer.step()


@torch.no_grad()
def accuracy(network: nn.Module, inputs: Tensor, labels: Tensor, bfloat16: bool = False) -> float:
    """The share of right answers, in percent."""
    was_training = network.training
    network.eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        right = sum(
            (network(batch).argmax(dim=1) == target).sum().item()
            for batch, target in zip(inputs.split(1000), labels.split(1000))
        )
    network.train(was_training)
    return 100.0 * right / len(labels)
