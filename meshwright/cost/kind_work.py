"""The kinds of nodes of one table as rows of ``OperatorWork``, at any batch split.

A row stands for all nodes of a kind, so that equal nodes are priced equal. A pair of rows is joined
where any node of the one kind meets any of the other; a kind is not joined to itself. Views are
looked through. Collectives have no row: they are priced elsewhere.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright.cost.columns import Columns, FloatArray, IntArray
from meshwright.cost.distinct import NodeKinds
from meshwright.cost.op_work import COUNTED
from meshwright.cost.work import DTYPES, EdgeKind, Family, OperatorWork, components

__all__ = ["JOINED", "LINEAR", "NARROW", "KindWork"]

JOINED = (
    Family.NORM,
    Family.NORM_BACKWARD,
    Family.SOFTMAX,
    Family.SOFTMAX_BACKWARD,
    Family.ELEMENTWISE,
    Family.REDUCTION,
    Family.COPY,
    Family.RANDOM,
)
"""What works element by element or row by row: a compiler joins neighbors of these."""

LINEAR = (Family.MATMUL, Family.BATCHED_MATMUL, Family.GROUPED_MATMUL)
"""What recipes of narrower types cast,"""
NARROW = (DTYPES.index("bfloat16"), DTYPES.index("float16"))
"""of these types."""


class KindWork:
    """Rows for the kinds that do anything on the device."""

    def __init__(self, columns: Columns, kinds: NodeKinds) -> None:
        """From a table's columns and their kinds."""
        works = (kinds.flop > 0) | (kinds.num_bytes.sum(axis=1) > 0)
        self.rows: IntArray = np.flatnonzero(works)
        """(R,) kind of each row."""
        self._kinds = kinds
        self._row_of_kind = np.full(kinds.count, -1)
        self._row_of_kind[self.rows] = np.arange(len(self.rows))
        self._edges, self._edge_kind = self._find_edges(columns)
        data_edges = self._edges[:, self._edge_kind == EdgeKind.DATA]
        family, dtype = kinds.family[self.rows], kinds.dtype[self.rows]
        self._is_counted = np.isin(family, COUNTED)
        self._is_joined = np.isin(family, JOINED)
        attends = np.zeros(kinds.count, dtype=np.bool_)
        attends[kinds.kind_of_node[columns.nodes.is_attention]] = True
        linear = np.isin(family, LINEAR) & np.isin(dtype, NARROW) & ~attends[self.rows]
        self.is_cast: NDArray[np.bool_] = linear & ~self._meets_softmax(data_edges)
        """(R,) whether recipes of narrower types cast it: products of linear layers and of
        experts, not of attention, nor those whose result goes into a softmax, as logits and
        routers keep their type."""

    def at(
        self, weights: FloatArray, *, pointwise_traffic: float = 1.0, matmul_dtype: str = ""
    ) -> OperatorWork:
        """Work of every row at S batch splits: all rows of the first, then of the next.

        Args:
            weights: (S, 4) of ``columns.scale_weights``.
            pointwise_traffic: share of their traffic that operators a compiler joins have left.
            matmul_dtype: what linear layers of 2-byte types are multiplied in; empty: their own.
        """
        kinds, rows, splits = self._kinds, self.rows, len(weights)
        dims = np.rint(kinds.dims[rows] * weights[:, kinds.dims_scale[rows]])
        dims = np.maximum(dims, 1.0)
        counted = kinds.flop[rows] * weights[:, kinds.flop_scale[rows]]
        elements = dims[:, :, 1] * dims[:, :, 2]
        flop = np.where(self._is_counted, counted, elements) * kinds.flop_factor[rows]
        num_bytes = weights @ kinds.num_bytes[rows].T
        num_bytes = np.where(self._is_joined, num_bytes * pointwise_traffic, num_bytes)
        dtype = kinds.dtype[rows]
        if matmul_dtype:
            dtype = np.where(self.is_cast, DTYPES.index(matmul_dtype), dtype)
        first = np.repeat(np.arange(splits) * len(rows), self._edges.shape[1])
        return OperatorWork(
            family=np.tile(kinds.family[rows], splits),
            dtype=np.tile(dtype, splits),
            dims=dims.reshape(-1, 4),
            flop=flop.reshape(-1),
            num_bytes=num_bytes.reshape(-1),
            edges=np.tile(self._edges, splits) + first,
            edge_kind=np.tile(self._edge_kind, splits),
        )

    def distinct(self, work: OperatorWork) -> tuple[OperatorWork, IntArray, IntArray]:
        """Of what ``at`` gave, every connected graph once, however many splits have it alike.

        Returns:
            That; which rows of ``work`` it has; (S * R,) the row of it that stands for each of
            ``work``.
        """
        count = len(self.rows)
        amounts = np.column_stack([work.dims, work.flop, work.num_bytes])
        by_split = amounts.reshape(-1, count, amounts.shape[1])
        same_as = np.empty(by_split.shape[:2], dtype=np.int64)
        graph = components(self._edges, count)
        for number in range(graph.max(initial=-1) + 1):
            rows = np.flatnonzero(graph == number)
            own = by_split[:, rows].reshape(len(by_split), -1)
            _, first, which = np.unique(own, axis=0, return_index=True, return_inverse=True)
            same_as[:, rows] = first[which][:, None] * count + rows
        kept, place = np.unique(same_as, return_inverse=True)
        is_kept = np.isin(work.edges[0], kept)
        once = OperatorWork(
            family=work.family[kept],
            dtype=work.dtype[kept],
            dims=work.dims[kept],
            flop=work.flop[kept],
            num_bytes=work.num_bytes[kept],
            edges=np.searchsorted(kept, work.edges[:, is_kept]),
            edge_kind=work.edge_kind[is_kept],
        )
        return once, kept, place.reshape(-1)

    def _meets_softmax(self, edges: IntArray) -> NDArray[np.bool_]:
        """(R,) rows joined to a softmax or its backward, directly or through a copy."""
        family = self._kinds.family[self.rows]
        near = np.isin(family, (Family.SOFTMAX, Family.SOFTMAX_BACKWARD))
        for _ in range(2):
            met = near.copy()
            met[edges[0][near[edges[1]]]] = True
            met[edges[1][near[edges[0]]]] = True
            near |= met & (family == Family.COPY)
        return met

    def _find_edges(self, columns: Columns) -> tuple[IntArray, IntArray]:
        """(2, E) pairs of rows, each once for a kind of edge; (E,) of ``EdgeKind``."""
        nodes, values = columns.nodes, columns.values
        row = np.where(nodes.is_view, -1, self._row_of_kind[self._kinds.kind_of_node])
        maker = values.producer[values.edge_value]
        data = self._distinct(np.where(maker >= 0, row[maker], -1), row[values.edge_reader])
        joined = np.isin(self._kinds.family[self.rows], JOINED)
        fusion = data[:, joined[data[0]] & joined[data[1]]]
        working = np.flatnonzero(row >= 0)
        before, after = working[:-1], working[1:]
        same = nodes.phase[before] == nodes.phase[after]
        order = self._distinct(row[before[same]], row[after[same]])
        found = ((data, EdgeKind.DATA), (fusion, EdgeKind.FUSION), (order, EdgeKind.ORDER))
        return (
            np.concatenate([edges for edges, _ in found], axis=1),
            np.concatenate([np.full(edges.shape[1], int(kind)) for edges, kind in found]),
        )

    def _distinct(self, first: IntArray, second: IntArray) -> IntArray:
        """(2, E) distinct pairs of unlike rows, in order."""
        known: NDArray[np.bool_] = (first >= 0) & (second >= 0) & (first != second)
        size = max(len(self.rows), 1)
        codes = np.unique(first[known] * size + second[known])
        return np.stack([codes // size, codes % size])
