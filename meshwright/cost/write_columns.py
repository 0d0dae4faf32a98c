"""The pass that writes a sharded graph as columns."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from meshwright.cost.columns import (
    BACKWARD,
    FORWARD,
    PROLOGUE,
    CollectiveColumns,
    Columns,
    FloatArray,
    IntArray,
    NodeColumns,
    ParameterColumns,
    ValueColumns,
)
from meshwright.cost.neighbors import exchanges_of, of_last_rank
from meshwright.cost.op_work import OpWorks, Size, dtype_index
from meshwright.cost.work import Family
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

__all__ = ["columns_of", "needed_nodes"]

_PHASE = {
    ShardedPhase.PROLOGUE: PROLOGUE,
    ShardedPhase.FORWARD: FORWARD,
    ShardedPhase.BACKWARD: BACKWARD,
}

_BATCH_SCALE = {MICRO: 1, "dp_shard": 2}

_LOOK_UP_SHARE = 0.5
"""An operator that reads less of its operands than this looks rows up: what it reads scales like
what it returns."""


def columns_of(sharded: ShardedGraph, *, scaled: bool, works: OpWorks | None = None) -> Columns:
    """The columns of ``sharded``.

    Args:
        sharded: the sharded graph.
        scaled: leave ``dp_shard`` and ``micro`` to ``scale_weights``; ``dp_shard`` then stands for
            all data-parallel axes. Otherwise amounts are those of the graph's own axis sizes.
        works: of the graph's operators, for calls that share what they find.
    """
    graph = sharded.analysis.graph
    return _Builder(sharded, scaled, OpWorks(graph) if works is None else works).build()


def _blank(count: int) -> NodeColumns:
    """Columns to be filled in; a node of which nothing is said does nothing."""

    def numbers() -> IntArray:
        return np.zeros(count, np.int64)

    def flags() -> NDArray[np.bool_]:
        return np.zeros(count, np.bool_)

    return NodeColumns(
        segment=numbers(),
        phase=numbers(),
        num_launches=np.zeros(count),
        flop=np.zeros(count),
        flop_scale=numbers(),
        num_bytes=np.zeros((count, 4)),
        is_kept=flags(),
        is_view=flags(),
        is_from_parameter=flags(),
        is_attention=flags(),
        family=np.full(count, int(Family.OTHER)),
        dtype=numbers(),
        dims=np.ones((count, 4)),
        dims_scale=np.zeros((count, 4), np.int64),
        flop_factor=np.zeros(count),
    )


class _Builder:
    """The pass over nodes; lists that become columns."""

    def __init__(self, sharded: ShardedGraph, scaled: bool, works: OpWorks) -> None:
        self.sharded = sharded
        self.works = works
        self.graph = sharded.analysis.graph
        self.batch_scale = _BATCH_SCALE if scaled else {}
        self.scaled = scaled
        self._scale_of_layout: dict[Layout, tuple[int, int]] = {}
        self._scale_of_dims: dict[tuple[Layout, tuple[int, ...]], tuple[int, int]] = {}
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

    def dims_scale(self, layout: Layout, dims: tuple[int, ...]) -> tuple[int, int]:
        """``scale`` of the axes that shard these dims."""
        key = (layout, dims)
        found = self._scale_of_dims.get(key)
        if found is None:
            found = self._scale_of_dims[key] = self.scale(
                axis for (dim, _), axes in layout.shards if dim in dims for axis in axes
            )
        return found

    def build(self) -> Columns:
        needed = needed_nodes(self.sharded)
        self.rows = {index: row for row, index in enumerate(needed)}
        return Columns(
            nodes=self._node_columns(needed),
            collectives=self._collective_columns(),
            values=self._value_columns(needed),
            parameters=self._parameter_columns(needed),
            num_segments=len(self.sharded.segmentation.segments),
            is_scaled=self.scaled,
        )

    # Nodes -------------------------------------------------------------------------------------

    def _node_columns(self, needed: Sequence[int]) -> NodeColumns:
        sharded, nodes = self.sharded, _blank(len(needed))
        attends = AttentionFinder(sharded.analysis)
        stored = {sharded.inputs[item.value] for item in self.graph.parameters}
        for row, index in enumerate(needed):
            node = sharded.nodes[index]
            nodes.segment[row], nodes.phase[row] = node.segment, _PHASE[node.phase]
            if isinstance(node, ConvertNode):
                nodes.is_kept[row] = self._convert(row, node, nodes.num_bytes)
                self._convert_work(row, node, nodes)
                nodes.num_launches[row] = len(node.steps)
                if self.base[node.source] in stored:
                    nodes.is_from_parameter[row] = True
                    stored.add(node.result)
                continue
            op = self.graph.ops[node.op]
            if sharded.analysis.rules[node.op].is_view:
                nodes.is_view[row] = True
                self._view(node)
                continue
            nodes.num_launches[row] = 1
            nodes.is_attention[row] = attends(op)
            divisor, nodes.flop_scale[row] = self.scale(axis for axis, _ in node.choice)
            nodes.flop[row] = op.flop / divisor
            self._op_work(row, node, nodes)
            self._bytes(row, node, nodes.num_bytes)
            self._inside(row, node)
            self._exchanges(row, node)
            nodes.is_kept[row] = op.target.split(".")[1] in KEPT_BY_SELECTIVE
        return nodes

    def _view(self, node: OpNode) -> None:
        for value in node.results:
            if value is not None and node.operands:
                self.base[value] = self.base[node.operands[0]]

    def _op_work(self, row: int, node: OpNode, nodes: NodeColumns) -> None:
        """Family and sizes on one rank."""
        found = self.works.of(self.graph.ops[node.op])
        sizes = [
            (size.whole, 0) if not size.dims else self._local(node, size) for size in found.sizes
        ]
        if found.family in {Family.ATTENTION, Family.ATTENTION_BACKWARD}:
            sizes[2] = self._keys(node, found.sizes[2])
        nodes.family[row], nodes.dtype[row] = found.family, found.dtype
        nodes.dims[row] = [size for size, _ in sizes]
        nodes.dims_scale[row] = [scale for _, scale in sizes]
        nodes.flop_factor[row] = self._attended(node, found.family, found.flop_factor)

    def _attended(self, node: OpNode, family: Family, flop_factor: float) -> float:
        """The factor of the rank that attends to most: in a ring the one of the last tokens."""
        factors = self.sharded.analysis.leaf_factors[node.op]
        rings = [axis for axis, i in node.choice if factors[i].variant == Variant.RING]
        if not rings:
            return flop_factor
        ways = math.prod(self.sharded.axis_sizes[axis] for axis in rings)
        return of_last_rank(flop_factor, family, ways)

    def _layout(self, node: OpNode, tensor: int) -> Layout:
        value = node.operands[tensor] if tensor >= 0 else node.results[-1 - tensor]
        return Layout() if value is None else self.sharded.layouts[value]

    def _local(self, node: OpNode, size: Size) -> tuple[float, int]:
        divisor, index = self.dims_scale(self._layout(node, size.tensor), size.dims)
        return size.whole / divisor, index

    def _keys(self, node: OpNode, size: Size) -> tuple[float, int]:
        """Keys a rank attends to: those of the whole ring come by."""
        factors = self.sharded.analysis.leaf_factors[node.op]
        rings = {axis for axis, i in node.choice if factors[i].variant == Variant.RING}
        layout = self._layout(node, size.tensor)
        divisor, index = self.scale(
            axis
            for (dim, _), axes in layout.shards
            if dim in size.dims
            for axis in axes
            if axis not in rings
        )
        return size.whole / divisor, index

    def _convert_work(self, row: int, node: ConvertNode, nodes: NodeColumns) -> None:
        """What a redistribution does on the device itself: a copy of its rows."""
        spec = self.graph.values[self.sharded.graph_value[node.source]]
        step = next((s for s in node.steps if s.kind in {StepKind.SLICE, StepKind.MASK}), None)
        nodes.family[row] = Family.COLLECTIVE if step is None else Family.COPY
        if step is None or not spec.shape:
            return
        last = len(spec.shape) - 1
        rows, rows_scale = self.dims_scale(step.after, tuple(range(last)))
        columns, columns_scale = self.dims_scale(step.after, (last,))
        nodes.dtype[row] = dtype_index(spec.dtype)
        nodes.dims[row, 1:] = math.prod(spec.shape[:last]) / rows, spec.shape[last] / columns, 2
        nodes.dims_scale[row, 1:3] = rows_scale, columns_scale

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
