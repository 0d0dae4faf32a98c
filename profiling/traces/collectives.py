"""The collectives of one rank: what, how large, of what type, among whom, from when to when.

What a profiler says of a collective moved with its versions. In this order, each filling what the
ones before left open: the kernel's own arguments (PyTorch 2.4), those of the host's
``record_param_comms`` that encloses the launch (2.1), the shapes of the ``nccl:...`` annotation
around it (1.12), the shapes of the ``c10d::...`` operator. What none of them says stays None.

``num_bytes`` counts as nccl-tests does: the whole buffer of an all-reduce or broadcast, the
gathered buffer of an all-gather, the buffer that is scattered of a reduce-scatter, what this rank
sends in an all-to-all, what passes in a send or receive.
"""

from __future__ import annotations

import bisect
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from meshwright.profiling.traces.columns import KERNEL, Integers, RankTrace
from meshwright.profiling.traces.events import Arguments
from meshwright.profiling.traces.families import parse_dims
from meshwright.profiling.traces.nesting import Nesting, nesting_of
from meshwright.profiling.traces.operators import first_places
from meshwright.profiling.traces.timeline import Iteration, is_communication
from meshwright.profiling.traces.words import dtype_of, item_bytes_of

__all__ = ["CollectiveCall", "collective_name", "collectives_of"]

# The first that the name holds, letters only, says what it is.
_NAMES = (
    ("allreduce", "all_reduce"),
    ("reducescatter", "reduce_scatter"),
    ("allgather", "all_gather"),
    ("alltoall", "all_to_all"),
    ("broadcast", "broadcast"),
    ("sendrecv", "send_recv"),
    ("barrier", "barrier"),
    ("allbroadcast", "broadcast"),
    ("gather", "gather"),
    ("scatter", "scatter"),
    ("reduce", "reduce"),
    ("send", "send_recv"),
    ("recv", "send_recv"),
)
_ANNOTATION = re.compile(r"(nccl|gloo|mpi|ucc|xccl|hccl):(?!coalesced)")
_OPERATOR = re.compile(r"c10d::|_c10d_functional::")
_OPERATORS_WITH_OUTPUT_FIRST = re.compile(r"base|into_tensor|single")
_MAX_GROUP = 2**24


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveCall:
    """One collective on one rank; None for what the trace does not tell."""

    name: str
    """``all_reduce``, ``all_to_all``...; the kernel's own name where it is none of ours."""
    num_bytes: int | None
    dtype: str | None
    group_size: int | None
    group: str | None
    """Name of the process group or, without one, its ranks as text."""
    sequence: int | None
    """Number within the group, where the profiler counts."""
    iteration: int | None
    start_ns: int
    end_ns: int
    """On the device, from the trace's zero; waiting for the other ranks included."""
    launch_ns: int | None
    """When the host launched it."""

    @property
    def time_s(self) -> float:
        """From start to end on this rank."""
        return (self.end_ns - self.start_ns) * 1e-9


def collective_name(word: str) -> str | None:
    """Our name of what a profiler, NCCL or PyTorch calls ``word``; None if it is none."""
    letters = re.sub(r"[^a-z]", "", word.lower())
    return next((name for part, name in _NAMES if part in letters), None)


def collectives_of(
    trace: RankTrace, nesting: Nesting, launched_by: Integers, iterations: list[Iteration]
) -> list[CollectiveCall]:
    """The collectives of one rank in the order they were launched.

    Kernels that one call of the host launched count as one.
    """
    work = trace.work
    numbers = [n for n, name in enumerate(trace.names) if is_communication(name)]
    kernels = np.flatnonzero((work.kind == KERNEL) & np.isin(work.name, numbers))
    if not len(kernels):
        return []
    launch = first_places(trace.launches.correlation, work.correlation[kernels])
    known = launch >= 0
    launch_ns = np.full(len(kernels), -1, dtype=np.int64)
    thread = np.full(len(kernels), -1, dtype=np.int64)
    launch_ns[known] = trace.launches.start_ns[launch[known]]
    thread[known] = trace.launches.thread[launch[known]]
    notes = nesting_of(trace.annotations)
    note = notes.enclosing(thread, launch_ns)
    operator_parents, note_parents = nesting.parents(), notes.parents()

    found: dict[Any, CollectiveCall] = {}
    starts = [one.start_ns for one in iterations]
    for place, kernel in enumerate(kernels.tolist()):
        operators = _upwards(operator_parents, int(launched_by[kernel]))
        clues = _clues(trace, kernel, operators, _upwards(note_parents, int(note[place])))
        host_ns = int(launch_ns[place]) if known[place] else None
        when_ns = int(work.start_ns[kernel]) if host_ns is None else host_ns
        call = CollectiveCall(
            **clues,
            iteration=_iteration_at(when_ns, iterations, starts),
            start_ns=int(work.start_ns[kernel]),
            end_ns=int(work.end_ns[kernel]),
            launch_ns=host_ns,
        )
        caller = next((one for one in operators if one in trace.collectives), None)
        key: Any = ("kernel", kernel) if caller is None else caller
        before = found.get(key)
        found[key] = call if before is None else _joined(before, call)
    return sorted(found.values(), key=lambda one: (one.launch_ns or one.start_ns, one.start_ns))


