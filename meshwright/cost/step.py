"""The cost of one training step: from a table and a choice to time and memory by cause.

For every stage the forward F and the backward B of one micro-batch are sums over its segments of
compute, exposed launches, collectives, and the exposed part of ZeRO gathers and reduce-scatters.
The schedule is simulated with these; after its last backward a stage reduces gradients, steps the
optimizer and publishes parameters. The step ends with the last stage to finish.

The breakdown is that of the stage with the most work; what the step takes beyond that stage's own
work is ``pipeline_transfer`` (as far as a simulation without transfers is faster) and ``bubble``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.cluster.model import Cluster, Device
from meshwright.cost.collectives import CollectivePrices
from meshwright.cost.columns import FORWARD, FloatArray, IntArray, sums_by
from meshwright.cost.memory import MemoryRequest, StageMemory, stage_memory
from meshwright.cost.parameters import ParameterState, StageParameters
from meshwright.cost.pipeline import closed_form_s, finish_times_s, step_lower_bound_s
from meshwright.cost.reduction import DataTraffic, Payload, data_traffic, stages_of, traffic_times_s
from meshwright.cost.roofline import Roofline, roofline_of
from meshwright.cost.table import CostTable, Split
from meshwright.plans.plan import OptimizerSpec, Recompute, ScheduleName

__all__ = ["TIME_CAUSES", "Choice", "StepCost", "StepPricer"]

TIME_CAUSES = (
    "compute",
    "launch",
    "tp_communication",
    "zero_gather",
    "dp_communication",
    "optimizer",
    "pipeline_transfer",
    "bubble",
)

_OVERLAP_FRACTION = 0.8
"""Share of a function's compute that communication started early can hide behind. Assumption: the
first bucket is ready only after the first backward segment, and the last has nothing behind it."""

_OVERLAP_SLOWDOWN = 0.19
"""Compute slows by this much while a collective runs beside it (arXiv 2507.03114, average)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a plan decides beyond sharding labels."""

    split: Split
    starts: tuple[int, ...]
    """First segment of each stage."""
    first_devices: tuple[int, ...]
    """First device of each stage."""
    zero_stages: tuple[int, ...]
    """One for each segment."""
    policies: tuple[Recompute, ...]
    """One for each segment."""
    schedule: ScheduleName
    bucket_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Time and memory of one step."""

    breakdown_s: dict[str, float]
    """``TIME_CAUSES`` to seconds; they sum to ``time_s``."""
    memory: StageMemory
    capacity_bytes: FloatArray
    """(stages,) of the smallest device."""

    @property
    def time_s(self) -> float:
        """Seconds of the step."""
        return sum(self.breakdown_s.values())

    @property
    def fullest_stage(self) -> int:
        """The stage with the least room."""
        return int(np.argmax(self.memory.peak_bytes / self.capacity_bytes))

    @property
    def fits(self) -> bool:
        """Every stage fits its devices."""
        return bool((self.memory.peak_bytes <= self.capacity_bytes).all())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """Seconds of every stage by cause; arrays of shape (stages,)."""

    forward: dict[str, FloatArray]
    """One micro-batch."""
    backward: dict[str, FloatArray]
    """One micro-batch."""
    tail: dict[str, FloatArray]
    """Once, after the last backward; the prologue too."""


