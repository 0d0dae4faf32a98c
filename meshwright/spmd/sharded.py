"""The sharded graph: every operator's sharding and every redistribution, for one plan.

A pass in execution order. On each mesh axis an operator is sharded along the first dimension class
its segment wants on that axis and the operator can be sharded along. From the choice follow the
layouts its operands must have; where a value has another layout, a redistribution is put before the
operator. Partial sums are carried through linear operators and reduced where first needed whole, so
that the three gradients of q, k and v meet before one all-reduce.

The same pass serves the cost model, which prices the nodes, and the lowering, which emits them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from meshwright.errors import PlanRefused
from meshwright.graph.dimensions import DimensionLabels
from meshwright.graph.factors import FactorAnalysis, LeafFactor
from meshwright.graph.opgraph import GraphOutput, InputRole, Op, OutputRole, Phase
from meshwright.graph.segments import Segmentation
from meshwright.spmd.choose import chosen_factors, operand_layout, result_layout
from meshwright.spmd.draws import check_draws
from meshwright.spmd.layout import ALL_AXES, MICRO, Layout
from meshwright.spmd.nodes import ConvertNode, Node, OpNode, ShardedGraph, ShardedPhase
from meshwright.spmd.redistribute import Step, StepKind, communicates_over_micro, plan_steps
from meshwright.spmd.terms import gradient_terms
from meshwright.spmd.wanted import Shard, readers_of_parameter_views, wanted_classes

__all__ = ["ConvertNode", "Node", "OpNode", "ShardedGraph", "ShardedPhase", "shard_graph"]


def shard_graph(
    analysis: FactorAnalysis,
    segmentation: Segmentation,
    labels: DimensionLabels,
    *,
    shards: Sequence[Shard],
    operators: Sequence[Mapping[int, Shard]] = (),
    axis_sizes: Mapping[str, int],
) -> ShardedGraph:
    """Choose every operator's sharding and place the redistributions.

    Args:
        analysis: rules and classes of the graph.
        segmentation: its segments.
        labels: what the classes are called in each segment.
        shards: for each segment, mesh axis to wanted labels, most wanted first.
        operators: for each segment, exceptions: number of an operator, its position in the
            segment's forward and then backward operators, to labels that stand for those of
            ``shards`` on the axes it names. Empty: no segment has any.
        axis_sizes: devices along each mesh axis, and ``micro``: the number of micro-batches.

    Raises:
        PlanRefused: a label or operator number is unknown, or the loss is not a sum over
            micro-batches.
    """
    return _Pass(analysis, segmentation, labels, shards, operators, axis_sizes).run()


class _Pass:
    """The state of one pass: what each value's current sharded value is."""

    def __init__(
        self,
        analysis: FactorAnalysis,
        segmentation: Segmentation,
        labels: DimensionLabels,
        shards: Sequence[Shard],
        operators: Sequence[Mapping[int, Shard]],
        axis_sizes: Mapping[str, int],
    ) -> None:
        self.analysis = analysis
        self.graph = analysis.graph
        self.segmentation = segmentation
        self.axis_sizes = {axis: axis_sizes.get(axis, 1) for axis in ALL_AXES}
        self.axes = tuple(axis for axis in ALL_AXES if self.axis_sizes[axis] > 1)
        self.graph_value: list[int] = []
        self.layouts: list[Layout] = []
        self.producer: list[int] = []
        self.nodes: list[Node] = []
        self.marks: list[tuple[int, int]] = []
        self.current: dict[int, int] = {}
        self.whole: dict[int, int] = {}
        """Prologue versions of values: not cut into micro-batches."""
        self.inputs: dict[int, int] = {}
        self.prologue_inputs: dict[int, int] = {}
        self.converted: dict[tuple[int, Layout, int, ShardedPhase], int] = {}
        self.waiting_parameters = {item.value for item in self.graph.parameters}
        self.parameter_values = {item.name: item.value for item in self.graph.parameters}
        self.gradients = gradient_terms(self.graph)
        self.view_readers = readers_of_parameter_views(analysis)
        self.makers = {value: op for op in self.graph.ops for value in op.results}
        self.wanted = wanted_classes(
            segmentation, labels, shards=shards, operators=operators, axes=self.axes
        )
        free: dict[str, list[int]] = {}
        for axis in self.axes:
            if axis in {"dp_replicate", "dp_shard", "ep", MICRO} and labels.batch is not None:
                free[axis] = [labels.batch]
            elif axis == "cp" and labels.sequence is not None:
                free[axis] = [labels.sequence]
        self.wanted_free = free
        self.depends_on_data = {item.value for item in self.graph.inputs_of(InputRole.DATA)}

    def run(self) -> ShardedGraph:
        for item in self.graph.inputs:
            self._mark()
            if item.role == InputRole.DATA:
                self.inputs[item.value] = self._new(item.value, self._data_layout(item.value), -1)
            elif item.role != InputRole.PARAMETER:
                self.inputs[item.value] = self._new(item.value, Layout(), -1)
        self.current.update(self.inputs)
        for op in self.graph.ops:
            self._mark()
            if op.index in self.gradients.additions:
                continue
            segment = self.segmentation.segment_of_op[op.index]
            if segment < 0:
                self._visit_free(op)
            else:
                phase = ShardedPhase.FORWARD if op.phase == Phase.FORWARD else ShardedPhase.BACKWARD
                self._visit(op, segment, phase, self._wanted_of(op, segment))
        outputs = tuple(self._finish(output) for output in self.graph.outputs)
        self._mark()
        for value in sorted(self.waiting_parameters):
            self.inputs[value] = self._new(value, Layout(), -1)
        return ShardedGraph(
            analysis=self.analysis,
            segmentation=self.segmentation,
            axis_sizes=self.axis_sizes,
            graph_value=tuple(self.graph_value),
            layouts=tuple(self.layouts),
            nodes=tuple(self.nodes),
            producer=tuple(self.producer),
            inputs=self.inputs,
            prologue_inputs=self.prologue_inputs,
            outputs=outputs,
            marks=tuple(self.marks),
        )

    def _mark(self) -> None:
        self.marks.append((len(self.nodes), len(self.layouts)))

    def _new(self, value: int, layout: Layout, producer: int) -> int:
        self.graph_value.append(value)
        self.layouts.append(layout)
        self.producer.append(producer)
        return len(self.layouts) - 1

    def _data_layout(self, value: int) -> Layout:
        shards: dict[tuple[int, int], list[str]] = {}
        for axis, classes in self.wanted_free.items():
            for dim, leaves in enumerate(self.analysis.value_dims[value]):
                for position, leaf in enumerate(leaves):
                    taken = shards.setdefault((dim, position), [])
                    ways = math.prod(self.axis_sizes[other] for other in (*taken, axis))
                    if leaf in classes and self.analysis.class_size[leaf] % ways == 0:
                        taken.append(axis)
        return Layout.of(shards, {})

    # Operators ---------------------------------------------------------------------------------

    def _visit_free(self, op: Op) -> None:
        """An operator that depends on no parameter.

        What sums over micro-batches is computed in the prologue on the rank's whole batch; so is
        what depends on no data.
        """
        if any(value in self.depends_on_data for value in op.inputs):
            self.depends_on_data.update(op.results)
        choice = self._choose(op, self.wanted_free)
        factors = self.analysis.leaf_factors[op.index]
        micro = choice.get(MICRO)
        if micro is not None and factors[micro].partial_results:
            self._visit_whole(op)
        elif micro is None and all(self._is_settled(value) for value in op.inputs):
            self._visit(op, -1, ShardedPhase.PROLOGUE, self.wanted_free)
        else:
            self._visit(op, -1, ShardedPhase.FORWARD, self.wanted_free)

    def _is_settled(self, value: int) -> bool:
        """Whether the prologue can know a value before any micro-batch."""
        return value not in self.depends_on_data or self._is_prologue(self._current(value))

    def _visit_whole(self, op: Op) -> None:
        wanted = {axis: c for axis, c in self.wanted_free.items() if axis != MICRO}
        for value in op.inputs:
            self._make_whole(value)
        kept = self.current
        self.current = self.whole
        self._visit(op, -1, ShardedPhase.PROLOGUE, wanted)
        self.current = kept

    def _make_whole(self, value: int) -> None:
        """A version of ``value`` that is not cut into micro-batches."""
        if value in self.whole:
            return
        if value in self.current and value not in self.depends_on_data:
            self.whole[value] = self.current[value]
            return
        if value in self.inputs:
            layout = self.layouts[self.inputs[value]]
            if MICRO not in layout.sharding_axes:
                self.whole[value] = self.inputs[value]
                return
            self.whole[value] = self._new(value, layout.without(MICRO), -1)
            self.prologue_inputs[value] = self.whole[value]
            return
        self._visit_whole(self.makers[value])

    def _visit(
        self, op: Op, segment: int, phase: ShardedPhase, wanted: Mapping[str, Sequence[int]]
    ) -> None:
        choice = self._choose(op, wanted)
        if self.analysis.rules[op.index].random:
            check_draws(op, choice, self.axis_sizes)
        carried = self._carried_partials(op, choice)
        choice = {axis: index for axis, index in choice.items() if axis not in carried}
        factors = self.analysis.leaf_factors[op.index]
        rule = self.analysis.rules[op.index]
        operands = []
        for position, value in enumerate(op.inputs):
            layout = operand_layout(position, rule, factors, choice, carried)
            if value in self.waiting_parameters:
                self.waiting_parameters.discard(value)
                stored = Layout.of(dict(layout.shards), {}).without(MICRO)
                self.inputs[value] = self.current[value] = self._new(value, stored, -1)
            if position in rule.ignored:
                operands.append(self._current(value))
            else:
                operands.append(self._convert(value, layout, segment, phase, op))
        results = tuple(
            None if value is None else self._result(value, number, factors, choice, carried)
            for number, value in enumerate(op.outputs)
        )
        self.nodes.append(
            OpNode(
                op=op.index,
                choice=tuple(choice.items()),
                operands=tuple(operands),
                results=results,
                segment=segment,
                phase=phase,
            )
        )

    def _result(
        self,
        value: int,
        number: int,
        factors: tuple[LeafFactor, ...],
        choice: Mapping[str, int],
        carried: Mapping[str, frozenset[int]],
    ) -> int:
        layout = result_layout(number, factors, choice, carried)
        self.current[value] = self._new(value, layout, len(self.nodes))
        return self.current[value]

    def _wanted_of(self, op: Op, segment: int) -> Mapping[str, Sequence[int]]:
        """What ``op`` is to be sharded along; a view of a parameter like what reads it first."""
        if op.index not in self.view_readers:
            return self.wanted.of(op.index, segment)
        index, position = self.view_readers[op.index]
        wanted = self.wanted.of(index, self.segmentation.segment_of_op[index])
        factors = self.analysis.leaf_factors[index]
        return {
            axis: [factors[factor].dimension_class]
            for axis, factor in self._choose(self.graph.ops[index], wanted).items()
            if factors[factor].operands[position] is not None
        }

    def _choose(self, op: Op, wanted: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """For each axis the leaf factor it shards."""
        factors = self.analysis.leaf_factors[op.index]
        return chosen_factors(factors, wanted, self.axes, self.axis_sizes)

    def _carried_partials(self, op: Op, choice: Mapping[str, int]) -> dict[str, frozenset[int]]:
        """Axes over which partial operands stay partial through ``op``, and those operands."""
        rule = self.analysis.rules[op.index]
        if not rule.linear:
            return {}
        spread: dict[str, set[int]] = {}
        for position, value in enumerate(op.inputs):
            if value in self.waiting_parameters or position in rule.ignored:
                continue
            for axis, how in self.layouts[self._current(value)].partial:
                if how == "sum":
                    spread.setdefault(axis, set()).add(position)
        if not spread:
            return {}
        size = self.graph.values
        result_bytes = sum(size[value].num_bytes for value in op.results)
        carried: dict[str, frozenset[int]] = {}
        for axis, positions in spread.items():
            # Several partial results are added first and reduced once, and a view waits for that;
            # any other operator wants its one operand reduced and cut at once.
            if axis in choice and len(positions) < 2 and not rule.is_view:
                continue
            operand_bytes = sum(size[op.inputs[position]].num_bytes for position in positions)
            if frozenset(positions) in rule.linear and (
                axis == MICRO or result_bytes <= operand_bytes
            ):
                carried[axis] = frozenset(positions)
        return carried

    # Redistribution ----------------------------------------------------------------------------

    def _current(self, value: int) -> int:
        if value not in self.current:
            self.current[value] = self.whole[value]
        return self.current[value]

    def _convert(
        self, value: int, layout: Layout, segment: int, phase: ShardedPhase, op: Op | None
    ) -> int:
        source = self._current(value)
        if self.layouts[source] == layout:
            return source
        if self._is_prologue(source):
            segment, phase = -1, ShardedPhase.PROLOGUE
        key = (source, layout, segment, phase)
        steps = plan_steps(self.layouts[source], layout)
        # Exchanged values are no larger than what they are made of: backward finds them kept,
        # while what is gathered is gathered again.
        kept = (source, layout, segment, ShardedPhase.FORWARD)
        for made in (key, kept) if {s.kind for s in steps} == {StepKind.ALL_TO_ALL} else (key,):
            if made in self.converted:
                return self.converted[made]
        if communicates_over_micro(steps):
            raise PlanRefused(self._micro_message(op))
        seen = self._seen_through_view(source, layout, steps, segment, phase)
        result = self._new(value, layout, len(self.nodes)) if seen is None else seen
        if seen is None:
            self.nodes.append(
                ConvertNode(source=source, result=result, steps=steps, segment=segment, phase=phase)
            )
        self.converted[key] = result
        before, after = dict(self.layouts[source].partial), dict(layout.partial)
        if len(after) < len(before):
            # What is reduced stays reduced for everybody after.
            self.current[value] = result
        return result

    def _seen_through_view(
        self,
        source: int,
        layout: Layout,
        steps: tuple[Step, ...],
        segment: int,
        phase: ShardedPhase,
    ) -> int | None:
        """A view of a gathered or reduced tensor instead of the reverse: views share the step."""
        node = self.nodes[self.producer[source]] if self.producer[source] >= 0 else None
        if (
            not isinstance(node, OpNode)
            or not self.analysis.rules[node.op].is_view
            or len(node.operands) != 1
            or layout.partial
            or len({step.kind for step in steps}) != 1
            or steps[0].kind in {StepKind.SLICE, StepKind.MASK}
        ):
            return None
        (operand,) = self.graph.ops[node.op].inputs
        sizes = [self.graph.values[v].num_bytes for v in (operand, self.graph_value[source])]
        if self.layouts[source].partial and sizes[0] > sizes[1]:
            return None
        factors = self.analysis.leaf_factors[node.op]
        shards: dict[tuple[int, int], tuple[str, ...]] = {}
        choice: dict[str, int] = {}
        number = node.results.index(source)
        for place, axes in layout.shards:
            index = next((i for i, f in enumerate(factors) if f.results[number] == place), None)
            operand_place = None if index is None else factors[index].operands[0]
            if index is None or operand_place is None:
                return None
            shards[operand_place] = axes
            choice.update(dict.fromkeys(axes, index))
        if self._current(operand) != node.operands[0] and not self.layouts[source].partial:
            return None
        gathered = self._convert(operand, Layout.of(shards, {}), segment, phase, None)
        result = self._new(self.graph_value[source], layout, len(self.nodes))
        self.nodes.append(
            OpNode(
                op=node.op,
                choice=tuple(choice.items()),
                operands=(gathered,),
                results=tuple(result if i == number else None for i in range(len(node.results))),
                segment=segment,
                phase=phase,
            )
        )
        return result

    def _is_prologue(self, value: int) -> bool:
        node = self.producer[value]
        return node >= 0 and self.nodes[node].phase == ShardedPhase.PROLOGUE

    def _micro_message(self, op: Op | None) -> str:
        if op is None:
            what, where = "an output of the model", ""
        else:
            what = f"operator {op.target} in {op.module_path or 'the model'}"
            where = f" ({op.source})" if op.source else ""
        return (
            f"{what}{where} needs the whole batch at once, so the step cannot be cut into "
            "micro-batches; use num_microbatches=1"
        )

    def _finish(self, output: GraphOutput) -> tuple[int, ...]:
        """The sharded values an output leaves as.

        The loss leaves whole but for micro-batches; a gradient leaves cut like its parameter,
        partial where the reduction is still to come.
        """
        self._mark()
        value = output.value
        if value in self.waiting_parameters:
            self.waiting_parameters.discard(value)
            self.inputs[value] = self.current[value] = self._new(value, Layout(), -1)
        if output.role == OutputRole.GRADIENT:
            stored = self.layouts[self.inputs[self.parameter_values[output.name]]]
            return self._finish_gradient(self.gradients.of_value[value], stored)
        layout = self.layouts[self._current(value)]
        maker = self.makers.get(value)
        segment = -1 if maker is None else self.segmentation.segment_of_op[maker.index]
        kept = {MICRO: "sum"} if (MICRO, "sum") in layout.partial else {}
        whole = output.role in {OutputRole.LOSS, OutputRole.BUFFER_UPDATE}
        if output.role == OutputRole.BUFFER_UPDATE and (kept or MICRO in layout.sharding_axes):
            raise PlanRefused(self._micro_message(maker))
        if output.role == OutputRole.LOSS and MICRO in self.axes and not kept:
            raise PlanRefused(self._micro_message(maker))
        target = Layout.of({} if whole else dict(layout.shards), kept)
        return (self._convert(value, target, segment, ShardedPhase.FORWARD, maker),)

    def _finish_gradient(self, terms: Sequence[int], stored: Layout) -> tuple[int, ...]:
        """All terms cut like the parameter, and partial over the same axes."""
        partials = [dict(self.layouts[self._current(term)].partial) for term in terms]
        common = {
            axis: how
            for axis, how in partials[0].items()
            if how == "sum"
            and axis not in stored.sharding_axes
            and all(axis in other for other in partials)
        }
        finished = []
        for term in terms:
            maker = self.makers[term]
            if MICRO in self.axes and MICRO not in common:
                raise PlanRefused(self._micro_message(maker))
            target = Layout.of(dict(stored.shards), common)
            segment = self.segmentation.segment_of_op[maker.index]
            finished.append(self._convert(term, target, segment, ShardedPhase.BACKWARD, maker))
        return tuple(finished)
