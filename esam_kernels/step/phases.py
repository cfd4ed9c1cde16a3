"""What a step consists of: pass 1, w -> w + e, the choice of B+, w + e -> w and the update."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from esam_kernels import state
from esam_kernels.batches import batch_size, check_losses
from esam_kernels.distributed import Parallelism
from esam_kernels.perturbation.swp import StochasticWeightPerturbation
from esam_kernels.ranking import Head, HeadRecorder, RankingContext, make
from esam_kernels.ranking.head import own_parameter
from esam_kernels.selection import check_logits, num_selected, selected_from_logits_on, selected_on
from esam_kernels.step.perturbed_weights import PerturbedWeights
from esam_kernels.step.replay import RandomState
from esam_kernels.tensor_lists import GradientMarks, drop_gradients, gradients, inspect_graph, leaves

# The backward of reentrant checkpointing, in the graph of a loss.
_REENTRANT = "CheckpointFunctionBackward"
# In what torch says where somebody differentiates, or hooks a gradient, under no_grad.
_NO_GRAD_MESSAGES = ("does not require grad", "doesn't require gradient", "requires_grad=False")


def needs_gradients(error: RuntimeError) -> bool:
    """Whether losses failed under ``no_grad`` because they take gradients themselves."""
    return any(text in str(error) for text in _NO_GRAD_MESSAGES)


class Phases:
    """The phases of a step, for loops of the user's own and for the plans of :mod:`esam_kernels.step.plan`.

    :class:`esam_kernels.ESAM` documents each under the same name.
    """

    def __init__(
        self,
        perturbation: StochasticWeightPerturbation,
        parallelism: Parallelism,
        model: nn.Module | None,
        sync_perturbation: bool,
        head: nn.Linear | None = None,
    ) -> None:
        self.perturbation = perturbation
        self.parallelism = parallelism
        self._model = model
        self.sync_perturbation = sync_perturbation
        self.weights = PerturbedWeights(perturbation, parallelism, model)
        self.ranking = make(perturbation.settings.ranking)
        self._recorder = HeadRecorder(head) if head is not None and self.ranking.records_head else None
        self._head: Head | None = None
        # Whether a select of this step has used it up: it is not kept during pass 2.
        self._head_is_used = False
        self.replays_noise = True
        # Set while a step is captured: what remembers the random numbers of the first forward.
        self.remember_noise: Callable[[], Any] | None = None
        self._ran_backward = False
        self._evaluates_with_grad = False
        # How often the gradients were dropped or zeroed by the optimizer's own zero_grad.
        self.zeroed = 0
        #: The gradients that the last step, or a zero_grad in place since, left behind.
        self.marks = GradientMarks()
        self.zeroed_in_place = False

    def require(self, *, perturbed: bool, call: str) -> None:
        """Refuse ``call`` where the weights are perturbed and should not be, or the other way round.

        Raises:
            RuntimeError: it is refused.
        """
        if self.weights.is_open and not perturbed:
            raise RuntimeError(f"{call} while the weights are perturbed: second_step() or restore() has to come first")
        if perturbed and not self.weights.is_open:
            raise RuntimeError(f"{call} without first_step: the weights are not perturbed")

    @property
    def perturbs(self) -> bool:
        """Whether a parameter that trains is in a group with a radius."""
        groups = self.perturbation.base.param_groups
        radii = self.perturbation.radii
        if not any(radii):
            return False
        has_candidate = any(p.requires_grad for group, rho in zip(groups, radii) if rho > 0.0 for p in group["params"])
        # Where nothing trains at all, the step goes on and says so.
        return has_candidate or not self.perturbation.trained()

    def noise(self) -> Any:
        """The state of the random generators now, to be replayed; None where the forward at w + e draws its own."""
        if not self.replays_noise:
            return None
        if self.remember_noise is not None:
            return self.remember_noise()
        return RandomState(self.perturbation.parameters.devices)

    def drop_gradients(self) -> None:
        """Set every gradient to None."""
        self.zeroed += 1
        drop_gradients(self.perturbation.params)
        self._forget_pass_1()

    def note_zeroed(self) -> None:
        """The gradients were set to 0 in place: none of them is new."""
        self.zeroed += 1
        self.zeroed_in_place = True
        self.marks.set(self.perturbation.params)
        self._forget_pass_1()

    def follow(self, parallelism: Parallelism, gradients_are_old: bool) -> None:
        """The parameters are others than before; ``gradients_are_old`` says that no backward has run since the step."""
        if gradients_are_old:
            self.marks.set(self.perturbation.params)
        self.parallelism = parallelism
        self.weights = PerturbedWeights(self.perturbation, parallelism, self._model)
        if self._recorder is not None:
            self._recorder.forget_parameters()

    def backward(self, loss: Tensor) -> None:
        """Pass 1: the gradients of the parameters that are drawn."""
        perturbation = self.perturbation
        self.require(perturbed=False, call="backward")
        if not perturbation.ascent.two_passes:
            raise RuntimeError(
                f'ascent="{perturbation.settings.ascent}" has one pass a step: call first_step(), then the forward and '
                "loss.backward(), then second_step()"
            )
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"backward takes the mean loss, one number, got {shape}: call backward(losses.mean())")
        drawn = [perturbation.params[i] for i in perturbation.drawn()]
        trained = perturbation.trained()
        if not trained:
            raise RuntimeError("no parameter requires a gradient: nothing can be trained")
        recorded = self._recorder.pass_1() if self._recorder is not None else contextlib.nullcontext()
        takes_all = len(drawn) == len(trained) and (self.parallelism.synchronizes or not self._others(loss))
        with contextlib.nullcontext() if self.parallelism.synchronizes else self.unreduced(takes_all), recorded:
            if perturbation.parameters.is_sharded or takes_all:
                loss.backward()
            elif drawn:
                self._backward_of_some(loss, drawn)
        self._ran_backward = True

    def unreduced(self, takes_all: bool) -> contextlib.AbstractContextManager[None]:
        """Around the backward of pass 1 inside ``no_sync``: an error where DDP averages its gradients all the same.

        Args:
            takes_all: whether it computes all gradients. With ``sync_perturbation`` these may be averaged at once, as
                they are averaged later anyway; DDP cannot average some of them.
        """
        return contextlib.nullcontext() if self.sync_perturbation and takes_all else self.parallelism.unreduced()

    def _others(self, loss: Tensor) -> list[Tensor]:
        """What the loss can be differentiated for beside the parameters: those of another optimizer, for one."""
        return leaves(loss, self.perturbation.params)

    def _backward_of_some(self, loss: Tensor, drawn: list[Tensor]) -> None:
        """The gradients of the parameters ``drawn``, and of no others."""
        if self.parallelism.synchronizes:
            raise RuntimeError(
                "the first pass, forward and backward, belongs inside model.no_sync(): it computes some of the "
                "gradients, and DistributedDataParallel would wait for all of them"
            )
        is_reentrant, hides_some = inspect_graph(loss, drawn, _REENTRANT)
        settings = self.perturbation.settings
        if is_reentrant and settings.mask == "tensor" and settings.beta < 1.0:
            raise RuntimeError(
                "the forward uses torch.utils.checkpoint with use_reentrant=True, which can only compute the gradients "
                "of all parameters, and this step needs a part of them: checkpoint with use_reentrant=False, or build "
                'the optimizer with mask="element" or beta=1'
            )
        if not (is_reentrant or hides_some):
            extra = [] if self._recorder is None else self._recorder.also_needed(drawn, loss)
            own = gradients(extra)
            drop_gradients(extra)
            loss.backward(inputs=[*drawn, *extra])
            for param, grad in zip(extra, own):
                param.grad = grad
            return
        # A function in the graph runs a backward of its own inside: all gradients, and then only those that were drawn.
        wanted = set(map(id, drawn))
        others = [param for param in self.perturbation.params if id(param) not in wanted] + self._others(loss)
        before = gradients(others)
        drop_gradients(others)
        loss.backward()
        for param, grad in zip(others, before):
            param.grad = grad

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """w -> w + e."""
        self.require(perturbed=False, call="first_step")
        self._take_head()
        self.weights.open(
            gradients_are_dropped=zero_grad,
            may_lack_gradients=self._ran_backward,
            average_over=self.parallelism.process_group if self.sync_perturbation else None,
        )
        self._listen(False)
        self._ran_backward = False
        if zero_grad:
            self.drop_gradients()

    def evaluate(self, losses: Callable[..., Any], batch: tuple[Any, ...], noise: Any = None) -> Any:
        """What the closure returns at w + e, without gradients, with the random numbers that ``noise`` holds.

        A closure that differentiates by itself (a gradient penalty, a force field) needs them: it is called again with
        gradients then, and from now on at once.
        """
        replay = contextlib.nullcontext if noise is None else noise.replay
        if not self._evaluates_with_grad:
            try:
                with torch.no_grad(), replay():
                    return losses(*batch)
            except RuntimeError as error:
                if not needs_gradients(error):
                    raise
                self._evaluates_with_grad = True
        with replay():
            return losses(*batch)

    def num_selected(self, samples: int) -> int:
        """k, the size of B+. Where nothing is perturbed it is the whole batch."""
        return num_selected(self.perturbation.settings.gamma, samples) if self.perturbs else samples

    def select(self, loss_before: Tensor, loss_after: Tensor | None, *tensors: Any) -> Any:
        """B+ of a batch."""
        torch.clear_autocast_cache()  # torch 2.8 reuses the copies of weights that a forward without gradients made
        samples = batch_size(tensors)
        check_losses(loss_before, samples, "loss_before")
        if not self.ranking.needs_loss_after and loss_after is not None:
            raise ValueError(
                f"ranking={self.perturbation.settings.ranking!r} needs no losses at the perturbed weights: "
                "give None as loss_after"
            )
        if self.ranking.needs_loss_after:
            check_losses(loss_after, samples, "loss_after")
        k = self.num_selected(samples)
        if k == samples:
            return tensors[0] if len(tensors) == 1 else tensors
        if loss_after is None:
            loss_after = self.scores(loss_before.detach(), tensors)
            loss_before = torch.zeros_like(loss_after)
        if self.ranking.needs_loss_after and self._maximizes():
            loss_before, loss_after = loss_after, loss_before
        return selected_on(self.perturbation.backend, k, loss_before, loss_after, *tensors)

    def scores(self, losses: Tensor, batch: tuple[Any, ...]) -> Tensor:
        """What the ranking makes of pass 1."""
        self._take_head()
        if self._head is None and self.ranking.needs_head:
            assert self._recorder is not None
            if self._head_is_used:
                raise RuntimeError(
                    "a second select in one step: the first one has used what the ranking reads of pass 1. Give one "
                    "call all tensors, select(loss_before, None, inputs, targets)"
                )
            raise RuntimeError(self._recorder.problem)
        settings = self.perturbation.settings
        context = RankingContext(losses, batch, self._head, settings.seed, self.perturbation.step)
        scores = self.ranking.scores(context)
        if scores.shape != losses.shape:
            raise ValueError(
                f"the head, the last linear layer, saw {len(scores)} samples in the first pass, the batch has "
                f"{len(losses)}: the first pass has to see the batch that select is given, and nothing else"
            )
        self._head, self._head_is_used = None, True
        return scores

    def _take_head(self) -> None:
        """Take what pass 1 left at the head, while its weights are still those of pass 1."""
        if self._recorder is None or self._head is not None or not self._recorder.has_recorded:
            return
        head = self._recorder.head
        self._head = self._recorder.take(
            (self._is_adaptive(own_parameter(head, "weight")), self._is_adaptive(own_parameter(head, "bias"))),
            self.perturbation.settings.eta,
        )
        if self._head is not None:
            self._recorder.forget()

    def _is_adaptive(self, param: Tensor | None) -> bool:
        """Whether T_w of this parameter's group is not 1."""
        parameters = self.perturbation.parameters
        place = next((i for i, own in enumerate(parameters.tensors) if own is param), None)
        return place is not None and bool(self.perturbation.base.param_groups[parameters.groups[place]]["adaptive"])

    def _forget_pass_1(self) -> None:
        """The gradients of pass 1 are gone, and so is what it left at the head."""
        self._ran_backward = False
        if self._recorder is not None and not self.weights.is_open:
            self._recorder.forget()
            self._head, self._head_is_used = None, False

    def _listen(self, listens: bool) -> None:
        """Pass 1 is recorded at the head, pass 2 is not."""
        if self._recorder is not None:
            self._recorder.is_listening = listens
            if listens:
                self._recorder.forget()
                self._head, self._head_is_used = None, False

    def _maximizes(self) -> bool:
        """Whether the base optimizer looks for large losses: the worse side is then where they fall."""
        return all(group.get("maximize") for group in self.perturbation.base.param_groups)

    def select_from_logits(
        self,
        loss_before: Tensor,
        logits_after: Tensor,
        target: Tensor,
        *tensors: Any,
        label_smoothing: float,
        ignore_index: int,
        class_dim: int | None = None,
    ) -> Any:
        """B+ of a batch, from the logits at w + e."""
        samples = batch_size(tensors)
        batch_size((logits_after, *tensors))
        check_losses(loss_before, samples, "loss_before")
        check_logits(logits_after, target, label_smoothing, ignore_index, class_dim)
        if not self.ranking.needs_loss_after or self._maximizes():
            raise ValueError('select_from_logits needs ranking="rise" and a base optimizer that minimizes: call select')
        k = self.num_selected(samples)
        if k == samples:
            return tensors[0] if len(tensors) == 1 else tensors
        return selected_from_logits_on(
            self.perturbation.backend,
            k,
            loss_before,
            logits_after,
            target,
            *tensors,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            class_dim=class_dim,
        )

    @torch.no_grad()
    def second_step(self) -> None:
        """w + e -> w, and the base optimizer's update."""
        self.require(perturbed=True, call="second_step")
        self.restore_and_update()
        self.end()

    @torch.no_grad()
    def update(self) -> None:
        """The base optimizer's update, and w + e -> w before it where the weights are perturbed."""
        if self.weights.is_open:
            self.restore_and_update()
        else:
            self.perturbation.check_gradients(may_lack=True)
            self.perturbation.update()
        self.end()

    def restore_and_update(self) -> None:
        """:meth:`second_step` up to :meth:`end`."""
        try:
            self.weights.update()
        finally:
            if not self.weights.is_open:  # also where the weights are back, and the base optimizer's own step raised
                self._listen(True)

    def end(self) -> None:
        """The update is done, or was skipped by a GradScaler."""
        params = self.perturbation.params
        self.perturbation.ascent.remember(params)
        state.note(self.perturbation)
        self.zeroed_in_place = False
        self.marks.set(params)

    @torch.no_grad()
    def restore(self) -> None:
        """w + e -> w with no update."""
        if self.weights.is_open:
            self.weights.restore()
            self._listen(True)

    def give_up(self) -> None:
        """After an exception, perhaps inside a forward: w + e -> w."""
        if self.weights.is_open:
            self.parallelism.leave_forward()
        self.restore()

    def close(self) -> None:
        """Leave no hook at the head: this optimizer is not used any more."""
        if self._recorder is not None:
            self._recorder.close()

    def abandon(self) -> None:
        """Forget a step of which nothing was computed: that of a CUDA graph which failed to be captured."""
        self.weights.abandon()
        self._listen(True)
        self._ran_backward = False
