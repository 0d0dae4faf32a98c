"""Module pins and the segments they reach.

A segment is the smallest thing a plan decides about, so a pin reaches whole segments: those named
after a module that matches, those at least half of whose work or parameters lies in modules that
match, and ``segment.N`` by number. Every strategy has one form on every segment, the one its pins
ask for; ``PlanSpace`` prices these forms and ``decided_plan`` writes them, so that searches never
see anything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

import msgspec
import numpy as np
from numpy.typing import NDArray

from meshwright.cost.model import StepCostModel
from meshwright.errors import BadRequest, NoFeasiblePlan
from meshwright.graph.dimensions import RING
from meshwright.graph.homes import SegmentHome, segment_homes
from meshwright.plans.plan import AXIS_NAMES, ParallelPlan, SegmentPlan
from meshwright.space.decision import Labels, Sharding, Strategy, runs_of
from meshwright.space.pins import ModulePin, Pins

__all__ = ["ModulePins", "module_pins", "readable_names"]

_MAX_NAMES = 12
"""Listed in a message."""


class ModulePins:
    """The module pins of a search, resolved to segments."""

    def __init__(self, model: StepCostModel, pins: Pins) -> None:
        """Find out which pins reach which segments."""
        self.pins = pins
        self._segments = model.segmentation.segments
        self._classes = model.segment_classes
        self._labels = model.labels.by_segment
        self._class_size = model.analysis.class_size
        self._homes: tuple[SegmentHome, ...] = ()
        self.of_segment: tuple[tuple[ModulePin, ...], ...] = ()
        """For each segment its pins; empty where there are none at all."""
        self._changes: list[Labels] = []
        self._kinds: dict[int, list[Labels]] = {}
        self._variants: dict[tuple[Sharding, int], Sharding] = {}
        self._group: tuple[int, ...] = ()
        """Equal for segments on which every strategy has one form."""
        if not pins.modules:
            return
        forward_ops = [segment.forward_ops for segment in self._segments]
        self._homes = segment_homes(model.analysis.graph, forward_ops)
        reached = [self._reached(pin) for pin in pins.modules]
        self.of_segment = tuple(
            tuple(pin for pin, mine in zip(pins.modules, reached, strict=True) if number in mine)
            for number in range(len(self._segments))
        )
        for number, mine in enumerate(self.of_segment):
            wanted = {p.labels[0]: self._own_labels(p, number) for p in mine if p.labels}
            changes = tuple((axis, wanted[axis]) for axis in AXIS_NAMES if axis in wanted)
            kinds = self._kinds.setdefault(self._classes[number], [])
            if changes not in kinds:
                kinds.append(changes)
            self._changes.append(changes)
        alike: dict[tuple[object, ...], int] = {}
        self._group = tuple(
            alike.setdefault((mine, self._place(number)), len(alike))
            for number, mine in enumerate(self.of_segment)
        )

    def _reached(self, pin: ModulePin) -> set[int]:
        return {
            segment.index
            for segment, home in zip(self._segments, self._homes, strict=True)
            if pin.matches(segment.name)
            or pin.matches(f"segment.{segment.index}")
            or home.is_mostly(
                {path for path in (*home.work, *home.parameters) if pin.matches(path)}
            )
        }

    def _own_labels(self, pin: ModulePin, segment: int) -> tuple[str, ...]:
        """Those of the pin's labels that the segment has."""
        assert pin.labels is not None, "asked of pins with labels"
        names = self._names(segment)
        return tuple(label for label in pin.labels[1] if label in names or label == RING)

    def _names(self, segment: int) -> Mapping[str, int]:
        return self._labels[segment]

    # Strategies ----------------------------------------------------------------------------------

    def strategy(self, strategy: Strategy, segment: int) -> Strategy:
        """``strategy`` as the pins of a segment want it."""
        if not self.of_segment:
            return strategy
        changes: dict[str, object] = {}
        for pin in self.of_segment[segment]:
            changes |= pin.changes
        sharding = self._variant(strategy.sharding, self._place(segment))
        return replace(strategy, sharding=sharding, **changes)  # type: ignore[arg-type]

    def strategies(self, strategies: Sequence[Strategy]) -> tuple[Strategy, ...]:
        """One for each segment, as its pins want it."""
        return tuple(self.strategy(one, segment) for segment, one in enumerate(strategies))

    def forms(
        self, strategies: Sequence[Strategy]
    ) -> tuple[tuple[Strategy, ...], NDArray[np.int64] | None]:
        """``strategies`` and the forms they take, and where the form for a segment is.

        The places have the shape (V, S), all forms counted; ``None`` without module pins.
        """
        if not self.of_segment:
            return tuple(strategies), None
        firsts = [self._group.index(group) for group in range(max(self._group) + 1)]
        columns = [[self.strategy(one, segment) for one in strategies] for segment in firsts]
        origin = {strategy: place for place, strategy in enumerate(strategies)}
        for column in columns:
            for place, form in enumerate(column):
                origin.setdefault(form, place)
        number = {form: place for place, form in enumerate(origin)}
        places = [[number[column[place]] for place in origin.values()] for column in columns]
        return tuple(origin), np.array(places, dtype=np.int64)[list(self._group)]

    def _place(self, segment: int) -> int:
        """Which of its class's kinds of labels the segment has."""
        return self._kinds[self._classes[segment]].index(self._changes[segment])

    def _variant(self, sharding: Sharding, place: int) -> Sharding:
        """With the labels pinned: for each class those of its ``place``-th kind of segments."""
        if all(kinds == [()] for kinds in self._kinds.values()):
            return sharding
        key = (sharding, place)
        if key not in self._variants:
            by_class, operators = list(sharding.by_class), list(sharding.operators_by_class)
            for number, kinds in self._kinds.items():
                changes = kinds[min(place, len(kinds) - 1)]
                by_class[number] = _changed(by_class[number], changes)
                if changes and operators:
                    operators[number] = ()
            varied = replace(
                sharding, by_class=tuple(by_class), operators_by_class=tuple(operators)
            )
            self._variants[key] = varied if varied != sharding else sharding
        return self._variants[key]

    # Plans ---------------------------------------------------------------------------------------

    def allows_sizes(self, sizes: Mapping[str, int]) -> bool:
        """Whether what is pinned to an axis can be cut into its size on every segment."""
        return all(
            self._cuts(pin, segment, sizes.get(pin.labels[0], 1))
            for segment, mine in enumerate(self.of_segment)
            for pin in mine
            if pin.labels and pin.labels[1]
        )

    def _cuts(self, pin: ModulePin, segment: int, ways: int) -> bool:
        names, size = self._names(segment), self._class_size
        own = self._own_labels(pin, segment)
        return any(label == RING or size[names[label]] % ways == 0 for label in own)

    def applied(self, plan: ParallelPlan) -> ParallelPlan:
        """``plan`` with the pins carried out."""
        if not self.of_segment:
            return plan
        classes = self._classes
        before = plan.segment_plans(classes)
        sizes = [plan.stage_sizes(stage) for stage in range(len(plan.stages))]
        axes = {axis for stage in sizes for axis, size in stage.items() if size > 1}
        after = [self._entry(entry, number, axes) for number, entry in enumerate(before)]
        if all(one == other for one, other in zip(before, after, strict=True)):
            return plan
        grouped: dict[tuple[int, str], list[int]] = {}
        for number, entry in enumerate(after):
            plain = msgspec.structs.replace(entry, name="", at=None)
            grouped.setdefault((classes[number], repr(plain)), []).append(number)
        several = [segment_class for segment_class, _ in grouped]
        entries = [
            msgspec.structs.replace(
                after[numbers[0]],
                segment_class=segment_class,
                name=self._segments[numbers[0]].name,
                at=None if several.count(segment_class) == 1 else runs_of(numbers),
            )
            for (segment_class, _), numbers in grouped.items()
        ]
        entries.sort(key=lambda entry: (entry.segment_class, entry.at or []))
        return msgspec.structs.replace(plan, segments=entries)

    def _entry(self, entry: SegmentPlan, segment: int, axes: set[str]) -> SegmentPlan:
        changes: dict[str, object] = {}
        for pin in self.of_segment[segment]:
            changes |= pin.changes
        shard = dict(entry.shard)
        for axis, labels in self._changes[segment]:
            if axis in axes:
                shard[axis] = list(labels)
                changes["operators"] = {}
        return msgspec.structs.replace(entry, shard=shard, **changes)

    def allows_plan(self, plan: ParallelPlan) -> bool:
        """Whether every segment without a pin of its own does what is pinned for all."""
        pins = self.pins
        entries = plan.segment_plans(self._classes)
        free: list[SegmentPlan] = []
        for number, entry in enumerate(entries):
            mine = self.of_segment[number] if self.of_segment else ()
            fixed = {key for pin in mine for key in pin.changes}
            for key, wanted in (("zero_stage", pins.zero_stage), ("recompute", pins.recompute)):
                if key not in fixed and wanted not in (None, getattr(entry, key)):
                    return False
            if not any(pin.labels and pin.labels[0] == "tp" for pin in mine):
                free.append(entry)
        if pins.sequence_parallel is None or not free:
            return True
        has = any("sequence" in entry.shard.get("tp", ()) for entry in free)
        return has == pins.sequence_parallel

    # Messages ------------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse module pins that nothing in the model can meet.

        Raises:
            BadRequest: a pattern reaches no segment, names a dimension class a segment has not, or
                two pins disagree about a segment.
            NoFeasiblePlan: the size pinned for an axis divides nothing of what the axis shall cut.
        """
        for pin in self.pins.modules:
            if not any(pin in mine for mine in self.of_segment):
                raise BadRequest(f"--fix {pin.text}: {self._why_unreached(pin)}")
        for number, mine in enumerate(self.of_segment):
            self._check_agree(number, mine)
            for pin in mine:
                if pin.labels and pin.labels[1]:
                    self._check_labels(pin, number, *pin.labels)

    def _check_agree(self, segment: int, mine: Sequence[ModulePin]) -> None:
        for place, pin in enumerate(mine):
            for other in mine[:place]:
                both = pin.decides.keys() & other.decides.keys()
                if any(pin.decides[key] != other.decides[key] for key in both):
                    raise BadRequest(
                        f"--fix {pin.text}: {other.text} decides otherwise for "
                        f"{self._name(segment)}; keep one of them"
                    )

    def _check_labels(
        self, pin: ModulePin, segment: int, axis: str, labels: tuple[str, ...]
    ) -> None:
        names, size = self._names(segment), self._class_size
        if not self._own_labels(pin, segment):
            raise BadRequest(
                f"--fix {pin.text}: {self._name(segment)} has no dimension class "
                f"{' or '.join(labels)}, but {', '.join(names)}; pin the modules that have it: "
                f"{self._listed(self._with_labels(labels)) or 'none has'}"
            )
        ways = dict(self.pins.sizes).get(axis, 1)
        if not self._cuts(pin, segment, ways):
            sizes = ", ".join(f"{name} has {size[names[name]]}" for name in labels if name in names)
            raise NoFeasiblePlan(
                f"--fix {pin.text} cuts nothing: in {self._name(segment)} {sizes}, which "
                f"{axis}={ways} does not divide; pin another {axis}"
            )

    def _with_labels(self, labels: Sequence[str]) -> list[int]:
        every = range(len(self.of_segment))
        return [number for number in every if set(labels) & self._names(number).keys()]

    def _why_unreached(self, pin: ModulePin) -> str:
        inside = [
            number
            for number, home in enumerate(self._homes)
            if any(pin.matches(path) for path in (*home.work, *home.parameters))
        ]
        if not inside:
            return f"no module matches {pin.pattern!r}; the model has {self._listed()}"
        return (
            f"what matches {pin.pattern!r} is a small part of {self._listed(inside)}, and a plan "
            "decides for whole segments; pin these"
        )

    def _listed(self, numbers: Sequence[int] | None = None) -> str:
        segments = self._segments
        chosen = range(len(segments)) if numbers is None else numbers
        names = readable_names({number: segments[number].name for number in chosen})
        more = [f"and {len(names) - _MAX_NAMES} more"] if len(names) > _MAX_NAMES else []
        return ", ".join([*names[:_MAX_NAMES], *more])

    def _name(self, segment: int) -> str:
        return self._segments[segment].name or f"segment.{segment}"


def _changed(labels: Labels, changes: Labels) -> Labels:
    named = dict(labels)
    for axis, wanted in changes:
        if wanted or axis in named:
            named[axis] = wanted
    return tuple((axis, named[axis]) for axis in AXIS_NAMES if axis in named)


def readable_names(names: Mapping[int, str]) -> list[str]:
    """Patterns that pins take, for segments by number: equal but for numbers, they are one.

    >>> readable_names({0: "embed", 1: "layers.0.mlp", 2: "layers.1.mlp", 3: ""})
    ['embed', 'layers.0-1.mlp', 'segment.3']
    """
    paths = [name or f"segment.{number}" for number, name in names.items()]
    shapes: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for path in paths:
        parts = path.split(".")
        shape = tuple("" if part.isdecimal() else part for part in parts)
        shapes.setdefault(shape, []).append(tuple(int(p) for p in parts if p.isdecimal()))
    found = []
    for shape, numbers in shapes.items():
        spans = iter([_span(sorted(set(column))) for column in zip(*numbers, strict=True)])
        found.append(".".join(part or next(spans) for part in shape))
    return found


def _span(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


_KNOWN: WeakKeyDictionary[StepCostModel, dict[Pins, ModulePins]]
_KNOWN = WeakKeyDictionary()


def module_pins(model: StepCostModel, pins: Pins) -> ModulePins:
    """The module pins of ``pins`` on the model's segments; worked out once."""
    known = _KNOWN.setdefault(model, {})
    if pins not in known:
        known[pins] = ModulePins(model, pins)
    return known[pins]
