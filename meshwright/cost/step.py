"""The cost of one training step: from a table and a choice to time and memory by cause.

For every stage the forward F and the backward B of one micro-batch are sums over its segments of
compute, exposed launches, collectives, and the exposed part of ZeRO gathers and reduce-scatters.
The schedule is simulated with these; after its last backward a stage reduces gradients, steps the
optimizer and publishes parameters. The step ends with the last stage to finish.

The breakdown is that of the stage with the most work; what the step takes beyond that stage's own
work is ``pipeline_transfer`` (as far as a simulation without transfers is faster) and ``bubble``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from meshwright.cluster.model import Cluster, Device
from meshwright.cost.breakdown import step_breakdown_s
from meshwright.cost.calibration import Calibration
from meshwright.cost.choice import TIME_CAUSES, Choice, StepCost
from meshwright.cost.collectives import CollectivePrices
from meshwright.cost.columns import FORWARD, FloatArray, IntArray, sums_by
from meshwright.cost.compression import codec_of
from meshwright.cost.memory import MemoryRequest, StageMemory, stage_memory
from meshwright.cost.parameters import ParameterState, StageParameters
from meshwright.cost.pipeline import Transfers, inputs_of_crossing, step_lower_bound_s
from meshwright.cost.pricing import ANALYTIC, Pricing
from meshwright.cost.reduction import DataTraffic, data_traffic
from meshwright.cost.resharding import crossing_of, transfer_time_s
from meshwright.cost.roofline import Roofline, roofline_of
from meshwright.cost.stage_parts import (
    Places,
    StagePart,
    at_place,
    fullest_part,
    host_scales,
    merged_memory,
    merged_work,
    slowest_part,
)
from meshwright.cost.stage_work import StageOrder, StageWork, stage_work, work_parts
from meshwright.cost.table import CostTable, Split
from meshwright.errors import PlanRefused
from meshwright.plans.plan import OptimizerSpec, ScheduleName

__all__ = ["TIME_CAUSES", "Choice", "StepCost", "StepPricer"]


class StepPricer:
    """Prices choices on one cluster."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        dtype: str,
        optimizer: OptimizerSpec,
        pricing: Pricing = ANALYTIC,
    ) -> None:
        """Price for a torch dtype name.

        Args:
            cluster: where it runs.
            dtype: element type whose peak counts.
            optimizer: what steps the parameters.
            pricing: of operators and collectives on accelerators, and how they join.

        Raises:
            BadRequest: a device has no unit for the type.
        """
        self.cluster = cluster
        self.pricing = pricing
        self.calibration = calibration = pricing.calibration
        self.prices = CollectivePrices(
            cluster, pricer=pricing.collectives, link_efficiency=calibration.link_efficiency
        )
        self.optimizer = optimizer
        self.rooflines: dict[str, Roofline] = {
            device.name: roofline_of(
                device,
                dtype,
                calibration=calibration,
                operators=None if device.name == "cpu" else pricing.operators,
            )
            for device in cluster.devices
        }
        self._usable = {
            device.name: _usable_bytes(device, calibration) for device in cluster.devices
        }
        self.is_rounded = any(device.name != "cpu" for device in cluster.devices)
        """Whether the allocator rounds (any accelerator)."""
        self.allocator_share = calibration.allocator_share if self.is_rounded else 0.0
        """What an accelerator's allocator holds unused (``cost.memory``)."""
        self._places = Places(cluster)
        self._orders: dict[tuple[object, ...], StageOrder] = {}
        self._stage_devices: dict[tuple[int, int], tuple[Device, int]] = {}
        self._states: dict[tuple[object, ...], ParameterState] = {}
        self._placed: dict[tuple[object, ...], StageParameters] = {}

    def device_of_stage(self, first: int, count: int) -> tuple[Device, int]:
        """The slowest device of a stage, and the least memory a rank of it may use."""
        key = (first, count)
        if key not in self._stage_devices:
            hosts = range(self.cluster.host_of(first), self.cluster.host_of(first + count - 1) + 1)
            devices = [self.cluster.hosts[host].device for host in hosts]
            slowest = min(devices, key=lambda d: self.rooflines[d.name].flop_per_s)
            usable = min(self.usable_bytes(device.name) for device in devices)
            self._stage_devices[key] = (slowest, usable)
        return self._stage_devices[key]

    def usable_bytes(self, device: str) -> int:
        """Memory a rank may use on a type of device."""
        return self._usable[device]

    def bound_s(self, table: CostTable, choice: Choice) -> float:
        """What a choice takes at least: its segments' own work, without data parallelism.

        Each on the type of device that is fastest at it.
        """
        each = [
            table.segment_times(choice.split, choice.policies, roofline=one, prices=self.prices)
            for one in self.rooflines.values()
        ]
        order = self._order(choice, table.num_segments)
        forwards = [t.forward_s + t.forward_launch_s + t.forward_communication_s for t in each]
        forward_s = order.sums(np.min(forwards, axis=0))
        total_s = order.sums(np.min([times.total_s for times in each], axis=0))
        num_stages = len(forward_s)
        crossing = table.crossing_bytes(choice.split, order.stage_of) if num_stages > 1 else {}
        return step_lower_bound_s(
            forward_s.tolist(),
            (total_s - forward_s).tolist(),
            choice.split.num_microbatches,
            stage_inputs=inputs_of_crossing(crossing, num_stages),
            num_groups=choice.num_groups,
            is_split=choice.schedule is ScheduleName.ZB_H1,
        )

    # One choice --------------------------------------------------------------------------------

    def price(self, table: CostTable, choice: Choice, *, simulate: bool = True) -> StepCost:
        """Time and memory of one choice whose stages share a mesh.

        Without ``simulate`` the pipeline's closed form stands in for the schedule: the time of a
        schedule without waits beyond filling and draining.
        """
        assert not choice.stage_splits, "stages with meshes of their own: price_stages"
        return self.price_stages([table] * len(choice.starts), choice, simulate=simulate)

    def price_stages(
        self,
        tables: Sequence[CostTable],
        choice: Choice,
        *,
        whole: CostTable | None = None,
        simulate: bool = True,
    ) -> StepCost:
        """Time and memory of one choice.

        Args:
            tables: one for each stage, for the mesh of that stage.
            choice: what is decided.
            whole: the table of one device, which tells the bytes of whole values; needed where
                stages have meshes of their own.
            simulate: as in ``price``.
        """
        order = self._order(choice, tables[0].num_segments)
        parts = self._parts(tables, choice)
        works, memories = [], []
        for part in parts:
            work, memory = self._price_part(part, choice, order)
            works.append(work)
            memories.append(memory)
        busiest = slowest_part(parts, works, choice.split.num_microbatches)
        fullest = fullest_part(parts, memories)
        every = np.arange(len(choice.starts))
        forward_s, backward_s = self._transfers(tables, choice, whole)
        return StepCost(
            breakdown_s=step_breakdown_s(
                choice,
                merged_work(works, busiest),
                forward_transfer_s=forward_s,
                backward_transfer_s=backward_s,
                latency_s=self._latency_s(choice),
                simulate=simulate,
                calibration=self.calibration,
            ),
            memory=merged_memory(memories, fullest),
            capacity_bytes=np.array([part.capacity_bytes for part in parts])[fullest, every],
        )

    def work(self, table: CostTable, choice: Choice) -> StageWork:
        """Work of every stage of a choice whose stages share a mesh."""
        tables = [table] * len(choice.starts)
        order = self._order(choice, table.num_segments)
        parts = self._parts(tables, choice)
        works = [self._price_part(part, choice, order)[0] for part in parts]
        return merged_work(works, slowest_part(parts, works, choice.split.num_microbatches))

    def _parts(self, tables: Sequence[CostTable], choice: Choice) -> tuple[StagePart, ...]:
        """The distinct ways in which stages compute."""
        count = len(choice.starts)
        if not choice.stage_splits and not any(choice.batch_shares) and self._places.is_even:
            devices = [self.device_of_stage(*place) for place in choice.places]
            part = StagePart(
                table=tables[0],
                split=choice.split,
                stages=tuple(range(count)),
                rooflines=tuple(self.rooflines[device.name] for device, _ in devices),
                capacity_bytes=np.array([usable for _, usable in devices], dtype=np.float64),
            )
            return (part,)
        found: dict[tuple[CostTable, Split, Roofline], dict[int, int]] = {}
        for stage, (first, size) in enumerate(choice.places):
            here = self._places.representative(first, size)
            slowest, usable = self.device_of_stage(first, size)
            ways = {(slowest.name, 1.0): usable}
            if choice.batch_shares and choice.batch_shares[stage]:
                scales = host_scales(self.cluster, first, size, choice.batch_shares[stage])
                ways = {way: self.usable_bytes(way[0]) for way in scales}
                if not tables[stage].columns.is_scaled:
                    raise PlanRefused("$.stages: batch_shares need a batch that the mesh divides")
            for (device, scale), usable_bytes in ways.items():
                split = at_place(choice.split_of(stage), here, scale)
                key = (tables[stage], split, self.rooflines[device])
                found.setdefault(key, {})[stage] = usable_bytes
        return tuple(
            StagePart(
                table=table,
                split=split,
                stages=tuple(usable),
                rooflines=(roofline,) * count,
                capacity_bytes=np.array([usable.get(s, 1) for s in range(count)], np.float64),
            )
            for (table, split, roofline), usable in found.items()
        )

    def _order(self, choice: Choice, num_segments: int) -> StageOrder:
        key = (choice.starts, choice.stage_of_segment, num_segments)
        if key not in self._orders:
            self._orders[key] = StageOrder.of(choice.stage_of(num_segments))
        return self._orders[key]

    def _price_part(
        self, part: StagePart, choice: Choice, order: StageOrder
    ) -> tuple[StageWork, StageMemory]:
        """Work and memory of every stage, as if each were one of the part's."""
        table, split = part.table, part.split
        state, placed = self._parameters(table, choice, order.stage_of, split)
        num_stages = len(choice.starts)
        work, traffic = self._work(part, choice, order, state, placed)
        crossing = crossing_of(table, split, order.stage_of, relays=choice.relays)
        passing = np.zeros(num_stages)
        for (_, source, target), num_bytes in crossing.items():
            passing[source] += num_bytes
            passing[target] += num_bytes
        memory = stage_memory(
            table,
            MemoryRequest(
                split=split,
                policies=choice.policies,
                schedule=choice.schedule,
                starts=choice.starts,
                bucket_bytes=choice.bucket_bytes,
                stage_of_segment=choice.stage_of_segment,
                num_groups=choice.num_groups,
                num_slices=max(len(choice.token_slices), 1),
                stage_inputs=inputs_of_crossing(crossing, num_stages),
            ),
            state=state,
            placed=placed,
            gathered_bytes=(
                traffic.forward_gather.num_bytes,
                traffic.backward_gather.num_bytes,
            ),
            crossing_bytes=passing,
            is_rounded=self.is_rounded,
            allocator_share=self.allocator_share,
            is_in_place=bool(self.calibration.accumulates_in_place),
        )
        return work, memory

    def _work(
        self,
        part: StagePart,
        choice: Choice,
        order: StageOrder,
        state: ParameterState,
        placed: StageParameters,
    ) -> tuple[StageWork, DataTraffic]:
        table, split = part.table, part.split
        traffic = data_traffic(
            table,
            split,
            choice.policies,
            state=state,
            placed=placed,
            num_stages=len(choice.starts),
        )
        work = stage_work(
            table,
            split,
            choice.policies,
            order=order,
            rooflines=part.rooflines,
            prices=self.prices,
            bucket_bytes=choice.bucket_bytes,
            traffic=traffic,
            state=state,
            placed=placed,
            tied_s=self._tied_s(traffic, choice),
            calibration=self.calibration,
        )
        puts_off = choice.schedule is ScheduleName.ZB_H1
        if puts_off or choice.token_slices:
            parts = work_parts(
                table,
                split,
                choice.policies,
                order=order,
                rooflines=part.rooflines,
                prices=self.prices,
                work=work,
                with_weight=puts_off,
                with_slices=bool(choice.token_slices),
            )
            work = replace(work, parts=parts)
        return work, traffic

    def traffic(self, table: CostTable, choice: Choice, split: Split) -> DataTraffic:
        """What data parallelism communicates in a step, if every stage had ``table``."""
        stage_of = self._order(choice, table.num_segments).stage_of
        state, placed = self._parameters(table, choice, stage_of, split)
        return data_traffic(
            table,
            split,
            choice.policies,
            state=state,
            placed=placed,
            num_stages=len(choice.starts),
        )

    def segment_work(self, table: CostTable, choice: Choice) -> StageWork:
        """Work of every segment as if each were a stage in the place of the choice's first.

        Sums over segments come near the work of a stage: what every stage does for itself counts
        once for each segment.
        """
        count = table.num_segments
        alone = replace(
            choice, starts=tuple(range(count)), first_devices=choice.first_devices[:1] * count
        )
        order = self._order(alone, count)
        (part,) = self._parts([table] * count, alone)
        state, placed = self._parameters(table, alone, order.stage_of, part.split)
        return self._work(part, alone, order, state, placed)[0]

    def segment_bytes(
        self, table: CostTable, choice: Choice
    ) -> tuple[FloatArray, FloatArray, float]:
        """What segments bring to a stage, for cutting stages by memory.

        Returns (segments,) bytes of parameters, optimizer state and gradients; (segments,) bytes
        kept for one micro-batch; and the bytes any stage needs besides.
        """
        whole = np.zeros(table.num_segments, dtype=np.int64)
        stage_of = self._order(choice, table.num_segments).stage_of
        state, _ = self._parameters(table, choice, stage_of, choice.split)
        placed = table.parameters.on_stages(whole)
        copies = 2.0 if choice.split.num_microbatches > 1 else 1.0
        each = state.stored_bytes + state.optimizer_bytes + copies * state.gradient_bytes
        fixed = sums_by(placed.segment, each[placed.parameter], table.num_segments)
        value, segment = table.saved_on_stages(choice.policies, whole)
        columns = table.columns.values
        weights = table.weights(choice.split)
        kept = sums_by(
            segment,
            columns.num_bytes[value] * weights[columns.scale[value]],
            table.num_segments,
        )
        transient = table.transient_bytes(choice.split, choice.policies)
        spare = float(transient.max()) + table.shared_bytes(choice.split)
        zero3 = state.zero_stage[placed.parameter] == 3
        gathered = sums_by(
            placed.segment[zero3],
            state.padded_bytes[placed.parameter[zero3]],
            table.num_segments,
        )
        return fixed, kept, spare + 2 * float(gathered.max()) + 2.0 * choice.bucket_bytes

    def _parameters(
        self, table: CostTable, choice: Choice, stage_of: IntArray, split: Split
    ) -> tuple[ParameterState, StageParameters]:
        dp_shard = split.sizes["dp_shard"]
        if self.calibration.shards_over_context:
            dp_shard *= split.sizes.get("cp", 1)
        key = (id(table), choice.zero_stages, dp_shard, choice.offloaded)
        if key not in self._states:
            self._states[key] = table.parameters.state(
                choice.zero_stages,
                dp_shard=dp_shard,
                optimizer=self.optimizer,
                offloaded=choice.offloaded,
                calibration=self.calibration,
            )
        place = (id(table), choice.starts, choice.stage_of_segment)
        if place not in self._placed:
            self._placed[place] = table.parameters.on_stages(stage_of)
        return self._states[key], self._placed[place]

    # Time --------------------------------------------------------------------------------------

    def _tied_s(self, traffic: DataTraffic, choice: Choice) -> FloatArray:
        """Exchange of tied gradients between the first and last stage that holds one."""
        holders = np.flatnonzero(traffic.tied_bytes)
        found = np.zeros(len(choice.starts))
        if len(holders) < 2:
            return found
        first, last = (choice.first_devices[holders[i]] for i in (0, -1))
        num_bytes = float(traffic.tied_bytes[holders].max())
        found[holders] = self.prices.send_time_s(num_bytes, first, last)
        return found

    def _latency_s(self, choice: Choice) -> Callable[[int, int], float]:
        """Seconds of the least message from one stage to another."""
        devices = choice.first_devices
        return lambda source, target: self.prices.send_time_s(1, devices[source], devices[target])

    def _transfers(
        self, tables: Sequence[CostTable], choice: Choice, whole: CostTable | None
    ) -> tuple[Transfers, Transfers]:
        """Seconds each pair of stages needs for one micro-batch's values, by phase."""
        forward: dict[tuple[int, int], float] = {}
        backward: dict[tuple[int, int], float] = {}
        if len(choice.starts) == 1:
            return forward, backward
        stage_of = self._order(choice, tables[0].num_segments).stage_of
        places = choice.places
        received = {
            (table, split): crossing_of(table, split, stage_of, relays=choice.relays)
            for table, split in dict.fromkeys(self._ways(tables, choice))
        }
        ways = self._ways(tables, choice)
        alone = replace(
            choice.split, axis_sizes=tuple((axis, 1) for axis, _ in choice.split.axis_sizes)
        )
        all_bytes = (
            {} if whole is None else crossing_of(whole, alone, stage_of, relays=choice.relays)
        )
        codec = codec_of(choice.pipeline_compression, tables[0].item_bytes)
        slowest = min(roofline.bytes_per_s for roofline in self.rooflines.values())
        for phase, source, target in dict.fromkeys(key for of in received.values() for key in of):
            num_bytes = received[ways[target]].get((phase, source, target), 0.0)
            is_same = ways[source] == ways[target]
            assert is_same or whole is not None, "stages with meshes of their own need all bytes"
            seconds = transfer_time_s(
                self.prices,
                source=places[source],
                target=places[target],
                num_bytes=num_bytes,
                whole_bytes=None if is_same else all_bytes.get((phase, source, target), 0.0),
                codec=codec,
                device_bytes_per_s=slowest,
            )
            (forward if phase == FORWARD else backward)[source, target] = seconds
        return forward, backward

    @staticmethod
    def _ways(tables: Sequence[CostTable], choice: Choice) -> list[tuple[CostTable, Split]]:
        return [(table, choice.split_of(stage)) for stage, table in enumerate(tables)]


def _usable_bytes(device: Device, calibration: Calibration) -> int:
    """Memory that is ours to plan with."""
    if device.name == "cpu":
        return int(device.memory_bytes)
    share = (1 - calibration.reserved_fraction) / (1 + calibration.memory_margin)
    return max(int(device.memory_bytes * share) - calibration.reserved_bytes, 0)
