"""One fx graph of loss, outputs and gradients, traced on fake tensors.

``torch.export`` (non-strict) gives a forward graph that keeps the module tree; replaying it under
``make_fx`` with ``autograd.grad`` appends the backward operators.

**Which forward operator a backward operator differentiates.** Autograd numbers its nodes. While
the forward pass is replayed, fx stores in ``meta["seq_nr"]`` the number of the newest autograd
node, which for a differentiable operator is its own, for others that of an earlier operator: so
the *first* fx node with a number is the operator that owns it. Outside a hook the numbers of
backward operators mean nothing (they repeat the newest one), so a pair of hooks on every autograd
node says which node runs; what runs between two nodes is the sum of gradients of a value
used several times and belongs to none.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx

from meshwright.capture.containers import map_tensors, tensor_leaves
from meshwright.capture.failure import (
    as_capture_failed,
    calling_line,
    quiet_on_failure,
    source_line,
)
from meshwright.capture.standins import StandIns
from meshwright.errors import CaptureFailed
from meshwright.graph.opgraph import InputRole, OutputRole

__all__ = [
    "GRAD_OF",
    "OWNS",
    "ExportedStep",
    "JointTrace",
    "Step",
    "TracedInput",
    "export_step",
    "trace_joint",
]

GRAD_OF = "meshwright_grad_of"
"""Key in ``node.meta["custom"]`` of backward nodes: number of the autograd node, or -1."""
OWNS = "meshwright_owns"
"""The same key of forward nodes: number of the newest autograd node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedInput:
    """One placeholder of the joint graph."""

    name: str
    role: InputRole
    tensor: Tensor
    """Fake, except for constants."""
    tied_names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class JointTrace:
    """The joint graph; placeholders follow ``inputs``, results follow ``outputs``."""

    module: fx.GraphModule
    inputs: tuple[TracedInput, ...]
    outputs: tuple[tuple[str, OutputRole], ...]


