"""The masks that dropout keeps for its backward, as bytes of a cost table's values.

A ``Decoder`` writes dropout as a ReLU, whose backward reads its result. That is right where the
result is kept anyway, but for the mask of one byte: attention's second product keeps its input.
"""

from __future__ import annotations

import numpy as np

from meshwright.cost.columns import FORWARD, Columns, FloatArray
from meshwright.cost.work import Family

__all__ = ["bytes_with_masks"]


def bytes_with_masks(columns: Columns, item_bytes: int) -> FloatArray:
    """(values,) bytes of storages, a mask of dropout counted with what it was applied to.

    Args:
        columns: of a decoder with dropout whose attention is written out.
        item_bytes: of an element of an activation.
    """
    nodes, values = columns.nodes, columns.values
    is_softmax = (nodes.phase == FORWARD) & (nodes.family == Family.SOFTMAX) & ~nodes.is_view
    is_pointwise = (nodes.phase == FORWARD) & (nodes.family == Family.ELEMENTWISE) & ~nodes.is_view
    maker = values.producer[values.edge_value]
    is_dropout = np.zeros(len(nodes.phase), dtype=np.bool_)
    reader = values.edge_reader[(maker >= 0) & is_softmax[maker]]
    is_dropout[reader[is_pointwise[reader]]] = True
    is_dropped = (values.producer >= 0) & is_dropout[values.producer] & values.is_base
    return np.where(is_dropped, (item_bytes + 1) / item_bytes, 1.0) * values.num_bytes
