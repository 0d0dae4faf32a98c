"""Which dimension classes the operators of each segment are to be sharded along.

On each axis it is the first class listed that the operator can be sharded along, with one
exception. Where experts are listed before the batch or the sequence, only operators that apply the
experts' weights follow the experts, and all others the rest: then rows go to their experts and come
back by one all-to-all each (GShard, arXiv 2006.16668).

``ring`` is no class: it asks attention whose sequence is cut to pass blocks of keys and values
around (arXiv 2310.01889), where ``sequence`` alone leaves attention to the next label or whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from meshwright.errors import PlanRefused
from meshwright.graph.dimensions import BATCH, RING, SEQUENCE, DimensionLabels, is_experts
from meshwright.graph.factors import FactorAnalysis, LeafFactor
from meshwright.graph.rules.base import Variant
from meshwright.graph.segments import Segment, Segmentation
from meshwright.spmd.layout import MICRO

__all__ = ["Shard", "Wanted", "fits", "readers_of_parameter_views", "wanted_classes"]

Shard = Mapping[str, Sequence[str]]
"""Mesh axis to labels of dimension classes, most wanted first."""

_RING_CLASS = -1

_Classes = dict[str, list[int]]
"""Mesh axis to dimension classes, most wanted first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Dimension classes by segment, and by operator where they differ from its segment's."""

    by_segment: tuple[_Classes, ...]
    by_op: dict[int, _Classes]

    def of(self, op: int, segment: int) -> _Classes:
        """What operator ``op`` of ``segment`` is to be sharded along."""
        return self.by_op.get(op, self.by_segment[segment])


def wanted_classes(
    segmentation: Segmentation,
    labels: DimensionLabels,
    *,
    shards: Sequence[Shard],
    operators: Sequence[Mapping[int, Shard]] = (),
    axes: Sequence[str],
) -> Wanted:
    """Classes for the ``axes`` of more than one device; see ``shard_graph``.

    Raises:
        PlanRefused: a label or the number of an operator is unknown.
    """
    assert len(shards) == len(segmentation.segments), "one mapping for each segment"
    assert not operators or len(operators) == len(shards), "one mapping for each segment, or none"
    by_segment = tuple(
        _classes(segment, names, shard, axes)
        for segment, names, shard in zip(
            segmentation.segments, labels.by_segment, shards, strict=True
        )
    )
    by_op: dict[int, _Classes] = {}
    for segment, shard in zip(segmentation.segments, shards, strict=True):
        beside = _classes(segment, labels.by_segment[segment.index], _without_experts(shard), axes)
        if beside != by_segment[segment.index]:
            ops = {*segment.forward_ops, *segment.backward_ops} - labels.expert_operators
            by_op.update(dict.fromkeys(ops, beside))
    for segment, exceptions in zip(segmentation.segments, operators, strict=False):
        numbered = (*segment.forward_ops, *segment.backward_ops)
        for number, shard in exceptions.items():
            if not 0 <= number < len(numbered):
                raise PlanRefused(
                    f"segment {segment.index} of class {segment.segment_class}: operator {number} "
                    f"is none of its {len(numbered)}, numbered from 0, forward and then backward"
                )
            own = _classes(segment, labels.by_segment[segment.index], shard, axes)
            by_op[numbered[number]] = {
                **by_op.get(numbered[number], by_segment[segment.index]),
                **{axis: classes for axis, classes in own.items() if axis in shard},
            }
    return Wanted(by_segment=by_segment, by_op=by_op)


def fits(factor: LeafFactor, dimension_class: int) -> bool:
    """Whether a factor is of a wanted class."""
    if factor.variant is Variant.RING:
        return dimension_class == _RING_CLASS
    return factor.dimension_class == dimension_class


def readers_of_parameter_views(analysis: FactorAnalysis) -> dict[int, tuple[int, int]]:
    """What first reads a parameter through views.

    For each view of parameters alone: the first operator beyond further views that reads it, and
    the position of the operand.
    """
    graph = analysis.graph
    first: dict[int, tuple[int, int]] = {}
    for op in graph.ops:
        for position, value in enumerate(op.inputs):
            first.setdefault(value, (op.index, position))
    parameters = {item.value for item in graph.parameters}
    views: list[int] = []
    for op in graph.ops:
        is_view = analysis.rules[op.index].is_view and op.inputs
        if is_view and parameters.issuperset(op.inputs) and op.results[0] in first:
            parameters.update(op.results)
            views.append(op.index)
    found: dict[int, tuple[int, int]] = {}
    for index in reversed(views):
        reader, position = first[graph.ops[index].results[0]]
        found[index] = found.get(reader, (reader, position))
    return found


def _without_experts(shard: Shard) -> Shard:
    """``shard`` without the experts that are listed before the batch or the sequence."""
    return {
        axis: [
            label
            for place, label in enumerate(names)
            if not (is_experts(label) and {BATCH, SEQUENCE} & set(names[place:]))
        ]
        for axis, names in shard.items()
    }


def _classes(
    segment: Segment, names: Mapping[str, int], shard: Shard, axes: Sequence[str]
) -> _Classes:
    wanted: _Classes = {}
    for axis in axes:
        known = []
        for label in (BATCH,) if axis == MICRO else shard.get(axis, ()):
            if label == RING:
                known.append(_RING_CLASS)
            elif label in names:
                known.append(names[label])
            elif label not in {BATCH, SEQUENCE}:
                raise PlanRefused(
                    f"segment {segment.index} of class {segment.segment_class}: axis {axis} shards "
                    f"unknown dimension class {label!r}; it has {', '.join(sorted(names))}"
                )
        wanted[axis] = known
    return wanted