def _iteration_at(time_ns: int, iterations: list[Iteration], starts: list[int]) -> int | None:
    """Number of the iteration that ``time_ns`` lies in; they are in order of their starts."""
    place = bisect.bisect_right(starts, time_ns) - 1
    inside = place >= 0 and time_ns < iterations[place].end_ns
    return iterations[place].number if inside else None


def _joined(one: CollectiveCall, other: CollectiveCall) -> CollectiveCall:
    return CollectiveCall(
        name=one.name,
        num_bytes=one.num_bytes,
        dtype=one.dtype,
        group_size=one.group_size,
        group=one.group,
        sequence=one.sequence,
        iteration=one.iteration,
        start_ns=min(one.start_ns, other.start_ns),
        end_ns=max(one.end_ns, other.end_ns),
        launch_ns=one.launch_ns,
    )


def _upwards(parents: Integers, number: int) -> list[int]:
    found = []
    while number >= 0:
        found.append(number)
        number = int(parents[number])
    return found


def _clues(trace: RankTrace, kernel: int, operators: list[int], notes: list[int]) -> dict[str, Any]:
    """The fields of a call that describe it, from whatever says them first."""
    kernel_name = trace.names[trace.work.name[kernel]]
    said = [trace.kernel_collectives.get(kernel)]
    said += [trace.collectives.get(one) for one in operators]
    sources = [one for one in said if one is not None]
    name, dtype, elements, group_size = None, None, None, None
    for arguments in sources:
        word = arguments.collective
        name = name or (collective_name(word) if isinstance(word, str) else None)
        dtype = dtype or dtype_of(arguments.dtype)
        group_size = group_size or _count(arguments.group_size)
    spans = [(trace.annotations, one) for one in notes]
    spans += [(trace.operators, one) for one in operators]
    named = [
        (words, spans_.shape[one])
        for spans_, one in spans
        if _ANNOTATION.match(words := trace.names[spans_.name[one]]) or _OPERATOR.match(words)
    ]
    for words, _ in named:
        name = name or collective_name(words)
    name = name or collective_name(kernel_name) or kernel_name[:80]
    group = _first_text(sources, "group_name") or _first_text(sources, "group_ranks")
    group_size = group_size or _size_of_group(trace.distributed, group)
    for arguments in sources:
        elements = elements or _elements_said(arguments, name)
    for words, shape in named:
        parsed = parse_dims(*trace.shapes[shape])
        if parsed is not None:
            dtype = dtype or parsed[1]
            elements = elements or _elements_of_shapes(words, parsed[0], name, group_size)
    for one in operators:
        if elements is None and one in trace.collectives:
            parsed = parse_dims(*trace.shapes[trace.operators.shape[one]])
            if parsed is not None:
                dtype = dtype or parsed[1]
                elements = _elements_of_shapes("record", parsed[0][:1], name, group_size)
    num_bytes = (elements or 0) * (item_bytes_of(dtype) or 0)
    return {
        "name": name,
        "num_bytes": num_bytes if 0 < num_bytes < 2**62 else None,
        "dtype": dtype,
        "group_size": group_size,
        "group": group,
        "sequence": next((s for a in sources if (s := _count(a.sequence)) is not None), None),
    }


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and 0 < value < 2**62 else None


def _first_text(sources: list[Arguments], field: str) -> str | None:
    for arguments in sources:
        value = getattr(arguments, field)
        if isinstance(value, str | int) and str(value).strip():
            return str(value)[:200]
    return None


def _elements_said(arguments: Arguments, name: str) -> int | None:
    taken, given = _count(arguments.elements_in), _count(arguments.elements_out)
    if name == "all_gather":
        return given or None
    if name in ("send_recv", "broadcast", "gather", "scatter"):
        return max(taken or 0, given or 0) or None
    return taken or given


def _elements_of_shapes(
    words: str, dims: list[list[int]], name: str, group_size: int | None
) -> int | None:
    """Elements of the buffer ``num_bytes`` counts, from shapes of tensors.

    An annotation holds the inputs of the collective; an operator that writes into a buffer holds
    that first, then the input.
    """
    counts = [math.prod(one) for one in dims if one]
    if not counts:
        return None
    if _OPERATOR.match(words) and _OPERATORS_WITH_OUTPUT_FIRST.search(words) and len(counts) > 1:
        return counts[0] if name == "all_gather" else counts[1]
    if name == "all_gather":
        return sum(counts) * group_size if group_size else None
    return sum(counts)


def _size_of_group(distributed: dict[str, Any], group: str | None) -> int | None:
    """Of the group called ``group``, from the list of groups at the head of the file."""
    listed = distributed.get("pg_config")
    for entry in listed if group is not None and isinstance(listed, list) else ():
        if isinstance(entry, dict) and str(entry.get("pg_name")) == group:
            size = _count(entry.get("pg_size"))
            return size if size is not None and size <= _MAX_GROUP else None
    return None
