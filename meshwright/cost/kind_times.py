"""What a node of each kind takes: by roofline, or by what a learned model says of its work.

What an operator takes depends on the batch split by four factors alone (``columns``), so splits
that agree in them share one price. A model is asked for many splits at once: a table that was asked
for a few is asked for more, and then all that may come are priced together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from meshwright.cost.collectives import CollectivePrices
from meshwright.cost.columns import Columns, FloatArray, scale_weights, sums_by
from meshwright.cost.compression import codec_of
from meshwright.cost.distinct import NodeKinds, node_kinds
from meshwright.cost.kind_work import JOINED, KindWork
from meshwright.cost.neighbors import exposed_ring_s
from meshwright.cost.roofline import Roofline
from meshwright.cost.split import DATA_AXES, Split
from meshwright.cost.training_kernels import PLAIN
from meshwright.cost.work import Family, OperatorWork
from meshwright.spmd.program import CollectiveKind

__all__ = ["KindPrices", "KindTimes", "batch_splits"]

_INSIDE_OPERATORS = frozenset({CollectiveKind.HALO, CollectiveKind.RING})

_ATTENTION = (Family.ATTENTION, Family.ATTENTION_BACKWARD)

_SINGLE_SPLITS = 2
"""So many splits of a table are priced one by one before all are."""

_MAX_ROWS = 1 << 14
"""Rows priced at once."""


def batch_splits(batch: int, num_devices: int) -> tuple[tuple[int, int], ...]:
    """Data-parallel ranks that divide devices, with micro-batches that divide a batch with them."""
    return tuple(
        (data, micro)
        for data in range(1, min(batch, num_devices) + 1)
        if num_devices % data == 0 and batch % data == 0
        for micro in _divisors(batch // data)
    )


def _divisors(number: int) -> list[int]:
    low = [way for way in range(1, math.isqrt(number) + 1) if number % way == 0]
    return sorted({*low, *(number // way for way in low)})


@dataclass(frozen=True, slots=True, kw_only=True)
class KindTimes:
    """Of a node of each of K kinds."""

    device_s: FloatArray
    """(K,) without its launch."""
    communication_s: FloatArray
    """(K,) of its collectives."""
    trust: FloatArray
    """(K,) of ``device_s``: 0 analytic, 1 learned."""

    @property
    def learned_s(self) -> FloatArray:
        """(K,) the learned part of ``device_s``."""
        return self.device_s * self.trust


class KindPrices:
    """Times of the kinds of one table; remembered."""

    def __init__(
        self, columns: Columns, *, item_bytes: int, splits: Sequence[tuple[int, int]] = ()
    ) -> None:
        """Prices for a table.

        Args:
            columns: the table's.
            item_bytes: of an element of what is communicated.
            splits: data-parallel ranks and micro-batches that may be asked for.
        """
        self._columns = columns
        self._item_bytes = item_bytes
        self._splits = splits if columns.is_scaled else ()
        self._times: dict[tuple[Split, Roofline], KindTimes] = {}
        self._device: dict[tuple[Roofline, bytes], tuple[FloatArray, FloatArray]] = {}
        self._asked: dict[Roofline, int] = {}

    @cached_property
    def kinds(self) -> NodeKinds:
        """The kinds of nodes there are."""
        return node_kinds(self._columns)

    @cached_property
    def work(self) -> KindWork:
        """Their work."""
        return KindWork(self._columns, self.kinds)

    def weights(self, split: Split) -> FloatArray:
        """Factors for amounts that the columns leave to the batch axes."""
        if not self._columns.is_scaled:
            return np.ones(4)
        return scale_weights(
            data_parallel=split.data_parallel / split.batch_scale,
            num_microbatches=split.num_microbatches,
        )

    def actual_axes(self, axes: Sequence[str]) -> tuple[str, ...]:
        """Axes of a collective; in scaled columns ``dp_shard`` stands for both batch axes."""
        if not self._columns.is_scaled or "dp_shard" not in axes:
            return tuple(axes)
        return (*DATA_AXES, *(axis for axis in axes if axis not in DATA_AXES))

    def times(self, split: Split, roofline: Roofline, prices: CollectivePrices) -> KindTimes:
        """Times of a node of each kind under one split."""
        key = (split, roofline)
        if key not in self._times:
            self._times[key] = self._price(split, roofline, prices)
        return self._times[key]

    def _price(self, split: Split, roofline: Roofline, prices: CollectivePrices) -> KindTimes:
        weights = self.weights(split)
        device_s, trust = self._device_times(weights, roofline)
        kinds = self.kinds
        table = kinds.collectives
        each_s = np.zeros(len(table.node))
        payload = table.num_bytes * weights[table.scale]
        for group, (kind, axes) in enumerate(table.groups):
            rows = table.group == group
            each_s[rows] = prices.time_s(
                kind,
                payload[rows],
                axes=self.actual_axes(axes),
                axis_sizes=split.sizes,
                num_stages=split.num_stages,
                first_device=split.first_device,
            )
        self._compress(each_s, payload, split, roofline, prices)
        rings = [kind is CollectiveKind.RING for kind, _ in table.groups]
        is_ring = np.array(rings, dtype=np.bool_)[table.group]
        communication_s = sums_by(table.node[~is_ring], each_s[~is_ring], kinds.count)
        if is_ring.any():
            ring_s = sums_by(table.node[is_ring], each_s[is_ring], kinds.count)
            communication_s += exposed_ring_s(ring_s, device_s)
        return KindTimes(device_s=device_s, communication_s=communication_s, trust=trust)

    def operator_work(self, weights: Sequence[FloatArray], roofline: Roofline) -> OperatorWork:
        """``KindWork.at`` under what the roofline says of fusion and of linear layers."""
        return self.work.at(
            np.array(weights),
            pointwise_traffic=roofline.pointwise_traffic,
            matmul_dtype=roofline.matmul_dtype,
        )

    # Operators ---------------------------------------------------------------------------------

    def _device_times(
        self, weights: FloatArray, roofline: Roofline
    ) -> tuple[FloatArray, FloatArray]:
        """Device time and trust of each kind."""
        if roofline.learned is None:
            return self._analytic_s(weights, roofline), np.zeros(self.kinds.count)
        key = (roofline, weights.tobytes())
        if key not in self._device:
            asked = self._asked[roofline] = self._asked.get(roofline, 0) + 1
            wanted = {weights.tobytes(): weights}
            if asked == _SINGLE_SPLITS + 1:
                wanted |= self._ahead(roofline)
            self._ask(roofline, list(wanted.values()))
        return self._device[key]

    def _analytic_s(self, weights: FloatArray, roofline: Roofline) -> FloatArray:
        kinds = self.kinds
        num_bytes = kinds.num_bytes @ weights
        if roofline.pointwise_traffic != 1.0:
            joined = np.isin(kinds.family, JOINED)
            num_bytes = np.where(joined, num_bytes * roofline.pointwise_traffic, num_bytes)
        attended = np.where(np.isin(kinds.family, _ATTENTION), kinds.flop_factor, 1.0)
        flop = kinds.flop * weights[kinds.flop_scale] * attended
        cast = np.zeros(kinds.count, dtype=np.bool_)
        if roofline.matmul_dtype:
            cast[self.work.rows] = self.work.is_cast
        found = roofline.device_time_s(flop, num_bytes, is_cast=cast)
        if roofline.kernels != PLAIN:
            rows = self.work.rows
            work = self.operator_work([weights], roofline)
            is_cast = self._is_cast(1, roofline)
            found[rows] = roofline.trained_s(found[rows], work, is_cast=is_cast)
        return found

    def _is_cast(self, num_splits: int, roofline: Roofline) -> NDArray[np.bool_]:
        """Of the rows of ``operator_work``."""
        return np.tile(self.work.is_cast & bool(roofline.matmul_dtype), num_splits)

    def _ahead(self, roofline: Roofline) -> dict[bytes, FloatArray]:
        """Weights of all splits that may come and are not priced."""
        every = (
            scale_weights(data_parallel=data, num_microbatches=micro)
            for data, micro in self._splits
        )
        return {
            weights.tobytes(): weights
            for weights in every
            if (roofline, weights.tobytes()) not in self._device
        }

    def _ask(self, roofline: Roofline, wanted: Sequence[FloatArray]) -> None:
        """Price the kinds at every one of these weights, and remember it."""
        rows = self.work.rows
        most = max(_MAX_ROWS // max(len(rows), 1), 1)
        # Splits with equal amounts for a micro-batch come together, as they share prices.
        wanted = sorted(wanted, key=lambda weights: (weights[3], weights[2]))
        for start in range(0, len(wanted), most):
            some = wanted[start : start + most]
            work, kept, place = self.work.distinct(self.operator_work(some, roofline))
            is_cast = self._is_cast(len(some), roofline)[kept]
            priced = roofline.operators(work, is_cast=is_cast)
            found = np.zeros((2, len(some), self.kinds.count))
            each = np.stack([priced.time_s, priced.trust])[:, place]
            found[:, :, rows] = each.reshape(2, len(some), -1)
            for weights, device_s, trust in zip(some, *found, strict=True):
                self._device[roofline, weights.tobytes()] = (device_s, trust)

    # Compression -------------------------------------------------------------------------------

    def _compress(
        self,
        each_s: FloatArray,
        payload: FloatArray,
        split: Split,
        roofline: Roofline,
        prices: CollectivePrices,
    ) -> None:
        """Lower the times of collectives along ``tp`` that are faster compressed."""
        codec = codec_of(split.compression, self._item_bytes)
        table = self.kinds.collectives
        for group, (kind, axes) in enumerate(table.groups if codec is not None else ()):
            if codec is None or "tp" not in axes or kind in _INSIDE_OPERATORS:
                continue
            rows = table.group == group
            axes = self.actual_axes(axes)
            num_ranks = math.prod(split.sizes[axis] for axis in axes)
            wire_s = prices.time_s(
                kind,
                codec.wire_bytes(kind, payload[rows], num_ranks),
                axes=axes,
                axis_sizes=split.sizes,
                num_stages=split.num_stages,
                first_device=split.first_device,
            )
            codec_s = codec.codec_s(payload[rows], device_bytes_per_s=roofline.bytes_per_s)
            compressed_s = wire_s + codec.num_codecs(kind) * codec_s
            each_s[rows] = np.minimum(each_s[rows], compressed_s)
