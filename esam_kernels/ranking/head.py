"""The head, the network's last linear layer, and what pass 1 leaves there."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from esam_kernels.backends.reference import compute_dtype
from esam_kernels.distributed import is_sharded
from esam_kernels.ranking.base import Head
from esam_kernels.tensor_lists import leaves

_BREAKS_THE_GRAPH = (
    "this ranking of ESAM reads the gradient of the head's output: compile without fullgraph=True, or take "
    'ranking="rise" or "random"'
)
_NAME_ONE = "name the network's last linear layer: ESAM(..., head=model.fc)"


def find_head(head: nn.Module | None, model: nn.Module | None, *, needed: bool) -> nn.Linear | None:
    """The head that is given, or the last ``nn.Linear`` of the model.

    Raises:
        TypeError: what is given is no ``nn.Linear``.
        ValueError: it is needed, and there is none.
    """
    if head is not None:
        if not isinstance(head, nn.Linear):
            raise TypeError(f"head must be a torch.nn.Linear, got {type(head).__name__}: {_NAME_ONE}")
        return head
    layers = [] if model is None else [module for module in model.modules() if isinstance(module, nn.Linear)]
    if layers:
        return layers[-1]
    if needed:
        where = "no model was given" if model is None else f"{type(model).__name__} has no torch.nn.Linear"
        raise ValueError(f'ranking="first_order" needs a head, and {where}: {_NAME_ONE}')
    return None


def own_parameter(head: nn.Linear, name: str) -> Tensor | None:
    """The layer's parameter of this name, that which pruning has renamed included; None where others stand in for it.

    The attribute is not asked: a parametrization computes it anew each time, and spectral_norm moves its buffers.
    """
    param = head._parameters.get(name)
    return head._parameters.get(f"{name}_orig") if param is None else param


class _Use:
    """One forward of the head: its input, and the gradient of its output as the last backward left it."""

    def __init__(self, inputs: Tensor) -> None:
        self.input = inputs
        self.output_grad: Tensor | None = None


class HeadRecorder:
    """Records what a linear layer is given in pass 1, and the gradient of what it returns.

    Backwards inside :meth:`pass_1` count, each of which may use the head once: several are parts of one batch, in
    order. If there is none, one that the user started without it counts. Nothing is kept of a forward that is not
    differentiated, and nothing of the layer holds the recorder: when it goes, its hook goes.
    """

    def __init__(self, head: nn.Linear) -> None:
        self.head = head
        #: Off while the weights are perturbed: pass 2 is not recorded.
        self.is_listening = True
        self._is_pass_1 = False
        # The parameters that the head's output has depended on, by identity.
        self._before_head: set[int] = set()
        self.forget()
        handle = head.register_forward_hook(_Hook(self), with_kwargs=True)
        self._remove = weakref.finalize(self, handle.remove)
        self._remove.atexit = False

    def close(self) -> None:
        """Take the hook off the layer, also while something keeps the recorder: the traceback of an exception."""
        self._remove()

    def forget(self) -> None:
        """Drop what was recorded."""
        self._parts: list[list[_Use]] = []
        # Of backwards that the user started. More than one is refused anyway: only the first is kept.
        self._others: list[_Use] = []
        self._num_others = 0
        self._saw_no_grad = False

    def forget_parameters(self) -> None:
        """The parameters are others than before."""
        self._before_head = set()

    @contextlib.contextmanager
    def pass_1(self) -> Iterator[None]:
        """Around a backward of pass 1."""
        self._is_pass_1 = True
        self._parts.append([])
        try:
            yield
        except BaseException:
            self._parts.pop()
            raise
        finally:
            self._is_pass_1 = False

    def also_needed(self, drawn: list[Tensor], loss: Tensor) -> list[Tensor]:
        """What has to be differentiated beside ``drawn``, so that the gradient of the head's output is: little or none.

        None if anything drawn lies at or before the head in the graph of ``loss``: not every batch passes each layer.
        """
        held = [own_parameter(self.head, name) for name in ("bias", "weight")]
        own = [param for param in held if param is not None and param.requires_grad]
        wanted = set(map(id, drawn))
        if not wanted.isdisjoint(map(id, own)):
            return []
        reached = leaves(loss, [])
        if any(id(leaf) in wanted and id(leaf) in self._before_head for leaf in reached):
            return []
        return own[:1] or [leaf for leaf in reached if id(leaf) not in wanted]

    def after_forward(self, inputs: Any, output: Any) -> None:
        """Called by the layer."""
        if not self.is_listening or not isinstance(inputs, Tensor) or not isinstance(output, Tensor):
            return
        if output.requires_grad:
            self._before_head = self._before_head or set(map(id, leaves(output, [])))
            output.register_hook(_GradHook(self, _Use(inputs.detach())))
        else:
            self._saw_no_grad = True

    def after_backward(self, use: _Use, grad: Tensor) -> None:
        """Called by autograd, once for each backward through the same forward."""
        if not self.is_listening:
            return
        is_new = use.output_grad is None
        use.output_grad = grad.detach()
        if self._is_pass_1:
            self._parts[-1].append(use)
        elif is_new:
            self._num_others += 1
            self._others = self._others or [use]

    @property
    def has_recorded(self) -> bool:
        """Whether anything was."""
        return bool(self._parts or self._others)

    @property
    def problem(self) -> str | None:
        """Why :meth:`take` returns None; None: it does not."""
        uses = self._num_others
        if self._parts:
            uses = max(map(len, self._parts)) if all(self._parts) else 0
        if uses == 1:
            return None
        name = f"the head (Linear with {self.head.out_features} outputs)"
        if uses > 1:
            return (
                f"{name} was used {uses} times in the first pass, and this ranking needs a layer that is used once: "
                f"{_NAME_ONE}. If other losses are differentiated between the steps, start the first pass "
                "with optimizer.backward(loss)"
            )
        if self._saw_no_grad:
            return (
                f"{name} was run without gradients in the first pass, and this ranking reads the gradient of its "
                "output: do not put it under torch.no_grad(), and let a weight at or before it train"
            )
        return (
            f"{name} was not seen in the first pass. Either it has no part in the loss, or no weight at or before it "
            f"was drawn: {_NAME_ONE}. Or the model was compiled and run before the optimizer was built: build the "
            "optimizer first"
        )

    def take(self, adaptive: tuple[bool, bool] = (False, False), eta: float = 0.0) -> Head | None:
        """What pass 1 left, or None if there is a :attr:`problem`.

        Args:
            adaptive: whether T_w of its weight's group, and of its bias's, is |w| + eta.
            eta: see ``adaptive``.
        """
        if self.problem is not None:
            return None
        uses = [part[0] for part in self._parts] or self._others
        grads = [use.output_grad for use in uses if use.output_grad is not None]
        bias = self.head.bias
        return Head(
            uses[0].input if len(uses) == 1 else torch.cat([use.input for use in uses]),
            grads[0] if len(uses) == 1 else torch.cat(grads),
            has_bias=bias is not None,
            transform=(
                _squared_scale(self.head.weight, eta) if adaptive[0] else None,
                _squared_scale(bias, eta) if adaptive[1] and bias is not None else None,
            ),
        )


@contextlib.contextmanager
def unrecorded(model: nn.Module) -> Iterator[None]:
    """Around forwards and backwards that are no part of a step: no optimizer records its head in them."""
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values() if isinstance(hook, _Hook)]
    recorders = [recorder for hook in hooks if (recorder := hook.recorder()) is not None and recorder.is_listening]
    for recorder in recorders:
        recorder.is_listening = False
    try:
        yield
    finally:
        for recorder in recorders:
            recorder.is_listening = True


class _Hook:
    """The forward hook. It may be copied and pickled with its layer: the copy belongs to no recorder, and does nothing.

    torch.compile breaks its graph here.
    """

    def __init__(self, recorder: HeadRecorder | None) -> None:
        self.recorder = (lambda: None) if recorder is None else weakref.ref(recorder)
        # Not a decorator: torch.compiler.disable imports torch._dynamo, which takes a second.
        self._record = _nothing if recorder is None else torch.compiler.disable(self._call_recorder, **_why())

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._record(args[0] if args else kwargs.get("input"), output)

    def _call_recorder(self, inputs: Any, output: Any) -> None:
        recorder = self.recorder()
        if recorder is not None:
            recorder.after_forward(inputs, output)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (None,)


def _why() -> dict[str, Any]:
    """Why torch.compile breaks its graph, for its own message; torch before 2.8 takes no reason."""
    takes_reason = "reason" in inspect.signature(torch.compiler.disable).parameters
    return {"reason": _BREAKS_THE_GRAPH} if takes_reason else {}


def _nothing(*_: Any) -> None:
    pass


class _GradHook:
    """The hook on the head's output: a graph that somebody keeps does not keep the recorder."""

    def __init__(self, recorder: HeadRecorder, use: _Use) -> None:
        self._recorder, self._use = weakref.ref(recorder), use

    def __call__(self, grad: Tensor) -> None:
        recorder = self._recorder()
        if recorder is not None:
            recorder.after_backward(self._use, grad)


def _squared_scale(param: Tensor, eta: float) -> Tensor:
    """T_w^2 = (|w| + eta)^2."""
    whole: Tensor = param.full_tensor() if is_sharded(param) else param  # type: ignore[attr-defined]
    return (whole.detach().to(compute_dtype(whole.dtype)).abs() + eta).square()
