"""A graph of a shortened module, expanded to the depth of the whole one.

With ``NUM_KEPT`` = 4 units kept of a run, units 0 and 3 may differ from the others (they touch
what stands before and behind), so only the operators of units 1 and 2 must repeat. A *track* is
their stretch of the program:

    forward    ... unit 0 | unit 1 | unit 2 | unit 3 ...
    backward   ... unit 3 | unit 2 | unit 1 | unit 0 ...

It starts with the first operator of one unit and ends before the first operator of the unit behind
unit 1 or 2, so that what runs between units belongs to it. Operator ``d`` of unit 1 and of unit 2
are merged into one template: equal but for their paths, and for each value they read one of

- the same value outside the track,
- the value of the same place in their own unit, the unit before, or the unit behind; the first
  (last) unit reads instead what it reads in the shortened graph,
- the same parameter, or their own unit's.

For ``n`` units the template is written out for units 1 to n - 2. Whatever outside reads a value of
unit 1 still does, and what reads unit 2 reads unit n - 2. ``NotPeriodic`` is raised where any of
this does not hold. That it is the graph of the deeper module the caller must check: for ``n`` = 3
it can be compared with a captured graph.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from meshwright.capture.layout import Layout
from meshwright.graph.opgraph import (
    Arg,
    GraphInput,
    GraphOutput,
    InputRole,
    Op,
    OpGraph,
    OutputRole,
    Phase,
    Ref,
    TensorSpec,
)

__all__ = ["NUM_KEPT", "NotPeriodic", "expand"]

NUM_KEPT = 4
"""Units of a run in the graph that is expanded."""

_FIRST, _SECOND = 1, 2
"""The two units that must repeat."""


class NotPeriodic(Exception):
    """The graph does not repeat with its units; it must be captured whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Track:
    """Two repetitions of a stretch of operators."""

    run: int
    start: int
    length: int
    """Operators in one repetition."""
    descending: bool
    """Whether unit 2 comes first, as in the backward pass."""

    @property
    def stop(self) -> int:
        return self.start + 2 * self.length

    def repetition_of(self, unit: int, num_units: int) -> int:
        """How many repetitions come before that of ``unit``."""
        return num_units - 2 - unit if self.descending else unit - 1


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an operator stands: alone at ``offset``, or at ``offset`` of its unit in a track."""

    track: int
    """-1 for an operator outside every track."""
    unit: int
    offset: int


_Reader = Callable[[int], int]
"""From the unit that reads to the number of the value (or operator) it reads."""


def expand(
    graph: OpGraph,
    layout: Layout,
    units: Sequence[int],
    inputs: Sequence[GraphInput],
    input_specs: Sequence[TensorSpec],
) -> OpGraph:
    """``graph``, of a module with ``NUM_KEPT`` units in every run, for ``units`` units instead.

    ``inputs`` and ``input_specs`` are those of the graph returned; values are numbered inputs
    first, then in the order of the operators. Raises NotPeriodic.
    """
    return _Expansion(graph, layout, units, inputs, input_specs).result()


class _Expansion:
    """One call of ``expand``; *old* is the graph given, *new* the one being written."""

    def __init__(
        self,
        graph: OpGraph,
        layout: Layout,
        units: Sequence[int],
        inputs: Sequence[GraphInput],
        input_specs: Sequence[TensorSpec],
    ) -> None:
        self.graph, self.layout, self.units = graph, layout, tuple(units)
        self.inputs, self.input_specs = inputs, input_specs
        self.kept = (NUM_KEPT,) * len(layout.runs)
        self.old_names = {item.value: item for item in graph.inputs}
        self.new_value_of_name = {(item.role, item.name): item.value for item in inputs}
        self.maker = _makers(graph)
        self.tracks = _find_tracks(graph, layout, self.kept)
        self.starts = [track.start for track in self.tracks]
        self.places = [self._place(op.index) for op in graph.ops]
        self.new_start = self._place_tracks()
        self.first_value = self._number_values()

    def result(self) -> OpGraph:
        """The new graph."""
        ops: list[Op] = []
        specs = list(self.input_specs)
        old = self.graph.ops
        position, track_index = 0, 0
        while position < len(old):
            if track_index < len(self.tracks) and position == self.tracks[track_index].start:
                self._write_track(track_index, ops, specs)
                position = self.tracks[track_index].stop
                track_index += 1
            else:
                self._write(self._template(old[position], old[position], -1), 0, ops, specs)
                position += 1
        return replace(
            self.graph,
            values=tuple(specs),
            inputs=tuple(self.inputs),
            ops=tuple(ops),
            outputs=self._outputs(),
        )

    def _place_tracks(self) -> list[int]:
        """First new index of every track."""
        grown = 0
        starts: list[int] = []
        for track in self.tracks:
            starts.append(track.start + grown)
            grown += (self.units[track.run] - NUM_KEPT) * track.length
        return starts

    def _number_values(self) -> list[int]:
        """The first value of every new operator."""
        counts: list[int] = []
        position = 0
        old = self.graph.ops
        for track in self.tracks:
            counts += [len(op.results) for op in old[position : track.start]]
            one = [len(op.results) for op in old[track.start : track.start + track.length]]
            counts += one * (self.units[track.run] - 2)
            position = track.stop
        counts += [len(op.results) for op in old[position:]]
        first, following = [], len(self.inputs)
        for count in counts:
            first.append(following)
            following += count
        return first

    def _place(self, index: int) -> _Place:
        """Where an old operator stands."""
        number = bisect_right(self.starts, index) - 1
        if number < 0 or index >= self.tracks[number].stop:
            return _Place(-1, 0, index)
        track = self.tracks[number]
        repetition, offset = divmod(index - track.start, track.length)
        unit = _SECOND - repetition if track.descending else _FIRST + repetition
        return _Place(number, unit, offset)

    def _new_index(self, place: _Place, unit: int) -> int:
        """New index of the operator at ``place``, for ``unit`` if it is in a track."""
        if place.track < 0:
            before = bisect_right(self.starts, place.offset) - 1
            if before < 0:
                return place.offset
            track = self.tracks[before]
            grown = self.new_start[before] - track.start
            return place.offset + grown + (self.units[track.run] - NUM_KEPT) * track.length
        track = self.tracks[place.track]
        repetition = track.repetition_of(unit, self.units[track.run])
        return self.new_start[place.track] + repetition * track.length + place.offset

    def _outer_index(self, place: _Place) -> int:
        """New index of an operator as seen from outside its run."""
        if place.track < 0:
            return self._new_index(place, 0)
        last = self.units[self.tracks[place.track].run] - 2
        return self._new_index(place, _FIRST if place.unit == _FIRST else last)

    def _op_reader(self, first: int, second: int, run: int) -> _Reader:
        """The new operator that stands for old ``first`` in unit 1 and ``second`` in unit 2."""
        one, two = self.places[first], self.places[second]
        last = self.units[run] - 2 if run >= 0 else 0
        inside_one, inside_two = self._is_inside(one, run), self._is_inside(two, run)
        if inside_two and _is_next(one, two) and two.unit == _SECOND:
            return lambda unit: self._new_index(two, unit)
        if inside_two and not inside_one and two.unit == _FIRST:
            # The unit before; unit 1 has unit 0 there, which is outside.
            outer = self._outer_index(one)
            return lambda unit: outer if unit == _FIRST else self._new_index(two, unit - 1)
        if inside_one and not inside_two and one.unit == _SECOND:
            outer = self._outer_index(two)
            return lambda unit: outer if unit == last else self._new_index(one, unit + 1)
        if one == two and not inside_one:
            outer = self._outer_index(one)
            return lambda unit: outer
        raise NotPeriodic(f"operators {first} and {second} are read unlike")

    def _is_inside(self, place: _Place, run: int) -> bool:
        return place.track >= 0 and self.tracks[place.track].run == run

    def _value_reader(self, first: int, second: int, run: int) -> _Reader:
        """The new value that stands for old ``first`` in unit 1 and ``second`` in unit 2."""
        if first in self.old_names or second in self.old_names:
            return self._input_reader(first, second, run)
        (maker_one, slot_one), (maker_two, slot_two) = self.maker[first], self.maker[second]
        if slot_one != slot_two:
            raise NotPeriodic(f"values {first} and {second} are read unlike")
        index = self._op_reader(maker_one, maker_two, run)
        return lambda unit: self.first_value[index(unit)] + slot_one

    def _input_reader(self, first: int, second: int, run: int) -> _Reader:
        one, two = self.old_names.get(first), self.old_names.get(second)
        if one is None or two is None or one.role != two.role:
            raise NotPeriodic(f"values {first} and {second} are read unlike")
        role = one.role
        if role in (InputRole.PARAMETER, InputRole.BUFFER):
            name = self._path_writer(one.name, two.name, run)
        elif one.name == two.name:
            constant_name = one.name
            name = lambda _unit: constant_name  # noqa: E731
        else:
            raise NotPeriodic(f"{one.name} and {two.name} are read unlike")

        def number(unit: int) -> int:
            found = self.new_value_of_name.get((role, name(unit)))
            if found is None:
                raise NotPeriodic(f"there is no {name(unit)}")
            return found

        return number

    def _path_writer(self, first: str, second: str, run: int) -> Callable[[int], str]:
        """The new path that stands for old ``first`` in unit 1 and ``second`` in unit 2."""
        if first == second:
            outer = self._outer_path(first)
            return lambda unit: outer
        one, two = self.layout.split(first, self.kept), self.layout.split(second, self.kept)
        if one is None or two is None or one.run != run or replace(one, unit=one.unit + 1) != two:
            raise NotPeriodic(f"{first} and {second} do not correspond")
        shift = one.unit - _FIRST
        return lambda unit: self.layout.join(replace(one, unit=unit + shift), self.units)

    def _outer_path(self, path: str) -> str:
        """An old path as seen from outside its run."""
        found = self.layout.split(path, self.kept)
        if found is None:
            return self.layout.moved(path, self.kept, self.units)
        unit = found.unit
        if unit >= _SECOND:
            unit += self.units[found.run] - NUM_KEPT
        return self.layout.join(replace(found, unit=unit), self.units)

    def _template(self, one: Op, two: Op, run: int) -> _Template:
        """What unit 1 and unit 2 have in common; outside tracks both are the same operator."""
        if self._signature(one) != self._signature(two):
            raise NotPeriodic(f"operators {one.index} and {two.index} differ")
        forward_op: _Reader | None = None
        if one.forward_op is not None and two.forward_op is not None:
            forward_op = self._op_reader(one.forward_op, two.forward_op, run)
        return _Template(
            like=one,
            args=tuple(
                self._merged(left, right, run)
                for left, right in zip(one.args, two.args, strict=True)
            ),
            kwargs=tuple(
                (key, self._merged(left, right, run))
                for (key, left), (_, right) in zip(one.kwargs, two.kwargs, strict=True)
            ),
            forward_op=forward_op,
            module_path=self._path_writer(one.module_path, two.module_path, run),
        )

    def _signature(self, op: Op) -> tuple[object, ...]:
        """What corresponding operators share, apart from their arguments."""
        return (
            op.target,
            op.phase,
            op.source,
            op.flop,
            op.bytes_read,
            op.bytes_written,
            op.forward_op is None,
            len(op.args),
            tuple(key for key, _ in op.kwargs),
            tuple(None if value is None else self.graph.values[value] for value in op.outputs),
        )

    def _merged(self, one: Arg, two: Arg, run: int) -> Callable[[int], Arg]:
        """The new argument that stands for ``one`` in unit 1 and ``two`` in unit 2."""
        if isinstance(one, Ref) and isinstance(two, Ref):
            value = self._value_reader(one.value, two.value, run)
            return lambda unit: Ref(value(unit))
        if isinstance(one, tuple) and isinstance(two, tuple) and len(one) == len(two):
            parts = [self._merged(left, right, run) for left, right in zip(one, two, strict=True)]
            return lambda unit: tuple(part(unit) for part in parts)
        # Numbers that are equal may still be of different types (1 and True) or signs (0.0, -0.0).
        if repr(one) != repr(two):
            raise NotPeriodic(f"arguments {one!r} and {two!r} differ")
        return lambda _unit: one

    def _write_track(self, number: int, ops: list[Op], specs: list[TensorSpec]) -> None:
        track = self.tracks[number]
        old = self.graph.ops
        earlier = old[track.start : track.start + track.length]
        later = old[track.start + track.length : track.stop]
        first, second = (later, earlier) if track.descending else (earlier, later)
        templates = [
            self._template(one, two, track.run) for one, two in zip(first, second, strict=True)
        ]
        units = range(_FIRST, self.units[track.run] - 1)
        for unit in reversed(units) if track.descending else units:
            for template in templates:
                self._write(template, unit, ops, specs)

    def _write(
        self, template: _Template, unit: int, ops: list[Op], specs: list[TensorSpec]
    ) -> None:
        like = template.like
        outputs: list[int | None] = []
        for value in like.outputs:
            if value is not None:
                outputs.append(len(specs))
                specs.append(self.graph.values[value])
            else:
                outputs.append(None)
        forward_op = template.forward_op
        op = Op(
            index=len(ops),
            target=like.target,
            args=tuple(part(unit) for part in template.args),
            kwargs=tuple((key, part(unit)) for key, part in template.kwargs),
            outputs=tuple(outputs),
            phase=like.phase,
            forward_op=None if forward_op is None else forward_op(unit),
            module_path=template.module_path(unit),
            source=like.source,
            flop=like.flop,
            bytes_read=like.bytes_read,
            bytes_written=like.bytes_written,
        )
        ops.append(op)

    def _outputs(self) -> tuple[GraphOutput, ...]:
        """Loss and results as they were; then one for every parameter and buffer like the old."""
        written: list[GraphOutput] = []
        for role in dict.fromkeys(item.role for item in self.graph.outputs):
            items = self.graph.outputs_of(role)
            if role in _INPUT_OF_OUTPUT:
                written += self._outputs_of_tensors(role, items)
                continue
            for item in items:
                value = self._value_reader(item.value, item.value, -1)(0)
                written.append(replace(item, value=value))
        return tuple(written)

    def _outputs_of_tensors(
        self, role: OutputRole, items: tuple[GraphOutput, ...]
    ) -> list[GraphOutput]:
        """Gradients or buffer updates, in the order of the inputs."""
        old_value = {item.name: item.value for item in items}
        wanted = _INPUT_OF_OUTPUT[role]
        if [item.name for item in self.graph.inputs_of(wanted) if item.name in old_value] != [
            item.name for item in items
        ]:
            raise NotPeriodic(f"{role} outputs are in another order than their tensors")
        written: list[GraphOutput] = []
        for item in self.inputs:
            if item.role != wanted:
                continue
            first, second, run, unit = self._old_names_of(item.name)
            if (first in old_value) != (second in old_value):
                raise NotPeriodic(f"only one of {first} and {second} has a {role}")
            if first in old_value:
                value = self._value_reader(old_value[first], old_value[second], run)(unit)
                written.append(GraphOutput(value=value, name=item.name, role=role))
        return written

    def _old_names_of(self, name: str) -> tuple[str, str, int, int]:
        """The old names in unit 1 and 2 for a new name, its run and its unit.

        Outside tracks both are the same, and the run is -1.
        """
        found = self.layout.split(name, self.units)
        if found is None:
            old = self.layout.moved(name, self.units, self.kept)
            return old, old, -1, 0
        last = self.units[found.run] - 1
        if found.unit in (0, last):
            unit = found.unit if found.unit == 0 else NUM_KEPT - 1
            old = self.layout.join(replace(found, unit=unit), self.kept)
            return old, old, -1, 0
        first, second = (
            self.layout.join(replace(found, unit=unit), self.kept) for unit in (_FIRST, _SECOND)
        )
        return first, second, found.run, found.unit


@dataclass(frozen=True, slots=True, kw_only=True)
class _Template:
    """An operator as a function of the unit it is written for."""

    like: Op
    args: tuple[Callable[[int], Arg], ...]
    kwargs: tuple[tuple[str, Callable[[int], Arg]], ...]
    forward_op: _Reader | None
    module_path: Callable[[int], str]


_INPUT_OF_OUTPUT = {
    OutputRole.GRADIENT: InputRole.PARAMETER,
    OutputRole.BUFFER_UPDATE: InputRole.BUFFER,
}


def _is_next(one: _Place, two: _Place) -> bool:
    """Whether ``two`` is the place of ``one`` in the unit behind."""
    return (one.track, one.unit + 1, one.offset) == (two.track, two.unit, two.offset)


def _makers(graph: OpGraph) -> dict[int, tuple[int, int]]:
    """For every value the operator it is a result of, and which of its results."""
    return {value: (op.index, slot) for op in graph.ops for slot, value in enumerate(op.results)}


def _find_tracks(graph: OpGraph, layout: Layout, kept: Sequence[int]) -> list[_Track]:
    """The forward and the backward track of every run, in the order of the program."""
    first: dict[tuple[int, Phase, int], int] = {}
    for op in graph.ops:
        path = layout.split(op.module_path, kept)
        if path is not None:
            first.setdefault((path.run, op.phase, path.unit), op.index)
    tracks: list[_Track] = []
    for run in range(len(layout.runs)):
        tracks.append(_track(first, run, Phase.FORWARD))
        if any((run, Phase.BACKWARD, unit) in first for unit in range(NUM_KEPT)):
            tracks.append(_track(first, run, Phase.BACKWARD))
    tracks.sort(key=lambda track: track.start)
    if any(left.stop > right.start for left, right in pairwise(tracks)):
        raise NotPeriodic("runs are interleaved")
    return tracks


def _track(first: Mapping[tuple[int, Phase, int], int], run: int, phase: Phase) -> _Track:
    order = (_FIRST, _SECOND, 3) if phase == Phase.FORWARD else (_SECOND, _FIRST, 0)
    start, middle, stop = (first.get((run, phase, unit), -1) for unit in order)
    if not 0 <= start < middle < stop or middle - start != stop - middle:
        raise NotPeriodic(f"units of run {run} have unlike numbers of {phase} operators")
    return _Track(run=run, start=start, length=middle - start, descending=phase == Phase.BACKWARD)
