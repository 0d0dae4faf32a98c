"""The choice graph: every way of sharding each operator of each segment class.

One *node* for each operator of the first segment of every class, and one for each parameter; a node
has *choices*. A choice says along which dimension class each free mesh axis shards the operator (or
that it replicates it, or lets partial sums pass), and from that follow the layouts of operands and
results by the same factor rules that ``spmd.sharded`` applies. *Links* say who reads whose result.
Views and parameters' views take whatever layout their operand has, so they are no nodes; a link
carries the way their places are renamed.

Axes that are not free (the batch axes, micro-batches) are sharded as their labels say, in every
choice, so layouts and bytes are those of one rank and one micro-batch.

Equal segments are one: a link between two classes counts how often it occurs in the whole program.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from meshwright.errors import PlanRefused
from meshwright.graph.dimensions import BATCH, DimensionLabels
from meshwright.graph.factors import FactorAnalysis, Place
from meshwright.graph.opgraph import Op, OutputRole, Phase
from meshwright.graph.segments import Segment, Segmentation
from meshwright.solvers.choices import (
    Carried,
    ChoiceGraph,
    ChoiceNode,
    FollowingView,
    Link,
    OpChoice,
    Renaming,
    composed,
    given_labels,
)
from meshwright.solvers.wiring import Wiring, wiring_of
from meshwright.spmd.choose import chosen_factors, operand_layout, result_layout
from meshwright.spmd.draws import check_draws
from meshwright.spmd.layout import ALL_AXES, MICRO, Layout

__all__ = ["choice_graph"]


def choice_graph(
    analysis: FactorAnalysis,
    segmentation: Segmentation,
    labels: DimensionLabels,
    *,
    axis_sizes: Mapping[str, int],
    background: Mapping[str, Sequence[str]],
    allowed: Mapping[str, frozenset[str] | None],
    wiring: Wiring | None = None,
) -> ChoiceGraph:
    """All choices of all segment classes.

    Args:
        analysis: rules and classes of the graph.
        segmentation: its segments.
        labels: what the classes are called in each segment.
        axis_sizes: devices along each mesh axis, and ``micro``.
        background: axes that are not free, to their labels in every segment.
        allowed: free axes, to the labels they may shard (``None``: all).
        wiring: of the graph, where the caller has it already.
    """
    wiring = wiring or wiring_of(analysis.graph, segmentation)
    return _Builder(analysis, segmentation, labels, axis_sizes, background, allowed, wiring).build()


class _Builder:
    def __init__(
        self,
        analysis: FactorAnalysis,
        segmentation: Segmentation,
        labels: DimensionLabels,
        axis_sizes: Mapping[str, int],
        background: Mapping[str, Sequence[str]],
        allowed: Mapping[str, frozenset[str] | None],
        wiring: Wiring,
    ) -> None:
        self.analysis, self.graph = analysis, analysis.graph
        self.segmentation, self.labels = segmentation, labels
        self.sizes = {axis: axis_sizes.get(axis, 1) for axis in ALL_AXES}
        self.axes = tuple(axis for axis in ALL_AXES if self.sizes[axis] > 1)
        self.free = tuple(axis for axis in self.axes if axis in allowed)
        self.allowed = allowed
        self.background = {MICRO: (BATCH,), **background}
        self.nodes: list[ChoiceNode] = []
        self.links: list[Link] = []
        self.views: list[FollowingView] = []
        self.made: dict[int, tuple[int, int]] = {}
        """Value of a representative to its node and result."""
        self.view_of: dict[int, tuple[int, Renaming]] = {}
        """Value of a view to its operand and the renaming of places."""
        self.partial: dict[int, frozenset[str]] = {}
        """Background axes a value is partial on."""
        self.wiring = wiring
        self.read: set[int] = set()
        """Nodes that some link reads."""
        self.parameters = {item.value for item in self.graph.parameters}
        self.made_by_segments = {
            value
            for op in self.graph.ops
            if segmentation.segment_of_op[op.index] >= 0
            for value in op.results
        }
        self.counts = segmentation.multiplicity()
        self.representatives = segmentation.representatives()

    def build(self) -> ChoiceGraph:
        for item in sorted(self.wiring.copies):
            self._add_parameter(item)
        operators = [
            (op, segment, number)
            for segment in self.representatives
            for number, op in enumerate((*segment.forward_ops, *segment.backward_ops))
        ]
        operators.sort(key=lambda entry: entry[0])
        operators = [entry for entry in operators if entry[0] not in self.wiring.sums]
        for index, segment, number in operators:
            self._add_op(self.graph.ops[index], segment, number)
        for index, segment, number in operators:
            self._link_op(self.graph.ops[index], segment, number)
        self._link_gradients()
        return ChoiceGraph(
            analysis=self.analysis,
            segmentation=self.segmentation,
            labels=self.labels,
            axis_sizes=self.sizes,
            free_axes=self.free,
            nodes=tuple(self.nodes),
            links=tuple(self.links),
            views=tuple(self.views),
            leaving=tuple(self._leaving()),
        )

    # Who reads whom ----------------------------------------------------------------------------

    def _roots(
        self, segment_class: int, number: int, operand: int
    ) -> Iterator[tuple[int, int, Renaming, float]]:
        """Nodes an operand comes from: node, result, renaming, occurrences."""
        for value, count in self.wiring.producers.get((segment_class, number, operand), {}).items():
            for node, result, places, share in self._root_of(value):
                yield node, result, places, count * share

    def _root_of(self, value: int) -> list[tuple[int, int, Renaming, float]]:
        if value in self.made:
            return [(*self.made[value], (), 1.0)]
        if value not in self.view_of:
            return []
        index, places = self.view_of[value]
        segment = self.segmentation.segments[self.segmentation.segment_of_op[index]]
        number = (*segment.forward_ops, *segment.backward_ops).index(index)
        found = list(self._roots(segment.segment_class, number, 0))
        total = sum(count for *_, count in found)
        return [
            (node, result, composed(before, places), count / total)
            for node, result, before, count in found
        ]

    # Nodes -------------------------------------------------------------------------------------

    def _add_parameter(self, value: int) -> None:
        """One choice for each dimension class of the parameter on each free axis."""
        dims = self.analysis.value_dims[value]
        place_of = {
            leaf: (dim, position)
            for dim, leaves in enumerate(dims)
            for position, leaf in enumerate(leaves)
        }
        segment = next(
            segment
            for segment in self.representatives
            for index in (*segment.forward_ops, *segment.backward_ops)
            if value in self.graph.ops[index].inputs
        )
        names = self.labels.by_segment[segment.index]
        options = [
            (None, *(label for label in self._labels(axis, names) if names[label] in place_of))
            for axis in self.free
        ]
        choices: dict[Layout, OpChoice] = {}
        for labels in itertools.product(*options):
            shards: dict[Place, list[str]] = {}
            ways: Counter[int] = Counter()
            fits = True
            for axis, label in zip(self.free, labels, strict=True):
                if label is None:
                    continue
                leaf = names[label]
                ways[leaf] = max(ways[leaf], 1) * self.sizes[axis]
                fits = fits and self.analysis.class_size[leaf] % ways[leaf] == 0
                shards.setdefault(place_of[leaf], []).append(axis)
            layout = Layout.of(shards, {})
            if fits:
                choices.setdefault(
                    layout,
                    OpChoice(
                        labels=given_labels(self.free, labels),
                        factors=(),
                        carried=(),
                        operands=(),
                        results=(layout,),
                    ),
                )
        self.made[value] = (len(self.nodes), 0)
        self.nodes.append(
            ChoiceNode(
                segment_class=segment.segment_class,
                number=-1,
                op=-1,
                value=value,
                weight=self.wiring.copies[value],
                choices=tuple(choices.values()),
            )
        )

    def _labels(self, axis: str, names: Mapping[str, int]) -> tuple[str, ...]:
        allowed = self.allowed[axis]
        return tuple(name for name in names if allowed is None or name in allowed)

    def _add_op(self, op: Op, segment: Segment, number: int) -> None:
        places = self._followed(op)
        if places is not None:
            (result,) = op.results
            self.view_of[result] = (op.index, places)
            self.partial[result] = self.partial.get(op.inputs[0], frozenset())
            return
        names = self.labels.by_segment[segment.index]
        choices = tuple(self._choices(op, names))
        for result, value in enumerate(op.outputs):
            if value is not None:
                self.made[value] = (len(self.nodes), result)
                layout = choices[0].results[result]
                assert layout is not None, f"{op.target} result {result}"
                self.partial[value] = frozenset(
                    axis for axis, _ in layout.partial if axis not in self.free
                )
        self.nodes.append(
            ChoiceNode(
                segment_class=segment.segment_class,
                number=number,
                op=op.index,
                value=-1,
                weight=self.counts[segment.segment_class],
                choices=choices,
            )
        )

    def _followed(self, op: Op) -> Renaming | None:
        """Renaming of places by a view that any layout passes; ``None`` for other operators."""
        rule = self.analysis.rules[op.index]
        if not rule.is_view or len(op.inputs) != 1 or len(op.outputs) != 1 or not op.results:
            return None
        if not (op.inputs[0] in self.parameters or op.inputs[0] in self.made_by_segments):
            return None
        factors = self.analysis.leaf_factors[op.index]
        found = {
            factor.operands[0]: factor.results[0]
            for factor in factors
            if not factor.fixed and factor.operands[0] is not None
        }
        there = [place for place in found.values() if place is not None]
        counts = [
            sum(len(leaves) for leaves in self.analysis.value_dims[value])
            for value in (op.inputs[0], op.results[0])
        ]
        if len(there) != len(found) or [len(found)] * 2 != counts:
            return None
        return tuple(
            (here, place) for here, place in found.items() if place is not None and here is not None
        )

    def _choices(self, op: Op, names: Mapping[str, int]) -> Iterator[OpChoice]:
        rule = self.analysis.rules[op.index]
        factors = self.analysis.leaf_factors[op.index]
        fixed = self._fixed(names)
        able = {f.dimension_class for f in factors if not f.fixed}
        carries: list[Carried | str | None] = []
        result_bytes = sum(self.graph.values[v].num_bytes for v in op.results)
        for positions in rule.linear:
            sizes = [self.graph.values[op.inputs[p]].num_bytes for p in positions]
            if result_bytes <= sum(sizes):
                carries.append(("", positions))
        options: list[list[Carried | str | None]] = [
            [
                None,
                *(label for label in self._labels(axis, names) if names[label] in able),
                *carries,
            ]
            for axis in self.free
        ]
        seen: set[tuple[object, ...]] = set()
        for picks in itertools.product(*options):
            wanted: dict[str, list[int]] = dict(fixed)
            for axis, pick in zip(self.free, picks, strict=True):
                wanted[axis] = [names[pick]] if isinstance(pick, str) else []
            choice = chosen_factors(factors, wanted, self.axes, self.sizes)
            if any(
                isinstance(pick, str) and axis not in choice
                for axis, pick in zip(self.free, picks, strict=True)
            ):
                continue
            carried = tuple(
                (axis, pick[1])
                for axis, pick in zip(self.free, picks, strict=True)
                if isinstance(pick, tuple)
            )
            key = (tuple(choice.items()), carried)
            if key in seen or (rule.random and not self._may_draw(op, choice)):
                continue
            seen.add(key)
            labels = tuple(pick if isinstance(pick, str) else None for pick in picks)
            yield self._choice(op, choice, given_labels(self.free, labels), carried)

    def _may_draw(self, op: Op, choice: Mapping[str, int]) -> bool:
        try:
            check_draws(op, choice, self.sizes)
        except PlanRefused:
            return False
        return True

    def _choice(
        self,
        op: Op,
        choice: dict[str, int],
        labels: tuple[tuple[str, str], ...],
        carried: tuple[Carried, ...],
    ) -> OpChoice:
        """Layouts that follow from the factor of each axis, as in ``spmd.sharded``."""
        rule = self.analysis.rules[op.index]
        factors = self.analysis.leaf_factors[op.index]
        passing = {**self._background_carried(op), **dict(carried)}
        choice = {axis: index for axis, index in choice.items() if axis not in passing}
        operands = tuple(
            operand_layout(position, rule, factors, choice, passing)
            for position in range(len(op.inputs))
        )
        results = tuple(
            None if value is None else result_layout(number, factors, choice, passing)
            for number, value in enumerate(op.outputs)
        )
        return OpChoice(
            labels=labels,
            factors=tuple(choice.items()),
            carried=carried,
            operands=operands,
            results=results,
        )

    def _background_carried(self, op: Op) -> dict[str, frozenset[int]]:
        """Background axes whose partial sums pass through ``op``."""
        rule = self.analysis.rules[op.index]
        spread: dict[str, set[int]] = {}
        for position, value in enumerate(op.inputs):
            if position not in rule.ignored:
                for axis in self.partial.get(value, ()):
                    spread.setdefault(axis, set()).add(position)
        return {
            axis: frozenset(positions)
            for axis, positions in spread.items()
            if frozenset(positions) in rule.linear
        }

    # Links -------------------------------------------------------------------------------------

    def _link_op(self, op: Op, segment: Segment, number: int) -> None:
        own = (segment.segment_class, number)
        followed = next((v for v in op.results if v in self.view_of), None)
        if followed is not None:
            self._follow(op, segment, number, followed)
            return
        rule = self.analysis.rules[op.index]
        target = self.made[op.results[0]][0]
        for operand in range(len(op.inputs)):
            if operand in rule.ignored:
                continue
            for node, result, places, count in self._roots(*own, operand):
                self._link(node, result, target, operand, places, count, op.phase)

    def _follow(self, op: Op, segment: Segment, number: int, value: int) -> None:
        """Remember a view with the first node it follows."""
        roots = self._root_of(value)
        if not roots:
            return
        node, result, places, _ = roots[0]
        names = self.labels.by_segment[segment.index]
        label_of = {dimension_class: label for label, dimension_class in names.items()}
        factors = self.analysis.leaf_factors[op.index]
        fixed = self._fixed(names)
        able = []
        for axis in self.free:
            labels = (
                label
                for label in names
                if axis
                in chosen_factors(factors, {**fixed, axis: [names[label]]}, self.axes, self.sizes)
            )
            able.append((axis, frozenset(labels)))
        self.views.append(
            FollowingView(
                segment_class=segment.segment_class,
                number=number,
                op=op.index,
                source=node,
                result=result,
                places=places,
                able=tuple(able),
                labels=tuple(
                    ((dim, position), label_of[leaf])
                    for dim, leaves in enumerate(self.analysis.value_dims[value])
                    for position, leaf in enumerate(leaves)
                    if leaf in label_of
                ),
            )
        )

    def _fixed(self, names: Mapping[str, int]) -> dict[str, list[int]]:
        """Classes that axes which are not free shard."""
        return {
            axis: [names[label] for label in labels if label in names]
            for axis, labels in self.background.items()
        }

    def _link(
        self,
        node: int,
        result: int,
        target: int,
        operand: int,
        places: Renaming,
        weight: float,
        phase: Phase,
    ) -> None:
        source = self.nodes[node]
        made = self.graph.ops[source.op].outputs[result] if source.op >= 0 else source.value
        assert made is not None
        is_storing = source.is_parameter and node not in self.read
        self.read.add(node)
        self.links.append(
            Link(
                source=node,
                result=result,
                value=made,
                target=target,
                operand=operand,
                places=places,
                weight=weight,
                is_backward=phase == Phase.BACKWARD,
                is_storing=is_storing,
            )
        )

    def _leaving(self) -> Iterator[tuple[int, int, float]]:
        for output in self.graph.outputs:
            if output.role in {OutputRole.LOSS, OutputRole.BUFFER_UPDATE}:
                for node, result, _, share in self._root_of(output.value):
                    yield node, result, share * self.nodes[node].weight

    def _link_gradients(self) -> None:
        for parameter, terms in self.wiring.terms.items():
            if parameter not in self.made:
                continue
            target = self.made[parameter][0]
            weight = self.nodes[target].weight
            for value in terms:
                for node, result, places, share in self._root_of(value):
                    self._link(node, result, target, -1, places, weight * share, Phase.BACKWARD)
