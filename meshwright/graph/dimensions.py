"""Labels of dimension classes inside a segment, so that a plan can say what it shards.

A label says what a class does in the program (``batch``, ``sequence``, ``vocab``, ``heads``,
``experts``, ``height``, ``width``, ``hidden``, ``inner``), found from the operators, never from
names; a second class of the same kind in one segment is ``inner2``, and so on in order of
appearance. Equal segments label alike, so a plan speaks of segment classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from meshwright.graph.factors import FactorAnalysis, LeafFactor
from meshwright.graph.opgraph import InputRole, Op, TensorSpec
from meshwright.graph.rules.base import Variant
from meshwright.graph.segments import Segment, Segmentation

__all__ = [
    "BATCH",
    "EXPERTS",
    "RING",
    "SEQUENCE",
    "SPATIAL",
    "DimensionLabels",
    "exchanges_rows",
    "is_experts",
    "label_dimensions",
]

BATCH = "batch"
SEQUENCE = "sequence"
EXPERTS = "experts"
SPATIAL = ("depth", "height", "width")
"""The last dims of images, as convolutions and pooling know them."""
RING = "ring"
"""No class: asks attention whose sequence is cut to pass keys and values around."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DimensionLabels:
    """What the classes are called."""

    batch: int | None
    """Class of the batch; ``None`` where the data have no common leading dim."""
    sequence: int | None
    by_segment: tuple[dict[str, int], ...]
    """For each segment, label to class."""
    expert_operators: frozenset[int] = frozenset()
    """Operators that apply weights of experts, each to its own rows, and those that only pass on
    what such operators return: not the router, nor what sends rows to experts and mixes them."""


def is_experts(label: str) -> bool:
    """Whether a label is one of the classes of experts."""
    return label.rstrip("0123456789") == EXPERTS


def exchanges_rows(label: str) -> bool:
    """Whether operators cut along a label exchange rows inside them: spatial dims and rings."""
    return label.rstrip("0123456789") in {*SPATIAL, RING}


def label_dimensions(analysis: FactorAnalysis, segmentation: Segmentation) -> DimensionLabels:
    """Labels for every segment."""
    batch = _common_class(analysis, dim=0, other_than=None)
    sequence = _common_class(analysis, dim=1, other_than=batch, within=_is_sequence)
    parameters = _parameter_views(analysis)
    by_segment = tuple(
        _label_segment(analysis, segment, batch, sequence, parameters)
        for segment in segmentation.segments
    )
    experts = {leaf for names in by_segment for label, leaf in names.items() if is_experts(label)}
    return DimensionLabels(
        batch=batch,
        sequence=sequence,
        by_segment=by_segment,
        expert_operators=frozenset(
            op for leaf in experts for op in _expert_operators(analysis, leaf, parameters)
        ),
    )


def _expert_operators(analysis: FactorAnalysis, experts: int, parameters: set[int]) -> set[int]:
    """Operators that apply weights along ``experts`` or pass on what such operators return."""
    graph = analysis.graph
    having: list[tuple[list[int], list[int]]] = []
    """For each operator with the class: operands that have it, and those that lack it."""
    found: set[int] = set()
    for op in graph.ops:
        places = [f for f in analysis.leaf_factors[op.index] if f.dimension_class == experts]
        inside = [
            value
            for position, value in enumerate(op.inputs)
            if any(factor.operands[position] is not None for factor in places)
        ]
        outside = [v for v in op.inputs if v not in inside and graph.values[v].shape]
        having.append((inside, outside))
        weights = sum(value in parameters for value in inside)
        is_applied = 0 < weights < len(inside) and not outside and all(map(_is_kept, places))
        if is_applied or (places and op.forward_op in found):
            found.add(op.index)
    passed = {value for index in found for value in graph.ops[index].results}
    for op in graph.ops:
        inside, outside = having[op.index]
        rows = set(inside) - parameters
        if rows and not outside and passed.issuperset(rows):
            found.add(op.index)
            passed.update(op.results)
    return found


def _is_kept(factor: LeafFactor) -> bool:
    """Whether all results have the factor."""
    return all(place is not None for place in factor.results)


