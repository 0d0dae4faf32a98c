"""Chakra execution traces: the protobuf form (``.et``) and the JSON of ``workload_graph``.

The protobuf form is a metadata message, then one message a node, each after its length (a varint).
Of ``et_def.proto`` (mlcommons/chakra, schema 0.0.4) these fields are read: of a node 1 id, 2 name,
3 type, 4 control and 5 data dependencies, 7 duration in microseconds, 8 inputs, 10 attributes; of
inputs 2 shapes and 3 types; of an attribute 1 name and its value in whatever field it stands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import field

from meshwright.errors import BadRequest
from meshwright.profiling.traces.collectives import collective_name
from meshwright.profiling.traces.execution_graph import Communication, ExecutionGraph, GraphNode
from meshwright.profiling.traces.json_array import ArrayStream
from meshwright.profiling.traces.sources import Member
from meshwright.profiling.traces.words import dtype_of
from meshwright.units import MIB

__all__ = ["read_chakra_json", "read_chakra_protobuf"]

_MAX_NODES = 1_000_000
_MAX_MESSAGE_BYTES = 16 * MIB
_COMMUNICATION = (5, 6, 7)
"""NodeType: COMM_SEND_NODE, COMM_RECV_NODE, COMM_COLL_NODE."""
_COMPUTE = 4
_COLLECTIVES = {
    0: "all_reduce",
    1: "reduce",
    2: "all_gather",
    3: "gather",
    4: "scatter",
    5: "broadcast",
    6: "all_to_all",
    7: "reduce_scatter",
    8: "reduce_scatter",
    9: "barrier",
}
"""CollectiveCommType; 8 is the block variant."""
_TENSOR = re.compile(r"Tensor\(([^()]*)\)")

_Fields = dict[int, list[int | bytes]]


class _Node(msgspec.Struct):
    id: int = field(name="Id")
    name: str = field(name="Name", default="")
    type: int = field(name="NodeType", default=0)
    runtime: int | float | None = None
    data_deps: list[int] = []
    ctrl_deps: list[int] = field(name="ctrlDeps", default_factory=list)
    is_cpu_op: bool | None = None
    comm_size: int | None = None


def read_chakra_json(member: Member) -> ExecutionGraph:
    """The Chakra trace in JSON in ``member``; ``runtime`` is microseconds.

    Raises:
        BadRequest: it is damaged, cut short, or no such trace.
    """
    nodes: list[GraphNode] = []
    for batch in ArrayStream(member, key="workload_graph", item=_Node).batches():
        for one in batch:
            nodes.append(
                GraphNode(
                    number=one.id,
                    name=one.name,
                    is_operator=one.type == _COMPUTE or one.type in _COMMUNICATION,
                    thread=0,
                    order=-1,
                    dims=b"",
                    types=b"",
                    controls=tuple(one.ctrl_deps),
                    data=tuple(one.data_deps),
                    duration_s=_seconds(one.runtime),
                    on_host=one.is_cpu_op,
                    communication=_communication(one.name, one.type, None, one.comm_size, None),
                )
            )
        _check_count(nodes, member)
    return ExecutionGraph(
        file_name=member.name, schema="", pid=None, process_groups=(), nodes=tuple(nodes)
    )


def read_chakra_protobuf(member: Member) -> ExecutionGraph:
    """The Chakra trace in protobuf in ``member``.

    Raises:
        BadRequest: it is damaged, cut short, or no such trace.
    """
    nodes: list[GraphNode] = []
    schema = ""
    try:
        for place, message in enumerate(_messages(member)):
            fields = _fields(message)
            if place == 0:
                attributes = _attributes(fields.get(2, []))
                schema = _text(attributes.get("schema", next(iter(fields.get(1, [])), b"")))
                continue
            nodes.append(_node(fields))
            _check_count(nodes, member)
    except (ValueError, IndexError, UnicodeDecodeError) as exc:
        raise BadRequest(
            f"{member.name}: node {len(nodes)} is damaged ({exc}); make the trace again"
        ) from exc
    return ExecutionGraph(
        file_name=member.name, schema=schema[:100], pid=None, process_groups=(), nodes=tuple(nodes)
    )


def _check_count(nodes: list[GraphNode], member: Member) -> None:
    if len(nodes) > _MAX_NODES:
        raise BadRequest(f"{member.name}: more than {_MAX_NODES} nodes; give a shorter run")


def _seconds(microseconds: float | None) -> float | None:
    known = microseconds is not None and 0 <= microseconds < 2**53
    return microseconds * 1e-6 if known and microseconds is not None else None


def _communication(
    name: str, type_: int, comm_type: object, comm_size: object, dtype: str | None
) -> Communication | None:
    if type_ not in _COMMUNICATION:
        return None
    said = _COLLECTIVES.get(comm_type) if isinstance(comm_type, int) else None
    return Communication(
        name=said or collective_name(name) or "send_recv",
        input_bytes=comm_size if isinstance(comm_size, int) and comm_size > 0 else None,
        dtype=dtype,
    )


def _messages(member: Member) -> Iterator[bytes]:
    """The messages of a stream of length-delimited ones."""
    rest = b""
    ended = False
    while True:
        position = 0
        while True:
            try:
                length, start = _varint(rest, position)
            except IndexError:
                break
            if length > _MAX_MESSAGE_BYTES:
                raise ValueError(f"a message of {length} bytes")
            if start + length > len(rest):
                break
            yield rest[start : start + length]
            position = start + length
        rest = rest[position:]
        if ended:
            if rest:
                raise ValueError("it is cut short")
            return
        piece = member.read(MIB)
        ended = not piece
        rest += piece


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """The number at ``position`` and the place after it."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _fields(message: bytes) -> _Fields:
    """The fields of a message by number: integers, or the bytes of anything longer."""
    found: _Fields = {}
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        number, wire = tag >> 3, tag & 7
        value: int | bytes
        if wire == 0:
            value, position = _varint(message, position)
        else:
            if wire == 2:
                length, position = _varint(message, position)
            elif wire in (1, 5):
                length = 8 if wire == 1 else 4
            else:
                raise ValueError(f"a field of unknown wire type {wire}")
            if position + length > len(message):
                raise ValueError("a field is longer than its message")
            value, position = message[position : position + length], position + length
        found.setdefault(number, []).append(value)
    return found


