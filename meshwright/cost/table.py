"""The cost table: times, traffic and bytes of one way of sharding, for any batch split.

Built once from a sharded graph; then a plan's cost is look-ups and array arithmetic. What varies
freely: ``dp_replicate``, ``dp_shard``, number of micro-batches, stages, recompute, ZeRO. Fixed are
the labels each axis shards and the sizes of the axes inside a layer (``cp``, ``ep``, ``tp``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from meshwright.cost.activations import Activations, RecomputeAnalysis
from meshwright.cost.collectives import CollectivePrices
from meshwright.cost.columns import (
    BACKWARD,
    FORWARD,
    PROLOGUE,
    Columns,
    FloatArray,
    IntArray,
    sums_by,
)
from meshwright.cost.distinct import NodeKinds, SegmentSums
from meshwright.cost.kind_times import KindPrices, KindTimes
from meshwright.cost.neighbors import of_every_rank
from meshwright.cost.parameters import ParameterTable
from meshwright.cost.put_off import PutOff, put_off
from meshwright.cost.roofline import Roofline
from meshwright.cost.split import DATA_AXES, Split
from meshwright.cost.work import OperatorWork
from meshwright.plans.plan import Recompute
from meshwright.spmd.program import CollectiveKind

__all__ = ["DATA_AXES", "SLICE_SHARES", "CollectiveCount", "CostTable", "SegmentTimes", "Split"]

SLICE_SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Shares of a sequence for which ``CostTable.slice_times`` says what works token by token takes:
``forward_compute_I`` and ``forward_communication_I`` of share I, attention left out of compute;
besides ``forward_attention`` of whole sequences and ``forward_host``, all launches, hidden or not.
``backward_...`` likewise; all (segments,)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentTimes:
    """Seconds of one micro-batch, by segment; arrays of shape (segments,)."""

    forward_s: FloatArray
    backward_s: FloatArray
    """Includes what is computed again."""
    forward_launch_s: FloatArray
    """Launches that do not hide behind the device's work."""
    backward_launch_s: FloatArray
    forward_communication_s: FloatArray
    backward_communication_s: FloatArray
    free_s: float
    """Of what every stage computes for itself in each micro-batch."""
    prologue_s: float
    """Once in a step."""
    learned_s: FloatArray
    """Part of ``forward_s`` and ``backward_s`` that is learned: each operator's time times the
    trust in its price."""

    @property
    def total_s(self) -> FloatArray:
        """Forward and backward with launches and collectives; (segments,)."""
        return np.asarray(
            self.forward_s
            + self.backward_s
            + self.forward_launch_s
            + self.backward_launch_s
            + self.forward_communication_s
            + self.backward_communication_s
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveCount:
    """Collectives of one kind along the same axes."""

    count: int
    num_bytes: int
    """Sum of full payloads."""


class CostTable:
    """All amounts of one sharded graph; see the module docstring."""

    def __init__(
        self,
        columns: Columns,
        *,
        is_rounded: bool,
        batch_splits: Sequence[tuple[int, int]] = (),
    ) -> None:
        """From the columns of a sharded graph.

        Args:
            columns: serve any number of data-parallel ranks and micro-batches if they are scaled;
                otherwise only the sharded graph's own.
            is_rounded: the device's allocator rounds every tensor up to 512 bytes.
            batch_splits: data-parallel ranks and micro-batches that may be asked for; a learned
                model prices them in one batch.
        """
        self.columns = columns
        self.parameters = ParameterTable(self.columns.parameters, is_rounded=is_rounded)
        self.recompute = RecomputeAnalysis(self.columns)
        self.num_segments = self.columns.num_segments
        self._prices = KindPrices(self.columns, item_bytes=self.item_bytes, splits=batch_splits)
        self._activations: dict[tuple[Recompute, ...], Activations] = {}
        self._times: dict[tuple[object, ...], SegmentTimes] = {}
        self._segment_sums: dict[tuple[tuple[Recompute, ...], int], SegmentSums] = {}
        self._slice_times: dict[tuple[object, ...], dict[str, FloatArray]] = {}
        self._put_off: PutOff | None = None
        self._crossings: dict[bytes, tuple[IntArray, IntArray]] = {}
        self._saved: dict[tuple[object, ...], tuple[IntArray, IntArray]] = {}
        self._transients: dict[tuple[object, ...], FloatArray] = {}
        self._data, self._early = self._shared_values()

    def with_kept(self, is_kept: NDArray[np.bool_]) -> CostTable:
        """The same table where selective recompute keeps the results of other nodes, (nodes,)."""
        nodes = replace(self.columns.nodes, is_kept=is_kept)
        return self._with_columns(replace(self.columns, nodes=nodes))

    def with_value_bytes(self, num_bytes: FloatArray) -> CostTable:
        """The same table where storages take (values,) bytes of memory; times stay."""
        values = replace(self.columns.values, num_bytes=num_bytes)
        return self._with_columns(replace(self.columns, values=values))

    def with_balanced_rings(self, ways: int) -> CostTable:
        """The same table where the ``ways`` ranks of each ring share causal attention evenly."""
        node, nodes = self.columns.collectives.node[self._rings()], self.columns.nodes
        factor = nodes.flop_factor.copy()
        factor[node] = of_every_rank(factor[node], nodes.family[node], ways)
        return self._repriced(replace(self.columns, nodes=replace(nodes, flop_factor=factor)))

    def with_ring_share(self, share: float) -> CostTable:
        """The same table where rings pass on that share of their bytes.

        Grouped keys and values may travel as they are before each is repeated for its queries.
        """
        found = self.columns.collectives
        num_bytes = np.where(self._rings(), share, 1.0) * found.num_bytes
        return self._repriced(
            replace(self.columns, collectives=replace(found, num_bytes=num_bytes))
        )

    def _rings(self) -> NDArray[np.bool_]:
        """(collectives,) whether it is a ring."""
        groups = self.columns.collectives.groups
        rings = [number for number, (kind, _) in enumerate(groups) if kind is CollectiveKind.RING]
        return np.isin(self.columns.collectives.group, rings)

    def _repriced(self, columns: Columns) -> CostTable:
        found = self._with_columns(columns)
        found._prices = KindPrices(found.columns, item_bytes=self.item_bytes, splits=())
        return found

    def _with_columns(self, columns: Columns) -> CostTable:
        found = copy(self)
        found.columns = columns
        found.recompute = RecomputeAnalysis(found.columns)
        found._activations, found._times, found._segment_sums = {}, {}, {}
        found._slice_times, found._saved, found._transients = {}, {}, {}
        return found

    def weights(self, split: Split) -> FloatArray:
        """Factors for amounts that the columns leave to the batch axes."""
        return self._prices.weights(split)

    @property
    def item_bytes(self) -> int:
        """Of an element of parameters and activations."""
        return int(self.columns.parameters.item_bytes.max(initial=1))

    def activations(self, policies: tuple[Recompute, ...]) -> Activations:
        """What ``policies``, one for each segment, keep and recompute."""
        if policies not in self._activations:
            self._activations[policies] = self.recompute.of(policies)
        return self._activations[policies]

    # Time --------------------------------------------------------------------------------------

    def segment_times(
        self,
        split: Split,
        policies: tuple[Recompute, ...],
        *,
        roofline: Roofline,
        prices: CollectivePrices,
    ) -> SegmentTimes:
        """Times of every segment under one split and choice of policies."""
        split = self._merged(split)
        key = (split, policies, roofline)
        if key not in self._times:
            self._times[key] = self._segment_times(split, policies, roofline, prices)
        return self._times[key]

    def _merged(self, split: Split) -> Split:
        """``split`` with one batch axis, where the columns know only one: the same groups."""
        if not self.columns.is_scaled:
            return split
        sizes = split.sizes
        sizes["dp_shard"] *= sizes["dp_replicate"]
        sizes["dp_replicate"] = 1
        return replace(split, axis_sizes=tuple(sizes.items()))

    @property
    def kinds(self) -> NodeKinds:
        """The kinds of nodes there are."""
        return self._prices.kinds

    def times_of_kinds(
        self, split: Split, roofline: Roofline, prices: CollectivePrices
    ) -> KindTimes:
        """Times of a node of each of ``kinds``."""
        return self._prices.times(self._merged(split), roofline, prices)

    def operator_work(self, split: Split, roofline: Roofline) -> tuple[OperatorWork, IntArray]:
        """Work of the kinds that do anything on the device, and (N,) kind of each row."""
        return self._prices.operator_work([self.weights(split)], roofline), self._prices.work.rows

    def _times_of_nodes(
        self, split: Split, roofline: Roofline, prices: CollectivePrices
    ) -> tuple[FloatArray, FloatArray]:
        """Device time and communication time of every node."""
        kind = self.kinds.kind_of_node
        times = self._prices.times(split, roofline, prices)
        return times.device_s[kind], times.communication_s[kind]

    def actual_axes(self, axes: Sequence[str]) -> tuple[str, ...]:
        """``KindPrices.actual_axes``."""
        return self._prices.actual_axes(axes)

    def _segment_times(
        self,
        split: Split,
        policies: tuple[Recompute, ...],
        roofline: Roofline,
        prices: CollectivePrices,
    ) -> SegmentTimes:
        times = self._prices.times(split, roofline, prices)
        device_s, communication_s = times.device_s, times.communication_s
        forward, late = self._sums(policies, FORWARD), self._sums(policies, BACKWARD)
        forward_s, backward_s = forward.of(device_s), late.of(device_s)
        forward_launch_s = roofline.exposed_launch_s(forward_s, forward.num_launches)
        backward_launch_s = roofline.exposed_launch_s(backward_s, late.num_launches)
        forward_communication_s = forward.of(communication_s)
        prologue = self.kinds.kind_of_node[self.columns.nodes.phase == PROLOGUE]
        return SegmentTimes(
            forward_s=forward_s[:-1],
            backward_s=backward_s[:-1],
            forward_launch_s=forward_launch_s[:-1],
            backward_launch_s=backward_launch_s[:-1],
            forward_communication_s=forward_communication_s[:-1],
            backward_communication_s=late.of(communication_s)[:-1],
            free_s=float(forward_s[-1] + forward_launch_s[-1] + forward_communication_s[-1]),
            prologue_s=float(device_s[prologue].sum() + communication_s[prologue].sum()),
            learned_s=(forward.of(times.learned_s) + late.of(times.learned_s))[:-1]
            if roofline.learned is not None
            else np.zeros(self.num_segments),
        )

    def _sums(self, policies: tuple[Recompute, ...], phase: int) -> SegmentSums:
        """Sums over what runs in the forward, or in the backward with what is computed again."""
        key = ((), phase) if phase == FORWARD else (policies, phase)
        if key not in self._segment_sums:
            nodes = self.columns.nodes
            rows = np.flatnonzero(nodes.phase == phase)
            if phase == BACKWARD:
                rows = np.concatenate([rows, self.activations(policies).recomputed])
            self._segment_sums[key] = SegmentSums(
                self.kinds.kind_of_node[rows],
                nodes.segment[rows],
                num_launches=nodes.num_launches[rows],
                count=self.num_segments,
            )
        return self._segment_sums[key]

    @property
    def put_off(self) -> PutOff:
        """What ZB-H1 puts off."""
        if self._put_off is None:
            self._put_off = put_off(self.columns)
        return self._put_off

    def weight_gradient_s(
        self,
        split: Split,
        policies: tuple[Recompute, ...],
        *,
        roofline: Roofline,
        prices: CollectivePrices,
    ) -> FloatArray:
        """(segments,) of the backward with launches and collectives, what can be put off."""
        times = self.segment_times(split, policies, roofline=roofline, prices=prices)
        device_s, communication_s = self._times_of_nodes(self._merged(split), roofline, prices)
        weight = np.flatnonzero(self.put_off.is_weight)
        weight_s = self._by_segment(weight, device_s)
        share = weight_s / np.where(times.backward_s > 0, times.backward_s, 1.0)
        launch_s = share * times.backward_launch_s
        return np.asarray(weight_s + launch_s + self._by_segment(weight, communication_s))

    def slice_times(
        self,
        split: Split,
        policies: tuple[Recompute, ...],
        *,
        roofline: Roofline,
        prices: CollectivePrices,
    ) -> dict[str, FloatArray]:
        """What token slices of one micro-batch take; see ``SLICE_TIMES``."""
        split = self._merged(split)
        key = (split, policies, roofline)
        if key in self._slice_times:
            return self._slice_times[key]
        nodes = self.columns.nodes
        again = self.activations(policies).recomputed
        forward = np.flatnonzero(nodes.phase == FORWARD)
        late = np.concatenate([np.flatnonzero(nodes.phase == BACKWARD), again])
        whole = self._times_of_nodes(split, roofline, prices)
        found: dict[str, FloatArray] = {}
        for phase, rows in (("forward", forward), ("backward", late)):
            is_attention = nodes.is_attention[rows]
            attention, others = rows[is_attention], rows[~is_attention]
            found[f"{phase}_attention"] = self._by_segment(attention, whole[0])
            launches = self._by_segment(rows, nodes.num_launches)
            found[f"{phase}_host"] = launches * roofline.launch_latency_s
            for number, share in enumerate(SLICE_SHARES):
                device_s, communication_s = (each * share for each in whole)
                if self.columns.is_scaled:
                    # A share of the tokens is as many rows as that share of the samples.
                    less = replace(split, num_microbatches=round(split.num_microbatches / share))
                    device_s, communication_s = self._times_of_nodes(less, roofline, prices)
                found[f"{phase}_compute_{number}"] = self._by_segment(others, device_s)
                found[f"{phase}_communication_{number}"] = self._by_segment(rows, communication_s)
        self._slice_times[key] = found
        return found

    def _by_segment(self, rows: IntArray, amounts: FloatArray) -> FloatArray:
        """(segments,) sums over nodes of ``rows`` that belong to one."""
        segment = self.columns.nodes.segment
        rows = rows[segment[rows] >= 0]
        return sums_by(segment[rows], amounts[rows], self.num_segments)

    # Bytes -------------------------------------------------------------------------------------

    def crossing_bytes(
        self, split: Split, stage_of_segment: IntArray
    ) -> Mapping[tuple[int, int, int], float]:
        """Bytes of one micro-batch by (phase, source stage, target stage), for one rank."""
        key = stage_of_segment.tobytes()
        if key not in self._crossings:
            self._crossings[key] = self._find_crossings(stage_of_segment)
        item, where = self._crossings[key]
        values = self.columns.values
        sizes = values.own_bytes[item] * self.weights(split)[values.own_scale[item]]
        span = int(stage_of_segment.max()) + 1
        total = np.bincount(where, weights=sizes)
        return {
            (code // span**2, code // span % span, code % span): float(total[code])
            for code in np.flatnonzero(total).tolist()
        }

    def _find_crossings(self, stage_of_segment: IntArray) -> tuple[IntArray, IntArray]:
        """Every value that crosses, and (phase, source, target) as one number in base stages."""
        values, nodes = self.columns.values, self.columns.nodes
        maker = values.own_producer[values.crossing_value]
        reader = values.edge_reader
        bound = (maker >= 0) & (nodes.segment[maker] >= 0) & (nodes.segment[reader] >= 0)
        value, reader, maker = values.crossing_value[bound], reader[bound], maker[bound]
        source = stage_of_segment[nodes.segment[maker]]
        target = stage_of_segment[nodes.segment[reader]]
        span = int(stage_of_segment.max()) + 1
        crosses = source != target
        where = (nodes.phase[maker] * span + source) * span + target
        codes = np.unique(value[crosses] * (3 * span**2) + where[crosses])
        return codes // (3 * span**2), codes % (3 * span**2)

    def saved_on_stages(
        self, policies: tuple[Recompute, ...], stage_of_segment: IntArray
    ) -> tuple[IntArray, IntArray]:
        """Kept storages, once for every stage that needs them, and the first segment that does."""
        key = (policies, stage_of_segment.tobytes())
        if key not in self._saved:
            value, segment = self.activations(policies).saved
            bound = segment >= 0
            value, segment = value[bound], segment[bound]
            span = int(stage_of_segment.max()) + 1
            # Pairs are sorted by storage and segment, so the first of each has the least segment.
            codes, first = np.unique(value * span + stage_of_segment[segment], return_index=True)
            self._saved[key] = (codes // span, segment[first])
        return self._saved[key]

    def shared_bytes(self, split: Split) -> float:
        """Data, buffers and what the prologue makes: a rank's whole batch of it.

        Counted on every stage, though a stage may read only some of it.
        """
        values, weights = self.columns.values, self.weights(split)
        total = (values.num_bytes[self._data] * weights[values.scale[self._data]]).sum()
        total += (values.num_bytes[self._early] * weights[values.scale[self._early]]).sum()
        return float(total)

    def _shared_values(self) -> tuple[IntArray, IntArray]:
        """Storages of inputs other than parameters, and of what the prologue makes."""
        values, nodes = self.columns.values, self.columns.nodes
        used = np.unique(values.edge_value)
        made = used[values.producer[used] >= 0]
        return used[values.is_data[used]], made[nodes.phase[values.producer[made]] == PROLOGUE]

    def transient_bytes(self, split: Split, policies: tuple[Recompute, ...]) -> FloatArray:
        """(2, segments): most bytes alive beyond the kept ones in each forward and backward."""
        key = (split.data_parallel, split.batch_scale, split.num_microbatches, policies)
        if key not in self._transients:
            self._transients[key] = self.activations(policies).transient_bytes(
                self.weights(split), self.num_segments
            )
        return self._transients[key]

    # Counts ------------------------------------------------------------------------------------

    def convert_counts(
        self, split: Split, policies: tuple[Recompute, ...], stage_of_segment: IntArray
    ) -> tuple[dict[tuple[CollectiveKind, tuple[str, ...]], CollectiveCount], ...]:
        """For each stage the collectives of redistributions in one step, by kind and axes.

        Backward and forward ones count once for each micro-batch.
        """
        nodes, table = self.columns.nodes, self.columns.collectives
        again = np.zeros(len(nodes.segment), np.int64)
        again[self.activations(policies).recomputed] = 1
        runs = np.where(nodes.phase == PROLOGUE, 1, (1 + again) * split.num_microbatches)
        payload = np.rint(table.num_bytes * self.weights(split)[table.scale]).astype(np.int64)
        found = []
        for stage in range(int(stage_of_segment.max()) + 1):
            mine = self._nodes_of_stage(stage, stage_of_segment)[table.node]
            counts: dict[tuple[CollectiveKind, tuple[str, ...]], CollectiveCount] = {}
            for group, (kind, axes) in enumerate(table.groups):
                named = tuple(a for a in self.actual_axes(axes) if split.sizes.get(a, 1) > 1)
                rows = mine & (table.group == group)
                number = int(runs[table.node[rows]].sum())
                if not named or not number:
                    continue
                num_bytes = int((runs[table.node[rows]] * payload[rows]).sum())
                before = counts.get((kind, named), CollectiveCount(count=0, num_bytes=0))
                counts[kind, named] = CollectiveCount(
                    count=before.count + number, num_bytes=before.num_bytes + num_bytes
                )
            found.append(counts)
        return tuple(found)

    def _nodes_of_stage(self, stage: int, stage_of_segment: IntArray) -> NDArray[np.bool_]:
        """Which nodes a stage runs: its segments' and the free ones they need."""
        nodes, values = self.columns.nodes, self.columns.values
        free = nodes.segment < 0
        mine: NDArray[np.bool_] = ~free & (stage_of_segment[nodes.segment] == stage)
        maker = values.own_producer[values.crossing_value]
        edges = (maker >= 0) & free[np.maximum(maker, 0)]
        maker, reader = maker[edges], values.edge_reader[edges]
        while True:
            wanted = np.unique(maker[mine[reader]])
            if mine[wanted].all():
                return mine
            mine[wanted] = True
