"""What a forward pass does, operator by operator, at a fraction of the cost of a trace.

The log is an OpGraph of the forward pass alone, as the dispatcher sees it: no gradients, writes
not removed, nothing simplified. Two passes with the same log export the same graph, since
export records the same calls a level higher. So a log of the whole module tells whether all units
of a run do the same, whatever Python decides that from (positions, counts, configurations).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._export.utils import _compiling_state_context
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from meshwright.capture.containers import tensor_leaves
from meshwright.capture.failure import calling_line
from meshwright.capture.opcost import spec_of
from meshwright.capture.remembered import RememberedResults
from meshwright.capture.standins import StandIns
from meshwright.capture.trace import Step
from meshwright.graph.opgraph import (
    Arg,
    GraphInput,
    GraphOutput,
    InputRole,
    Literal,
    Op,
    OpGraph,
    OutputRole,
    Phase,
    Ref,
    TensorSpec,
)

__all__ = ["forward_log"]


def forward_log(model: nn.Module, call: Any, found: StandIns, mode: FakeTensorMode) -> OpGraph:
    """The log of one forward pass on the fake inputs ``call``.

    Inputs are the parameters, buffers and data of the captured graph, in its order. An operator
    names grad mode and any operand it returned in place among its keyword arguments.
    """
    log = _Log(model, mode)
    for role, tensors in (
        (InputRole.PARAMETER, found.parameters),
        (InputRole.BUFFER, found.buffers),
    ):
        for name, tensor in tensors.items():
            log.add_input(name, role, tensor, found.tied_names(name))
    leaves = list(tensor_leaves(call))
    for name, tensor in leaves:
        log.add_input(name, InputRole.DATA, tensor, ())
    paths: list[str] = []
    step = Step(model, call, paths.extend)
    step.training = model.training
    with _compiling_state_context(), mode, log.watching_modules(), log.functions, log:
        results = step(*(tensor for _, tensor in leaves))
    return OpGraph(
        name="",
        values=tuple(log.values),
        inputs=tuple(log.inputs),
        ops=tuple(log.ops),
        outputs=tuple(
            GraphOutput(value=log.number_of[id(tensor)], name=path, role=OutputRole.OUTPUT)
            for path, tensor in zip(paths, results, strict=True)
        ),
    )


class _Log(TorchDispatchMode):
    """Writes down every operator while it is active."""

    def __init__(self, model: nn.Module, mode: FakeTensorMode) -> None:
        super().__init__()
        self.inputs: list[GraphInput] = []
        self.values: list[TensorSpec] = []
        self.ops: list[Op] = []
        self.number_of: dict[int, int] = {}
        """From the ``id`` of a tensor to its value."""
        self.functions = _Functions(self)
        self._alive: list[Tensor] = []
        self._module_paths = {id(module): path for path, module in model.named_modules()}
        self._running: list[str] = []
        self._results = RememberedResults(mode)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would have its compiler step aside at every call; nothing is compiled here.
        return False

    def add_input(self, name: str, role: InputRole, tensor: Tensor, tied: tuple[str, ...]) -> None:
        """Gives the next value to an input."""
        value = self._new_value(tensor)
        self.inputs.append(GraphInput(value=value, name=name, role=role, tied_names=tied))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.prim.device.default:
            # Two calls in three: whatever looks at a fake tensor asks where it lives.
            (tensor,) = args
            if type(tensor) is FakeTensor and not tensor.fake_mode.in_kernel_invocation:
                return tensor.fake_device
            return func(tensor)
        result = self._results.call(func, args, kwargs or {})
        self.record(str(func), args, kwargs or {}, result)
        return result

    def record(self, target: str, args: tuple[Any, ...], kwargs: Any, result: Any) -> None:
        """Appends one operator."""
        read = tuple(self._arg(item) for item in args)
        named = [(key, self._arg(item)) for key, item in kwargs.items()]
        named.append(("grad", torch.is_grad_enabled()))
        outputs: list[int | None] = []
        for item in result if isinstance(result, list | tuple) else (result,):
            if isinstance(item, Tensor) and id(item) not in self.number_of:
                outputs.append(self._new_value(item))
            else:
                named.append((f"returned.{len(outputs)}", self._arg(item)))
                outputs.append(None)
        self.ops.append(
            Op(
                index=len(self.ops),
                target=target,
                args=read,
                kwargs=tuple(named),
                outputs=tuple(outputs),
                phase=Phase.FORWARD,
                module_path=self._running[-1] if self._running else "",
                source=calling_line(),
            )
        )

    @contextmanager
    def watching_modules(self) -> Iterator[None]:
        """Keeps track of the module that runs."""

        def enter(module: nn.Module, _args: Any) -> None:
            self._running.append(self._module_paths.get(id(module), ""))

        def leave(_module: nn.Module, _args: Any, _result: Any) -> None:
            self._running.pop()

        before = register_module_forward_pre_hook(enter)
        after = register_module_forward_hook(leave, always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def _new_value(self, tensor: Tensor) -> int:
        # While a tensor lives, no other has its id.
        self._alive.append(tensor)
        self.values.append(spec_of(tensor))
        self.number_of[id(tensor)] = len(self.values) - 1
        return len(self.values) - 1

    def _arg(self, item: Any) -> Arg:
        if isinstance(item, Tensor):
            number = self.number_of.get(id(item))
            return Ref(number) if number is not None else _content(item)
        if isinstance(item, list | tuple):
            return tuple(self._arg(part) for part in item)
        if item is None or isinstance(item, bool | int | float | str):
            return item
        return Literal(type(item).__name__, str(item))


class _Functions(TorchFunctionMode):
    """Writes down calls of dropout: with probability 0 it calls no operator, yet is captured."""

    def __init__(self, log: _Log) -> None:
        super().__init__()
        self._log = log

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if "dropout" in getattr(func, "__name__", ""):
            plain = [item for item in args if not isinstance(item, Tensor)]
            self._log.record(resolve_name(func) or "dropout", tuple(plain), kwargs or {}, None)
        return result


def _content(tensor: Tensor) -> Literal:
    """A tensor written into the code, by its content."""
    known = tensor.constant if isinstance(tensor, FakeTensor) else tensor
    if known is None:
        raise ValueError("a tensor comes from nowhere")
    with _disable_current_modes(), torch.no_grad():
        flat = known.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest = hashlib.sha256(bytes(flat.tolist())).hexdigest()
    return Literal("constant", f"{spec_of(known)} {digest}")
