"""A graph of what a program ran, as execution traces give it: operators, shapes, dependencies."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

from meshwright.profiling.traces.formats import TraceFormat, TraceImport
from meshwright.strict_json import one_line
from meshwright.units import format_bytes, format_seconds

__all__ = ["Communication", "ExecutionGraph", "GraphNode", "graph_import"]

_NUM_LISTED = 20
_NUM_SHOWN = 6
_NAME_CHARACTERS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Communication:
    """What a node of communication says of itself; None for what it does not."""

    name: str
    """``all_reduce``, ``send_recv``..."""
    input_bytes: int | None
    dtype: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphNode:
    """One operator, kernel or range of the program."""

    number: int
    name: str
    is_operator: bool
    """False for the ranges and roots that only hold others."""
    thread: int
    order: int
    """Number of the call within the program (``rf_id``); -1 where there is none."""
    dims: bytes
    types: bytes
    """Of its inputs, as JSON in the profiler's words; empty where not said."""
    controls: tuple[int, ...]
    """Numbers of the nodes it waits for or lies in."""
    data: tuple[int, ...]
    """Numbers of the nodes whose results it takes."""
    duration_s: float | None = None
    on_host: bool | None = None
    communication: Communication | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionGraph:
    """One rank's execution trace."""

    file_name: str
    schema: str
    pid: int | None
    process_groups: tuple[tuple[str, int], ...]
    """Name and size, where the trace lists them."""
    nodes: tuple[GraphNode, ...]


def graph_import(
    graph: ExecutionGraph, *, format_: TraceFormat, linked_to: str | None, num_linked: int
) -> TraceImport:
    """The summary of one execution trace.

    It yields no Records: an execution trace alone holds no times, or (Chakra) times of calls of the
    host and of bare kernels, which are of no operator with a direction.
    """
    summary = _summary(graph)
    summary["linked_to"], summary["num_linked"] = linked_to, num_linked
    missing = []
    if not summary["num_with_times"]:
        missing.append("times (an execution trace holds none)")
    if linked_to is None and not summary["num_with_times"]:
        missing.append("a profiler trace of the same run (give it too, to join times and shapes)")
    if summary["num_communication"] and not graph.process_groups:
        missing.append("the groups of its communication")
    if not summary["num_with_shapes"]:
        missing.append("shapes of operators")
    return TraceImport(
        format=format_,
        names=(graph.file_name,),
        records=(),
        summary=summary,
        missing=tuple(missing),
        lines=tuple(_lines(graph, summary)),
    )


def _summary(graph: ExecutionGraph) -> dict[str, Any]:
    operators = [node for node in graph.nodes if node.is_operator]
    communication = [node for node in operators if node.communication is not None]
    known = {node.number for node in graph.nodes}
    timed = [node for node in operators if node.duration_s is not None]
    return {
        "file": graph.file_name,
        "schema": one_line(graph.schema),
        "num_nodes": len(graph.nodes),
        "num_operators": len(operators),
        "num_with_shapes": sum(bool(node.dims) for node in operators),
        "num_with_times": len(timed),
        "num_communication": len(communication),
        "num_threads": len({node.thread for node in operators}),
        "num_data_edges": sum(len(node.data) for node in graph.nodes),
        "num_control_edges": sum(len(node.controls) for node in graph.nodes),
        "num_dangling_edges": sum(
            one not in known for node in graph.nodes for one in (*node.data, *node.controls)
        ),
        "host_s": _total_s(node for node in timed if node.on_host),
        "device_s": _total_s(node for node in timed if node.on_host is False),
        "process_groups": [
            {"name": one_line(name), "size": size} for name, size in graph.process_groups
        ],
        "operators": [
            {"name": one_line(name)[:_NAME_CHARACTERS], "num_calls": count}
            for name, count in Counter(node.name for node in operators).most_common(_NUM_LISTED)
        ],
        "collectives": _collectives(communication),
    }


def _total_s(nodes: Any) -> float | None:
    times_s = [node.duration_s for node in nodes]
    return sum(times_s) if times_s else None


def _collectives(nodes: list[GraphNode]) -> list[dict[str, Any]]:
    groups: dict[Any, list[GraphNode]] = defaultdict(list)
    for node in nodes:
        assert node.communication is not None, "only nodes of communication are grouped"
        one = node.communication
        groups[one.name, one.input_bytes, one.dtype].append(node)
    return [
        {
            "name": one_line(name),
            "input_bytes": input_bytes,
            "dtype": dtype,
            "num_calls": len(members),
            "device_s": _total_s(
                node for node in members if node.duration_s is not None and not node.on_host
            ),
        }
        for (name, input_bytes, dtype), members in groups.items()
    ]


def _lines(graph: ExecutionGraph, summary: dict[str, Any]) -> list[str]:
    lines = [
        f"schema {summary['schema'] or 'not said'}: {summary['num_nodes']} nodes, "
        f"{summary['num_operators']} operators ({summary['num_with_shapes']} with shapes), "
        f"{summary['num_communication']} of communication, {summary['num_data_edges']} data and "
        f"{summary['num_control_edges']} control dependencies"
    ]
    for where in ("host", "device"):
        if summary[f"{where}_s"] is not None:
            lines.append(f"{where} times sum to {format_seconds(summary[f'{where}_s'])}")
    lines += [f"group {one_line(name)}: {size} ranks" for name, size in graph.process_groups[:5]]
    lines += [
        f"{one['name']}: {one['num_calls']} calls" for one in summary["operators"][:_NUM_SHOWN]
    ]
    for one in summary["collectives"][:_NUM_SHOWN]:
        size = "size not said" if one["input_bytes"] is None else format_bytes(one["input_bytes"])
        took = (
            "" if one["device_s"] is None else f", {format_seconds(one['device_s'])} on the device"
        )
        lines.append(
            f"{one['name']} of {size} {one['dtype'] or 'type not said'}: "
            f"{one['num_calls']} calls{took}"
        )
    if summary["linked_to"] is not None:
        lines.append(f"{summary['num_linked']} operators found again in {summary['linked_to']}")
    return lines
