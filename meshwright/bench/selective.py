"""What frameworks mean by selective recompute, as columns of a cost table."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright.bench.software import Selective
from meshwright.cost.columns import FORWARD, NodeColumns
from meshwright.cost.work import Family

__all__ = ["kept_nodes"]

_PRODUCTS = (Family.MATMUL, Family.GROUPED_MATMUL)


def kept_nodes(nodes: NodeColumns, selective: Selective) -> NDArray[np.bool_]:
    """(nodes,) whether selective recompute keeps a node's results."""
    kept = nodes.is_kept.copy()
    is_forward = nodes.phase == FORWARD
    if selective is Selective.CORE_ATTENTION:
        is_core = nodes.is_attention | (nodes.family == Family.ATTENTION)
        return np.where(nodes.is_view, kept, ~(is_forward & is_core))
    if selective is Selective.EVERY_SECOND_PRODUCT:
        rows = np.flatnonzero(is_forward & ~nodes.is_view & np.isin(nodes.family, _PRODUCTS))
        segment = nodes.segment[rows]
        order = np.argsort(segment, kind="stable")
        place = np.arange(len(rows)) - np.searchsorted(segment[order], segment[order])
        kept[rows[order][place % 2 == 1]] = False
    return kept
