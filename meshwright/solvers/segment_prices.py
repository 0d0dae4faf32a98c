"""What the choices of a choice graph cost: seconds of a step and bytes of a rank.

An operator takes the time of its share (``choice_work``) and the collectives inside it; a link the
cheapest redistribution from the layout its source gives to the one its target wants; a parameter
the optimizer's step. All are those of ``cost.columns`` and ``cost.table`` on the same layouts, so
that the sum of a solution is what the exact model says of the plan, but for redistributions that
several readers share. Gradients reduced once a step run beside the backward pass; of their time the
share ``EXPOSED_FRACTION`` counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from meshwright.cost.calibration import Calibration
from meshwright.cost.collectives import CollectivePrices
from meshwright.cost.columns import ParameterColumns
from meshwright.cost.parameters import ParameterTable
from meshwright.cost.roofline import Roofline
from meshwright.graph.opgraph import DTYPE_BYTES, OpGraph, Phase
from meshwright.graph.rules.base import Variant
from meshwright.plans.plan import OptimizerSpec
from meshwright.solvers.choice_work import ChoiceWork
from meshwright.solvers.choices import ChoiceGraph, ChoiceNode, Link, OpChoice
from meshwright.spmd.expansions import REDUCTIONS_INSIDE
from meshwright.spmd.layout import MICRO, Layout
from meshwright.spmd.program import CollectiveKind
from meshwright.spmd.redistribute import StepKind, communicates_over_micro, plan_steps

__all__ = ["EXPOSED_FRACTION", "ChoicePrices", "ParameterPrices"]

EXPOSED_FRACTION = 0.2
"""Of a collective that runs beside enough compute: it slows that by about so much of its own time
(arXiv 2507.03114, 19 % on average)."""

_LOOK_UP_SHARE = 0.5
"""As in ``cost.columns``: an operator that reads less of its operands looks rows up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterPrices:
    """One entry for each choice of a parameter's node."""

    step_s: tuple[float, ...]
    """Of the optimizer, once a step."""
    num_bytes: tuple[float, ...]
    """Parameter, gradient and optimizer state of a rank."""


