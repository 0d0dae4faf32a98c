"""PyTorch execution traces (``ExecutionTraceObserver``), schemas 1.0.1 to 1.1.x-chakra.

Nodes name their parent (an operator called inside another) and the tensors they take and give, by
number; a data dependency runs from the last node without children that gave a tensor to the next
that takes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec
from msgspec import Raw

from meshwright.errors import BadRequest
from meshwright.profiling.traces.collectives import collective_name
from meshwright.profiling.traces.execution_graph import Communication, ExecutionGraph, GraphNode
from meshwright.profiling.traces.json_array import ArrayStream
from meshwright.profiling.traces.sources import Member
from meshwright.profiling.traces.words import dtype_of

__all__ = ["read_execution_trace"]

_MAX_NODES = 1_000_000
_NOTHING = Raw(b"null")
_TENSOR = re.compile(r"Tensor\(([^()]*)\)")
_PARAMETERS = "record_param_comms"
_GROUPS = "## process_group:init ##"


class _Attribute(msgspec.Struct):
    name: str
    value: Raw = _NOTHING


class _Side(msgspec.Struct):
    """The inputs or outputs of a node, schema 1.0.2 and later."""

    values: Raw = _NOTHING
    shapes: Raw = _NOTHING
    types: Raw = _NOTHING


class _Node(msgspec.Struct):
    id: int
    name: str = ""
    parent: int = -1
    ctrl_deps: int | list[int] | None = None
    rf_id: int = -1
    tid: int = 0
    op_schema: str = ""
    inputs: Raw = _NOTHING
    input_shapes: Raw = _NOTHING
    input_types: Raw = _NOTHING
    outputs: Raw = _NOTHING
    output_types: Raw = _NOTHING
    attrs: list[_Attribute] = []


def read_execution_trace(member: Member) -> ExecutionGraph:
    """The execution trace in ``member``.

    Raises:
        BadRequest: it is damaged, cut short, or no execution trace.
    """
    stream = ArrayStream(member, key="nodes", item=_Node)
    rows: list[tuple[GraphNode, list[Any], list[Any]]] = []
    groups: tuple[tuple[str, int], ...] = ()
    texts: dict[bytes, bytes] = {}
    for batch in stream.batches():
        for node in batch:
            try:
                row = _row(node, texts)
                groups = groups or _process_groups(node)
            except (msgspec.MsgspecError, RecursionError) as exc:
                raise BadRequest(f"{member.name}: node {node.id}: {exc}; make it again") from exc
            rows.append(row)
            if len(rows) > _MAX_NODES:
                raise BadRequest(f"{member.name}: more than {_MAX_NODES} nodes; give a shorter run")
    keys = {
        key: msgspec.json.decode(stream.keys[key])
        for key in ("schema", "pid")
        if key in stream.keys
    }
    pid = keys.get("pid")
    return ExecutionGraph(
        file_name=member.name,
        schema=str(keys.get("schema", ""))[:100],
        pid=pid if isinstance(pid, int) else None,
        process_groups=groups,
        nodes=tuple(_with_data(rows)),
    )


def _row(node: _Node, texts: dict[bytes, bytes]) -> tuple[GraphNode, list[Any], list[Any]]:
    """The node without its data dependencies, the tensors it takes, and those it gives."""
    taken, given = _side(node.inputs), _side(node.outputs)
    shapes, types = node.input_shapes, node.input_types
    if taken is not None:
        shapes, types = taken.shapes, taken.types
    values = _list(taken.values if taken is not None else node.inputs)
    outputs = _list(given.values if given is not None else node.outputs)
    output_types = _list(given.types if given is not None else node.output_types)
    words = [str(one) for one in _list(types)]
    attributes = {one.name: one.value for one in node.attrs}
    dims, kinds = _in_profiler_words(_list(shapes), words)
    is_operator = bool(attributes.get("op_schema", node.op_schema) not in ("", Raw(b'""')))
    found = GraphNode(
        number=node.id,
        name=node.name,
        is_operator=is_operator or node.name == _PARAMETERS,
        thread=_integer(attributes.get("tid"), node.tid),
        order=_integer(attributes.get("rf_id"), node.rf_id),
        dims=texts.setdefault(dims, dims),
        types=texts.setdefault(kinds, kinds),
        controls=_controls(node),
        data=(),
        communication=_communication(node.name, values, words),
    )
    tensors = [
        one for value, word in zip(values, words, strict=False) for one in _tensors(value, word)
    ]
    results = [
        one
        for value, word in zip(outputs, output_types, strict=False)
        for one in _tensors(value, str(word))
    ]
    return found, tensors, results


def _side(raw: Raw) -> _Side | None:
    return msgspec.json.decode(raw, type=_Side) if bytes(raw).lstrip()[:1] == b"{" else None


def _list(raw: Raw) -> list[Any]:
    value = msgspec.json.decode(raw)
    return value if isinstance(value, list) else []


def _integer(raw: Raw | None, default: int) -> int:
    value = default if raw is None else msgspec.json.decode(raw)
    return value if isinstance(value, int) and -1 <= value < 2**62 else -1


def _controls(node: _Node) -> tuple[int, ...]:
    if isinstance(node.ctrl_deps, list):
        return tuple(node.ctrl_deps)
    if node.ctrl_deps is not None:
        return (node.ctrl_deps,)
    return (node.parent,) if node.parent >= 0 else ()


def _in_profiler_words(shapes: list[Any], words: list[str]) -> tuple[bytes, bytes]:
    """Dimensions and types as a profiler trace writes them (``Input Dims``, ``Input type``)."""
    if not words:
        return b"", b""
    dims: list[Any] = []
    kinds: list[str] = []
    for shape, word in zip(shapes, words, strict=False):
        tensor = _TENSOR.search(word)
        if tensor is None:
            dims.append([])
            kinds.append("Scalar" if word in ("Int", "Double", "Bool") else "")
        elif word.startswith("Tensor("):
            dims.append(shape)
            kinds.append(tensor[1])
        else:
            dims.append(shape)
            kinds.append("TensorList")
    return msgspec.json.encode(dims), msgspec.json.encode(kinds)


def _tensors(value: Any, word: str) -> Iterator[tuple[int, int]]:
    """Number of tensor and of storage of each tensor in ``value``."""
    if word.startswith("Tensor(") and _is_tensor(value):
        yield value[0], value[1]
    elif word.startswith("GenericList[Tensor") and isinstance(value, list):
        yield from ((one[0], one[1]) for one in value if _is_tensor(one))


def _is_tensor(value: Any) -> bool:
    """Tensor, storage, offset, number of elements, bytes of one, device."""
    return (
        isinstance(value, list)
        and len(value) >= 5
        and all(isinstance(one, int) and 0 <= one < 2**62 for one in value[:5])
    )


def _communication(name: str, values: list[Any], words: list[str]) -> Communication | None:
    if name != _PARAMETERS:
        return None
    said = (collective_name(value) for value in values if isinstance(value, str))
    collective = next((one for one in said if one is not None), None)
    if collective is None:
        return None  # the wait for one, or the setup of a group
    num_bytes, dtype = 0, None
    for value, word in zip(values, words, strict=False):
        tensor = _TENSOR.search(word)
        parts = [value] if word.startswith("Tensor(") else value if tensor else []
        if tensor and isinstance(parts, list):
            dtype = dtype or dtype_of(tensor[1])
            num_bytes += sum(one[3] * one[4] for one in parts if _is_tensor(one))
    return Communication(name=collective, input_bytes=num_bytes or None, dtype=dtype)


def _process_groups(node: _Node) -> tuple[tuple[str, int], ...]:
    """The groups a node of that purpose lists, as JSON inside a string."""
    if node.name != _GROUPS:
        return ()
    side = _side(node.inputs)
    values = _list(side.values if side is not None else node.inputs)
    if not values or not isinstance(values[0], str):
        return ()
    listed = msgspec.json.decode(values[0])
    return tuple(
        (str(one.get("pg_name"))[:100], one["group_size"])
        for one in (listed if isinstance(listed, list) else ())
        if isinstance(one, dict) and isinstance(one.get("group_size"), int)
    )


def _with_data(rows: list[tuple[GraphNode, list[Any], list[Any]]]) -> Iterator[GraphNode]:
    """The nodes with the nodes whose tensors they take, in the order they ran."""
    parents = {number for node, _, _ in rows for number in node.controls}
    rows.sort(key=lambda row: (row[0].order, row[0].number))
    giver: dict[Any, int] = {}
    for node, taken, given in rows:
        if node.number in parents:
            yield node
            continue
        data = sorted({giver[one] for one in taken if one in giver} - {node.number})
        giver.update(dict.fromkeys(given, node.number))
        yield replace(node, data=tuple(data)) if data else node
