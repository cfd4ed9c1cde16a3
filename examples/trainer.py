"""One training: a model, its optimizer and schedules, epoch by epoch, in a state that can be saved."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from data import DataSet, UserError
from learning_rate import build_lr_schedule
from models import build_model
from torch import Tensor

from esam_kernels import ESAM, SAM, cross_entropy, frozen_batch_norm, make_graphed_step, normalization_groups
from esam_kernels.perturbation.ascent import DEFAULT_RHO as DEFAULT_RHOS
from esam_kernels.schedules import LinearSchedule, PhaseSchedule, Schedule

# ESAM with one pass a step, and its ascent.
ONE_PASS = {"esam-previous": "previous", "esam-momentum": "momentum"}
OPTIMIZERS = ("sgd", "sam", "asam", "esam", "esam-swp", "esam-sds", *ONE_PASS)
# Those that choose B+.
RANKED = {"esam", "esam-sds"}
# Those that can take a part of the batch in pass 1.
SHORT_ASCENT = {"esam", "esam-swp"}
PERTURBED = ("all", "normalization")
# The radii of the papers: Foret et al. (2021) for SAM, Kwon et al. (2021) for ASAM.
DEFAULT_RHO = DEFAULT_RHOS["current"]
DEFAULT_RHO_ASAM = 0.5
DEFAULT_BETA, DEFAULT_GAMMA = 0.6, 0.5
# Pixels a channel in a batch of the evaluation: bounds its memory, and has no effect on the result.
EVALUATION_PIXELS = 1000 * 32 * 32


def build_optimizer(name: str, model: torch.nn.Module, options: argparse.Namespace) -> torch.optim.Optimizer:
    """SGD, or SGD within SAM or ESAM.

    ``esam-swp`` and ``esam-sds`` are ESAM with one of its two parts, ``esam-previous`` and ``esam-momentum`` ESAM with
    one pass a step.
    """
    sgd = {"lr": options.lr, "momentum": options.momentum, "weight_decay": options.weight_decay}
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), **sgd)
    rho = default_rho(name) if options.rho is None else options.rho
    params: Any = normalization_groups(model, rho) if options.perturb == "normalization" else model.parameters()
    if name in ("sam", "asam"):
        return SAM(params, torch.optim.SGD, rho=rho, adaptive=name == "asam", model=model, **sgd)
    return ESAM(
        params,
        torch.optim.SGD,
        rho=rho,
        ranking=options.ranking if name in RANKED else "rise",
        beta=beta_of(name, options),
        gamma=gamma_of(name, options),
        mask=options.mask,
        ascent=ONE_PASS.get(name, "current"),
        ascent_share=options.ascent_share if name in SHORT_ASCENT else 1.0,
        model=model,
        **sgd,
    )


def default_rho(name: str) -> float:
    return DEFAULT_RHO_ASAM if name == "asam" else DEFAULT_RHOS[ONE_PASS.get(name, "current")]


def beta_of(name: str, options: argparse.Namespace) -> float:
    """Without an option one pass perturbs all weights: it has no first backward pass that could be shortened."""
    if name == "esam-sds":
        return 1.0
    default = 1.0 if name in ONE_PASS else DEFAULT_BETA
    return default if options.beta is None else options.beta


def gamma_of(name: str, options: argparse.Namespace) -> float:
    """Selecting data takes two passes, and the whole batch in the first."""
    if name in RANKED:
        default = DEFAULT_GAMMA if options.ascent_share == 1.0 or name not in SHORT_ASCENT else 1.0
        return default if options.gamma is None else options.gamma
    return 1.0


class Trainer:
    """Trains one model with one optimizer. ``history`` has an entry for each finished epoch."""

    def __init__(self, name: str, seed: int, data: DataSet, options: argparse.Namespace) -> None:
        self.name, self.seed, self.options = name, seed, options
        self.device = data.device
        memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
        self.data = replace(data, memory_format=memory_format) if options.channels_last else data
        torch.manual_seed(seed)
        try:
            self.model = self._network()
            self.model.to(self.device, memory_format=memory_format)
            self.optimizer = build_optimizer(name, self.model, options)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{name}: {error}") from None
        self._sharpness_aware_step: Callable[..., Tensor] | None = None
        self.gamma_schedule = self._gamma_schedule()
        self.rho_schedule = self._rho_schedule()
        self.lr_schedule = self._lr_schedule()
        self.history: list[dict[str, float]] = []

    def _network(self) -> torch.nn.Module:
        channels, size = self.data.image_shape[:2]
        return build_model(self.options.model, channels, size, self.data.classes)

    def _gamma_schedule(self) -> LinearSchedule | None:
        """gamma from 1 down to its value over the share ``gamma_warmup`` of all steps."""
        steps = round(self.options.gamma_warmup * self.options.epochs * self.steps_per_epoch)
        if not isinstance(self.optimizer, ESAM) or self.optimizer.gamma == 1.0 or steps == 0:
            return None
        return LinearSchedule(self.optimizer, "gamma", 1.0, self.optimizer.gamma, total_iters=steps)

    def _rho_schedule(self) -> Schedule | None:
        """rho from 0 up to its value over the share ``rho_warmup`` of all steps, or 0 outside ``phase``."""
        if not isinstance(self.optimizer, ESAM):
            return None
        total = self.options.epochs * self.steps_per_epoch
        steps = round(self.options.rho_warmup * total)
        if self.options.phase != (0.0, 1.0):
            start, stop = (round(share * total) for share in self.options.phase)
            return PhaseSchedule(
                self.optimizer, "rho", self.optimizer.param_groups[0]["rho"], start, max(stop, start + 1)
            )
        if steps == 0:
            return None
        return LinearSchedule(self.optimizer, "rho", 0.0, self.optimizer.param_groups[0]["rho"], total_iters=steps)

    def _lr_schedule(self) -> torch.optim.lr_scheduler.LRScheduler | None:
        options = self.options
        return build_lr_schedule(
            self.optimizer, options.lr_schedule, options.epochs, options.lr_warmup, self.steps_per_epoch
        )

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.data.train_labels) // self.options.batch_size)

    def losses(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of each sample, shape (b,)."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.amp == "bf16"):
            logits = self.model(images)
        return cross_entropy(logits, labels, label_smoothing=self.options.label_smoothing)

    def _make_step(self, images: Tensor, labels: Tensor) -> Callable[..., Tensor]:
        """The step of SAM or ESAM, as one CUDA graph for batches like this one where that is wanted."""
        if self.options.graph and self.device.type == "cuda":
            return make_graphed_step(self.optimizer, self.losses, images, labels)
        return partial(self.optimizer.step, self.losses, micro_batch=self.options.micro_batch)

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One step of training; returns the mean loss of the batch, as the optimizer's ``step`` does, on the device."""
        if isinstance(self.optimizer, ESAM):
            if self._sharpness_aware_step is None:
                self._sharpness_aware_step = self._make_step(images, labels)
            loss = self._sharpness_aware_step(images, labels)
        else:
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.losses(images, labels).mean()
            loss.backward()
            self.optimizer.step()
        for schedule in (self.gamma_schedule, self.rho_schedule, self.lr_schedule):
            if schedule is not None:
                schedule.step()
        return loss.detach()

    def train_epoch(self, on_step: Callable[[], Any] = lambda: None) -> None:
        """Train for one epoch, measure on the test set, and add an entry to ``history``.

        All that is random in an epoch follows from the seed and the epoch's number, so that a resumed training and an
        undisturbed one draw the same numbers, and trainings beside each other do not disturb one another.
        """
        epoch = len(self.history)
        epoch_seed = self.seed * 1_000_003 + epoch
        torch.manual_seed(epoch_seed)
        generator = torch.Generator(self.device).manual_seed(epoch_seed)
        self.model.train()
        total = torch.zeros((), device=self.device)
        cost = steps = 0.0
        start = self._now()
        for images, labels in self.data.training_batches(self.options.batch_size, generator):
            cost += self.optimizer.relative_cost if isinstance(self.optimizer, ESAM) else 1.0
            steps += 1
            total += self.step(images, labels) * len(labels)
            on_step()
        seconds = self._now() - start
        loss = total.item() / len(self.data.train_labels)
        entry = {"epoch": epoch + 1, "seconds": seconds, "cost": cost / steps, "train_loss": loss}
        self.history.append({**entry, **self.evaluate()})

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and accuracy (in %) on the test set."""
        self.model.eval()
        correct, loss = torch.zeros(2, device=self.device)
        for images, labels in self.data.test_batches(EVALUATION_PIXELS // self.data.image_shape[1] ** 2):
            logits = self.model(images)
            correct += (logits.argmax(dim=1) == labels).sum()
            loss += cross_entropy(logits, labels).sum()
        samples = len(self.data.test_labels)
        return {"test_loss": loss.item() / samples, "test_accuracy": 100.0 * correct.item() / samples}

    def sharpness(self, rho: float) -> float:
        """The mean rise of the training loss under SAM's perturbation of radius ``rho``, batch by batch.

        With BatchNorm in training mode, as the optimizers see it; changes neither weights nor statistics.
        """
        self.model.train()
        probe = SAM(self.model.parameters(), torch.optim.SGD, rho=rho, lr=0.0, flatten=False)
        rise, samples = torch.zeros((), device=self.device), 0
        with frozen_batch_norm(self.model):
            for inputs, labels in self.data.plain_training_batches(self.options.batch_size):
                samples += len(labels)
                before = self.losses(inputs, labels)
                probe.zero_grad()
                probe.backward(before.mean())
                probe.first_step(zero_grad=True)
                with torch.no_grad():
                    rise += (self.losses(inputs, labels) - before).sum()
                probe.restore()
        return rise.item() / samples

    def result(self) -> dict[str, Any]:
        """What the report says about this training."""
        rho = DEFAULT_RHO if self.options.rho is None else self.options.rho
        return {
            "optimizer": self.name,
            "seed": self.seed,
            "images": len(self.data.train_labels),
            "sharpness": self.sharpness(rho),
            "history": self.history,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next epoch depends on; the random state follows from the seed and the epoch."""
        parts = {"model": self.model, "optimizer": self.optimizer}
        schedules = {name: getattr(self, name) for name in ("gamma_schedule", "rho_schedule", "lr_schedule")}
        parts |= {name: schedule for name, schedule in schedules.items() if schedule is not None}
        return {"history": self.history, **{name: part.state_dict() for name, part in parts.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = state["history"]
        for name in state.keys() - {"history"}:
            getattr(self, name).load_state_dict(state[name])
