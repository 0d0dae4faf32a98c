"""A sharded graph as columns of numbers, from which costs are plain array arithmetic.

Every amount is stored for one rank and one micro-batch *but for* the batch axes: next to it stands
the index of the factor that is still missing. ``scale_weights(dp, micro)`` gives the four factors::

    0  sharded by neither      1
    1  by micro-batches        1 / micro
    2  by data parallelism     1 / dp
    3  by both                 1 / (dp micro)

So the columns of one sharded graph serve every number of data-parallel ranks and micro-batches.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.cost.neighbors import exchanges_of
from meshwright.graph.attention import AttentionFinder
from meshwright.graph.opgraph import DTYPE_BYTES, OutputRole
from meshwright.graph.rules.base import Variant
from meshwright.spmd.crossing import operands_of
from meshwright.spmd.expansions import REDUCTIONS_INSIDE
from meshwright.spmd.layout import MICRO, Layout
from meshwright.spmd.parameters import cuts_like_zero
from meshwright.spmd.program import CollectiveKind
from meshwright.spmd.redistribute import StepKind
from meshwright.spmd.sharded import ConvertNode, Node, OpNode, ShardedGraph, ShardedPhase
from meshwright.spmd.stage import KEPT_BY_SELECTIVE

__all__ = [
    "BACKWARD",
    "FORWARD",
    "PROLOGUE",
    "CollectiveColumns",
    "Columns",
    "NodeColumns",
    "ParameterColumns",
    "ValueColumns",
    "columns_of",
    "needed_nodes",
    "scale_weights",
    "sums_by",
]

PROLOGUE, FORWARD, BACKWARD = 0, 1, 2
_PHASE = {
    ShardedPhase.PROLOGUE: PROLOGUE,
    ShardedPhase.FORWARD: FORWARD,
    ShardedPhase.BACKWARD: BACKWARD,
}

_BATCH_SCALE = {MICRO: 1, "dp_shard": 2}

_LOOK_UP_SHARE = 0.5
"""An operator that reads less of its operands than this looks rows up: what it reads scales like
what it returns."""

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def scale_weights(*, data_parallel: float, num_microbatches: int) -> FloatArray:
    """The four factors of the module docstring."""
    return np.array(
        [
            1.0,
            1 / num_microbatches,
            1 / data_parallel,
            1 / (data_parallel * num_microbatches),
        ]
    )


def sums_by(index: IntArray, amounts: FloatArray, size: int) -> FloatArray:
    """(size,) sums of ``amounts`` with equal ``index``."""
    return np.bincount(index, weights=amounts, minlength=size).astype(np.float64, copy=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeColumns:
    """One row for each needed node, in execution order."""

    segment: IntArray
    phase: IntArray
    num_launches: FloatArray
    flop: FloatArray
    flop_scale: IntArray
    num_bytes: FloatArray
    """(nodes, 4): bytes read and written, by scale."""
    is_kept: NDArray[np.bool_]
    """Selective recompute keeps its results."""
    is_view: NDArray[np.bool_]
    is_from_parameter: NDArray[np.bool_]
    """Redistributes a parameter: done again in the backward pass instead of kept."""
    is_attention: NDArray[np.bool_]
    """Its work grows with the product of two lengths of the sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveColumns:
    """One row for each collective of a redistribution or inside an operator."""

    node: IntArray
    group: IntArray
    """Index in ``groups``."""
    num_bytes: FloatArray
    """Full payload, as ``Collective.num_bytes`` defines it."""
    scale: IntArray
    groups: tuple[tuple[CollectiveKind, tuple[str, ...]], ...]
    """Kind and axes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueColumns:
    """Storages: one row for each sharded value; a view's row points to its base."""

    num_bytes: FloatArray
    scale: IntArray
    producer: IntArray
    """Row in ``NodeColumns``; -1 for graph inputs."""
    edge_value: IntArray
    """Base value of every (value, reader) pair."""
    edge_reader: IntArray
    """Node row that reads it."""
    is_parameter: NDArray[np.bool_]
    is_gradient: NDArray[np.bool_]
    crossing_value: IntArray
    """Value itself, not its base, of every pair, for what passes between stages."""
    own_bytes: FloatArray
    """Bytes of the value itself: views count."""
    own_scale: IntArray
    own_producer: IntArray
    is_data: NDArray[np.bool_]
    """Buffers, constants and data inputs."""
    is_base: NDArray[np.bool_]
    """Not a view."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterColumns:
    """One row for each parameter."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Local, before ZeRO."""
    item_bytes: IntArray
    is_low_precision: NDArray[np.bool_]
    first_segment: IntArray
    """First segment whose forward reads it; -1 where none does."""
    forward_use: tuple[IntArray, IntArray]
    """(parameter, segment) pairs of forward reads, distinct."""
    use: tuple[IntArray, IntArray]
    """(parameter, segment) pairs of any read, distinct."""
    gradient_axes: tuple[tuple[str, ...], ...]
    """Axes each gradient is partial on, micro-batches left out."""
    has_gradient: NDArray[np.bool_]
    is_cut: NDArray[np.bool_]
    """``spmd.parameters.cuts_like_zero``."""
    row_of_value: IntArray
    """Row of a storage that is a parameter; -1 for others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Everything the cost of a sharded graph depends on."""

    nodes: NodeColumns
    collectives: CollectiveColumns
    values: ValueColumns
    parameters: ParameterColumns
    num_segments: int
    is_scaled: bool
    """Batch axes are left to ``scale_weights``; otherwise every amount is final."""