class Step(nn.Module):
    """The user's module as a function from a flat list of tensors to a flat tuple of tensors."""

    def __init__(self, model: nn.Module, call: Any, record: Callable[[list[str]], None]) -> None:
        super().__init__()
        self.model = model
        self._call = _Held(call)
        self._record = record

    def forward(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        """Every tensor in the module's result, in order."""
        remaining = iter(leaves)
        call = map_tensors(self._call.value, lambda _path, _tensor: next(remaining))
        with _no_custom_gradients():
            result = self.model(*call["args"], **call["kwargs"])
        if not isinstance(result, Tensor) and not any(tensor_leaves(result)):
            result = getattr(result, "__dict__", result)
        found = list(tensor_leaves(result))
        self._record([path for path, _ in found])
        return tuple(tensor for _, tensor in found)


@contextmanager
def _no_custom_gradients() -> Iterator[None]:
    """Refuses ``torch.autograd.Function``: export would drop its backward without a word.

    Operators made with ``torch.library`` use one too, but export keeps those whole.
    """
    original = torch.autograd.Function.__dict__["apply"].__func__

    def refuse(cls: type, *args: Any, **kwargs: Any) -> Any:
        if cls.__module__ == "torch._library.autograd":
            return original(cls, *args, **kwargs)
        hint = (
            "pass use_reentrant=False to torch.utils.checkpoint"
            if cls.__module__ == "torch.utils.checkpoint"
            else "write it with ordinary tensor operators"
        )
        raise CaptureFailed(
            f"{cls.__name__} at {calling_line()} is a torch.autograd.Function, whose backward "
            f"cannot be captured; {hint}"
        )

    with mock.patch.object(torch.autograd.Function, "apply", classmethod(refuse)):
        yield


@dataclass(frozen=True, slots=True)
class _Held:
    """Hides the example inputs from export, which looks for tensors in module attributes."""

    value: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedStep:
    """The forward graph and what its outputs are called."""

    program: torch.export.ExportedProgram
    output_paths: tuple[str, ...]
    loss_index: int


def export_step(model: nn.Module, call: Any) -> ExportedStep:
    """The forward pass of ``model`` on the fake inputs ``call`` as a functional graph.

    Raises CaptureFailed where no output is a loss; torch's own errors pass through.
    """
    paths: list[str] = []

    def record(found: list[str]) -> None:
        paths[:] = found

    step = Step(model, call, record)
    step.training = model.training
    leaves = tuple(tensor for _, tensor in tensor_leaves(call))
    with quiet_on_failure():
        program = torch.export.export(step, leaves, strict=False)
    if _changes_tensors(program.graph_module):
        program = program.run_decompositions({})
    return ExportedStep(
        program=program,
        output_paths=tuple(paths),
        loss_index=_loss_index(tuple(paths), _user_outputs(program)),
    )


def trace_joint(
    step: ExportedStep, found: StandIns, data: Sequence[tuple[str, Tensor]], mode: FakeTensorMode
) -> JointTrace:
    """Loss, outputs, gradients and buffer updates of ``step`` in one graph."""
    inputs, position = _inputs(step.program, found, data)
    trained = [
        index
        for index, item in enumerate(inputs)
        if item.role == InputRole.PARAMETER and item.tensor.requires_grad
    ]
    outputs: list[tuple[str, OutputRole]] = []

    def joint(*flat: Tensor) -> list[Tensor]:
        replay = _Replay(step.program.graph_module)
        results = replay.run(*(flat[index] for index in position))
        named = _named_outputs(step, found, results)
        loss = results[_user_positions(step.program)[step.loss_index]]
        gradients = _gradients(loss, [flat[index] for index in trained])
        outputs[:] = [(name, role) for name, role, _ in named]
        tensors = [tensor for _, _, tensor in named]
        for index, gradient in zip(trained, gradients, strict=True):
            if gradient is not None:
                outputs.append((inputs[index].name, OutputRole.GRADIENT))
                tensors.append(gradient)
        return tensors

    flat = [
        mode.from_tensor(item.tensor) if item.role == InputRole.CONSTANT else item.tensor
        for item in inputs
    ]
    with mode, fx_traceback.preserve_node_meta(), torch.enable_grad():
        module = make_fx(joint, tracing_mode="real", _allow_non_fake_inputs=True)(*flat)
        for node in module.graph.nodes:
            custom = node.meta.get("custom", {})
            if GRAD_OF not in custom:
                # A second replay numbers nodes anew, but hands this on.
                node.meta["custom"] = {**custom, OWNS: node.meta.get("seq_nr", -1)}
        if _changes_tensors(module):
            # Some composite operators write into their intermediate results.
            pure = torch.func.functionalize(_Replay(module).run)
            module = make_fx(pure, tracing_mode="real", _allow_non_fake_inputs=True)(*flat)
    return JointTrace(module=module, inputs=tuple(inputs), outputs=tuple(outputs))


def _inputs(
    program: torch.export.ExportedProgram, found: StandIns, data: Sequence[tuple[str, Tensor]]
) -> tuple[list[TracedInput], list[int]]:
    """Parameters, buffers, constants, data; and which of them each placeholder is."""
    specs = program.graph_signature.input_specs
    constants = [
        (str(spec.target), _constant(program, str(spec.target)))
        for spec in specs
        if spec.kind not in (InputKind.USER_INPUT, InputKind.PARAMETER, InputKind.BUFFER)
    ]
    inputs = [
        TracedInput(name=name, role=role, tensor=tensor, tied_names=found.tied_names(name))
        for role, tensors in (
            (InputRole.PARAMETER, found.parameters),
            (InputRole.BUFFER, found.buffers),
        )
        for name, tensor in tensors.items()
    ]
    index_of = {item.name: index for index, item in enumerate(inputs)}
    index_of_constant = {
        target: len(inputs) + number for number, (target, _) in enumerate(constants)
    }
    inputs += [
        TracedInput(name=f"constant.{number}", role=InputRole.CONSTANT, tensor=tensor)
        for number, (_, tensor) in enumerate(constants)
    ]
    next_data = itertools.count(len(inputs))
    inputs += [TracedInput(name=name, role=InputRole.DATA, tensor=tensor) for name, tensor in data]
    position = [
        next(next_data)
        if spec.kind == InputKind.USER_INPUT
        else index_of[found.canonical[_user_name(str(spec.target))]]
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER)
        else index_of_constant[str(spec.target)]
        for spec in specs
    ]
    return inputs, position


def _constant(program: torch.export.ExportedProgram, target: str) -> Tensor:
    constant = program.constants[target]
    if not isinstance(constant, Tensor):
        raise CaptureFailed(
            f"{_user_name(target)} is a {type(constant).__name__}, which a graph cannot hold; "
            f"use tensors and plain Python values"
        )
    return constant


def _user_name(target: str) -> str:
    """The user's name of a tensor or module inside ``Step``."""
    return target.removeprefix("model.")


def _user_positions(program: torch.export.ExportedProgram) -> list[int]:
    """Places of the module's own results among the results of the exported graph."""
    return [
        place
        for place, spec in enumerate(program.graph_signature.output_specs)
        if spec.kind == OutputKind.USER_OUTPUT
    ]


def _user_outputs(program: torch.export.ExportedProgram) -> list[Tensor]:
    """Fake tensors of the module's own results."""
    (results,) = program.graph.output_node().args
    assert isinstance(results, list | tuple)
    return [results[place].meta["val"] for place in _user_positions(program)]


