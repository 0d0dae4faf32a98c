"""The data of a choice graph: nodes, their choices, and the links between them.

``segment_graph`` builds it and says what it means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshwright.graph.dimensions import DimensionLabels
from meshwright.graph.factors import FactorAnalysis, Place
from meshwright.graph.segments import Segmentation
from meshwright.spmd.layout import Layout

__all__ = [
    "Carried",
    "ChoiceGraph",
    "ChoiceNode",
    "FollowingView",
    "Link",
    "OpChoice",
    "Renaming",
    "composed",
    "given_labels",
]

Carried = tuple[str, frozenset[int]]
"""An axis and the operands whose partial sums pass through."""

Renaming = tuple[tuple[Place, Place], ...]
"""Place in one value to place in another; empty: the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpChoice:
    """One way of sharding one operator, or of storing one parameter."""

    labels: tuple[tuple[str, str], ...]
    """Free axis to label; an axis without one replicates, or carries."""
    factors: tuple[tuple[str, int], ...]
    """Every axis that shards the operator to the leaf factor, background axes included."""
    carried: tuple[Carried, ...]
    operands: tuple[Layout, ...]
    results: tuple[Layout | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceNode:
    """An operator of a segment class, or a parameter."""

    segment_class: int
    number: int
    """Position among the segment's forward and then backward operators; -1 for a parameter."""
    op: int
    """In the graph; -1 for a parameter."""
    value: int
    """A parameter's value; -1 for an operator."""
    weight: int
    """How many such there are in the program."""
    choices: tuple[OpChoice, ...]

    @property
    def is_parameter(self) -> bool:
        """Whether the node stores a parameter."""
        return self.value >= 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A result of one node that another reads."""

    source: int
    """Node."""
    result: int
    value: int
    """The source's value, for its size."""
    target: int
    """Node."""
    operand: int
    """Position among the target's operands; -1: a parameter takes its gradient."""
    places: Renaming
    """Place in the source's value to place in what the target reads."""
    weight: float
    """Occurrences in the program."""
    is_backward: bool
    is_storing: bool = False
    """The first that reads a parameter: the parameter is stored as it wants it."""

    def seen(self, layout: Layout) -> Layout:
        """A layout of the source's value as the target sees it."""
        if not self.places:
            return layout
        moved = dict(self.places)
        return Layout.of(
            {moved[place]: axes for place, axes in layout.shards}, dict(layout.partial)
        )

    def unseen(self, layout: Layout) -> Layout:
        """A layout the target wants, in the places of the source's value."""
        if not self.places:
            return layout
        moved = {there: here for here, there in self.places}
        return Layout.of(
            {moved[place]: axes for place, axes in layout.shards}, dict(layout.partial)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowingView:
    """A view, which takes the layout of what it looks at."""

    segment_class: int
    number: int
    op: int
    """In the graph."""
    source: int
    """Node."""
    result: int
    places: Renaming
    able: tuple[tuple[str, frozenset[str]], ...]
    """Free axis to the labels it could be sharded along."""
    labels: tuple[tuple[Place, str], ...]
    """Place in what it returns to the label there."""

    def label_at(self, place: Place) -> str | None:
        """The label of a place, where the segment has one."""
        return dict(self.labels).get(place)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceGraph:
    """Nodes and links of all segment classes; as ``segment_graph`` builds them."""

    analysis: FactorAnalysis
    segmentation: Segmentation
    labels: DimensionLabels
    axis_sizes: dict[str, int]
    """Every axis, ``micro`` included."""
    free_axes: tuple[str, ...]
    nodes: tuple[ChoiceNode, ...]
    links: tuple[Link, ...]
    views: tuple[FollowingView, ...]
    leaving: tuple[tuple[int, int, float], ...]
    """``(node, result, occurrences)`` of what leaves the program whole: the loss, buffers."""


def given_labels(axes: Sequence[str], labels: Sequence[str | None]) -> tuple[tuple[str, str], ...]:
    """``(axis, label)`` where there is a label."""
    return tuple(
        (axis, label) for axis, label in zip(axes, labels, strict=True) if label is not None
    )


def composed(first: Renaming, second: Renaming) -> Renaming:
    """First the one renaming, then the other."""
    if not first:
        return second
    if not second:
        return first
    after = dict(second)
    return tuple((here, after[there]) for here, there in first)
