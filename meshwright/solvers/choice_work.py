"""What the choices of operators do on one rank, as rows of ``OperatorWork`` and as seconds.

The same families and sizes as the cost table's (``cost.write_columns``), but each operator stands
alone: what is joined to it depends on what the others choose. So learned prices of operators that
a compiler joins may differ from the table's, and where linear layers are cast to a narrower type,
all products are.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from meshwright.cost.kind_work import JOINED, LINEAR, NARROW
from meshwright.cost.op_work import COUNTED, OpWork, OpWorks, Size
from meshwright.cost.roofline import Roofline
from meshwright.cost.work import DTYPES, Family, OperatorWork
from meshwright.graph.rules.base import Variant
from meshwright.solvers.choices import ChoiceGraph, ChoiceNode, OpChoice

__all__ = ["ChoiceWork"]

FloatArray = NDArray[np.float64]

_ATTENTION = (Family.ATTENTION, Family.ATTENTION_BACKWARD)


class ChoiceWork:
    """Seconds of choices on a kind of device."""

    def __init__(self, choices: ChoiceGraph, roofline: Roofline) -> None:
        """For the operators of a choice graph."""
        self._analysis, self._sizes = choices.analysis, choices.axis_sizes
        self._roofline = roofline
        self._works = OpWorks(choices.analysis.graph)

    def device_s(
        self, rows: Sequence[tuple[ChoiceNode, OpChoice]], num_bytes: Sequence[float]
    ) -> FloatArray:
        """(N,) of operators that are no views, without launches and collectives.

        Args:
            rows: operators and how they are sharded.
            num_bytes: (N,) that each moves.
        """
        if not rows:
            return np.zeros(0)
        work = self._work(rows, np.array(num_bytes, dtype=np.float64))
        roofline = self._roofline
        is_cast = np.zeros(work.count, np.bool_)
        if roofline.matmul_dtype:
            is_cast = np.isin(work.family, LINEAR) & np.isin(work.dtype, NARROW)
            work.dtype[is_cast] = DTYPES.index(roofline.matmul_dtype)
        if roofline.learned is not None:
            return roofline.operators(work, is_cast=is_cast).time_s
        counted = np.where(np.isin(work.family, COUNTED), work.flop, 0.0)
        time_s = roofline.device_time_s(counted, work.num_bytes, is_cast=is_cast)
        return roofline.trained_s(time_s, work, is_cast=is_cast)

    def _work(
        self, rows: Sequence[tuple[ChoiceNode, OpChoice]], num_bytes: FloatArray
    ) -> OperatorWork:
        ops = [self._analysis.graph.ops[node.op] for node, _ in rows]
        works = [self._works.of(op) for op in ops]
        family = np.array([found.family for found in works], dtype=np.int64)
        sizes = [
            self._sizes_of(node, choice, found)
            for (node, choice), found in zip(rows, works, strict=True)
        ]
        dims = np.maximum(np.rint(np.array(sizes)), 1.0)
        ways = [math.prod(self._sizes[axis] for axis, _ in choice.factors) for _, choice in rows]
        counted = np.array([op.flop for op in ops]) / np.array(ways)
        flop = np.where(np.isin(family, COUNTED), counted, dims[:, 1] * dims[:, 2])
        joined = np.isin(family, JOINED)
        return OperatorWork(
            family=family,
            dtype=np.array([found.dtype for found in works], dtype=np.int64),
            dims=dims,
            flop=flop * np.array([found.flop_factor for found in works]),
            num_bytes=np.where(joined, num_bytes * self._roofline.pointwise_traffic, num_bytes),
            edges=np.zeros((2, 0), np.int64),
            edge_kind=np.zeros(0, np.int64),
        )

    def _sizes_of(self, node: ChoiceNode, choice: OpChoice, work: OpWork) -> list[float]:
        """b, m, n, k on one rank."""
        found = [self._local(choice, size) for size in work.sizes]
        if work.family in _ATTENTION:
            factors = self._analysis.leaf_factors[node.op]
            rings = {axis for axis, i in choice.factors if factors[i].variant is Variant.RING}
            found[2] = self._local(choice, work.sizes[2], but=rings)
        return found

    def _local(self, choice: OpChoice, size: Size, *, but: Collection[str] = ()) -> float:
        if not size.dims:
            return size.whole
        tensor = size.tensor
        layout = choice.operands[tensor] if tensor >= 0 else choice.results[-1 - tensor]
        axes = [
            axis
            for (dim, _), sharding in (() if layout is None else layout.shards)
            if dim in size.dims
            for axis in sharding
            if axis not in but
        ]
        return size.whole / math.prod(self._sizes[axis] for axis in axes)