def _loss_index(paths: tuple[str, ...], tensors: list[Tensor]) -> int:
    """Which result is the loss.

    The one called ``loss``; else the only result or the first of a tuple, if it is a floating
    scalar; else the only floating scalar.
    """
    if not paths:
        raise CaptureFailed(f"the module returns no tensor; {_HOW_TO_GIVE_A_LOSS}")
    scalars = [
        index
        for index, tensor in enumerate(tensors)
        if tensor.dim() == 0 and tensor.is_floating_point()
    ]
    for wanted in ("loss", "", "0"):
        if wanted in paths and paths.index(wanted) in scalars:
            return paths.index(wanted)
    if len(scalars) == 1 and "loss" not in paths:
        return scalars[0]
    results = ", ".join(
        f"{path or 'result'} {list(tensor.shape)}"
        for path, tensor in list(zip(paths, tensors, strict=True))[:4]
    )
    raise CaptureFailed(f"no result is a scalar loss (found {results}); {_HOW_TO_GIVE_A_LOSS}")


_HOW_TO_GIVE_A_LOSS = (
    "return a floating scalar alone, first in a tuple, or as the key or attribute 'loss'"
)


def _named_outputs(
    step: ExportedStep, found: StandIns, results: Sequence[Tensor]
) -> list[tuple[str, OutputRole, Tensor]]:
    """Loss first, then the other results, then buffer updates."""
    places = _user_positions(step.program)
    named = [("loss", OutputRole.LOSS, results[places[step.loss_index]])]
    named += [
        (path or "result", OutputRole.OUTPUT, results[place])
        for index, (path, place) in enumerate(zip(step.output_paths, places, strict=True))
        if index != step.loss_index
    ]
    for place, spec in enumerate(step.program.graph_signature.output_specs):
        if spec.kind == OutputKind.BUFFER_MUTATION:
            name = found.canonical[_user_name(str(spec.target))]
            named.append((name, OutputRole.BUFFER_UPDATE, results[place]))
    return named


class _Replay(fx.Interpreter):
    """Runs an exported graph so that what it calls is traced with the original metadata."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        # Our messages are one line; fx would append the node and a stack to them.
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        try:
            with fx_traceback.set_current_meta(n):
                return super().run_node(n)
        except CaptureFailed:
            raise
        except Exception as error:
            raise as_capture_failed(error, where=source_line(n.stack_trace or "")) from error

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        higher_order = torch.ops.higher_order
        if target is higher_order.wrap_with_set_grad_enabled:
            with torch.set_grad_enabled(args[0]):
                return _Replay(args[1]).run(*args[2:])
        if target is higher_order.wrap_with_autocast:
            device, dtype, enabled, cache, inner, *rest = args
            with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache):
                return _Replay(inner).run(*rest)
        if target is torch.ops.aten.dropout.default and args[2]:
            # The composite fills a mask in place; this one is functional and has the mask to save.
            return torch.ops.aten.native_dropout.default(args[0], args[1], True)[0]
        return super().call_function(target, args, kwargs)


def _changes_tensors(module: fx.GraphModule) -> bool:
    """Whether an operator writes into one of its operands."""
    for graph_module in module.modules():
        if not isinstance(graph_module, fx.GraphModule):
            continue
        for node in graph_module.graph.nodes:
            target = node.target
            if isinstance(target, torch._ops.OpOverload) and (
                target._schema.is_mutable or target in _HIDDEN_WRITES
            ):
                return True
    return False


_HIDDEN_WRITES = {torch.ops.aten.batch_norm.default, torch.ops.aten.instance_norm.default}
"""Write running statistics though their schema does not say so."""


def _gradients(loss: Tensor, parameters: list[Tensor]) -> Sequence[Tensor | None]:
    """Gradients of ``loss``, with every backward operator marked with its autograd node."""
    if not loss.requires_grad:
        raise CaptureFailed(
            "the loss does not depend on any parameter that requires a gradient; "
            "return a loss computed from the parameters, or set requires_grad"
        )
    running: list[int] = []

    def mark() -> None:
        # A new dict each time: nodes traced so far keep the one they were given.
        fx_traceback.get_current_meta()["custom"] = {GRAD_OF: running[-1] if running else -1}

    def enter(number: int) -> None:
        running.append(number)
        mark()

    def leave() -> None:
        running.pop()
        mark()

    assert loss.grad_fn is not None
    for node in _autograd_nodes(loss.grad_fn):
        number = node._sequence_nr()
        node.register_prehook(lambda _grads, number=number: enter(number))
        node.register_hook(lambda _inputs, _outputs: leave())
    mark()
    return torch.autograd.grad(loss, parameters, allow_unused=True)


def _autograd_nodes(root: Any) -> list[Any]:
    """Every autograd node below ``root``, except the ends that hold leaf tensors."""
    seen, waiting, found = {root}, [root], []
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            continue
        found.append(node)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return found