def columns_of(sharded: ShardedGraph, *, scaled: bool) -> Columns:
    """The columns of ``sharded``.

    Args:
        sharded: the sharded graph.
        scaled: leave ``dp_shard`` and ``micro`` to ``scale_weights``; ``dp_shard`` then stands for
            all data-parallel axes. Otherwise amounts are those of the graph's own axis sizes.
    """
    return _Builder(sharded, scaled).build()


class _Builder:
    """The pass over nodes; lists that become columns."""

    def __init__(self, sharded: ShardedGraph, scaled: bool) -> None:
        self.sharded = sharded
        self.graph = sharded.analysis.graph
        self.batch_scale = _BATCH_SCALE if scaled else {}
        self.scaled = scaled
        self._scale_of_layout: dict[Layout, tuple[int, int]] = {}
        self.base = list(range(len(sharded.layouts)))
        self.rows: dict[int, int] = {}
        self.groups: dict[tuple[CollectiveKind, tuple[str, ...]], int] = {}
        self.collectives: list[tuple[int, int, float, int]] = []
        self.sizes = [spec.num_bytes for spec in self.graph.values]

    def scale(self, axes: Iterable[str]) -> tuple[int, int]:
        """Divisor by the axes that are final, and the scale index of the rest."""
        divisor, index = 1, 0
        for axis in axes:
            if axis in self.batch_scale:
                index |= self.batch_scale[axis]
            else:
                divisor *= self.sharded.axis_sizes[axis]
        return divisor, index

    def layout_scale(self, layout: Layout) -> tuple[int, int]:
        found = self._scale_of_layout.get(layout)
        if found is None:
            found = self.scale(axis for _, axes in layout.shards for axis in axes)
            self._scale_of_layout[layout] = found
        return found

    def build(self) -> Columns:
        sharded = self.sharded
        needed = needed_nodes(sharded)
        self.rows = {index: row for row, index in enumerate(needed)}
        count = len(needed)
        segment, phase = np.zeros(count, np.int64), np.zeros(count, np.int64)
        launches, flop = np.zeros(count), np.zeros(count)
        flop_scale = np.zeros(count, np.int64)
        num_bytes = np.zeros((count, 4))
        is_kept, is_view = np.zeros(count, np.bool_), np.zeros(count, np.bool_)
        from_parameter, is_attention = np.zeros(count, np.bool_), np.zeros(count, np.bool_)
        attends = AttentionFinder(sharded.analysis)
        stored = {sharded.inputs[item.value] for item in self.graph.parameters}
        for row, index in enumerate(needed):
            node = sharded.nodes[index]
            segment[row], phase[row] = node.segment, _PHASE[node.phase]
            if isinstance(node, ConvertNode):
                is_kept[row] = self._convert(row, node, num_bytes)
                launches[row] = len(node.steps)
                if self.base[node.source] in stored:
                    from_parameter[row] = True
                    stored.add(node.result)
                continue
            op = self.graph.ops[node.op]
            if sharded.analysis.rules[node.op].is_view:
                is_view[row] = True
                self._view(node)
                continue
            launches[row] = 1
            is_attention[row] = attends(op)
            divisor, flop_scale[row] = self.scale(axis for axis, _ in node.choice)
            flop[row] = op.flop / divisor
            self._bytes(row, node, num_bytes)
            self._inside(row, node)
            self._exchanges(row, node)
            is_kept[row] = op.target.split(".")[1] in KEPT_BY_SELECTIVE
        nodes = NodeColumns(
            segment=segment,
            phase=phase,
            num_launches=launches,
            flop=flop,
            flop_scale=flop_scale,
            num_bytes=num_bytes,
            is_kept=is_kept,
            is_view=is_view,
            is_from_parameter=from_parameter,
            is_attention=is_attention,
        )
        return Columns(
            nodes=nodes,
            collectives=self._collective_columns(),
            values=self._value_columns(needed),
            parameters=self._parameter_columns(needed),
            num_segments=len(sharded.segmentation.segments),
            is_scaled=self.scaled,
        )

    # Nodes -------------------------------------------------------------------------------------

    def _view(self, node: OpNode) -> None:
        for value in node.results:
            if value is not None and node.operands:
                self.base[value] = self.base[node.operands[0]]

    def _bytes(self, row: int, node: OpNode, num_bytes: FloatArray) -> None:
        op = self.graph.ops[node.op]
        results = [value for value in node.results if value is not None]
        for value in results:
            divisor, index = self.layout_scale(self.sharded.layouts[value])
            if op.bytes_written:
                num_bytes[row, index] += self.sizes[self.sharded.graph_value[value]] / divisor
        if not op.bytes_read:
            return
        operands = dict(zip(op.inputs, node.operands, strict=True))
        total = sum(self.sizes[value] for value in operands)
        share = op.bytes_read / total if total else 0.0
        if share < _LOOK_UP_SHARE and results:
            divisor, index = self.layout_scale(self.sharded.layouts[results[0]])
            num_bytes[row, index] += op.bytes_read / divisor
            return
        for value, operand in operands.items():
            divisor, index = self.layout_scale(self.sharded.layouts[operand])
            num_bytes[row, index] += share * self.sizes[value] / divisor

    def _convert(self, row: int, node: ConvertNode, num_bytes: FloatArray) -> bool:
        communicates = False
        size = self.sizes[self.sharded.graph_value[node.source]]
        for step in node.steps:
            if step.kind in {StepKind.SLICE, StepKind.MASK}:
                divisor, index = self.layout_scale(step.after)
                num_bytes[row, index] += 2 * size / divisor
                continue
            communicates = True
            whole = step.after if step.kind == StepKind.ALL_GATHER else step.before
            divisor, index = self.layout_scale(whole)
            kind = CollectiveKind(step.kind.value)
            self._collective(row, kind, step.axes, size / divisor, index)
        return communicates

    def _inside(self, row: int, node: OpNode) -> None:
        """All-reduces of an operator that is expanded."""
        factors = self.sharded.analysis.leaf_factors[node.op]
        axes = tuple(a for a, i in node.choice if factors[i].variant == Variant.REDUCE_INSIDE)
        if not axes:
            return
        op = self.graph.ops[node.op]
        count = REDUCTIONS_INSIDE[op.target]
        statistic = node.results[1] if len(node.results) > 1 else None
        if statistic is not None:
            divisor, index = self.layout_scale(self.sharded.layouts[statistic])
            size = float(self.sizes[self.sharded.graph_value[statistic]])
        else:
            (result,) = [value for value in node.results if value is not None]
            place = next(factors[i].results[0] for a, i in node.choice if a in axes)
            spec = self.graph.values[self.sharded.graph_value[result]]
            size = spec.num_bytes / (spec.shape[place[0]] if place is not None else 1)
            divisor, index = self.scale(axis for axis, _ in node.choice if axis not in axes)
        for _ in range(count):
            self._collective(row, CollectiveKind.ALL_REDUCE, axes, size / divisor, index)

    def _exchanges(self, row: int, node: OpNode) -> None:
        """Halos and rings of an operator."""
        for item in exchanges_of(self.sharded, node):
            axes = self.sharded.layouts[item.value].sharding_axes
            divisor, index = self.scale(axis for axis in axes if axis not in item.undivided)
            size = item.share * self.sizes[self.sharded.graph_value[item.value]]
            self._collective(row, item.kind, item.axes, size / divisor, index)

    def _collective(
        self, row: int, kind: CollectiveKind, axes: tuple[str, ...], size: float, index: int
    ) -> None:
        group = self.groups.setdefault((kind, axes), len(self.groups))
        self.collectives.append((row, group, size, index))

    def _collective_columns(self) -> CollectiveColumns:
        rows = self.collectives
        return CollectiveColumns(
            node=np.array([row[0] for row in rows], dtype=np.int64),
            group=np.array([row[1] for row in rows], dtype=np.int64),
            num_bytes=np.array([row[2] for row in rows], dtype=np.float64),
            scale=np.array([row[3] for row in rows], dtype=np.int64),
            groups=tuple(self.groups),
        )

    # Values ------------------------------------------------------------------------------------

    def _value_columns(self, needed: Sequence[int]) -> ValueColumns:
        sharded = self.sharded
        count = len(sharded.layouts)
        own_bytes, own_scale = np.zeros(count), np.zeros(count, np.int64)
        for value, layout in enumerate(sharded.layouts):
            divisor, own_scale[value] = self.layout_scale(layout)
            own_bytes[value] = self.sizes[sharded.graph_value[value]] / divisor
        for value in sharded.inputs.values():
            # A rank holds its whole batch; micro-batches are cut from it when they are used.
            layout = sharded.layouts[value].without(MICRO)
            divisor, own_scale[value] = self.layout_scale(layout)
            own_bytes[value] = self.sizes[sharded.graph_value[value]] / divisor
        producer = np.array([self.rows.get(node, -1) for node in sharded.producer], dtype=np.int64)
        values: list[int] = []
        readers: list[int] = []
        for row, index in enumerate(needed):
            operands = operands_of(sharded.nodes[index])
            values.extend(operands)
            readers.extend([row] * len(operands))
        crossing = np.array(values, dtype=np.int64)
        base = np.array(self.base, dtype=np.int64)
        is_parameter, is_data = np.zeros(count, np.bool_), np.zeros(count, np.bool_)
        is_gradient = np.zeros(count, np.bool_)
        parameters = {item.value for item in self.graph.parameters}
        for graph_value, value in sharded.inputs.items():
            (is_parameter if graph_value in parameters else is_data)[value] = True
        is_data[list(sharded.prologue_inputs.values())] = True
        for output, terms in zip(self.graph.outputs, sharded.outputs, strict=True):
            if output.role == OutputRole.GRADIENT:
                is_gradient[base[list(terms)]] = True
        return ValueColumns(
            num_bytes=own_bytes[base],
            scale=own_scale[base],
            producer=producer[base],
            edge_value=base[crossing],
            edge_reader=np.array(readers, dtype=np.int64),
            is_parameter=is_parameter,
            is_gradient=is_gradient,
            crossing_value=crossing,
            own_bytes=own_bytes,
            own_scale=own_scale,
            own_producer=producer,
            is_data=is_data,
            is_base=base == np.arange(count),
        )

    # Parameters --------------------------------------------------------------------------------

    def _parameter_columns(self, needed: Sequence[int]) -> ParameterColumns:
        sharded = self.sharded
        items = self.graph.parameters
        row_of = {sharded.inputs[item.value]: row for row, item in enumerate(items)}
        forward: set[tuple[int, int]] = set()
        used: set[tuple[int, int]] = set()
        for index in needed:
            node = sharded.nodes[index]
            for value in operands_of(node):
                row = row_of.get(value)
                if row is not None:
                    used.add((row, node.segment))
                    if node.phase == ShardedPhase.FORWARD:
                        forward.add((row, node.segment))
        first: dict[int, int] = {}
        for row, segment in sorted(forward):
            first.setdefault(row, segment)
        # A parameter nobody reads lives on the last stage.
        last = len(sharded.segmentation.segments) - 1
        read = {row for row, _ in used}
        used |= {(row, last) for row in range(len(items)) if row not in read}
        gradients = {
            output.name: terms
            for output, terms in zip(self.graph.outputs, sharded.outputs, strict=True)
            if output.role == OutputRole.GRADIENT
        }
        axes = [
            tuple(dict(sharded.layouts[terms[0]].partial)) if terms else ()
            for item in items
            for terms in (gradients.get(item.name, ()),)
        ]
        specs = [self.graph.values[item.value] for item in items]
        return ParameterColumns(
            names=tuple(item.name for item in items),
            shapes=tuple(self._local_shape(sharded.inputs[item.value]) for item in items),
            item_bytes=np.array([DTYPE_BYTES[spec.dtype] for spec in specs], dtype=np.int64),
            is_low_precision=np.array(
                [spec.dtype in {"bfloat16", "float16"} for spec in specs], dtype=np.bool_
            ),
            first_segment=np.array([first.get(row, -1) for row in range(len(items))], np.int64),
            forward_use=_pairs(forward),
            use=_pairs(used),
            gradient_axes=tuple(tuple(a for a in names if a != MICRO) for names in axes),
            has_gradient=np.array([item.name in gradients for item in items], dtype=np.bool_),
            is_cut=np.array(
                [cuts_like_zero(sharded.layouts[sharded.inputs[item.value]]) for item in items],
                dtype=np.bool_,
            ),
            row_of_value=np.array(
                [row_of.get(value, -1) for value in range(len(sharded.layouts))], dtype=np.int64
            ),
        )

    def _local_shape(self, value: int) -> tuple[int, ...]:
        spec = self.graph.values[self.sharded.graph_value[value]]
        ways: defaultdict[int, int] = defaultdict(lambda: 1)
        for (dim, _), axes in self.sharded.layouts[value].shards:
            ways[dim] *= math.prod(self.sharded.axis_sizes[axis] for axis in axes)
        return tuple(size // ways[dim] for dim, size in enumerate(spec.shape))


def _pairs(pairs: set[tuple[int, int]]) -> tuple[IntArray, IntArray]:
    ordered = sorted(pairs)
    return (
        np.array([first for first, _ in ordered], dtype=np.int64),
        np.array([second for _, second in ordered], dtype=np.int64),
    )


def needed_nodes(sharded: ShardedGraph) -> list[int]:
    """Nodes that outputs depend on, in execution order."""
    needed = [False] * len(sharded.nodes)
    waiting = [sharded.producer[term] for terms in sharded.outputs for term in terms]
    while waiting:
        index = waiting.pop()
        if index >= 0 and not needed[index]:
            needed[index] = True
            node: Node = sharded.nodes[index]
            waiting.extend(sharded.producer[value] for value in operands_of(node))
    return [index for index, wanted in enumerate(needed) if wanted]