def _is_sequence(spec: TensorSpec) -> bool:
    """Whether data are tokens or vectors in a row: not features of a sample, not an image."""
    is_float = spec.dtype.startswith(("float", "bfloat"))
    return len(spec.shape) == (3 if is_float else 2)


def _common_class(
    analysis: FactorAnalysis,
    *,
    dim: int,
    other_than: int | None,
    within: Callable[[TensorSpec], bool] = lambda _: True,
) -> int | None:
    """The class of a dim that most data inputs ``within`` have."""
    counts: Counter[int] = Counter()
    for item in analysis.graph.inputs_of(InputRole.DATA):
        dims = analysis.value_dims[item.value]
        if not within(analysis.graph.values[item.value]):
            continue
        if len(dims) > dim and dims[dim] and dims[dim][0] != other_than:
            counts[dims[dim][0]] += 1
    return counts.most_common(1)[0][0] if counts else None


def _parameter_views(analysis: FactorAnalysis) -> set[int]:
    """Values that are parameters, or views of parameters alone."""
    values = {item.value for item in analysis.graph.parameters}
    for op, rule in zip(analysis.graph.ops, analysis.rules, strict=True):
        if rule.is_view and op.inputs and all(value in values for value in op.inputs):
            values.update(op.results)
    return values


def _label_segment(
    analysis: FactorAnalysis,
    segment: Segment,
    batch: int | None,
    sequence: int | None,
    parameters: set[int],
) -> dict[str, int]:
    known = {batch: BATCH, sequence: SEQUENCE}
    labels: dict[str, int] = {}
    kinds: dict[int, str] = {}
    shardable: set[int] = set()
    for index in segment.forward_ops:
        op = analysis.graph.ops[index]
        for factor in analysis.leaf_factors[index]:
            if not factor.fixed or factor.variant is Variant.HALO:
                shardable.add(factor.dimension_class)
            own = _kind(analysis, op, factor, parameters)
            for leaf in _classes_of(analysis, op, factor):
                if kinds.get(leaf, "inner") == "inner":
                    kinds[leaf] = known.get(leaf) or own
    passing = _passing_classes(analysis, segment, parameters)
    for dimension_class, kind in kinds.items():
        if dimension_class not in shardable:
            continue
        name = "hidden" if kind == "inner" and dimension_class in passing else kind
        number = 1
        label = name
        while label in labels:
            number += 1
            label = f"{name}{number}"
        labels[label] = dimension_class
    return labels


def _classes_of(analysis: FactorAnalysis, op: Op, factor: LeafFactor) -> tuple[int, ...]:
    """The factor's class, and that of the rows a halo reads where they are more."""
    place = factor.operands[0] if factor.variant is Variant.HALO else None
    if place is None:
        return (factor.dimension_class,)
    read = analysis.value_dims[op.inputs[0]][place[0]][place[1]]
    return tuple(dict.fromkeys((read, factor.dimension_class)))


def _passing_classes(analysis: FactorAnalysis, segment: Segment, parameters: set[int]) -> set[int]:
    """Classes of the activations that enter or leave the segment."""
    ops = [analysis.graph.ops[index] for index in segment.forward_ops]
    made = {value for op in ops for value in op.results}
    data = {item.value for item in analysis.graph.inputs}
    entering = {value for op in ops for value in op.inputs} - made - parameters - data
    return {
        leaf
        for value in (*entering, *ops[-1].results)
        for dim in analysis.value_dims[value]
        for leaf in dim
    }


def _kind(analysis: FactorAnalysis, op: Op, factor: LeafFactor, parameters: set[int]) -> str:
    """What one operator says about a class."""
    name = op.target.split(".")[1]
    first = factor.operands[0] if factor.operands else None
    if factor.variant is Variant.HALO and factor.results[0] is not None:
        return SPATIAL[factor.results[0][0] - len(analysis.graph.values[op.results[0]].shape)]
    if factor.variant is Variant.OFFSET or (
        factor.variant is Variant.REDUCE_INSIDE and "norm" not in name
    ):
        return "vocab"
    if name.startswith("_scaled_dot_product") and first is not None and first[0] == 1:
        return "heads"
    if name == "bmm" and first is not None and first[0] == 0:
        weighted = any(value in parameters for value in op.inputs)
        return EXPERTS if weighted else "heads"
    return "inner"