class ChoicePrices:
    """Prices the choices of one graph on one kind of device."""

    def __init__(
        self,
        graph: ChoiceGraph,
        *,
        roofline: Roofline,
        prices: CollectivePrices,
        optimizer: OptimizerSpec,
        calibration: Calibration,
        zero_stage: int,
        num_stages: int,
        is_rounded: bool,
    ) -> None:
        """``zero_stage`` and ``num_stages``: of the plan the choices are for."""
        self._choices = graph
        self._graph: OpGraph = graph.analysis.graph
        self._sizes = graph.axis_sizes
        self._roofline, self._prices = roofline, prices
        self._optimizer, self._zero_stage = optimizer, zero_stage
        self._calibration = calibration
        self._num_stages, self._is_rounded = num_stages, is_rounded
        self._collective_s: dict[tuple[CollectiveKind, tuple[str, ...], float], float] = {}
        self._converted: dict[tuple[int, Layout, Layout], float] = {}

    # Operators ---------------------------------------------------------------------------------

    def operators_s(self, nodes: Sequence[ChoiceNode]) -> list[list[float]]:
        """Seconds of one micro-batch for each operator's choices: on the device and inside it."""
        rules = self._choices.analysis.rules
        rows = [
            (node, choice)
            for node in nodes
            if not rules[node.op].is_view
            for choice in node.choices
        ]
        work = ChoiceWork(self._choices, self._roofline)
        device_s = iter(work.device_s(rows, [self._moved_bytes(*row) for row in rows]).tolist())
        return [
            [0.0] * len(node.choices)
            if rules[node.op].is_view
            else [next(device_s) + self._inside_s(node, choice) for choice in node.choices]
            for node in nodes
        ]

    def _moved_bytes(self, node: ChoiceNode, choice: OpChoice) -> float:
        op, values = self._graph.ops[node.op], self._graph.values
        total = 0.0
        local = [
            (value, self._local_bytes(value, layout))
            for value, layout in zip(op.outputs, choice.results, strict=True)
            if value is not None and layout is not None
        ]
        if op.bytes_written:
            total += sum(size for _, size in local)
        if op.bytes_read:
            operands = dict(zip(op.inputs, choice.operands, strict=True))
            whole = sum(values[value].num_bytes for value in operands)
            share = op.bytes_read / whole if whole else 0.0
            if share < _LOOK_UP_SHARE and local:
                value, size = local[0]
                total += op.bytes_read * size / max(values[value].num_bytes, 1)
            else:
                total += share * sum(self._local_bytes(v, at) for v, at in operands.items())
        return total

    def _inside_s(self, node: ChoiceNode, choice: OpChoice) -> float:
        factors = self._choices.analysis.leaf_factors[node.op]
        inside = [
            (axis, index)
            for axis, index in choice.factors
            if factors[index].variant == Variant.REDUCE_INSIDE
        ]
        if not inside:
            return 0.0
        op = self._graph.ops[node.op]
        axes = tuple(axis for axis, _ in inside)
        if len(op.outputs) > 1 and op.outputs[1] is not None and choice.results[1] is not None:
            size = self._local_bytes(op.outputs[1], choice.results[1])
        else:
            (result,) = op.results
            place = next(factors[index].results[0] for _, index in inside)
            spec = self._graph.values[result]
            rows = spec.num_bytes / (spec.shape[place[0]] if place is not None else 1)
            others = (self._sizes[axis] for axis, _ in choice.factors if axis not in axes)
            size = rows / math.prod(others)
        count: int = REDUCTIONS_INSIDE[op.target]
        return count * self._time_s(CollectiveKind.ALL_REDUCE, axes, size)

    def _local_bytes(self, value: int, layout: Layout) -> float:
        ways = math.prod(self._sizes[axis] for _, axes in layout.shards for axis in axes)
        return self._graph.values[value].num_bytes / ways

    def _time_s(self, kind: CollectiveKind, axes: tuple[str, ...], num_bytes: float) -> float:
        key = (kind, axes, num_bytes)
        if key not in self._collective_s:
            launch_s = 0.0 if self._roofline.queue_runs_ahead else self._roofline.launch_latency_s
            self._collective_s[key] = launch_s + float(
                self._prices.time_s(
                    kind,
                    num_bytes,
                    axes=axes,
                    axis_sizes=self._sizes,
                    num_stages=self._num_stages,
                )
            )
        return self._collective_s[key]

    # Links -------------------------------------------------------------------------------------

    def convert_s(self, value: int, source: Layout, wanted: Layout) -> float:
        """Seconds of one redistribution; infinite where micro-batches would have to meet."""
        if source == wanted:
            return 0.0
        key = (value, source, wanted)
        if key not in self._converted:
            self._converted[key] = self._convert_s(value, source, wanted)
        return self._converted[key]

    def _convert_s(self, value: int, source: Layout, wanted: Layout) -> float:
        steps = plan_steps(source, wanted)
        if communicates_over_micro(steps):
            return math.inf
        total = 0.0
        for step in steps:
            if step.kind in {StepKind.SLICE, StepKind.MASK}:
                moved = 2 * self._local_bytes(value, step.after)
                total += moved / self._roofline.bytes_per_s
                continue
            whole = step.after if step.kind == StepKind.ALL_GATHER else step.before
            kind = CollectiveKind(step.kind.value)
            total += self._time_s(kind, step.axes, self._local_bytes(value, whole))
        return total

    def gradient_s(self, link: Link, source: Layout, stored: Layout) -> tuple[float, float]:
        """Seconds of a gradient's way to its parameter: in every micro-batch, and once a step."""
        kept = {
            axis: how
            for axis, how in source.partial
            if how == "sum" and axis not in stored.sharding_axes
        }
        target = Layout.of(dict(stored.shards), kept)
        each_s = self.convert_s(link.value, link.seen(source), target)
        axes = tuple(axis for axis in kept if axis != MICRO)
        if not axes:
            return each_s, 0.0
        size = self._local_bytes(link.value, target)
        return each_s, EXPOSED_FRACTION * self._time_s(CollectiveKind.ALL_REDUCE, axes, size)

    def leaving_s(self, node: ChoiceNode, choice: OpChoice, result: int) -> float:
        """Seconds of making a result whole that leaves the program."""
        value, layout = self._graph.ops[node.op].outputs[result], choice.results[result]
        assert value is not None
        assert layout is not None
        kept = {axis: how for axis, how in layout.partial if axis == MICRO}
        return self.convert_s(value, layout, Layout.of({}, kept))

    # Memory and parameters ---------------------------------------------------------------------

    def kept_bytes(self, choice: OpChoice, results: Iterable[int], node: ChoiceNode) -> float:
        """Bytes of the results of one micro-batch that the backward pass reads."""
        outputs = self._graph.ops[node.op].outputs
        total = 0.0
        for result in results:
            value, layout = outputs[result], choice.results[result]
            if value is not None and layout is not None:
                total += self._local_bytes(value, layout)
        return total

    def kept_results(self) -> dict[int, tuple[int, ...]]:
        """For each forward node the results that some backward operator reads."""
        found: dict[int, set[int]] = {}
        for link in self._choices.links:
            node = self._choices.nodes[link.source]
            if node.op < 0 or self._graph.ops[node.op].phase != Phase.FORWARD:
                continue
            if link.is_backward:
                found.setdefault(link.source, set()).add(link.result)
        return {node: tuple(sorted(results)) for node, results in found.items()}

    def parameters(self, nodes: Sequence[ChoiceNode]) -> list[ParameterPrices]:
        """Prices of the choices of parameter nodes, in order."""
        rows = [(node, choice) for node in nodes for choice in node.choices]
        specs = [self._graph.values[node.value] for node, _ in rows]
        shapes = []
        for (_, choice), spec in zip(rows, specs, strict=True):
            (layout,) = choice.results
            assert layout is not None
            shape = list(spec.shape)
            for (dim, _), axes in layout.shards:
                shape[dim] //= math.prod(self._sizes[axis] for axis in axes)
            shapes.append(tuple(shape))
        count = len(rows)
        none = np.zeros(0, np.int64)
        table = ParameterTable(
            ParameterColumns(
                names=tuple(str(row) for row in range(count)),
                shapes=tuple(shapes),
                item_bytes=np.array([DTYPE_BYTES[spec.dtype] for spec in specs], np.int64),
                is_low_precision=np.array(
                    [spec.dtype in {"bfloat16", "float16"} for spec in specs], np.bool_
                ),
                first_segment=np.zeros(count, np.int64),
                forward_use=(none, none),
                use=(none, none),
                gradient_axes=((),) * count,
                has_gradient=np.ones(count, np.bool_),
                is_cut=np.zeros(count, np.bool_),
                row_of_value=none,
            ),
            is_rounded=self._is_rounded,
        )
        state = table.state(
            (self._zero_stage,),
            dp_shard=self._sizes["dp_shard"],
            optimizer=self._optimizer,
            calibration=self._calibration,
        )
        copies = 2 if self._sizes[MICRO] > 1 else 1
        total = state.stored_bytes + state.optimizer_bytes + copies * state.gradient_bytes
        step_s = (state.step_traffic_bytes + state.clipping_bytes) / self._roofline.bytes_per_s
        found, start = [], 0
        for node in nodes:
            stop = start + len(node.choices)
            found.append(
                ParameterPrices(
                    step_s=tuple(step_s[start:stop].tolist()),
                    num_bytes=tuple(total[start:stop].tolist()),
                )
            )
            start = stop
        return found
