"""OpGraph as JSON, as canonical text, and as a digest.

The JSON form keeps everything. The canonical text leaves out what the user called things (the
graph, modules, parameters, inputs, source lines) and what follows from the rest (counts of
operations and bytes), so that graphs that compute the same in the same order have one text.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from meshwright.errors import BadRequest
from meshwright.graph.opgraph import (
    DTYPE_BYTES,
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

__all__ = ["graph_from_json", "graph_sha256", "graph_text", "graph_to_json"]

_FORMAT = "meshwright.opgraph"
_VERSION = 1


def graph_to_json(graph: OpGraph) -> str:
    """``graph`` as one JSON document; ``graph_from_json`` gives an equal graph back."""
    document = {
        "format": _FORMAT,
        "version": _VERSION,
        "name": graph.name,
        "values": [[spec.dtype, spec.shape, spec.stride] for spec in graph.values],
        "inputs": [
            {"value": item.value, "name": item.name, "role": item.role}
            | ({"tied_names": item.tied_names} if item.tied_names else {})
            for item in graph.inputs
        ],
        "ops": [_op_to_json(op) for op in graph.ops],
        "outputs": [
            {"value": item.value, "name": item.name, "role": item.role} for item in graph.outputs
        ],
    }
    return json.dumps(document, separators=(",", ":"), allow_nan=False)


def graph_from_json(text: str) -> OpGraph:
    """The graph that ``graph_to_json`` wrote.

    Raises BadRequest where the text is not such a document or the graph is not consistent.
    """
    try:
        document = json.loads(text)
        _require_format(document)
        graph = OpGraph(
            name=document["name"],
            values=tuple(_spec_from_json(item) for item in document["values"]),
            inputs=tuple(_input_from_json(item) for item in document["inputs"]),
            ops=tuple(_op_from_json(index, op) for index, op in enumerate(document["ops"])),
            outputs=tuple(_output_from_json(item) for item in document["outputs"]),
        )
    except BadRequest:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise BadRequest(
            f"not a {_FORMAT} document: {type(error).__name__}: {error}; capture the model again"
        ) from error
    _require_consistent(graph)
    return graph


def _require_format(document: dict[str, Any]) -> None:
    if document["format"] != _FORMAT or document["version"] != _VERSION:
        raise BadRequest(
            f"expected a {_FORMAT} document of version {_VERSION}, got {document['format']!r} "
            f"version {document['version']!r}; capture the model again"
        )


def graph_text(graph: OpGraph) -> str:
    """``graph`` one line per input, operator and output, without names.

    Values appear as ``%number``, with dtype, shape and strides where they are made.
    """
    lines = [f"{_value_text(graph, item.value)} = {item.role.value}" for item in graph.inputs]
    for op in graph.ops:
        made = ", ".join(
            "none" if value is None else _value_text(graph, value) for value in op.outputs
        )
        args = [_arg_text(arg) for arg in op.args]
        args += [f"{key}={_arg_text(arg)}" for key, arg in op.kwargs]
        origin = "" if op.forward_op is None else f" of op {op.forward_op}"
        lines.append(f"{made} = {op.target}({', '.join(args)}) {op.phase.value}{origin}")
    value_of_name = {
        name: item.value
        for item in graph.inputs
        if item.role in (InputRole.PARAMETER, InputRole.BUFFER)
        for name in (item.name, *item.tied_names)
    }
    for output in graph.outputs:
        line = f"{output.role.value} %{output.value}"
        if output.role in (OutputRole.GRADIENT, OutputRole.BUFFER_UPDATE):
            line += f" of %{value_of_name[output.name]}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def graph_sha256(graph: OpGraph) -> str:
    """Hexadecimal SHA-256 of ``graph_text``: renaming modules and parameters keeps it."""
    return hashlib.sha256(graph_text(graph).encode()).hexdigest()


def _value_text(graph: OpGraph, value: int) -> str:
    spec = graph.values[value]
    shape = "x".join(map(str, spec.shape))
    stride = ",".join(map(str, spec.stride))
    return f"%{value}:{spec.dtype}[{shape}]({stride})"


def _arg_text(arg: Arg) -> str:
    if isinstance(arg, Ref):
        return f"%{arg.value}"
    if isinstance(arg, Literal):
        return f"{arg.kind}:{arg.name}"
    if isinstance(arg, tuple):
        return f"[{', '.join(_arg_text(item) for item in arg)}]"
    return json.dumps(arg) if isinstance(arg, str) else repr(arg)


def _op_to_json(op: Op) -> dict[str, Any]:
    """Fields that hold their default are left out."""
    return {
        "target": op.target,
        "args": [_arg_to_json(arg) for arg in op.args],
        "outputs": op.outputs,
        "phase": op.phase,
        **({"kwargs": {key: _arg_to_json(arg) for key, arg in op.kwargs}} if op.kwargs else {}),
        **({} if op.forward_op is None else {"forward_op": op.forward_op}),
        **({"module_path": op.module_path} if op.module_path else {}),
        **({"source": op.source} if op.source else {}),
        **({"flop": op.flop} if op.flop else {}),
        **({"bytes_read": op.bytes_read} if op.bytes_read else {}),
        **({"bytes_written": op.bytes_written} if op.bytes_written else {}),
    }


def _op_from_json(index: int, item: dict[str, Any]) -> Op:
    return Op(
        index=index,
        target=_string(item["target"]),
        args=tuple(_arg_from_json(arg) for arg in item["args"]),
        kwargs=tuple((key, _arg_from_json(arg)) for key, arg in item.get("kwargs", {}).items()),
        outputs=tuple(None if value is None else _count(value) for value in item["outputs"]),
        phase=Phase(item["phase"]),
        forward_op=_count(item["forward_op"]) if "forward_op" in item else None,
        module_path=_string(item.get("module_path", "")),
        source=_string(item.get("source", "")),
        flop=_count(item.get("flop", 0)),
        bytes_read=_count(item.get("bytes_read", 0)),
        bytes_written=_count(item.get("bytes_written", 0)),
    )


def _arg_to_json(arg: Arg) -> Any:
    if isinstance(arg, Ref):
        return {"ref": arg.value}
    if isinstance(arg, Literal):
        return {"literal": [arg.kind, arg.name]}
    if isinstance(arg, tuple):
        return [_arg_to_json(item) for item in arg]
    if isinstance(arg, float) and not math.isfinite(arg):
        return {"float": repr(arg)}
    return arg


def _arg_from_json(item: Any) -> Arg:
    if isinstance(item, list):
        return tuple(_arg_from_json(part) for part in item)
    if isinstance(item, dict):
        ((key, content),) = item.items()
        if key == "ref":
            return Ref(_count(content))
        if key == "float":
            return float(content)
        if key == "literal":
            kind, name = content
            return Literal(_string(kind), _string(name))
        raise ValueError(f"unknown kind of argument {key!r}")
    if item is None or isinstance(item, bool | int | float | str):
        return item
    raise TypeError(f"argument of type {type(item).__name__}")


def _spec_from_json(item: Any) -> TensorSpec:
    dtype, shape, stride = item
    if dtype not in DTYPE_BYTES or len(shape) != len(stride):
        raise ValueError(f"bad tensor description {item!r}")
    return TensorSpec(
        dtype=dtype, shape=tuple(map(_count, shape)), stride=tuple(map(_count, stride))
    )


def _input_from_json(item: Any) -> GraphInput:
    return GraphInput(
        value=_count(item["value"]),
        name=_string(item["name"]),
        role=InputRole(item["role"]),
        tied_names=tuple(map(_string, item.get("tied_names", ()))),
    )


def _output_from_json(item: Any) -> GraphOutput:
    return GraphOutput(
        value=_count(item["value"]), name=_string(item["name"]), role=OutputRole(item["role"])
    )


def _count(item: Any) -> int:
    if not isinstance(item, int) or isinstance(item, bool) or item < 0:
        raise ValueError(f"{item!r} is not a number from 0 up")
    return item


def _string(item: Any) -> str:
    if not isinstance(item, str):
        raise ValueError(f"{item!r} is not a string")
    return item


def _require_consistent(graph: OpGraph) -> None:
    """Every value is made once, before it is read."""
    made: set[int] = set()

    def make(value: int, what: str) -> None:
        if value >= len(graph.values) or value in made:
            raise BadRequest(f"{what} makes value {value}, which does not exist or is made twice")
        made.add(value)

    for item in graph.inputs:
        make(item.value, f"input {item.name}")
    for op in graph.ops:
        if not made.issuperset(op.inputs):
            raise BadRequest(f"operator {op.index} ({op.target}) reads a value made after it")
        if op.forward_op is not None and op.forward_op >= op.index:
            raise BadRequest(f"operator {op.index} ({op.target}) differentiates a later one")
        for value in op.results:
            make(value, f"operator {op.index} ({op.target})")
    for output in graph.outputs:
        if output.value not in made:
            raise BadRequest(f"output {output.name} is value {output.value}, which nothing makes")
