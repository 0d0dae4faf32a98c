"""Where a rank's time went: iterations, and compute, communication and idleness in each.

A device is busy while anything runs on any of its streams. Of a span of time T, with A the time in
which compute (kernels, copies, fills) runs and B the time in which communication runs:

    overlap = |A and B| = |A| + |B| - |A or B|,   idle = T - |A or B|,   exposed = |B| - overlap

so compute + communication - overlap + idle = T. Each is the measure of a union of intervals.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from meshwright.profiling.traces.columns import COPY, FILL, Integers, RankTrace

__all__ = [
    "Cover",
    "Iteration",
    "Shares",
    "cover_of",
    "device_shares",
    "is_communication",
    "iterations_of",
]

_STEP = re.compile(r"ProfilerStep#(\d{1,12})")
_OPTIMIZER_STEP = re.compile(r"Optimizer\.step#")
_COMMUNICATION = ("nccl", "rccl", "oneccl", "msccl", "nvshmem")
_HOST_COMMUNICATION = re.compile(r"(gloo|nccl|mpi|ucc|xccl|hccl):")


@dataclass(frozen=True, slots=True, kw_only=True)
class Iteration:
    """One training step, by the clock of the trace."""

    number: int
    start_ns: int
    end_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """How one device spent one span; seconds. See the module for what adds up to ``span_s``."""

    span_s: float
    compute_s: float
    """Kernels that do not communicate, copies and fills."""
    communication_s: float
    overlap_s: float
    idle_s: float
    copy_only_s: float
    """The part of ``compute_s`` in which nothing but copies and fills runs."""

    @property
    def exposed_s(self) -> float:
        """Communication beside which nothing else runs."""
        return self.communication_s - self.overlap_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Cover:
    """A union of intervals, as disjoint ones in order."""

    start_ns: Integers
    end_ns: Integers

    def measure_ns(self, low_ns: Integers, high_ns: Integers) -> Integers:
        """Covered time in each span from ``low_ns`` to ``high_ns``."""
        return self._before(high_ns) - self._before(low_ns)

    def _before(self, time_ns: Integers) -> Integers:
        if not len(self.start_ns):
            return np.zeros(len(time_ns), dtype=np.int64)
        lengths = np.concatenate(([0], np.cumsum(self.end_ns - self.start_ns)))
        place = np.searchsorted(self.start_ns, time_ns, side="right") - 1
        at = np.maximum(place, 0)
        inside = np.clip(time_ns - self.start_ns[at], 0, self.end_ns[at] - self.start_ns[at])
        return np.where(place >= 0, lengths[at] + inside, 0)


def cover_of(start_ns: Integers, end_ns: Integers) -> Cover:
    """The union of intervals given in any order, which may overlap."""
    order = np.argsort(start_ns, kind="stable")
    start, end = start_ns[order], np.maximum.accumulate(end_ns[order])
    if not len(start):
        return Cover(start_ns=start, end_ns=end)
    first = np.concatenate(([True], start[1:] > end[:-1]))
    last = np.concatenate((first[1:], [True]))
    return Cover(start_ns=start[first], end_ns=end[last])


def is_communication(name: str) -> bool:
    """Whether a kernel of this name moves data between ranks."""
    lowered = name.lower()
    return any(word in lowered for word in _COMMUNICATION)


def iterations_of(trace: RankTrace) -> tuple[list[Iteration], str]:
    """The training steps in order, and in words how they were told.

    By the profiler's own marks (``ProfilerStep#N``); else from the end of one optimizer step to the
    end of the next; else the whole trace counts as one.
    """
    notes = trace.annotations
    steps = {
        number: int(found[1])
        for number, name in enumerate(trace.names)
        if (found := _STEP.fullmatch(name))
    }
    marks = np.flatnonzero(np.isin(notes.name, list(steps)))
    if len(marks):
        return _by_marks(trace, marks, steps), "ProfilerStep marks"
    optimizers = [n for n, name in enumerate(trace.names) if _OPTIMIZER_STEP.match(name)]
    of_optimizers = np.flatnonzero(np.isin(notes.name, optimizers))
    if len(of_optimizers):
        # Several optimizers take turns in a step: the one that ends last ends the step.
        last = notes.name[of_optimizers[np.argmax(notes.end_ns[of_optimizers])]]
        ends = np.sort(notes.end_ns[of_optimizers[notes.name[of_optimizers] == last]])
        if len(ends) > 1:
            pairs = enumerate(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True))
            spans = [Iteration(number=n, start_ns=low, end_ns=high) for n, (low, high) in pairs]
            return spans, "from one optimizer step's end to the next"
    low_ns, high_ns = _whole_span(trace)
    return [Iteration(number=0, start_ns=low_ns, end_ns=high_ns)], "none marked: the whole trace"


def _by_marks(trace: RankTrace, marks: Integers, steps: dict[int, int]) -> list[Iteration]:
    notes = trace.annotations
    found: dict[int, Iteration] = {}
    for mark in marks.tolist():
        number = steps[int(notes.name[mark])]
        span = Iteration(
            number=number, start_ns=int(notes.start_ns[mark]), end_ns=int(notes.end_ns[mark])
        )
        # A step of that number on another thread repeats the mark; the longest one counts.
        other = found.get(number)
        if other is None or span.end_ns - span.start_ns > other.end_ns - other.start_ns:
            found[number] = span
    return sorted(found.values(), key=lambda one: one.start_ns)


def _whole_span(trace: RankTrace) -> tuple[int, int]:
    spans = [part for part in (trace.operators, trace.annotations, trace.work) if len(part)]
    if not spans:
        return 0, 0
    return (
        min(int(part.start_ns.min()) for part in spans),
        max(int(part.end_ns.max()) for part in spans),
    )


def device_shares(trace: RankTrace, iterations: list[Iteration]) -> dict[int, tuple[Shares, ...]]:
    """By device that did anything: its shares in each iteration.

    Without devices the host stands in as device -1: compute is what operators take on any thread,
    communication what the annotations of a host backend (``gloo:all_reduce``) span.
    """
    work = trace.work
    if not len(work):
        notes = trace.annotations
        names = [n for n, name in enumerate(trace.names) if _HOST_COMMUNICATION.match(name)]
        of_ranks = np.isin(notes.name, names)
        own = trace.operators
        return {
            -1: _shares(
                cover_of(own.start_ns, own.end_ns),
                cover_of(notes.start_ns[of_ranks], notes.end_ns[of_ranks]),
                cover_of(own.start_ns[:0], own.end_ns[:0]),
                iterations,
            )
        }
    names = [number for number, name in enumerate(trace.names) if is_communication(name)]
    between_ranks = np.isin(work.name, names)
    copies = (work.kind == COPY) | (work.kind == FILL)
    found: dict[int, tuple[Shares, ...]] = {}
    for device in np.unique(work.device).tolist():
        here = work.device == device
        covers = [
            cover_of(work.start_ns[chosen], work.end_ns[chosen])
            for chosen in (
                here & ~between_ranks,
                here & between_ranks,
                here & ~between_ranks & ~copies,
            )
        ]
        found[device] = _shares(covers[0], covers[1], covers[2], iterations, copies_known=True)
    return found


def _shares(
    compute: Cover,
    communication: Cover,
    kernels: Cover,
    iterations: list[Iteration],
    *,
    copies_known: bool = False,
) -> tuple[Shares, ...]:
    low = np.array([one.start_ns for one in iterations], dtype=np.int64)
    high = np.array([one.end_ns for one in iterations], dtype=np.int64)
    either = cover_of(
        np.concatenate((compute.start_ns, communication.start_ns)),
        np.concatenate((compute.end_ns, communication.end_ns)),
    )
    busy, computing, communicating, in_kernels = (
        cover.measure_ns(low, high) for cover in (either, compute, communication, kernels)
    )
    copying = computing - in_kernels if copies_known else np.zeros_like(busy)
    columns = (high - low, computing, communicating, computing + communicating - busy)
    rows = zip(*(column.tolist() for column in (*columns, high - low - busy, copying)), strict=True)
    return tuple(
        Shares(
            span_s=span * 1e-9,
            compute_s=compute_ns * 1e-9,
            communication_s=communication_ns * 1e-9,
            overlap_s=overlap * 1e-9,
            idle_s=idle * 1e-9,
            copy_only_s=copy * 1e-9,
        )
        for span, compute_ns, communication_ns, overlap, idle, copy in rows
    )
