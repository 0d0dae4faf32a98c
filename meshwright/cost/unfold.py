"""Columns of a deep graph, written out from those of the short graph that stands for it.

``graph.shorten`` says which inputs, operators, outputs and segments of the deep graph each one of
the short graph stands for. The pass that shards a graph goes through them in order and does with
each what the layouts of the values it reads ask for. So if it does the same with three neighboring
units of a stretch (the same choices, redistributions and layouts, read from the same slots), it
does the same with the next one, and with all that were left out: what a unit finds is what the unit
before left. ``unfolded`` checks this on the short graph and raises ``NotPeriodic`` where it fails.

Everything the pass makes belongs to the input, operator or output at which it was made
(``ShardedGraph.marks``). So nodes, values, reads and collectives of the deep graph are those of the
short one with the ones of the template (unit 2) repeated. A number that points to another item
points so many units before or behind in all three units, or to the same item outside them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from meshwright.cost.columns import (
    CollectiveColumns,
    Columns,
    IntArray,
    NodeColumns,
    ParameterColumns,
    ValueColumns,
)
from meshwright.cost.write_columns import needed_nodes
from meshwright.graph.opgraph import InputRole, OpGraph
from meshwright.graph.periods import NUM_KEPT, TEMPLATE
from meshwright.graph.shorten import Copies, Short
from meshwright.spmd.nodes import OpNode, ShardedGraph

__all__ = ["NotPeriodic", "unfolded"]

_Column = TypeVar("_Column", bound=np.generic)


class NotPeriodic(Exception):
    """Equal units are sharded unlike; the deep graph must be sharded itself."""


def unfolded(columns: Columns, sharded: ShardedGraph, short: Short, graph: OpGraph) -> Columns:
    """The columns of the deep ``graph``.

    Args:
        columns: of ``sharded``.
        sharded: ``short.graph``, sharded.
        short: what stands for ``graph``.
        graph: the deep graph.

    Raises:
        NotPeriodic: equal units turned out unlike.
    """
    return _Unfolding(columns, sharded, short, graph).result()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Items:
    """Items of one sort in the deep graph, and those of the short graph they repeat."""

    source: IntArray
    """(deep,) item of the short graph."""
    stretch: IntArray
    """(deep,) -1 outside the repeating units."""
    unit: IntArray
    """(deep,)"""
    short_stretch: IntArray
    short_unit: IntArray
    slot: IntArray
    """(short,) distinct for the items of a unit."""
    deep_at: tuple[IntArray, ...]
    """For each stretch (slots, units) the deep item; -1 in the first and the last unit."""
    short_at: tuple[IntArray, ...]
    """For each stretch (slots, ``NUM_KEPT``) the short item."""
    home: IntArray
    """(short,) first deep item it stands for."""

    @property
    def template(self) -> IntArray:
        """(short,) the item of the template in the same slot; itself outside."""
        found = np.arange(len(self.slot))
        for number, table in enumerate(self.short_at):
            mine = self.short_stretch == number
            found[mine] = table[self.slot[mine], TEMPLATE]
        return found


def _items(
    source: IntArray,
    stretch: IntArray,
    unit: IntArray,
    short_stretch: IntArray,
    short_unit: IntArray,
    slot: IntArray,
    stretches: Sequence[int],
) -> _Items:
    deep_at, short_at = [], []
    for number, num_units in enumerate(stretches):
        mine = np.flatnonzero(short_stretch == number)
        num_slots = int(slot[mine].max(initial=-1)) + 1
        table = np.full((num_slots, NUM_KEPT), -1, dtype=np.int64)
        table[slot[mine], short_unit[mine]] = mine
        if (table[:, 1 : NUM_KEPT - 1] < 0).any():
            raise NotPeriodic("equal units have unlike numbers of items")
        short_at.append(table)
        deep = np.flatnonzero(stretch == number)
        table = np.full((num_slots, num_units), -1, dtype=np.int64)
        table[slot[source[deep]], unit[deep]] = deep
        deep_at.append(table)
    home = np.full(len(slot), -1, dtype=np.int64)
    home[source[::-1]] = np.arange(len(source))[::-1]
    return _Items(
        source=source,
        stretch=stretch,
        unit=unit,
        short_stretch=short_stretch,
        short_unit=short_unit,
        slot=slot,
        deep_at=tuple(deep_at),
        short_at=tuple(short_at),
        home=home,
    )


class _Unfolding:
    """One call of ``unfolded``."""

    def __init__(
        self, columns: Columns, sharded: ShardedGraph, short: Short, graph: OpGraph
    ) -> None:
        self.columns, self.sharded = columns, sharded
        self.graph = graph
        self.stretches = short.stretches
        self.needed = np.array(needed_nodes(sharded), dtype=np.int64)
        self.segments = self._of_copies(short.segments)
        self.ops = self._of_copies(short.ops)
        inputs = self._of_copies(short.inputs)
        self.parameters = self._children(inputs, self._is_parameter())
        passed = [inputs, self.ops, self._of_copies(short.outputs)]
        marks = np.array(sharded.marks, dtype=np.int64)
        num_nodes, num_values = np.diff(marks, axis=0).T
        positions = self._joined(passed)
        nodes = self._children(positions, num_nodes)
        # Parameters that nothing uses are made at the end, in the order of their values.
        behind = self._is_unused(int(marks[-1, 1]))
        self.values = self._children(
            self._joined([*passed, inputs]), np.concatenate([num_values, behind])
        )
        is_needed = np.zeros(len(sharded.nodes), dtype=np.int64)
        is_needed[self.needed] = 1
        self.rows = self._children(nodes, is_needed)
        self._check()

    def result(self) -> Columns:
        return replace(
            self.columns,
            nodes=self._nodes(),
            collectives=self._collectives(),
            values=self._values(),
            parameters=self._parameters(),
            num_segments=len(self.segments.source),
        )

    # Items -------------------------------------------------------------------------------------

    def _of_copies(self, copies: Copies) -> _Items:
        return _items(
            copies.source,
            copies.stretch,
            copies.unit,
            copies.short_stretch,
            copies.short_unit,
            copies.slot,
            self.stretches,
        )

    def _joined(self, sorts: Sequence[_Items]) -> _Items:
        """Items of several sorts as one sort, one after the other."""
        sources, slots = [], []
        first_item, first_slot = 0, np.zeros(len(self.stretches) + 1, dtype=np.int64)
        for items in sorts:
            sources.append(items.source + first_item)
            slots.append(items.slot + first_slot[items.short_stretch])
            first_item += len(items.slot)
            first_slot[:-1] += [len(table) for table in items.short_at]
        return _items(
            np.concatenate(sources),
            np.concatenate([items.stretch for items in sorts]),
            np.concatenate([items.unit for items in sorts]),
            np.concatenate([items.short_stretch for items in sorts]),
            np.concatenate([items.short_unit for items in sorts]),
            np.concatenate(slots),
            self.stretches,
        )

    def _children(self, parents: _Items, counts: IntArray) -> _Items:
        """Items that come ``counts`` to a parent of the short graph, in the order of parents."""
        if (counts != counts[parents.template]).any():
            raise NotPeriodic("equal units have unlike numbers of items")
        start = np.cumsum(counts) - counts
        parent = np.repeat(np.arange(len(counts)), counts)
        sub = np.arange(len(parent)) - start[parent]
        first_slot = np.zeros(len(counts), dtype=np.int64)
        for number, table in enumerate(parents.short_at):
            of_slot = counts[table[:, TEMPLATE]]
            mine = parents.short_stretch == number
            first_slot[mine] = (np.cumsum(of_slot) - of_slot)[parents.slot[mine]]
        deep_counts = counts[parents.source]
        deep_parent = np.repeat(np.arange(len(deep_counts)), deep_counts)
        deep_sub = np.arange(len(deep_parent)) - (np.cumsum(deep_counts) - deep_counts)[deep_parent]
        return _items(
            start[parents.source[deep_parent]] + deep_sub,
            parents.stretch[deep_parent],
            parents.unit[deep_parent],
            parents.short_stretch[parent],
            parents.short_unit[parent],
            first_slot[parent] + sub,
            self.stretches,
        )

    def _is_parameter(self) -> IntArray:
        inputs = self.sharded.analysis.graph.inputs
        return np.array([item.role == InputRole.PARAMETER for item in inputs], dtype=np.int64)

    def _is_unused(self, num_before: int) -> IntArray:
        """For each input of the short graph whether the pass met it only at the end."""
        inputs = self.sharded.analysis.graph.inputs
        numbers = [item.value for item in self.graph.inputs]
        if numbers != sorted(numbers):
            raise NotPeriodic("inputs are not in the order of their values")
        return np.array(
            [self.sharded.inputs[item.value] >= num_before for item in inputs], dtype=np.int64
        )

    # Columns -----------------------------------------------------------------------------------

    def _copy(self, items: _Items, column: NDArray[_Column]) -> NDArray[_Column]:
        """A column of amounts."""
        if (column != column[items.template]).any():
            raise NotPeriodic("equal units have unlike amounts")
        found: NDArray[_Column] = column[items.source]
        return found

    def _copy_table(self, items: _Items, table: NDArray[_Column]) -> NDArray[_Column]:
        """(items, columns) of amounts."""
        return np.stack([self._copy(items, column) for column in table.T], axis=1)

    def _point(self, items: _Items, column: IntArray, to: _Items) -> IntArray:
        """A column of items of ``to``; -1 stays."""
        self._check_pointers(items, column, to)
        pointed = column[items.source]
        found = np.where(pointed >= 0, to.home[pointed], -1)
        for number, table in enumerate(to.deep_at):
            mine = np.flatnonzero(
                (pointed >= 0) & (items.stretch == number) & (to.short_stretch[pointed] == number)
            )
            away = to.short_unit[pointed[mine]] - items.short_unit[items.source[mine]]
            found[mine] = table[to.slot[pointed[mine]], items.unit[mine] + away]
        return found

    def _check_pointers(self, items: _Items, column: IntArray, to: _Items) -> None:
        stretch = np.where(column >= 0, to.short_stretch[column], -1)
        to_template = (stretch >= 0) & (to.short_unit[column] == TEMPLATE)
        if (items.short_stretch[to_template] != stretch[to_template]).any():
            raise NotPeriodic("something outside the units depends on all of them")
        for number, (own, other) in enumerate(zip(items.short_at, to.short_at, strict=True)):
            middle = column[own[:, TEMPLATE]]
            near = (middle >= 0) & (to.short_stretch[middle] == number)
            away = to.short_unit[middle] - TEMPLATE
            for unit in (TEMPLATE - 1, TEMPLATE + 1):
                here = column[own[:, unit]]
                target = unit + away
                inside = near & (target >= 1) & (target <= NUM_KEPT - 2)
                wanted = other[to.slot[middle[inside]], target[inside]]
                beyond = here[near & ~inside]
                if (
                    (here[inside] != wanted).any()
                    or (here[~near] != middle[~near]).any()
                    or (beyond < 0).any()
                    or (to.short_stretch[beyond] == number).any()
                ):
                    raise NotPeriodic("equal units depend on unlike things")

    def _check(self) -> None:
        """Equal units are sharded alike, beyond what the columns show of it."""
        sharded = self.sharded
        nodes = [sharded.nodes[index] for index in self.needed.tolist()]
        self._copy(self.values, _numbered(sharded.layouts))
        self._copy(
            self.rows,
            _numbered(node.choice if isinstance(node, OpNode) else node.steps for node in nodes),
        )
        ops = [node.op if isinstance(node, OpNode) else -1 for node in nodes]
        self._point(self.rows, np.array(ops, dtype=np.int64), self.ops)

    def _nodes(self) -> NodeColumns:
        old, rows = self.columns.nodes, self.rows
        return NodeColumns(
            segment=self._point(rows, old.segment, self.segments),
            phase=self._copy(rows, old.phase),
            num_launches=self._copy(rows, old.num_launches),
            flop=self._copy(rows, old.flop),
            flop_scale=self._copy(rows, old.flop_scale),
            num_bytes=self._copy_table(rows, old.num_bytes),
            is_kept=self._copy(rows, old.is_kept),
            is_view=self._copy(rows, old.is_view),
            is_from_parameter=self._copy(rows, old.is_from_parameter),
            is_attention=self._copy(rows, old.is_attention),
            family=self._copy(rows, old.family),
            dtype=self._copy(rows, old.dtype),
            dims=self._copy_table(rows, old.dims),
            dims_scale=self._copy_table(rows, old.dims_scale),
            flop_factor=self._copy(rows, old.flop_factor),
        )

    def _collectives(self) -> CollectiveColumns:
        old = self.columns.collectives
        items = self._children(self.rows, np.bincount(old.node, minlength=len(self.rows.slot)))
        return CollectiveColumns(
            node=self._point(items, old.node, self.rows),
            group=self._copy(items, old.group),
            num_bytes=self._copy(items, old.num_bytes),
            scale=self._copy(items, old.scale),
            groups=old.groups,
        )

    def _values(self) -> ValueColumns:
        old, values, rows = self.columns.values, self.values, self.rows
        reads = self._children(rows, np.bincount(old.edge_reader, minlength=len(rows.slot)))
        return ValueColumns(
            num_bytes=self._copy(values, old.num_bytes),
            scale=self._copy(values, old.scale),
            producer=self._point(values, old.producer, rows),
            edge_value=self._point(reads, old.edge_value, values),
            edge_reader=self._point(reads, old.edge_reader, rows),
            is_parameter=self._copy(values, old.is_parameter),
            is_gradient=self._copy(values, old.is_gradient),
            crossing_value=self._point(reads, old.crossing_value, values),
            own_bytes=self._copy(values, old.own_bytes),
            own_scale=self._copy(values, old.own_scale),
            own_producer=self._point(values, old.own_producer, rows),
            is_data=self._copy(values, old.is_data),
            is_base=self._copy(values, old.is_base),
        )

    def _parameters(self) -> ParameterColumns:
        old, items = self.columns.parameters, self.parameters
        shape, axes = _numbered(old.shapes), _numbered(old.gradient_axes)
        self._copy(items, shape)
        self._copy(items, axes)
        source = items.source.tolist()
        return ParameterColumns(
            names=tuple(item.name for item in self.graph.parameters),
            shapes=tuple(map(old.shapes.__getitem__, source)),
            item_bytes=self._copy(items, old.item_bytes),
            is_low_precision=self._copy(items, old.is_low_precision),
            first_segment=self._point(items, old.first_segment, self.segments),
            forward_use=self._uses(old.forward_use),
            use=self._uses(old.use),
            gradient_axes=tuple(map(old.gradient_axes.__getitem__, source)),
            has_gradient=self._copy(items, old.has_gradient),
            is_cut=self._copy(items, old.is_cut),
            row_of_value=self._point(self.values, old.row_of_value, items),
        )

    def _uses(self, pairs: tuple[IntArray, IntArray]) -> tuple[IntArray, IntArray]:
        """Pairs of parameters and segments, sorted."""
        parameter, segment = pairs
        counts = np.bincount(parameter, minlength=len(self.parameters.slot))
        items = self._children(self.parameters, counts)
        found = (
            self._point(items, parameter, self.parameters),
            self._point(items, segment, self.segments),
        )
        order = np.lexsort((found[1], found[0]))
        return found[0][order], found[1][order]


def _numbered(items: Iterable[Hashable]) -> IntArray:
    """Equal numbers for equal items."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(item, len(numbers)) for item in items], dtype=np.int64)
