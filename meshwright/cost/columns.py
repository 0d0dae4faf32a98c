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

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.spmd.program import CollectiveKind

__all__ = [
    "BACKWARD",
    "FORWARD",
    "PROLOGUE",
    "CollectiveColumns",
    "Columns",
    "NodeColumns",
    "ParameterColumns",
    "ValueColumns",
    "scale_weights",
    "sums_by",
]

PROLOGUE, FORWARD, BACKWARD = 0, 1, 2
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
    family: IntArray
    """``work.Family``; that of a view says nothing."""
    dtype: IntArray
    """Place in ``work.DTYPES``."""
    dims: FloatArray
    """(nodes, 4): b, m, n, k of ``cost.work``."""
    dims_scale: IntArray
    """(nodes, 4)"""
    flop_factor: FloatArray
    """``op_work.OpWork.flop_factor``."""


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
