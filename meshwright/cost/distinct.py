"""Nodes that cost the same whatever the split, and segments that are made of the same nodes.

The layers of a deep model repeat, so of ten thousand nodes some thirty are distinct. Times are
worked out for one node of each kind, and summed for one segment of each kind, in the order of the
program: the sums are those of all nodes, to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.cost.columns import CollectiveColumns, Columns, FloatArray, IntArray, sums_by

__all__ = ["NodeKinds", "SegmentSums", "node_kinds"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeKinds:
    """One node for each of K kinds, with amounts as in ``NodeColumns``."""

    kind_of_node: IntArray
    """(nodes,)"""
    flop: FloatArray
    """(K,)"""
    flop_scale: IntArray
    num_bytes: FloatArray
    """(K, 4)"""
    family: IntArray
    dtype: IntArray
    dims: FloatArray
    """(K, 4)"""
    dims_scale: IntArray
    """(K, 4)"""
    flop_factor: FloatArray
    collectives: CollectiveColumns
    """Of these nodes alone; ``node`` is the kind."""

    @property
    def count(self) -> int:
        """Number of kinds."""
        return len(self.flop)


class SegmentSums:
    """Sums by segment over some nodes."""

    num_launches: FloatArray
    """(segments + 1,)"""

    def __init__(
        self, kinds: IntArray, segments: IntArray, *, num_launches: FloatArray, count: int
    ) -> None:
        """Over nodes of these ``kinds``, in order, each in one of ``count`` segments.

        Segment -1 (free operators) is counted in the last place.
        """
        place = segments % (count + 1)
        self.num_launches = sums_by(place, num_launches, count + 1)
        order = np.argsort(place, kind="stable")
        parts = np.split(kinds[order], np.searchsorted(place[order], np.arange(1, count + 1)))
        number_of: dict[bytes, int] = {}
        distinct: list[IntArray] = []
        like: list[int] = []
        for part in parts:
            number = number_of.setdefault(part.tobytes(), len(number_of))
            if number == len(distinct):
                distinct.append(part)
            like.append(number)
        self._like = np.array(like)
        self._kinds = np.concatenate(distinct)
        self._place = np.repeat(np.arange(len(distinct)), [len(part) for part in distinct])
        self._num_distinct = len(distinct)

    def of(self, amounts: FloatArray) -> FloatArray:
        """(segments + 1,) sums of ``amounts``, (K,) one for each kind."""
        sums = sums_by(self._place, amounts[self._kinds], self._num_distinct)
        return np.asarray(sums[self._like])


def node_kinds(columns: Columns) -> NodeKinds:
    """The kinds of nodes there are in ``columns``."""
    nodes, table = columns.nodes, columns.collectives
    first, kind = _kinds(columns)
    rows = np.flatnonzero(first[kind[table.node]] == table.node)
    return NodeKinds(
        kind_of_node=kind,
        flop=nodes.flop[first],
        flop_scale=nodes.flop_scale[first],
        num_bytes=nodes.num_bytes[first],
        family=nodes.family[first],
        dtype=nodes.dtype[first],
        dims=nodes.dims[first],
        dims_scale=nodes.dims_scale[first],
        flop_factor=nodes.flop_factor[first],
        collectives=CollectiveColumns(
            node=kind[table.node[rows]],
            group=table.group[rows],
            num_bytes=table.num_bytes[rows],
            scale=table.scale[rows],
            groups=table.groups,
        ),
    )


def _kinds(columns: Columns) -> tuple[IntArray, IntArray]:
    """The first node of each kind (K,), and the kind of each node."""
    nodes, table = columns.nodes, columns.collectives
    every = np.arange(len(nodes.flop))
    start = np.searchsorted(table.node, np.append(every, len(every)))
    within = np.arange(len(table.node)) - start[table.node]
    own = [
        _bits(nodes.flop),
        *map(_bits, nodes.num_bytes.T),
        *map(_bits, nodes.dims.T),
        _bits(nodes.flop_factor),
        _digits([nodes.flop_scale, *nodes.dims_scale.T, nodes.dtype, nodes.family]),
        np.diff(start),
    ]
    sent = [_bits(table.num_bytes), table.group, table.scale]
    of_node = np.zeros(len(every), dtype=np.uint64)
    np.add.at(of_node, table.node, _hashes([*sent, within]))
    _, first, kind = np.unique(_hashes([*own, of_node]), return_index=True, return_inverse=True)
    # Nodes whose hashes agree by chance, and collectives that are not in order, are no reason
    # for a wrong sum: row by row all must be as at the first node of the kind.
    twin = start[first[kind[table.node]]] + within
    alike = (
        bool((np.diff(table.node) >= 0).all())
        and all(np.array_equal(column[first][kind], column) for column in own)
        and all(np.array_equal(column[twin], column) for column in sent)
    )
    return (first, kind) if alike else (every, every)


def _bits(amounts: FloatArray) -> IntArray:
    return np.ascontiguousarray(amounts).view(np.int64)


def _digits(columns: Sequence[IntArray]) -> IntArray:
    """One number for each row of small ones, below 64 each."""
    found = np.zeros(len(columns[0]), dtype=np.int64)
    for column in columns:
        found = found * 64 + column
    return found


def _hashes(columns: Sequence[NDArray[Any]]) -> NDArray[np.uint64]:
    """A number for each row; equal rows have the same."""
    mixed = np.zeros(len(columns[0]), dtype=np.uint64)
    for column in columns:
        mixed ^= column.astype(np.uint64)
        mixed *= np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return mixed
