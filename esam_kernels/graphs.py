"""The step as one CUDA graph: everything between two batches, from F1 to the update, in one launch.

What may change between replays is read on the device: the batch, the learning rates, rho and beta of element masks, the
Philox step and what ranking="random" draws. Everything else that a step depends on is fixed in a captured graph, and is
part of its key: another value is another graph. Each key runs once eagerly before it is captured, on the tensors and
with the kernels of the capture.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from esam_kernels import held_graphs, uploads
from esam_kernels.batches import PASSED_THROUGH, batch_size
from esam_kernels.capturable import check_arguments, check_batch, check_capturable, name_of
from esam_kernels.captures import (
    Capture,
    CapturedNoise,
    Captures,
    HostState,
    check_failures,
    first_cause,
    give_up,
    key_of,
    memory_of,
    modules_of,
)
from esam_kernels.device_numbers import DeviceNumbers
from esam_kernels.hooks import run_step
from esam_kernels.optimizer import ESAM
from esam_kernels.perturbation.ascent import PreviousGradient
from esam_kernels.perturbation.fused_update import check_rates
from esam_kernels.tensor_lists import increment_version, mark_memory

logger = logging.getLogger("esam_kernels")

# Eager steps on a side stream before the first capture: libraries choose their algorithms there.
WARMUP_STEPS = 3
# Draws of whole tensors that are captured, one graph each, sharing one memory pool.
DRAW_POOL = 8
# Graphs that are kept: every draw at three settings in turn, such as sizes of B+.
MAX_GRAPHS = 3 * DRAW_POOL


@overload
def make_graphed_step(optimizer: ESAM, closure: Callable[..., Tensor], *sample_batch: Any) -> Callable[..., Tensor]: ...


@overload
def make_graphed_step(
    optimizer: ESAM, closure: Callable[..., tuple[Any, ...]], *sample_batch: Any
) -> Callable[..., tuple[Tensor, Any]]: ...


def make_graphed_step(optimizer: ESAM, closure: Callable[..., Any], *sample_batch: Any) -> Callable[..., Any]:
    """``optimizer.step`` as one CUDA graph, which runs with one launch.

    >>> step = make_graphed_step(optimizer, losses, inputs, targets)
    >>> for inputs, targets in loader:
    ...     loss = step(inputs, targets)

    The first steps run eagerly (one operation at a time), and so does the first one of every new draw, gamma or other
    setting that is fixed in a graph. The next such step is captured (recorded), and from then on replayed. Where a
    tensor that a graph holds has moved (``load_state_dict``, ``model.to``), the step is captured again. A batch of
    another shape, dtype or memory format than ``sample_batch``, the last one of an epoch for example, runs eagerly.

    The weights are, bit for bit, those of the eager steps with the same draws. With mask="tensor" the draws of eight
    steps are used in turn. ``.grad`` says nothing between steps. This has not run on a GPU yet.

    Args:
        optimizer: over parameters on one CUDA device. On the CPU the step runs eagerly, and one log line says so.
        closure: what ``optimizer.step`` takes, returning one loss for each sample. It must not wait for the device, and
            runs in Python only when it is captured.
        sample_batch: a batch of the usual shape: tensors on the parameters' device, or dicts, lists and tuples of such.

    Returns:
        A function that is called with a batch, ``step(*batch)``, or as ``optimizer.step`` is,
        ``step(closure, *batch)``. It returns what ``optimizer.step`` returns: the mean loss, and what else the closure
        returned, detached.

    Raises:
        TypeError: not an ESAM or SAM, or a closure that cannot be called.
        ValueError: a base optimizer whose update cannot be captured, parameters on several devices, a model that is
            spread over ranks, an empty batch, or one on another device.
        RuntimeError: between ``first_step`` and ``second_step``.
    """
    check_arguments(optimizer, closure, sample_batch)
    optimizer._phases.require(perturbed=False, call="make_graphed_step")
    if not any(param.is_cuda for param in optimizer._perturbation.params):
        logger.warning("make_graphed_step: the parameters are not on a CUDA device, so that every step runs eagerly")
        return _EagerStep(optimizer, closure)
    check_capturable(optimizer)
    check_batch(sample_batch, optimizer._perturbation.params[0].device)
    return _GraphedStep(optimizer, closure, sample_batch)


class _EagerStep:
    """``optimizer.step`` with the closure bound."""

    def __init__(self, optimizer: ESAM, closure: Callable[..., Any]) -> None:
        self.optimizer = optimizer
        self.closure = closure

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return held_graphs.detached(self.optimizer.step(self.closure, *self._batch(arguments, options)))

    def _batch(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
        if options:
            names = ", ".join(sorted(options))
            raise TypeError(
                f"a graphed step takes a batch, by position, and no named arguments, got {names}. Call it as "
                "step(inputs, targets). For a step with options, call "
                f"optimizer.step(closure, *batch, {names.replace(', ', '=..., ')}=...)"
            )
        if arguments and callable(arguments[0]) and not isinstance(arguments[0], Tensor):
            if arguments[0] != self.closure:  # a method of an object is another object each time
                found, allowed = name_of(arguments[0]), name_of(self.closure)
                raise ValueError(
                    f"closure is {'another ' if found == allowed else ''}{found}, and this step was made for {allowed}:"
                    " a graph holds one closure. Define it once, before the loop, and leave it out of the call, "
                    "step(*batch); or call make_graphed_step once for each closure"
                )
            return arguments[1:]
        return arguments


class _GraphedStep(_EagerStep):
    """Captures one graph for each kind of step, and replays it."""

    def __init__(self, optimizer: ESAM, closure: Callable[..., Any], sample_batch: tuple[Any, ...]) -> None:
        super().__init__(optimizer, closure)
        self._device = optimizer._perturbation.params[0].device
        self._inputs = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), sample_batch)
        self._layout = _layout(self._inputs)
        self._samples = batch_size(self._inputs)
        self._stream = torch.cuda.Stream(self._device)
        self._pool: Any = None
        self._captures = Captures(MAX_GRAPHS)
        self._steps_until_capture = WARMUP_STEPS
        self._noise = CapturedNoise(self._device)
        self._lrs: list[DeviceNumbers] = []
        optimizer._perturbation.draw.pool = DRAW_POOL
        if isinstance(optimizer._perturbation.ascent, PreviousGradient):
            optimizer._perturbation.ascent.in_place = True

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return run_step(self.optimizer, self._step, (self.closure, *self._batch(arguments, options)), {})

    def _step(self, optimizer: ESAM, closure: Any = None, *batch: Any, **options: Any) -> Any:
        if options or closure != self.closure or _layout(batch) != self._layout:
            logger.debug("graphed step: another layout, closure or options: this step runs eagerly")
            return held_graphs.detached(optimizer.step(closure, *batch, **options))
        return self._run(batch)

    def _run(self, batch: tuple[Any, ...]) -> Any:
        optimizer = self.optimizer
        optimizer._phases.require(perturbed=False, call="a graphed step")
        check_rates(optimizer.base_optimizer)
        optimizer._follow()
        optimizer._perturbation.parameters.refresh()
        modules = modules_of(optimizer)
        key = key_of(optimizer, modules, self._samples)
        numbers = self._upload(batch)
        capture = self._captures.find(key, [*numbers, *memory_of(optimizer, modules)])
        if capture is None or self._steps_until_capture > 0:
            check_capturable(optimizer)
            logger.debug("graphed step: runs eagerly, to be captured later: new settings or memory")
            result = self._warm_up()
            self._steps_until_capture -= 1
            self._captures.keep(key, Capture(mark_memory([*numbers, *memory_of(optimizer, modules)])))
            return result
        if capture.graph is None:
            logger.debug("graphed step: captured as a CUDA graph")
            self._capture(capture)
        return self._replay(capture)

    def _upload(self, batch: tuple[Any, ...]) -> list[Tensor]:
        """Bring up to date what a graph reads on the device. Returns its numbers, which have to stay where they are."""
        perturbation, phases = self.optimizer._perturbation, self.optimizer._phases
        with torch.no_grad():
            for held, given in zip(pytree.tree_leaves(self._inputs), pytree.tree_leaves(batch)):
                if isinstance(held, Tensor):
                    held.copy_(given, non_blocking=True)
        perturbation.upload()
        groups = self.optimizer.param_groups
        self._lrs += [DeviceNumbers(torch.float64) for _ in groups[len(self._lrs) :]]
        for numbers, group in zip(self._lrs, groups):
            if not self._is_on_device(group["lr"]):
                numbers.set([float(group["lr"])], self._device)
        drawn: list[Tensor] = []
        if phases.num_selected(self._samples) < self._samples:
            drawn = phases.ranking.upload(perturbation.settings.seed, perturbation.step, self._samples, self._device)
        return [*perturbation.numbers(), *(numbers.tensor for numbers in self._lrs), *drawn]

    def _is_on_device(self, lr: Any) -> bool:
        return isinstance(lr, Tensor) and lr.is_cuda

    @contextlib.contextmanager
    def _as_in_a_graph(self) -> Iterator[None]:
        """Inside, a step on the inputs launches what a graph holds."""
        optimizer, perturbation, phases = self.optimizer, self.optimizer._perturbation, self.optimizer._phases
        phases.remember_noise = self._noise.remember
        # Without a fused update the base optimizer reads its learning rate on the device itself.
        if perturbation.why_not_fused() is None:
            perturbation.lr_tensors = [
                group["lr"] if self._is_on_device(group["lr"]) else numbers.tensor.reshape(())
                for numbers, group in zip(self._lrs, optimizer.param_groups)
            ]
        # What autocast has kept of an earlier forward is not to be read in a graph, nor the other way round.
        torch.clear_autocast_cache()
        try:
            yield
        finally:
            torch.clear_autocast_cache()
            phases.remember_noise = None
            perturbation.lr_tensors = None

    def _warm_up(self) -> Any:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(self._stream), self._as_in_a_graph():
                return held_graphs.detached(self.optimizer.step(self.closure, *self._inputs))
        finally:  # also after an exception: the weights are restored on that stream
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _capture(self, capture: Capture) -> None:
        check_failures()
        uploads.refill()
        if not self._captures.hold_a_graph:
            # torch's allocator refuses a pool whose graphs are all gone while a piece of its memory is in use.
            self._pool = torch.cuda.graph_pool_handle()
        self.optimizer._phases.drop_gradients()
        before, held = HostState(self.optimizer), held_graphs.told(self.optimizer._perturbation.params)
        graph = torch.cuda.CUDAGraph()
        try:
            # torch.cuda.stream makes its device the current one too, where torch puts the seed that the kernels read.
            # torch.cuda.graph leaves the stream that it has set where ending the capture fails: hence the outer one.
            with torch.cuda.stream(self._stream), self._as_in_a_graph(), uploads.keeping() as kept:
                self._noise.register(graph)
                # In mode "global" a call of any other thread would break the capture: a DataLoader's that pins memory.
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    result = held_graphs.detached(self.optimizer.step(self.closure, *self._inputs))
            before.end()
        except BaseException as error:
            self._begin_anew(graph)
            before.put_back()
            if not isinstance(error, Exception):
                raise
            raise RuntimeError(
                f"the step cannot be captured in a CUDA graph: {first_cause(error)}\n"
                "A graph allows nothing that waits for the device (.item(), print, if tensor:), no shapes that depend "
                "on values, and no copies from ordinary memory of the host. Take such calls out of the closure and the "
                f"model, or call optimizer.step in place of the graphed step. {held}Nothing was changed by this call"
            ) from error
        capture.graph, capture.result = graph, result
        uploads.release_with(capture, kept, self._device)

    def _begin_anew(self, graph: torch.cuda.CUDAGraph) -> None:
        """After a capture that failed."""
        give_up(graph, self._pool, self._device)
        self._noise.mend()
        self._captures.clear()

    def _replay(self, capture: Capture) -> Any:
        optimizer, perturbation, phases = self.optimizer, self.optimizer._perturbation, self.optimizer._phases
        assert capture.graph is not None
        phases.drop_gradients()
        self._noise.align()
        capture.graph.replay()
        torch.clear_autocast_cache()
        increment_version(perturbation.params)
        perturbation.step += 1
        phases.end()
        optimizer._opt_called = True
        optimizer.base_optimizer._opt_called = True  # type: ignore[attr-defined]
        return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), capture.result)


def _layout(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    leaves, structure = pytree.tree_flatten(batch)
    return structure, tuple(map(_layout_of, leaves))


def _layout_of(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return _lie(leaf)
    # Arrays and the like are unlike any batch that can be captured: optimizer.step says what is wrong with them.
    return leaf if isinstance(leaf, PASSED_THROUGH) else type(leaf)


def _lie(tensor: Tensor) -> tuple[Any, ...]:
    """How a copy of the tensor lies in memory."""
    copy = tensor if tensor.is_contiguous() else torch.empty_like(tensor, device="meta")
    strides = tuple(stride if size != 1 else 1 for stride, size in zip(copy.stride(), copy.shape))
    return tuple(tensor.shape), tensor.dtype, tensor.device, strides
