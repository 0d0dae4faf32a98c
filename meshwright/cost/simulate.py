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

_LONGEST_REMEMBERED = 20_000
"""Micro-batches times stages and slices of a list that is kept: about 10 MB."""

_FEW_PLANS = 8
"""Up to so many plans go one by one: an operation on an array costs as much as on ten numbers."""


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

    kind_row: tuple[int, ...]
    """Row of ``(kind, stage, slice)`` durations, row-major."""
    before: tuple[int, ...]
    """The event before on the same group; -1 for the first."""
    waits: tuple[tuple[tuple[int, int], ...], ...]
    """(event, row of transfers): rows are those of (edge, slice), forward, backward, late."""
    last: tuple[int, ...]
    """Last event of each group."""
    by_microbatch: NDArray[np.int64]
    """(micro-batches, functions and slices) events."""


def event_list(shape: PipelineShape, num_microbatches: int) -> EventList:
    """The events of a step; short lists are remembered.

    Raises:
        PlanRefused: the schedule does not exist for these numbers of stages and micro-batches.
    """
    if shape.num_stages * num_microbatches * shape.num_slices > _LONGEST_REMEMBERED:
        return _built(shape, num_microbatches)
    return _remembered(shape, num_microbatches)


def _built(shape: PipelineShape, num_microbatches: int) -> EventList:
    return _Builder(shape, num_microbatches).build()


_remembered = lru_cache(maxsize=48)(_built)


class _Builder:
    """Takes events from the heads of the groups' orders as soon as what they wait for is there."""

    def __init__(self, shape: PipelineShape, num_microbatches: int) -> None:
        self.shape = shape
        size = num_microbatches * shape.num_slices
        self.number = [[[-1] * size for _ in range(shape.num_stages)] for _ in Kind]
        self.sources: dict[tuple[Kind, int], list[tuple[list[int], int]]] = {}
        row = 0
        for edges, source_kind, target_kind in (
            (shape.forward_edges, Kind.FORWARD, Kind.FORWARD),
            (shape.backward_edges, Kind.BACKWARD, Kind.BACKWARD),
            (shape.late_edges, Kind.FORWARD, Kind.BACKWARD),
        ):
            for source, target in edges:
                found = self.sources.setdefault((target_kind, target), [])
                found.append((self.number[source_kind][source], row))
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
        self.rows: list[int] = []
        self.before: list[int] = []
        self.waits: list[tuple[tuple[int, int], ...]] = []

    def build(self) -> EventList:
        position = [0] * self.shape.num_groups
        groups = (*range(len(position)), *range(len(position) - 2, -1, -1))
        while any(position[g] < len(self.orders[g]) for g in range(len(position))):
            before = len(self.rows)
            for group in groups:
                order = self.orders[group]
                while position[group] < len(order) and self._take(group, order[position[group]]):
                    position[group] += 1
            assert len(self.rows) > before, "the schedule waits for itself"
        every = np.array(self.number, dtype=np.int64)
        by_microbatch = every.reshape(
            -1, every.shape[2] // self.shape.num_slices, self.shape.num_slices
        )
        used = by_microbatch[by_microbatch[:, 0, 0] >= 0]
        return EventList(
            kind_row=tuple(self.rows),
            before=tuple(self.before),
            waits=tuple(self.waits),
            last=tuple(self.last),
            by_microbatch=used.transpose(1, 0, 2).reshape(used.shape[1], -1),
        )

    def _take(self, group: int, task: Task) -> bool:
        """Add the events of ``task``, unless something it waits for is not there yet."""
        count, microbatch = self.shape.num_slices, task.microbatch
        sources = self.sources.get((task.kind, task.stage), ())
        if any(made[microbatch * count] < 0 for made, _ in sources):
            return False
        first = (task.kind * self.shape.num_stages + task.stage) * count
        slices = range(count) if task.kind is Kind.FORWARD else range(count - 1, -1, -1)
        mine = self.number[task.kind][task.stage]
        for number in slices:
            place = microbatch * count + number
            event = mine[place] = len(self.rows)
            self.waits.append(tuple([(made[place], row + number) for made, row in sources]))
            self.before.append(self.last[group])
            self.last[group] = event
            self.rows.append(first + number)
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
    for kind, before, waits in zip(events.kind_row, events.before, events.waits, strict=True):
        start = ends[before] if before >= 0 else 0.0
        for event, row in waits:
            arrival = ends[event] + transfers_s[row]
            if arrival > start:
                start = arrival
        add(start + durations_s[kind])
    return ends


def end_times_of_many_s(
    events: EventList, durations_s: NDArray[np.float64], transfers_s: NDArray[np.float64]
) -> NDArray[np.float64]:
    """As ``end_times_s`` for many plans: arguments (rows, plans), result (events, plans)."""
    num_plans = durations_s.shape[1]
    if num_plans <= _FEW_PLANS:
        each = zip(durations_s.T.tolist(), transfers_s.T.tolist(), strict=True)
        return np.array([end_times_s(events, *plan) for plan in each]).reshape(num_plans, -1).T
    ends = np.empty((len(events.kind_row), num_plans))
    arrival = np.empty(num_plans)
    takes = (transfers_s.sum(axis=1) > 0).tolist()
    zeros = np.zeros(num_plans)
    for number, (kind, before, waits) in enumerate(
        zip(events.kind_row, events.before, events.waits, strict=True)
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
        np.add(start, durations_s[kind], out=end)
    return ends
