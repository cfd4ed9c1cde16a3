"""The loss of a batch as a function of a model's weights, measured without leaving a trace.

Every evaluation starts from the same buffers and the same random state: BatchNorm's running statistics, spectral norms
and dropout masks are those of the first one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from esam_kernels import distributed
from esam_kernels.backends.reference import compute_dtype
from esam_kernels.batches import batch_size, losses_and_rest, split
from esam_kernels.optimizer import ESAM
from esam_kernels.perturbation.flat_buffer import is_dense, owners
from esam_kernels.ranking.head import unrecorded
from esam_kernels.selection import gather
from esam_kernels.step.phases import needs_gradients
from esam_kernels.step.replay import RandomState, is_writable

Result = TypeVar("Result")
Vector = list[Tensor]
"""One tensor for each of ``Probe.weights``, of its shape and strides, in float32 or, where the weight is, float64."""
Derivative = tuple[Tensor | None, ...]
"""A gradient for each parameter that trains, as autograd returns them."""


class Probe:
    """L_B(w), its gradient, and L_B at other weights.

    Use it as a context manager: on leaving, weights, gradients, ``requires_grad``, buffers and training modes are those
    from before.

    Args:
        model: any module whose parameters are dense and not sharded.
        closure: ``closure(*batch)`` returns one loss per sample, shape (b,), or a tuple that begins with them.
        batch: tensors or pytrees of tensors with the samples in front.
        micro_batch: at most so many samples at a time; None: all at once.

    ``weights`` are the parameters that train, those in the same memory once.

    Raises:
        TypeError: ``model`` is no module, or ``closure`` cannot be called.
        ValueError: nothing trains, parameters that are lazy, complex, on "meta", sharded or not dense, or a bad batch.
    """

    def __init__(
        self, model: nn.Module, closure: Callable[..., Any], batch: tuple[Any, ...], micro_batch: int | None = None
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not callable(closure):
            raise TypeError(f"closure must be callable, got {type(closure).__name__}")
        self.batch, self._micro_batch = batch, micro_batch
        self.samples = batch_size(batch)
        self.is_one_part = len(split(batch, micro_batch)) == 1
        self._model, self._closure = model, closure
        # Whether the closure fails under no_grad, since its losses take gradients themselves.
        self._evaluates_with_grad = False
        self._all = list(model.parameters())
        self._params = [param for param in self._all if param.requires_grad]
        _check_parameters(self._params)
        self._owner = owners(self._params)
        self.owned = [i for i, owner in enumerate(self._owner) if owner == i]
        self.weights: list[Tensor] = [self._params[i] for i in self.owned]

    # -- nothing is left changed ---------------------------------------------------------------------------------------

    def __enter__(self) -> Probe:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            parallelism = distributed.Parallelism(self._model)
            stack.enter_context(parallelism.without_synchronization())
            stack.enter_context(parallelism.unreduced())
            stack.enter_context(unrecorded(self._model))
            self._remember()
            self._outside = stack.pop_all()
        return self

    def _remember(self) -> None:
        tensors = [*self._all, *self._model.buffers()]
        self._noise = RandomState({tensor.device for tensor in tensors})
        self._flags = [(param, param.requires_grad, param.grad) for param in self._all]
        self._modes = [(module, module.training) for module in self._model.modules()]
        self._buffers = [
            (module._buffers, name, buffer, None if buffer is None else buffer.detach().clone())
            for module in self._model.modules()
            for name, buffer in module._buffers.items()
        ]
        with torch.no_grad():
            self.saved = [torch.empty_like(weight).copy_(weight) for weight in self.weights]
        for param in self._all:  # a backward in the closure would add to the gradients that are there
            param.grad = None

    def __exit__(self, *_: object) -> None:
        with self._outside:
            self.restore()
            self._restore_buffers()
            for param, requires_grad, grad in self._flags:
                param.requires_grad_(requires_grad)
                param.grad = grad
            for module, training in self._modes:
                module.training = training

    @torch.no_grad()
    def restore(self) -> None:
        """Back to w, bit for bit."""
        for weight, saved in zip(self.weights, self.saved):
            weight.copy_(saved)
        torch.clear_autocast_cache()

    @torch.no_grad()
    def _restore_buffers(self) -> None:
        for owner, name, buffer, saved in self._buffers:
            if buffer is not None and saved is not None and is_writable(buffer):
                buffer.copy_(saved)
            owner[name] = buffer

    # -- vectors -------------------------------------------------------------------------------------------------------

    def zeros(self) -> Vector:
        """The vector 0."""
        return [torch.zeros_like(saved, dtype=compute_dtype(saved.dtype)) for saved in self.saved]

    def normal(self, generator: torch.Generator) -> Vector:
        """A vector of independent normal numbers, from a generator on the CPU: the same on every device."""
        vector = self.zeros()
        for part in vector:
            part.copy_(torch.randn(part.shape, generator=generator, dtype=torch.float64, device="cpu"))
        return vector

    # -- other weights -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def move(self, *steps: tuple[float, Vector]) -> None:
        """To w plus the sum of factor times vector."""
        for i, (weight, saved) in enumerate(zip(self.weights, self.saved)):
            moved = saved.to(compute_dtype(saved.dtype))
            for factor, vector in steps:
                moved = moved + factor * vector[i]
            weight.copy_(moved)
        torch.clear_autocast_cache()

    def perturb(self, optimizer: ESAM, gradient: Vector) -> None:
        """To w + e, with the e that ``optimizer`` (see :meth:`perturber`) takes along ``gradient``."""
        for weight, grad in zip(self.weights, gradient):
            weight.grad = grad.to(weight.dtype)
        optimizer.first_step()  # which leaves the gradients as they are: they are the caller's
        for weight in self.weights:
            weight.grad = None

    def perturber(self, **kwargs: Any) -> ESAM:
        """An optimizer over the weights, left in their places, that is there for its perturbation only."""
        return ESAM(self.weights, torch.optim.SGD, lr=0.0, flatten=False, **kwargs)

    @torch.no_grad()
    def displacement(self) -> Vector:
        """Where the weights are now, minus w, in float64."""
        return [weight.double() - saved.double() for weight, saved in zip(self.weights, self.saved)]

    # -- the loss and its derivatives ----------------------------------------------------------------------------------

    def each_part(self, use: Callable[[Tensor], Result], batch: tuple[Any, ...] | None = None) -> list[Result]:
        """``use`` of the losses of each micro-batch of ``batch`` (None: the whole), as the closure returns them."""
        results = []
        self._restore_buffers()
        with self._noise.replay():
            for part in split(self.batch if batch is None else batch, self._micro_batch):
                losses, _ = losses_and_rest(self._closure(*part), batch_size(part))
                results.append(use(losses))
        return results

    def subset(self, indices: Tensor) -> tuple[Any, ...]:
        """The samples ``indices`` of the batch."""
        device = next(leaf.device for leaf in pytree.tree_leaves(self.batch) if isinstance(leaf, Tensor))
        gathered = gather(indices.to(device), *self.batch)
        return gathered if len(self.batch) > 1 else (gathered,)

    def losses(self) -> Tensor:
        """The losses of the whole batch, shape (b,)."""
        try:
            with torch.set_grad_enabled(self._evaluates_with_grad):
                losses = torch.cat(self.each_part(Tensor.detach))
        except RuntimeError as error:
            if self._evaluates_with_grad or not needs_gradients(error):
                raise
            self._evaluates_with_grad = True
            return self.losses()
        torch.clear_autocast_cache()  # torch 2.8 reuses the copies of weights that are made without gradients
        return losses

    def loss(self) -> float:
        """The mean loss."""
        return mean(self.losses())

    def gradient(self, batch: tuple[Any, ...] | None = None) -> tuple[Tensor, Vector]:
        """The losses, detached, and the gradient of their mean."""
        samples = self.samples if batch is None else batch_size(batch)
        total = self.zeros()

        def add(losses: Tensor) -> Tensor:
            self.add(total, self.differentiate_loss(losses.mean()), len(losses) / samples)
            return losses.detach()

        return torch.cat(self.each_part(add, batch)), total

    def differentiate_loss(self, loss: Tensor, create_graph: bool = False) -> Derivative:
        """:meth:`differentiate` of a mean of the closure's losses.

        Raises:
            ValueError: it depends on no parameter that trains.
        """
        gradient = self.differentiate(loss, create_graph) if loss.requires_grad else ()
        if all(grad is None for grad in gradient):
            raise ValueError(
                "the closure's losses depend on no parameter that trains: is it run under no_grad, or does it call "
                "another model than the one that is measured?"
            )
        return gradient

    def differentiate(self, value: Tensor, create_graph: bool = False, retain_graph: bool = False) -> Derivative:
        """The derivative of a number with respect to every parameter that trains, None where it has no part in it."""
        # A function that is differentiable once leaves its mark in the graph only if this needs a gradient too.
        seed = torch.ones_like(value, requires_grad=create_graph)
        return torch.autograd.grad(
            value,
            self._params,
            grad_outputs=seed,
            create_graph=create_graph,
            retain_graph=create_graph or retain_graph,
            allow_unused=True,
        )

    def tangent(self, vector: Vector) -> Vector:
        """``vector``, with one tensor for every parameter that trains, those in the same memory included."""
        place = dict(zip(self.owned, vector))
        return [
            place[owner].as_strided(param.size(), param.stride()) for owner, param in zip(self._owner, self._params)
        ]

    @torch.no_grad()
    def add(self, total: Vector, gradient: Derivative, weight: float = 1.0) -> None:
        """Add to ``total`` what :meth:`differentiate` returned, times ``weight``."""
        place = dict(zip(self.owned, total))
        for owner, param, grad in zip(self._owner, self._params, gradient):
            if grad is not None:
                place[owner].as_strided(param.size(), param.stride()).add_(grad, alpha=weight)


def mean(losses: Tensor) -> float:
    """The mean in float64."""
    return float(losses.double().mean())


@torch.no_grad()
def dot(left: Vector, right: Vector) -> float:
    """The scalar product, in float64."""
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(left, right))


def norm(vector: Vector) -> float:
    """The Euclidean norm, in float64."""
    return dot(vector, vector) ** 0.5


def _check_parameters(params: list[nn.Parameter]) -> None:
    if not params:
        raise ValueError("no parameter of the model requires a gradient: there are no weights to perturb")
    for i, param in enumerate(params):
        if distributed.is_sharded(param):
            raise ValueError(f"trained parameter {i} is a DTensor: diagnostics need the whole model on each process")
        if is_lazy(param):
            raise ValueError(f"trained parameter {i} is lazy and has no shape yet: run the model on a batch first")
        if param.is_meta:
            raise ValueError(
                f"trained parameter {i} is on the meta device, without values: give the model memory first"
            )
        if param.is_complex():
            raise ValueError(f"trained parameter {i} is complex ({param.dtype}): only real ones can be perturbed")
        if param.layout is not torch.strided or not is_dense(param):
            raise ValueError(f"trained parameter {i} (shape {tuple(param.shape)}) is not dense: make it contiguous")
