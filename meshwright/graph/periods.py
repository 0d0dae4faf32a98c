"""Runs of equal units in a graph, checked operator by operator.

A *unit* is a few segments in a row whose classes come again and again. Of a run of units all but
the first and the last, which touch what stands before and behind, must repeat: the operators of
unit u stand a fixed number of places after those of unit u - 1 (before them in the backward pass),
are of the same kinds, and everything they name (values, parameters, forward operators, segments)
either is the same in all units or moves on by a fixed step from unit to unit. So an item of such a
unit is given by its *slot* and its unit. A run of which this does not hold is no run.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.graph.kinds import OpKinds
from meshwright.graph.opgraph import OpGraph, OutputRole, Phase
from meshwright.graph.segments import Segmentation

__all__ = ["NUM_KEPT", "TEMPLATE", "Items", "Periods", "Run", "find_periods"]

NUM_KEPT = 5
"""Units that stand for a longer run: one that repeats, a neighbor of it on each side, and the
two ends."""

TEMPLATE = 2
"""Of the units kept, the one that stands for those left out."""

_MAX_PERIOD = 12

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Equal units one after the other."""

    first_segment: int
    period: int
    """Segments of a unit."""
    num_units: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Items:
    """Where the items of one sort (operators, values, inputs...) stand; arrays (items,)."""

    run: IntArray
    """-1: in the repeating units of no run."""
    unit: IntArray
    slot: IntArray
    at: tuple[IntArray, ...]
    """For each run (slots, units) the item; -1 in the first and the last unit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Periods:
    """The runs of a graph and the items of their repeating units."""

    runs: tuple[Run, ...]
    segments: Items
    ops: Items
    values: Items
    inputs: Items
    outputs: Items


def find_periods(graph: OpGraph, segmentation: Segmentation, kinds: OpKinds) -> Periods:
    """The runs of more than ``NUM_KEPT`` units."""
    classes = [segment.segment_class for segment in segmentation.segments]
    runs = [
        Run(first_segment=first, period=period, num_units=count)
        for first, period, count in _repetitions(classes)
    ]
    flat = _Flat(graph, segmentation, kinds)
    tracks = {run: _tracks(run, graph, flat) for run in runs}
    runs = [run for run in runs if tracks[run]]
    while True:
        search = _Search(graph, flat, [(run, tracks[run]) for run in runs])
        bad = search.bad_runs()
        if not bad:
            return search.periods()
        runs = [run for number, run in enumerate(runs) if number not in bad]


def _repetitions(keys: Sequence[Hashable]) -> Iterator[tuple[int, int, int]]:
    """First position, period and number of units of every long repetition, from the left."""
    position = 0
    while position < len(keys):
        for period in range(1, _MAX_PERIOD + 1):
            stop = position + period
            while stop < len(keys) and keys[stop] == keys[stop - period]:
                stop += 1
            num_units = (stop - position) // period
            if num_units > NUM_KEPT:
                yield position, period, num_units
                position += num_units * period
                break
        else:
            position += 1


class _Flat:
    """What operators name, as arrays: the lists of all operators one after the other."""

    def __init__(self, graph: OpGraph, segmentation: Segmentation, kinds: OpKinds) -> None:
        count = len(graph.ops)
        self.kind = np.array(kinds.kind, dtype=np.int64)
        self.segment = np.array(segmentation.segment_of_op, dtype=np.int64)
        self.num_segments = len(segmentation.segments)
        self.is_forward = np.array([op.phase == Phase.FORWARD for op in graph.ops], dtype=np.bool_)
        self.forward_op = np.array(
            [-1 if op.forward_op is None else op.forward_op for op in graph.ops], dtype=np.int64
        )
        self.amounts = np.array(
            [(op.flop, op.bytes_read, op.bytes_written) for op in graph.ops], dtype=np.float64
        )
        self.refs, self.refs_start = _joined(kinds.inputs)
        self.results, self.results_start = _joined(kinds.results)
        self.reader = np.repeat(np.arange(count), np.diff(self.refs_start))
        self.input_of_value = np.full(len(graph.values), -1, dtype=np.int64)
        self.input_of_value[[item.value for item in graph.inputs]] = np.arange(len(graph.inputs))


def _joined(lists: Sequence[tuple[int, ...]]) -> tuple[IntArray, IntArray]:
    start = np.zeros(len(lists) + 1, dtype=np.int64)
    np.cumsum([len(items) for items in lists], out=start[1:])
    return np.array([item for items in lists for item in items], dtype=np.int64), start


@dataclass(frozen=True, slots=True, kw_only=True)
class _Track:
    """The stretch of the program with the repeating units of a run, in one direction.

    Matrices have a row for each repeating unit, the first one's first.
    """

    ops: IntArray
    refs: IntArray
    results: IntArray


def _tracks(run: Run, graph: OpGraph, flat: _Flat) -> tuple[_Track, ...]:
    """The forward and the backward track; empty where operators do not repeat."""
    unit = (flat.segment - run.first_segment) // run.period
    inside = (flat.segment >= run.first_segment) & (unit < run.num_units)
    found = []
    for forward in (True, False):
        mine = np.flatnonzero(inside & (flat.is_forward == forward))
        if not len(mine):
            continue
        first = np.full(run.num_units, len(graph.ops), dtype=np.int64)
        np.minimum.at(first, unit[mine], mine)
        # Unit u ends where the next one in the program starts: u + 1 forward, u - 1 backward.
        bounds = first[1:] if forward else first[-2::-1]
        steps = np.diff(bounds)
        if steps[0] <= 0 or (steps != steps[0]).any():
            return ()
        track = _track(int(bounds[0]), int(steps[0]), run, flat, forward=forward)
        if track is None:
            return ()
        found.append(track)
    return tuple(found)


def _track(start: int, length: int, run: Run, flat: _Flat, *, forward: bool) -> _Track | None:
    rows = run.num_units - 2
    stop = start + rows * length
    order = slice(None) if forward else slice(None, None, -1)
    ops = np.arange(start, stop).reshape(rows, length)[order]
    kind, amounts = flat.kind[ops], flat.amounts[ops]
    if (kind != kind[0]).any() or (amounts != amounts[0]).any():
        return None
    refs = flat.refs[flat.refs_start[start] : flat.refs_start[stop]].reshape(rows, -1)[order]
    results = flat.results[flat.results_start[start] : flat.results_start[stop]]
    results = results.reshape(rows, -1)[order]
    segment = flat.segment[ops]
    step = _step(segment)
    if step is None or (step[segment[0] >= 0] != run.period).any() or step[segment[0] < 0].any():
        return None
    if any(_step(matrix) is None for matrix in (refs, results, flat.forward_op[ops])):
        return None
    return _Track(ops=ops, refs=refs, results=results)


def _step(matrix: IntArray) -> IntArray | None:
    """By how much each column moves on from row to row; ``None``: not always by the same."""
    steps = np.diff(matrix, axis=0)
    return steps[0] if (steps == steps[0]).all() else None


class _Labels:
    """``Items`` in the making."""

    def __init__(self, count: int, runs: Sequence[Run]) -> None:
        self.run = np.full(count, -1, dtype=np.int64)
        self.unit = np.zeros(count, dtype=np.int64)
        self.slot = np.zeros(count, dtype=np.int64)
        self.runs = runs
        self.tables: list[list[IntArray]] = [[] for _ in runs]
        self.num_slots = [0] * len(runs)

    def put(self, number: int, matrix: IntArray) -> bool:
        """Label the items of ``matrix`` (repeating units, slots); whether none was labeled."""
        rows, slots = matrix.shape
        fresh = bool((self.run[matrix] < 0).all()) and len(np.unique(matrix)) == matrix.size
        self.run[matrix] = number
        self.unit[matrix] = np.arange(1, rows + 1)[:, None]
        self.slot[matrix] = self.num_slots[number] + np.arange(slots)
        self.num_slots[number] += slots
        table = np.full((slots, self.runs[number].num_units), -1, dtype=np.int64)
        table[:, 1:-1] = matrix.T
        self.tables[number].append(table)
        return fresh

    def items(self) -> Items:
        return Items(
            run=self.run,
            unit=self.unit,
            slot=self.slot,
            at=tuple(
                np.concatenate([np.empty((0, run.num_units), dtype=np.int64), *tables])
                for run, tables in zip(self.runs, self.tables, strict=True)
            ),
        )


class _Search:
    """One attempt to label the items of some runs."""

    def __init__(
        self, graph: OpGraph, flat: _Flat, found: list[tuple[Run, tuple[_Track, ...]]]
    ) -> None:
        self.graph, self.flat = graph, flat
        self.runs = tuple(run for run, _ in found)
        self.tracks = [tracks for _, tracks in found]
        self.segments = _Labels(flat.num_segments, self.runs)
        self.ops = _Labels(len(graph.ops), self.runs)
        self.values = _Labels(len(graph.values), self.runs)
        self.inputs = _Labels(len(graph.inputs), self.runs)
        self.outputs = _Labels(len(graph.outputs), self.runs)
        self.bad: set[int] = set()
        for number in range(len(self.runs)):
            self._label(number)

    def bad_runs(self) -> set[int]:
        """Runs that do not repeat after all."""
        if not self.bad:
            for number in range(len(self.runs)):
                self._check_refs(number)
            self._label_outputs()
            self._check_outside()
        return self.bad

    def periods(self) -> Periods:
        return Periods(
            runs=self.runs,
            segments=self.segments.items(),
            ops=self.ops.items(),
            values=self.values.items(),
            inputs=self.inputs.items(),
            outputs=self.outputs.items(),
        )

    def _label(self, number: int) -> None:
        run = self.runs[number]
        first = run.first_segment + run.period
        rows = run.num_units - 2
        segments = np.arange(first, first + rows * run.period).reshape(rows, run.period)
        fresh = self.segments.put(number, segments)
        for track in self.tracks[number]:
            fresh &= self.ops.put(number, track.ops)
            fresh &= self.values.put(number, track.results)
        refs = np.concatenate([track.refs for track in self.tracks[number]], axis=1)
        index = self.flat.input_of_value[refs]
        mine = (index[0] >= 0) & (refs[0] != refs[1])
        _, once = np.unique(refs[0, mine], return_index=True)
        inputs = index[:, mine][:, once]
        if (inputs < 0).any():
            self.bad.add(number)
            return
        fresh &= self.inputs.put(number, inputs)
        fresh &= self.values.put(number, refs[:, mine][:, once])
        if not fresh:
            self.bad.add(number)

    def _check_refs(self, number: int) -> None:
        """What moves on is the same slot of this unit or a neighbor; what does not is no item."""
        for track in self.tracks[number]:
            moves = track.refs[0] != track.refs[1]
            if (
                not self._moves_on(number, track.refs[:, moves])
                or (self.values.run[track.refs[0, ~moves]] >= 0).any()
            ):
                self.bad.add(number)

    def _moves_on(self, number: int, values: IntArray) -> bool:
        """Whether the columns of ``values``, from one reader in each unit, are one slot each."""
        run, unit, slot = self.values.run, self.values.unit, self.values.slot
        # The first (last) reader's neighbor may be the first (last) unit, which has no slots.
        inner = values[1:-1]
        away = unit[inner] - np.arange(2, len(values))[:, None]
        return bool(
            (run[inner] == number).all()
            and (slot[inner] == slot[inner[0]]).all()
            and (away == away[0]).all()
            and (abs(away[0]) <= 1).all()
        )

    def _label_outputs(self) -> None:
        """Gradients and buffer updates belong to the unit of their tensor."""
        value_of = {item.name: item.value for item in self.graph.inputs}
        wanted: dict[tuple[int, int, OutputRole], dict[int, int]] = {}
        for index, output in enumerate(self.graph.outputs):
            if output.role not in {OutputRole.GRADIENT, OutputRole.BUFFER_UPDATE}:
                continue
            tensor = value_of[output.name]
            number = int(self.values.run[tensor])
            if number >= 0:
                key = (number, int(self.values.slot[tensor]), output.role)
                wanted.setdefault(key, {})[int(self.values.unit[tensor])] = index
        columns: dict[int, list[list[int]]] = {}
        for (number, _, _), found in wanted.items():
            if len(found) < self.runs[number].num_units - 2:
                self.bad.add(number)
            else:
                columns.setdefault(number, []).append([found[unit] for unit in sorted(found)])
        values = np.array([output.value for output in self.graph.outputs], dtype=np.int64)
        for number, lists in columns.items():
            matrix = np.array(lists, dtype=np.int64).T
            if not self.outputs.put(number, matrix) or not self._moves_on(number, values[matrix]):
                self.bad.add(number)

    def _check_outside(self) -> None:
        """What is in no repeating unit names of one only what its first and last unit make."""
        refs = self.flat.refs[self.ops.run[self.flat.reader] < 0]
        outputs = np.array([output.value for output in self.graph.outputs], dtype=np.int64)
        read = np.concatenate([refs, outputs[self.outputs.run < 0]])
        segments = self.flat.segment[self.ops.run < 0]
        segments = segments[segments >= 0]
        last = np.array([run.num_units - 2 for run in self.runs], dtype=np.int64)
        for labels, items in ((self.values, read), (self.segments, segments)):
            mine = items[labels.run[items] >= 0]
            number, unit = labels.run[mine], labels.unit[mine]
            self.bad.update(number[(unit != 1) & (unit != last[number])].tolist())
