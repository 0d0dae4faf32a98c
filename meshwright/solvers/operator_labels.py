"""From a choice for every operator to what a plan can say: label lists and exceptions.

A plan shards each operator along the first class of its segment's list that the operator has. For
every segment class and axis the list is sought under which the fewest operators would do otherwise
than chosen; those that still would are named one by one. What a list and its exceptions then do is
not always what was chosen: partial sums pass through linear operators whether or not that was
chosen. So both forms are priced by the exact model, and the better one counts.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from meshwright.graph.dimensions import BATCH, is_experts
from meshwright.plans.plan import AXIS_NAMES
from meshwright.solvers.choices import ChoiceGraph
from meshwright.space.decision import Exceptions, Labels, Sharding

__all__ = ["shardings_of_picks"]

_MAX_LABELS = 5
"""Labels of one axis whose orders are all tried; the rest goes to exceptions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wish:
    """What one operator shall do on one axis."""

    number: int
    able: frozenset[str]
    """Labels it could be sharded along."""
    label: str | None
    is_view: bool
    applies_experts: bool

    def is_met(self, order: Sequence[str]) -> bool:
        """Whether a plan that lists ``order`` does what is wished for.

        The first label that the operator has counts; experts listed before the batch only for
        operators that apply the experts' weights (``spmd.wanted``).
        """
        beside = BATCH in order and not self.applies_experts
        last = order.index(BATCH) if beside else 0
        return self.label == next(
            (
                label
                for place, label in enumerate(order)
                if label in self.able and not (beside and place < last and is_experts(label))
            ),
            None,
        )


def shardings_of_picks(
    graph: ChoiceGraph,
    picks: Sequence[int],
    background: Mapping[str, Sequence[str]],
    *,
    name: str,
) -> tuple[Sharding, ...]:
    """Ways to say ``picks``, the choice of each node: with all exceptions, and with none.

    Args:
        graph: the choices.
        picks: of each node.
        background: the other axes and their labels in every segment.
        name: of the shardings.
    """
    wishes = _wishes(graph, picks)
    count = graph.segmentation.num_classes
    names = [graph.labels.by_segment[s.index] for s in graph.segmentation.representatives()]
    orders: list[dict[str, tuple[str, ...]]] = []
    for number in range(count):
        orders.append({axis: _order(wishes[number, axis]) for axis in graph.free_axes})
    by_class = tuple(
        _labels({**_known(background, names[number]), **orders[number]}, graph)
        for number in range(count)
    )
    found = []
    for says_all in (True, False):
        exceptions: list[Exceptions] = []
        for number in range(count):
            unmet: defaultdict[int, dict[str, tuple[str, ...]]] = defaultdict(dict)
            for axis in graph.free_axes:
                for wish in wishes[number, axis]:
                    if says_all and not wish.is_met(orders[number][axis]):
                        unmet[wish.number][axis] = () if wish.label is None else (wish.label,)
            exceptions.append(
                tuple((number, _ordered(labels)) for number, labels in sorted(unmet.items()))
            )
        has_some = any(exceptions)
        found.append(
            Sharding(
                name=name,
                by_class=by_class,
                operators_by_class=tuple(exceptions) if has_some else (),
            )
        )
    return tuple(dict.fromkeys(found))


def _known(
    background: Mapping[str, Sequence[str]], names: Mapping[str, int]
) -> dict[str, tuple[str, ...]]:
    return {
        axis: tuple(label for label in labels if label in names)
        for axis, labels in background.items()
    }


def _labels(found: Mapping[str, tuple[str, ...]], graph: ChoiceGraph) -> Labels:
    used = {axis: labels for axis, labels in found.items() if graph.axis_sizes[axis] > 1}
    return _ordered(used)


def _ordered(labels: Mapping[str, tuple[str, ...]]) -> Labels:
    return tuple((axis, labels[axis]) for axis in AXIS_NAMES if axis in labels)


def _wishes(graph: ChoiceGraph, picks: Sequence[int]) -> dict[tuple[int, str], list[_Wish]]:
    """By segment class and axis."""
    found: defaultdict[tuple[int, str], list[_Wish]] = defaultdict(list)
    for node, pick in zip(graph.nodes, picks, strict=True):
        if node.is_parameter:
            continue
        carried = {axis for axis, _ in node.choices[pick].carried}
        labels = dict(node.choices[pick].labels)
        for axis in graph.free_axes:
            able = frozenset(
                label for choice in node.choices for other, label in choice.labels if other == axis
            )
            if able and axis not in carried:
                found[node.segment_class, axis].append(
                    _Wish(
                        number=node.number,
                        able=able,
                        label=labels.get(axis),
                        is_view=False,
                        applies_experts=node.op in graph.labels.expert_operators,
                    )
                )
    for view in graph.views:
        source = graph.nodes[view.source]
        layout = source.choices[picks[view.source]].results[view.result]
        assert layout is not None
        partial = {axis for axis, _ in layout.partial}
        moved = dict(view.places)
        for axis in graph.free_axes:
            able = dict(view.able).get(axis, frozenset())
            place = layout.place_of(axis)
            if not able or axis in partial:
                continue
            label = None if place is None else view.label_at(moved.get(place, place))
            if label is None or label in able:
                found[view.segment_class, axis].append(
                    _Wish(
                        number=view.number,
                        able=able,
                        label=label,
                        is_view=True,
                        applies_experts=view.op in graph.labels.expert_operators,
                    )
                )
    return found


def _order(wishes: Sequence[_Wish]) -> tuple[str, ...]:
    """The list that meets most wishes; of equals the shortest, then the most wished for first."""
    counts = Counter(wish.label for wish in wishes if wish.label is not None)
    candidates = [label for label, _ in counts.most_common(_MAX_LABELS)]
    best: tuple[int, int, int] | None = None
    found: tuple[str, ...] = ()
    place = 0
    for length in range(len(candidates) + 1):
        for order in itertools.permutations(candidates, length):
            unmet = sum((1 if wish.is_view else 3) for wish in wishes if not wish.is_met(order))
            key = (unmet, length, place)
            place += 1
            if best is None or key < best:
                best, found = key, order
    return found
