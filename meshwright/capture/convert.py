"""From the traced fx graph to an OpGraph: values numbered, dead code and no-ops left out."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from meshwright.capture.failure import source_line
from meshwright.capture.opcost import bytes_moved, flop_of, spec_of
from meshwright.capture.trace import GRAD_OF, OWNS, JointTrace
from meshwright.errors import CaptureFailed
from meshwright.graph.opgraph import (
    DTYPE_BYTES,
    Arg,
    GraphInput,
    GraphOutput,
    InputRole,
    Literal,
    Op,
    OpGraph,
    Phase,
    Ref,
    TensorSpec,
)

__all__ = ["to_opgraph"]

aten = torch.ops.aten

_NO_OPS = {
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
}
"""Return their operand; in a graph without writes the copy cannot be told from the original."""


@dataclass
class _Conversion:
    """What is known so far about one fx graph."""

    values: list[TensorSpec] = field(default_factory=list)
    value_of: dict[fx.Node, int | tuple[int | None, ...]] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    owner_of_number: dict[int, int] = field(default_factory=dict)
    """From the number of an autograd node to the forward operator that owns it."""
    has_path: list[bool] = field(default_factory=list)

    def new_value(self, tensor: Tensor, node: fx.Node) -> int:
        """Numbers one more tensor."""
        self.values.append(_checked_spec(tensor, node))
        return len(self.values) - 1


def to_opgraph(trace: JointTrace, *, name: str) -> tuple[OpGraph, dict[str, Tensor]]:
    """The graph, and the tensors of its constants by name.

    Raises CaptureFailed for an operator the graph cannot hold: one whose result's shape depends
    on data, or that returns something other than tensors.
    """
    state = _Conversion()
    inputs: list[GraphInput] = []
    constants: dict[str, Tensor] = {}
    nodes = list(trace.module.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    for node, item in zip(placeholders, trace.inputs, strict=True):
        state.value_of[node] = state.new_value(node.meta["val"], node)
        if item.role == InputRole.CONSTANT:
            constants[item.name] = item.tensor
        inputs.append(_graph_input(len(inputs), item.name, item.role, item.tied_names))
    live = _live_nodes(trace.module.graph)
    for node in nodes:
        if node.op == "get_attr" and node in live:
            constant = getattr(trace.module, str(node.target))
            constant_name = f"constant.{len(constants)}"
            constants[constant_name] = _with_values(constant, node)
            state.value_of[node] = state.new_value(constant, node)
            inputs.append(_graph_input(len(inputs), constant_name, InputRole.CONSTANT, ()))
    for node in nodes:
        if node.op == "call_function" and node in live:
            _convert_call(state, node)
    (results,) = trace.module.graph.output_node().args
    outputs = tuple(
        GraphOutput(value=_single_value(state, node), name=output_name, role=role)
        for node, (output_name, role) in zip(results, trace.outputs, strict=True)  # type: ignore[arg-type]
    )
    graph = OpGraph(
        name=name,
        values=tuple(state.values),
        inputs=tuple(inputs),
        ops=tuple(_with_neighbor_paths(state.ops, state.has_path)),
        outputs=outputs,
    )
    return graph, constants


def _graph_input(value: int, name: str, role: InputRole, tied: tuple[str, ...]) -> GraphInput:
    return GraphInput(value=value, name=name, role=role, tied_names=tied)


def _live_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes the outputs depend on."""
    live: set[fx.Node] = set()
    waiting = list(graph.output_node().all_input_nodes)
    while waiting:
        node = waiting.pop()
        if node not in live:
            live.add(node)
            waiting.extend(node.all_input_nodes)
    return live


def _convert_call(state: _Conversion, node: fx.Node) -> None:
    if node.target is operator.getitem:
        source, index = node.args
        outputs = state.value_of[source]  # type: ignore[index]
        assert isinstance(outputs, tuple)
        chosen = outputs[index]  # type: ignore[index]
        assert chosen is not None, f"{node.format_node()} reads a result that is no tensor"
        state.value_of[node] = chosen
        return
    if not isinstance(node.target, torch._ops.OpOverload):
        raise CaptureFailed(
            f"operator {node.target} at {_where(node)} cannot be captured; "
            f"write it with ordinary tensor operators"
        )
    if node.target in _NO_OPS:
        state.value_of[node] = _single_value(state, node.args[0])
        return
    _append_op(state, node)


