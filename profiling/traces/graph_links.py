"""The operators of an execution trace found again in a profiler trace of the same run.

Both list the calls of each thread in order: the execution trace by its ``rf_id``, the profiler by
its ``External id`` (by start, where it gives none). Their numbers differ by what one of them leaves
out, so the calls are found by name: the thread's whole list of names must stand, unbroken, in the
list of one thread of the profiler trace. What is found so gets its shapes and types from the
execution trace where the profiler recorded none.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from meshwright.profiling.traces.columns import Integers, RankTrace, Spans
from meshwright.profiling.traces.execution_graph import ExecutionGraph, GraphNode

__all__ = ["Linked", "link_graph"]

_MARKS = re.compile(r"ProfilerStep#\d+|\[pytorch\|profiler\|.*|## process_group:init ##")
_LEAST_CALLS = 8
"""A shorter list of names may stand anywhere by chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Linked:
    """A profiler trace with what an execution trace adds to it."""

    trace: RankTrace
    num_linked: int
    """Operators found in both; 0 if they are not of the same run."""


def link_graph(trace: RankTrace, graph: ExecutionGraph) -> Linked:
    """``trace`` with shapes and types of the operators that ``graph`` describes."""
    host_pids = {pid for pid, _ in trace.threads if isinstance(pid, int)}
    if graph.pid is not None and host_pids and graph.pid not in host_pids:
        return Linked(trace=trace, num_linked=0)
    numbers = {name: number for number, name in enumerate(trace.names)}
    lists = _lists(trace)
    shape = trace.operators.shape.astype(np.int64)
    shapes = {text: number for number, text in enumerate(trace.shapes)}
    num_linked = 0
    for nodes in _threads(graph):
        wanted = np.array([numbers.get(node.name, -1) for node in nodes], dtype=np.int64)
        if len(nodes) < _LEAST_CALLS or (wanted < 0).any():
            continue
        places = _found(wanted, lists)
        if places is None:
            continue
        for node, place in zip(nodes, places.tolist(), strict=True):
            if place < 0:
                continue  # an annotation
            num_linked += 1
            if node.dims and trace.shapes[shape[place]] == (b"", b""):
                text = (node.dims, node.types)
                shape[place] = shapes.setdefault(text, len(shapes))
    if not num_linked:
        return Linked(trace=trace, num_linked=0)
    return Linked(
        trace=replace(trace, shapes=tuple(shapes), operators=replace(trace.operators, shape=shape)),
        num_linked=num_linked,
    )


def _threads(graph: ExecutionGraph) -> list[list[GraphNode]]:
    threads: dict[int, list[GraphNode]] = defaultdict(list)
    for node in graph.nodes:
        if node.order >= 0 and not _MARKS.fullmatch(node.name):
            threads[node.thread].append(node)
    return [sorted(nodes, key=lambda node: node.order) for nodes in threads.values()]


def _lists(trace: RankTrace) -> list[tuple[Integers, Integers]]:
    """By thread: names in order, and the number of each among the operators, -1 for annotations."""
    marks = [number for number, name in enumerate(trace.names) if _MARKS.fullmatch(name)]
    parts: Sequence[tuple[Spans, bool]] = ((trace.operators, True), (trace.annotations, False))
    columns = [
        np.stack(
            (
                spans.thread.astype(np.int64),
                spans.external_id.astype(np.int64),
                spans.start_ns,
                -spans.end_ns,
                spans.name.astype(np.int64),
                np.arange(len(spans)) if are_operators else np.full(len(spans), -1),
            )
        )
        for spans, are_operators in parts
    ]
    thread, external, start, end, name, number = np.concatenate(columns, axis=1)
    kept = ~np.isin(name, marks)
    order = np.lexsort((end, start, external, thread))
    order = order[kept[order]]
    splits = np.flatnonzero(np.diff(thread[order])) + 1
    return list(zip(np.split(name[order], splits), np.split(number[order], splits), strict=True))


def _found(wanted: Integers, lists: list[tuple[Integers, Integers]]) -> Integers | None:
    """Numbers of the operators at the one place where ``wanted`` stands; None if there is none.

    Where it stands more than once, iterations repeat one another: the last is taken, when caches
    are warm.
    """
    needle = wanted.tobytes()
    for names, numbers in lists:
        text = names.tobytes()
        place = text.rfind(needle)
        while place >= 0 and place % wanted.itemsize:
            place = text.rfind(needle, 0, place + len(needle) - 1)
        if place >= 0:
            first = place // wanted.itemsize
            return numbers[first : first + len(wanted)]
    return None