class StepPricer:
    """Prices choices on one cluster."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        dtype: str,
        optimizer: OptimizerSpec,
        reserved_fraction: float,
    ) -> None:
        """Price for a torch dtype name.

        Args:
            cluster: where it runs.
            dtype: element type whose peak counts.
            optimizer: what steps the parameters.
            reserved_fraction: share of accelerator memory that is not ours to plan with.
        """
        self.cluster = cluster
        self.prices = CollectivePrices(cluster)
        self.optimizer = optimizer
        self.rooflines: dict[str, Roofline] = {
            device.name: roofline_of(device, dtype) for device in cluster.devices
        }
        self._reserved_fraction = reserved_fraction
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
            usable = min(
                int(d.memory_bytes * (1.0 if d.name == "cpu" else 1 - self._reserved_fraction))
                for d in devices
            )
            self._stage_devices[key] = (slowest, usable)
        return self._stage_devices[key]

    @property
    def is_rounded(self) -> bool:
        """Whether the allocator rounds (any accelerator)."""
        return any(device.name != "cpu" for device in self.cluster.devices)

    def bound_s(self, table: CostTable, choice: Choice) -> float:
        """What a choice takes at least: its segments' own work, without data parallelism."""
        roofline = max(self.rooflines.values(), key=lambda r: r.flop_per_s)
        times = table.segment_times(
            choice.split, choice.policies, roofline=roofline, prices=self.prices
        )
        starts = np.array(choice.starts, dtype=np.int64)
        stages = np.add.reduceat(times.total_s, starts)
        return step_lower_bound_s(
            stages.tolist(), [0.0] * len(starts), choice.split.num_microbatches
        )

    def state_excess(self, table: CostTable, choice: Choice) -> float:
        """Parameters, optimizer state and gradients of the fullest stage, over its capacity."""
        stage_of = stages_of(choice.starts, table.num_segments)
        state, placed = self._parameters(table, choice, stage_of)
        each = state.stored_bytes + state.optimizer_bytes + state.gradient_bytes
        total = np.bincount(placed.stage, weights=each[placed.parameter])
        per_stage = self._devices_per_stage(choice)
        capacity = max(self.device_of_stage(first, per_stage)[1] for first in choice.first_devices)
        return float(total.max() / capacity)

    # One choice --------------------------------------------------------------------------------

    def price(self, table: CostTable, choice: Choice, *, simulate: bool = True) -> StepCost:
        """Time and memory of one choice.

        Without ``simulate`` the pipeline's closed form stands in for the schedule: the time of a
        schedule without waits beyond filling and draining.
        """
        stage_of = stages_of(choice.starts, table.num_segments)
        state, placed = self._parameters(table, choice, stage_of)
        traffic = data_traffic(
            table,
            choice.split,
            choice.policies,
            state=state,
            placed=placed,
            num_stages=len(choice.starts),
        )
        crossing = table.crossing_bytes(choice.split, stage_of) if len(choice.starts) > 1 else {}
        passing = np.zeros(len(choice.starts))
        for (_, source, target), num_bytes in crossing.items():
            passing[source] += num_bytes
            passing[target] += num_bytes
        work = self._work(table, choice, traffic, state, placed)
        memory = stage_memory(
            table,
            MemoryRequest(
                split=choice.split,
                policies=choice.policies,
                schedule=choice.schedule,
                starts=choice.starts,
                bucket_bytes=choice.bucket_bytes,
            ),
            state=state,
            placed=placed,
            gathered_bytes=(
                traffic.forward_gather.num_bytes,
                traffic.backward_gather.num_bytes,
            ),
            crossing_bytes=passing,
            is_rounded=self.is_rounded,
        )
        per_stage = self._devices_per_stage(choice)
        capacity = np.array(
            [self.device_of_stage(first, per_stage)[1] for first in choice.first_devices],
            dtype=np.float64,
        )
        return StepCost(
            breakdown_s=self._breakdown(choice, work, crossing, simulate),
            memory=memory,
            capacity_bytes=capacity,
        )

    def segment_bytes(
        self, table: CostTable, choice: Choice
    ) -> tuple[FloatArray, FloatArray, float]:
        """What segments bring to a stage, for cutting stages by memory.

        Returns (segments,) bytes of parameters, optimizer state and gradients; (segments,) bytes
        kept for one micro-batch; and the bytes any stage needs besides.
        """
        whole = np.zeros(table.num_segments, dtype=np.int64)
        state, _ = self._parameters(table, choice, stages_of(choice.starts, table.num_segments))
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

    def _devices_per_stage(self, choice: Choice) -> int:
        count = 1
        for _, size in choice.split.axis_sizes:
            count *= size
        return count

    def _parameters(
        self, table: CostTable, choice: Choice, stage_of: IntArray
    ) -> tuple[ParameterState, StageParameters]:
        dp_shard = choice.split.sizes["dp_shard"]
        key = (id(table), choice.zero_stages, dp_shard)
        if key not in self._states:
            self._states[key] = table.parameters.state(
                choice.zero_stages, dp_shard=dp_shard, optimizer=self.optimizer
            )
        place = (id(table), choice.starts)
        if place not in self._placed:
            self._placed[place] = table.parameters.on_stages(stage_of)
        return self._states[key], self._placed[place]

    # Time --------------------------------------------------------------------------------------

    def _work(
        self,
        table: CostTable,
        choice: Choice,
        traffic: DataTraffic,
        state: ParameterState,
        placed: StageParameters,
    ) -> _Work:
        starts = np.array(choice.starts, dtype=np.int64)
        size, count = len(starts), table.num_segments
        rooflines = self._rooflines_of_stages(choice)
        times = {
            roofline: table.segment_times(
                choice.split, choice.policies, roofline=roofline, prices=self.prices
            )
            for roofline in set(rooflines)
        }

        def stages(field: str) -> FloatArray:
            sums = {
                roofline: np.add.reduceat(np.asarray(getattr(found, field)), starts)
                for roofline, found in times.items()
            }
            return np.array([sums[roofline][s] for s, roofline in enumerate(rooflines)])

        free_s = np.array([times[roofline].free_s for roofline in rooflines])
        hides = np.array([roofline.queue_runs_ahead for roofline in rooflines])
        forward_s, backward_s = stages("forward_s"), stages("backward_s")

        def gather(payload: Payload) -> FloatArray:
            return np.add.reduceat(self._traffic_s((payload,), choice, None, count), starts)

        def reduce(payloads: tuple[Payload, ...]) -> FloatArray:
            return self._traffic_s(payloads, choice, choice.bucket_bytes, size)

        every_s = reduce(traffic.every_backward)
        forward = {
            "compute": forward_s + free_s,
            "launch": stages("forward_launch_s"),
            "tp_communication": stages("forward_communication_s"),
            "zero_gather": _exposed_s(gather(traffic.forward_gather), forward_s, hides),
        }
        backward = {
            "compute": backward_s,
            "launch": stages("backward_launch_s"),
            "tp_communication": stages("backward_communication_s"),
            "zero_gather": _exposed_s(gather(traffic.backward_gather), backward_s, hides),
            "dp_communication": _exposed_s(every_s, backward_s, hides),
        }
        step_bytes = sums_by(placed.stage, state.step_traffic_bytes[placed.parameter], size)
        tail = {
            "compute": np.array([times[roofline].prologue_s for roofline in rooflines]),
            "dp_communication": _exposed_s(reduce(traffic.once), backward_s, hides)
            + gather(traffic.publish[0])
            + self._tied_s(traffic, choice),
            "optimizer": step_bytes / np.array([r.bytes_per_s for r in rooflines]),
        }
        return _Work(forward=forward, backward=backward, tail=tail)

    def _rooflines_of_stages(self, choice: Choice) -> list[Roofline]:
        count = self._devices_per_stage(choice)
        devices = [self.device_of_stage(first, count)[0] for first in choice.first_devices]
        return [self.rooflines[device.name] for device in devices]

    def _traffic_s(
        self, payloads: tuple[Payload, ...], choice: Choice, bucket_bytes: int | None, size: int
    ) -> FloatArray:
        return traffic_times_s(
            payloads, choice.split, self.prices, bucket_bytes=bucket_bytes, size=size
        )

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

    def _breakdown(
        self,
        choice: Choice,
        work: _Work,
        crossing: object,
        simulate: bool,
    ) -> dict[str, float]:
        micro = choice.split.num_microbatches
        forward_s = np.sum(list(work.forward.values()), axis=0)
        backward_s = np.sum(list(work.backward.values()), axis=0)
        tail_s = np.sum(list(work.tail.values()), axis=0)
        forward_transfer, backward_transfer = self._transfers(choice, crossing)
        if simulate:

            def end_s(
                there: dict[tuple[int, int], float], back: dict[tuple[int, int], float]
            ) -> float:
                finish = finish_times_s(
                    choice.schedule,
                    forward_s=forward_s.tolist(),
                    backward_s=backward_s.tolist(),
                    num_microbatches=micro,
                    forward_transfer_s=there,
                    backward_transfer_s=back,
                )
                return float(np.max(np.array(finish) + tail_s))

            total_s = end_s(forward_transfer, backward_transfer)
            without_s = end_s({}, {}) if forward_transfer or backward_transfer else total_s
        else:
            through_s = closed_form_s(forward_s.tolist(), backward_s.tolist(), micro)
            without_s = through_s + float(tail_s.max())
            total_s = without_s + sum(forward_transfer.values()) + sum(backward_transfer.values())
        own_s = micro * (forward_s + backward_s) + tail_s
        busiest = int(np.argmax(own_s))
        breakdown = dict.fromkeys(TIME_CAUSES, 0.0)
        for part, times in ((work.forward, micro), (work.backward, micro), (work.tail, 1)):
            for cause, seconds in part.items():
                breakdown[cause] += times * float(seconds[busiest])
        breakdown["pipeline_transfer"] = max(total_s - without_s, 0.0)
        breakdown["bubble"] = max(without_s - float(own_s[busiest]), 0.0)
        return breakdown

    def _transfers(
        self, choice: Choice, crossing: object
    ) -> tuple[dict[tuple[int, int], float], dict[tuple[int, int], float]]:
        """Seconds each pair of stages needs for one micro-batch's values, by phase."""
        forward: dict[tuple[int, int], float] = {}
        backward: dict[tuple[int, int], float] = {}
        assert isinstance(crossing, dict)
        for (phase, source, target), num_bytes in crossing.items():
            seconds = self.prices.send_time_s(
                num_bytes, choice.first_devices[source], choice.first_devices[target]
            )
            (forward if phase == FORWARD else backward)[source, target] = seconds
        return forward, backward


def _exposed_s(communication_s: FloatArray, compute_s: FloatArray, hides: np.ndarray) -> FloatArray:
    """What communication adds to compute it may run beside, the slowed compute included.

    On a CPU nothing hides: the cores that compute also move the bytes.
    """
    hidden = np.where(hides, np.minimum(communication_s, _OVERLAP_FRACTION * compute_s), 0.0)
    return np.asarray(communication_s - (1 - _OVERLAP_SLOWDOWN) * hidden)