def _append_op(state: _Conversion, node: fx.Node) -> None:
    value = node.meta["val"]
    results = list(value) if isinstance(value, list | tuple) else [value]
    if not any(isinstance(item, Tensor) for item in results):
        raise CaptureFailed(
            f"operator {node.target} at {_where(node)} reads a value out of a tensor; "
            f"keep it a tensor, so that the graph does not depend on data"
        )
    outputs = tuple(
        state.new_value(item, node) if isinstance(item, Tensor) else None for item in results
    )
    state.value_of[node] = outputs if isinstance(value, list | tuple) else outputs[0]  # type: ignore[assignment]
    phase, forward_op = _phase_of(state, node)
    path = _module_path(node)
    if forward_op is not None:
        path = state.ops[forward_op].module_path
    args = tuple(_arg(state, item, node) for item in node.args)
    kwargs = tuple((key, _arg(state, item, node)) for key, item in node.kwargs.items())
    op = Op(
        index=len(state.ops),
        target=str(node.target),
        args=args,
        kwargs=kwargs,
        outputs=outputs,
        phase=phase,
        forward_op=forward_op,
        module_path=path or "",
        source=state.ops[forward_op].source if forward_op is not None else _source(node),
    )
    operands = [state.values[index] for index in dict.fromkeys(op.inputs)]
    read, written = bytes_moved(node.target, operands, [state.values[i] for i in op.results])
    arg_values = fx.node.map_arg(node.args, lambda item: item.meta["val"])
    kwarg_values = fx.node.map_arg(node.kwargs, lambda item: item.meta["val"])
    flop = flop_of(node.target, arg_values, kwarg_values, value)
    state.ops.append(replace(op, flop=flop, bytes_read=read, bytes_written=written))
    state.has_path.append(path is not None)


def _phase_of(state: _Conversion, node: fx.Node) -> tuple[Phase, int | None]:
    """Phase, and the forward operator for a backward one; see ``trace``'s docstring."""
    custom = node.meta.get("custom", {})
    mark = custom.get(GRAD_OF)
    if mark is None:
        state.owner_of_number.setdefault(custom.get(OWNS, -1), len(state.ops))
        return Phase.FORWARD, None
    return Phase.BACKWARD, state.owner_of_number.get(mark)


def _with_neighbor_paths(ops: Sequence[Op], has_path: Sequence[bool]) -> Iterator[Op]:
    """Backward operators that differentiate nothing (sums of gradients, the first gradient).

    They take module path and source of the operator that reads them first, and where nothing
    does, of the one that produced their last operand.
    """
    paths = {op.index: (op.module_path, op.source) for op in ops if has_path[op.index]}
    reader: dict[int, int] = {}
    producer: dict[int, int] = {}
    for op in ops:
        for value in op.results:
            producer[value] = op.index
        for value in op.inputs:
            reader.setdefault(value, op.index)
    for op in reversed(ops):
        if op.index not in paths:
            readers = [reader[value] for value in op.results if reader.get(value) in paths]
            if readers:
                paths[op.index] = paths[min(readers)]
    for op in ops:
        if op.index not in paths:
            makers = [producer[value] for value in op.inputs if value in producer]
            paths[op.index] = paths[makers[-1]] if makers else ("", "")
        path, source = paths[op.index]
        yield op if op.module_path == path else replace(op, module_path=path, source=source)


def _single_value(state: _Conversion, node: Any) -> int:
    value = state.value_of[node]
    assert isinstance(value, int), f"{node} is not one tensor"
    return value


def _arg(state: _Conversion, item: Any, node: fx.Node) -> Arg:
    if isinstance(item, fx.Node):
        return Ref(_single_value(state, item))
    if isinstance(item, list | tuple):
        return tuple(_arg(state, part, node) for part in item)
    if isinstance(item, torch.dtype):
        return Literal("dtype", str(item).removeprefix("torch."))
    if isinstance(item, torch.device):
        return Literal("device", str(item))
    if isinstance(item, torch.layout):
        return Literal("layout", str(item).removeprefix("torch."))
    if isinstance(item, torch.memory_format):
        return Literal("memory_format", str(item).removeprefix("torch."))
    if item is None or isinstance(item, bool | int | float | str):
        return item
    raise CaptureFailed(
        f"operator {node.target} at {_where(node)} has an argument of type "
        f"{type(item).__name__}, which a graph cannot hold"
    )


def _checked_spec(tensor: Tensor, node: fx.Node) -> TensorSpec:
    if any(not isinstance(size, int) for size in tensor.shape):
        raise CaptureFailed(
            f"operator {node.target} at {_where(node)} has a result whose shape depends on data; "
            f"use a fixed shape (a mask or torch.where instead of selecting elements)"
        )
    if tensor.layout != torch.strided:
        raise CaptureFailed(
            f"operator {node.target} at {_where(node)} has a {tensor.layout} result; use dense "
            f"tensors (sparse=False)"
        )
    spec = spec_of(tensor)
    if spec.dtype not in DTYPE_BYTES:
        raise CaptureFailed(
            f"operator {node.target} at {_where(node)} has the unsupported dtype {spec.dtype}"
        )
    return spec


def _with_values(constant: Any, node: fx.Node) -> Tensor:
    if not isinstance(constant, Tensor) or isinstance(constant, FakeTensor):
        raise CaptureFailed(f"constant {node.target} has no values; register it as a buffer")
    return constant


def _module_path(node: fx.Node) -> str | None:
    """Innermost module of the user's model that was running; ``None`` where unknown."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path = str(next(reversed(stack.values()))[0]).partition("@")[0]
    return "" if path in ("", "model") else path.removeprefix("model.")


def _source(node: fx.Node) -> str:
    return source_line(node.meta.get("stack_trace") or node.stack_trace or "")


def _where(node: fx.Node) -> str:
    """For messages: the user's line, or failing that the module or the phase."""
    if GRAD_OF in node.meta.get("custom", {}):
        return "the backward pass"
    return _source(node) or _module_path(node) or "an unknown line"
