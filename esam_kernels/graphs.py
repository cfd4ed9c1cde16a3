"""The step as one CUDA graph: everything between two batches, from F1 to the update, in one launch.

What may change between replays is read on the device: the batch, the learning rates, rho and beta of element masks, and
the Philox step. What is fixed in a captured graph is captured anew when it changes: the size k of B+, and the tensors
that SWP draws, of which a small pool is used in turn.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam
from torch.utils import _pytree as pytree

from esam_kernels.device_numbers import DeviceNumbers
from esam_kernels.optimizer import ESAM
from esam_kernels.perturbation.ascent import PreviousGradient
from esam_kernels.perturbation.fused_update import plan_update
from esam_kernels.selection import batch_size, num_selected

logger = logging.getLogger("esam_kernels")

# Eager steps on a side stream before a capture: kernels are compiled and libraries choose their algorithms there.
WARMUP_STEPS = 3
# Draws of whole tensors that are captured, one graph each, sharing one memory pool.
DRAW_POOL = 8


def make_graphed_step(optimizer: ESAM, closure: Callable[..., Any], *sample_batch: Any) -> Callable[..., Any]:
    """``optimizer.step`` as one CUDA graph a replay.

    The first steps run eagerly, and so does the first one of every new draw, gamma or other setting that a graph holds
    fast: what it launches is loaded there. The next such step is captured, and from then on replayed. A batch of
    another shape than ``sample_batch`` (a last one) runs eagerly. The weights are, bit for bit, those of the eager
    steps with the same draws. With mask="tensor" the draws repeat every ``DRAW_POOL`` steps. ``.grad`` says nothing
    between steps.

    Args:
        optimizer: over CUDA parameters. Elsewhere the step runs eagerly, and one log line says so.
        closure: what ``optimizer.step`` takes, returning one loss per sample. It must not wait for the device, and runs
            in Python only when it is captured.
        sample_batch: a batch of the usual shape, tensors or pytrees of tensors on the parameters' device.

    Returns:
        A function with the signature of ``step``: ``step(closure, *batch)``, where the closure may be left out. It
        returns the mean loss at w.

    Raises:
        TypeError: not an ESAM or SAM, or a closure that cannot be called.
        ValueError: a base optimizer whose update cannot be captured, a model that is spread over ranks, or an empty
            batch.
    """
    if not isinstance(optimizer, ESAM):
        raise TypeError(f"optimizer must be an ESAM or SAM, got {type(optimizer).__name__}")
    if not callable(closure):
        raise TypeError("closure must be a function of the batch that returns one loss per sample")
    batch_size(sample_batch)
    if not all(param.is_cuda for param in optimizer._perturbation.params):
        logger.warning("make_graphed_step: the parameters are not on a CUDA device, so that every step runs eagerly")
        return _EagerStep(optimizer, closure)
    _check_capturable(optimizer)
    return _GraphedStep(optimizer, closure, sample_batch)


class _EagerStep:
    """``optimizer.step`` with the closure bound."""

    def __init__(self, optimizer: ESAM, closure: Callable[..., Any]) -> None:
        self.optimizer = optimizer
        self.closure = closure

    def __call__(self, *arguments: Any) -> Any:
        return self.optimizer.step(self.closure, *self._batch(arguments))

    def _batch(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if arguments and callable(arguments[0]) and not isinstance(arguments[0], Tensor):
            if arguments[0] is not self.closure:
                raise ValueError("the step was made for another closure: call make_graphed_step for this one")
            return arguments[1:]
        return arguments


class _GraphedStep(_EagerStep):
    """Captures one graph for each k and draw, and replays it."""

    def __init__(self, optimizer: ESAM, closure: Callable[..., Any], sample_batch: tuple[Any, ...]) -> None:
        super().__init__(optimizer, closure)
        self._device = optimizer._perturbation.params[0].device
        self._inputs = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, sample_batch)
        self._layout = _layout(sample_batch)
        self._stream = torch.cuda.Stream(self._device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._steps_until_capture = WARMUP_STEPS
        # Draws and settings that have run eagerly: what a capture launches has to be loaded before it.
        self._seen: set[tuple[Any, ...]] = set()
        self._noise = _CapturedNoise(self._device)
        self._lrs = [DeviceNumbers(torch.float64) for _ in optimizer.param_groups]
        optimizer._perturbation.draw.pool = DRAW_POOL
        if isinstance(optimizer._perturbation.ascent, PreviousGradient):
            optimizer._perturbation.ascent.in_place = True

    def __call__(self, *arguments: Any) -> Any:
        batch = self._batch(arguments)
        if _layout(batch) != self._layout:
            return self.optimizer.step(self.closure, *batch)
        key = self._key()
        if self._steps_until_capture > 0 or not self._seen.issuperset(key):
            self._steps_until_capture -= 1
            self._seen.update(key)
            return self._eagerly_on_side_stream(batch)
        self._upload(batch)
        if key not in self._graphs:
            self._graphs[key] = self._capture()
        graph, loss = self._graphs[key]
        self._noise.align()
        graph.replay()
        self.optimizer._perturbation.step += 1
        self.optimizer._opt_called = True
        self.optimizer.base_optimizer._opt_called = True  # type: ignore[attr-defined]
        return loss.clone()

    def _key(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """What is fixed in a graph: the draw, and all else."""
        optimizer, perturbation = self.optimizer, self.optimizer._perturbation
        draw = tuple(perturbation.drawn())
        k = num_selected(optimizer.gamma, batch_size(self._inputs))
        masked = perturbation.draws_elements
        settings = perturbation.settings
        beta = settings.beta if settings.mask == "tensor" else None
        fixed = tuple(
            (group["adaptive"], group["rho"] > 0.0, *(group.get(name) for name in _FIXED))
            for group in optimizer.param_groups
        )
        trained = tuple(perturbation.trained())
        return ("draw", *draw), (k, masked, beta, trained, fixed, optimizer.replay_noise)

    def _eagerly_on_side_stream(self, batch: tuple[Any, ...]) -> Any:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            loss = self.optimizer.step(self.closure, *batch)
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return loss

    def _upload(self, batch: tuple[Any, ...]) -> None:
        for held, given in zip(pytree.tree_leaves(self._inputs), pytree.tree_leaves(batch)):
            if isinstance(held, Tensor):
                held.copy_(given, non_blocking=True)
        self.optimizer._perturbation.upload()
        for numbers, group in zip(self._lrs, self.optimizer.param_groups):
            if not _is_on_device(group["lr"]):
                numbers.set([float(group["lr"])], self._device)

    def _capture(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        optimizer, perturbation = self.optimizer, self.optimizer._perturbation
        step = perturbation.step
        graph = torch.cuda.CUDAGraph()
        self._noise.register(graph)
        optimizer._phases.remember_noise = lambda: self._noise
        perturbation.lr_tensors = [
            group["lr"] if _is_on_device(group["lr"]) else numbers.tensor.reshape(())
            for numbers, group in zip(self._lrs, optimizer.param_groups)
        ]
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                result = optimizer.step(self.closure, *self._inputs)
        except Exception as error:
            optimizer._phases.weights.abandon()
            raise RuntimeError(
                "the step cannot be captured: something in it waits for the device or is not allowed in a CUDA graph "
                f"(look for .item(), print or data-dependent shapes in the closure): {error}"
            ) from error
        finally:
            optimizer._phases.remember_noise = None
            perturbation.lr_tensors = None
            # Capturing computes nothing, so that this step is still to come.
            perturbation.step = step
            optimizer.zero_grad(set_to_none=True)
        return graph, result[0] if isinstance(result, tuple) else result


# The base optimizer's numbers that kernels take as arguments, and that a graph therefore holds fast.
_FIXED = ("momentum", "dampening", "weight_decay", "nesterov", "maximize", "betas", "eps", "amsgrad")


class _CapturedNoise:
    """The random numbers of the first forward once more, inside a graph.

    A second generator state takes part in the graph; before each replay it is set to where the first one stands.
    """

    def __init__(self, device: torch.device) -> None:
        index = device.index if device.index is not None else torch.cuda.current_device()
        self._generator = torch.cuda.default_generators[index]
        self._second = self._generator.clone_state()

    def register(self, graph: torch.cuda.CUDAGraph) -> None:
        graph.register_generator_state(self._second)
        self.align()

    def align(self) -> None:
        self._second.set_state(self._generator.get_state())

    @contextlib.contextmanager
    def replay(self) -> Iterator[None]:
        first = self._generator.graphsafe_get_state()
        self._generator.graphsafe_set_state(self._second)
        try:
            yield
        finally:
            self._generator.graphsafe_set_state(first)


def _layout(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    leaves, structure = pytree.tree_flatten(batch)
    return structure, tuple(
        (tuple(leaf.shape), leaf.dtype, leaf.device.type) if isinstance(leaf, Tensor) else leaf for leaf in leaves
    )


def _is_on_device(lr: Any) -> bool:
    return isinstance(lr, Tensor) and lr.is_cuda


def _check_capturable(optimizer: ESAM) -> None:
    base, perturbation = optimizer.base_optimizer, optimizer._perturbation
    if optimizer._parallelism.is_spread or optimizer.sync_perturbation:
        raise ValueError(
            "a model in DistributedDataParallel or fully_shard cannot be captured in a CUDA graph: call optimizer.step"
        )
    fused = plan_update(base, perturbation.backend, perturbation.params) is not None
    for group in optimizer.param_groups:
        on_device = group.get("capturable") or (isinstance(base, Adam) and group["fused"])
        if type(base) is SGD and fused:
            continue
        if not on_device:
            raise ValueError(
                f"{type(base).__name__} counts its steps on the host, which a CUDA graph cannot: build it with "
                "capturable=True"
                if "capturable" in group
                else f"{type(base).__name__} cannot be captured in a CUDA graph with these settings"
            )
        if not fused and not _is_on_device(group["lr"]):
            raise ValueError(
                f"the learning rate of {type(base).__name__} would be frozen in the graph: give lr as a tensor on the "
                "device"
            )
