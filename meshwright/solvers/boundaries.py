"""What passes between segments, and the ways it may be cut: boundaries of a choice graph.

A boundary says for each free axis which label cuts the values that forward passes from one segment
to the next, that they are partial sums there, or that they are whole. Solved once for each
boundary, the integer program gives segments that join without redistribution where their boundaries
agree.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from meshwright.solvers.choices import ChoiceGraph, ChoiceNode

__all__ = ["Boundary", "Labels", "boundaries_of"]

Labels = tuple[tuple[str, str], ...]
"""Free axis to label, or to ``PARTIAL``; an axis that is absent leaves the values whole."""

PARTIAL = "partial"


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundary:
    """One way of cutting what passes between segments."""

    labels: Labels
    allowed: Mapping[int, frozenset[int]]
    """Node to the choices that cut its passing results so; all where none does."""


def boundaries_of(graph: ChoiceGraph) -> Iterator[Boundary]:
    """Every boundary some passing value can have, the whole one first."""
    passing = _passing(graph)
    cuts = {
        (node, result): [
            _cut(graph, graph.nodes[node], place, result)
            for place in range(len(graph.nodes[node].choices))
        ]
        for node, result in passing
    }
    found = {labels for every in cuts.values() for labels in every}
    for labels in sorted(found, key=lambda labels: (len(labels), labels)):
        yield Boundary(labels=labels, allowed=_allowed(cuts, dict(labels)))


def _passing(graph: ChoiceGraph) -> tuple[tuple[int, int], ...]:
    """``(node, result)`` of what a segment reads in forward and another one made.

    Equal segments are folded, so within a class it is what is read no later than it is made.
    """
    found: dict[tuple[int, int], None] = {}
    for link in graph.links:
        source, target = graph.nodes[link.source], graph.nodes[link.target]
        if source.is_parameter or target.is_parameter or link.is_backward:
            continue
        if source.segment_class != target.segment_class or target.number <= source.number:
            found[link.source, link.result] = None
    return tuple(found)


def _cut(graph: ChoiceGraph, node: ChoiceNode, place: int, result: int) -> Labels:
    """Labels that a choice cuts a result along."""
    layout = node.choices[place].results[result]
    value = graph.analysis.graph.ops[node.op].outputs[result]
    assert layout is not None
    assert value is not None, "links read values"
    segment = graph.segmentation.representatives()[node.segment_class]
    label_of = {leaf: label for label, leaf in graph.labels.by_segment[segment.index].items()}
    dims = graph.analysis.value_dims[value]
    found = {axis: PARTIAL for axis, _ in layout.partial if axis in graph.free_axes}
    for (dim, position), axes in layout.shards:
        label = label_of.get(dims[dim][position], "")
        found.update({axis: label for axis in axes if axis in graph.free_axes})
    return tuple(sorted(found.items()))


def _allowed(
    cuts: Mapping[tuple[int, int], list[Labels]], wanted: Mapping[str, str]
) -> dict[int, frozenset[int]]:
    """Choices that cut as wanted; what cannot be cut along a wanted label is whole on its axis."""
    allowed: dict[int, frozenset[int]] = {}
    for (node, _), every in cuts.items():
        able = {pair for labels in every for pair in labels}
        own = tuple(sorted(pair for pair in wanted.items() if pair in able))
        fitting = frozenset(itertools.compress(itertools.count(), [cut == own for cut in every]))
        both = allowed.get(node, fitting) & fitting
        if both:
            allowed[node] = both
    return allowed
