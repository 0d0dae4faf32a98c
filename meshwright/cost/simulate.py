"""A schedule as a list of events, timed for one plan or for many at a time.

A device group runs one function at a time, in the schedule's order. A function starts when its
group is free and every value it waits for has arrived; sends do not block. So each event ends at::

    max(end of the one before it on its group, ends it waits for + transfers) + its own time

The list is in an order in which every event comes after those it waits for, and it depends on the
schedule and the stage graph alone: one pass over it gives all ends, for one plan with numbers, for
many with arrays over the plans. With token slices (arXiv 2102.07988) every function is an event for
each slice: forwards in ascending order, backwards in descending order, since a slice's keys and
values get gradients from the later ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from meshwright.plans.plan import ScheduleName
from meshwright.spmd.schedule import Kind, StageInputs, Task, depths, group_order

__all__ = ["EventList", "PipelineShape", "end_times_of_many_s", "end_times_s", "event_list"]

Edges = tuple[tuple[int, int], ...]
"""(source stage, target stage)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineShape:
    """What the order of events depends on, but for the number of micro-batches."""

    schedule: ScheduleName
    stage_inputs: tuple[tuple[int, ...], ...]
    """For each stage those it waits for, forward or backward, as ``spmd.schedule`` has it."""
    num_groups: int
    """Device groups; fewer than stages under the interleaved schedule."""
    forward_edges: Edges
    """A forward waits for a forward."""
    backward_edges: Edges
    """A backward waits for a backward."""
    late_edges: Edges = ()
    """A backward waits for a forward of another stage."""
    num_slices: int = 1

    @property
    def num_stages(self) -> int:
        """Stages, several on a device group under the interleaved schedule."""
        return len(self.stage_inputs)

    @property
    def is_interleaved(self) -> bool:
        """Several stages on a device group."""
        return self.num_groups < self.num_stages

    @property
    def span(self) -> int:
        """Micro-batches between the first and the last that any moment of the step deals with."""
        return 3 * self.num_groups if self.is_interleaved else max(depths(self.stage_inputs))

    @property
    def is_chain(self) -> bool:
        """Values pass between neighbors only."""
        pairs = {*self.forward_edges, *(edge[::-1] for edge in self.backward_edges)}
        return not self.late_edges and all(b == a + 1 for a, b in pairs)

    @classmethod
    def of(
        cls,
        schedule: ScheduleName,
        *,
        stage_inputs: StageInputs,
        num_groups: int,
        forward_edges: Iterator[tuple[int, int]] | Sequence[tuple[int, int]] = (),
        backward_edges: Iterator[tuple[int, int]] | Sequence[tuple[int, int]] = (),
        late_edges: Edges = (),
        num_slices: int = 1,
    ) -> PipelineShape:
        """With the edges of ``stage_inputs``, both ways, and some more."""
        known = [(source, stage) for stage, found in enumerate(stage_inputs) for source in found]
        forward = {*known, *forward_edges}
        backward = {*((target, source) for source, target in known), *backward_edges}
        inputs: list[set[int]] = [set() for _ in stage_inputs]
        for source, target in (*forward, *(edge[::-1] for edge in backward)):
            inputs[target].add(source)
        return cls(
            schedule=schedule,
            stage_inputs=tuple(tuple(sorted(found)) for found in inputs),
            num_groups=num_groups,
            forward_edges=tuple(sorted(forward)),
            backward_edges=tuple(sorted(backward)),
            late_edges=late_edges,
            num_slices=num_slices,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EventList:
    """Every event of a step; see the module docstring."""

    duration: tuple[int, ...]
    """Row of ``(kind, stage, slice)`` durations, row-major."""
    before: tuple[int, ...]
    """The event before on the same group; -1 for the first."""
    waits: tuple[tuple[tuple[int, int], ...], ...]
    """(event, row of transfers): rows are those of (edge, slice), forward, backward, late."""
    last: tuple[int, ...]
    """Last event of each group."""
    by_microbatch: NDArray[np.int64]
    """(micro-batches, functions and slices) events."""


@lru_cache(maxsize=64)
def event_list(shape: PipelineShape, num_microbatches: int) -> EventList:
    """The events of a step.

    Raises:
        PlanRefused: the schedule does not exist for these numbers of stages and micro-batches.
    """
    return _Builder(shape, num_microbatches).build()


class _Builder:
    """Takes events from the heads of the groups' orders as soon as what they wait for is there."""

    def __init__(self, shape: PipelineShape, num_microbatches: int) -> None:
        self.shape = shape
        size = (len(Kind), shape.num_stages, num_microbatches, shape.num_slices)
        self.number = np.full(size, -1, dtype=np.int64)
        self.sources: dict[tuple[Kind, int], list[tuple[Kind, int, int]]] = {}
        row = 0
        for edges, source_kind, target_kind in (
            (shape.forward_edges, Kind.FORWARD, Kind.FORWARD),
            (shape.backward_edges, Kind.BACKWARD, Kind.BACKWARD),
            (shape.late_edges, Kind.FORWARD, Kind.BACKWARD),
        ):
            for source, target in edges:
                found = self.sources.setdefault((target_kind, target), [])
                found.append((source_kind, source, row))
                row += shape.num_slices
        self.orders = [
            group_order(
                shape.schedule,
                group=group,
                num_groups=shape.num_groups,
                num_microbatches=num_microbatches,
                stage_inputs=shape.stage_inputs,
            )
            for group in range(shape.num_groups)
        ]
        self.last = [-1] * shape.num_groups
        self.duration: list[int] = []
        self.before: list[int] = []
        self.waits: list[tuple[tuple[int, int], ...]] = []

    def build(self) -> EventList:
        position = [0] * self.shape.num_groups
        groups = (*range(len(position)), *range(len(position) - 2, -1, -1))
        while any(position[g] < len(self.orders[g]) for g in range(len(position))):
            before = len(self.duration)
            for group in groups:
                order = self.orders[group]
                while position[group] < len(order) and self._take(group, order[position[group]]):
                    position[group] += 1
            assert len(self.duration) > before, "the schedule waits for itself"
        used = np.moveaxis(self.number, 2, 0).reshape(self.number.shape[2], -1)
        return EventList(
            duration=tuple(self.duration),
            before=tuple(self.before),
            waits=tuple(self.waits),
            last=tuple(self.last),
            by_microbatch=np.asarray(used[:, np.flatnonzero(used[0] >= 0)]),
        )

    def _take(self, group: int, task: Task) -> bool:
        """Add the events of ``task``, unless something it waits for is not there yet."""
        sources = self.sources.get((task.kind, task.stage), [])
        found = [
            (self.number[kind, stage, task.microbatch].tolist(), row)
            for kind, stage, row in sources
        ]
        if any(-1 in numbers for numbers, _ in found):
            return False
        count = self.shape.num_slices
        first = (task.kind * self.shape.num_stages + task.stage) * count
        slices = range(count) if task.kind is Kind.FORWARD else range(count - 1, -1, -1)
        for number in slices:
            self.number[task.kind, task.stage, task.microbatch, number] = len(self.duration)
            self.waits.append(tuple((numbers[number], row + number) for numbers, row in found))
            self.before.append(self.last[group])
            self.last[group] = len(self.duration)
            self.duration.append(first + number)
        return True


def end_times_s(
    events: EventList, durations_s: Sequence[float], transfers_s: Sequence[float]
) -> list[float]:
    """When each event ends, seconds from the start of the step, for one plan.

    Args:
        events: the events.
        durations_s: of every (kind, stage, slice), row-major.
        transfers_s: of every (edge, slice), row-major: forward edges, backward, late.
    """
    ends: list[float] = []
    add = ends.append
    for duration, before, waits in zip(events.duration, events.before, events.waits, strict=True):
        start = ends[before] if before >= 0 else 0.0
        for event, row in waits:
            arrival = ends[event] + transfers_s[row]
            if arrival > start:
                start = arrival
        add(start + durations_s[duration])
    return ends


def end_times_of_many_s(
    events: EventList, durations_s: NDArray[np.float64], transfers_s: NDArray[np.float64]
) -> NDArray[np.float64]:
    """As ``end_times_s`` for many plans: arguments (rows, plans), result (events, plans)."""
    ends = np.empty((len(events.duration), durations_s.shape[1]))
    arrival = np.empty(durations_s.shape[1])
    takes = (transfers_s.sum(axis=1) > 0).tolist()
    zeros = np.zeros(durations_s.shape[1])
    for number, (duration, before, waits) in enumerate(
        zip(events.duration, events.before, events.waits, strict=True)
    ):
        start = ends[before] if before >= 0 else zeros
        end = ends[number]
        for event, row in waits:
            if takes[row]:
                np.add(ends[event], transfers_s[row], out=arrival)
                np.maximum(start, arrival, out=end)
            else:
                np.maximum(start, ends[event], out=end)
            start = end
        np.add(start, durations_s[duration], out=end)
    return ends