def _attributes(messages: list[int | bytes]) -> dict[str, int | bytes]:
    found: dict[str, int | bytes] = {}
    for one in messages:
        if isinstance(one, bytes):
            fields = _fields(one)
            name = _text(next(iter(fields.pop(1, [])), b""))
            found[name] = next((values[0] for values in fields.values()), 0)
    return found


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _numbers(values: list[int | bytes]) -> tuple[int, ...]:
    """Of a repeated field, packed or not."""
    found: list[int] = []
    for value in values:
        if isinstance(value, int):
            found.append(value)
            continue
        position = 0
        while position < len(value):
            number, position = _varint(value, position)
            found.append(number)
    return tuple(found)


def _number(fields: _Fields, key: int) -> int | None:
    value = next(iter(fields.get(key, [])), None)
    return value if isinstance(value, int) else None


def _node(fields: _Fields) -> GraphNode:
    attributes = _attributes(fields.get(10, []))
    type_ = _number(fields, 3) or 0
    name = _text(next(iter(fields.get(2, [])), b""))
    sides = [one for one in fields.get(8, []) if isinstance(one, bytes)]
    inputs = _fields(sides[0]) if sides else {}
    shapes, types = (_text(next(iter(inputs.get(key, [])), b"")) for key in (2, 3))
    tensor = _TENSOR.search(types)
    order = attributes.get("rf_id")
    thread = attributes.get("tid")
    on_host = attributes.get("is_cpu_op")
    return GraphNode(
        number=_number(fields, 1) or 0,
        name=name,
        is_operator=type_ == _COMPUTE or type_ in _COMMUNICATION,
        thread=thread if isinstance(thread, int) else 0,
        order=order if isinstance(order, int) and order < 2**62 else -1,
        dims=shapes.encode() if shapes != "[]" else b"",
        types=types.encode() if types != "[]" else b"",
        controls=_numbers(fields.get(4, [])),
        data=_numbers(fields.get(5, [])),
        duration_s=_seconds(_number(fields, 7)),
        on_host=bool(on_host) if isinstance(on_host, int) else None,
        communication=_communication(
            name,
            type_,
            attributes.get("comm_type"),
            attributes.get("comm_size"),
            dtype_of(tensor[1]) if tensor else None,
        ),
    )
