"""Ways to run a stage: a sub-mesh of some size, and what the stage does on it.

The hosts of a cluster fall into pools of equal hosts. A stage takes some devices of a host, or
whole hosts of one pool. For every size the ways are tensor parallel within a host, data parallel
over the rest, ZeRO 0, 1 or 3 over all of that or over a host, and how much is recomputed. Each is
priced for all segments at once, as if every segment were a stage; a stage of several is a sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from meshwright.cluster.model import Cluster
from meshwright.cost.choice import Choice
from meshwright.cost.columns import FloatArray, IntArray, sums_by
from meshwright.cost.table import CostTable, Split
from meshwright.errors import PlanRefused
from meshwright.plans.plan import AXIS_NAMES, CommunicationOptions, Recompute, ScheduleName
from meshwright.space.search import SearchContext
from meshwright.space.uniform import UniformChoice, divisors, table_of, tensor_parallel_sizes

__all__ = [
    "OptionCosts",
    "Pool",
    "StageOption",
    "option_costs",
    "pools_of",
    "priced_options",
    "sizes_of",
    "stage_costs",
    "whole_hosts_only",
]

_WHOLE_HOSTS_FROM = 128
"""With more devices than this a stage takes whole hosts only."""

_ZERO_STAGES = (1, 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Equal hosts."""

    hosts: tuple[int, ...]
    devices_per_host: int
    first_device: int

    @property
    def num_devices(self) -> int:
        """Devices of all its hosts."""
        return len(self.hosts) * self.devices_per_host


def pools_of(cluster: Cluster) -> tuple[Pool, ...]:
    """The pools of a cluster, in order of their first hosts."""
    found: dict[tuple[object, ...], list[int]] = {}
    for number, host in enumerate(cluster.hosts):
        found.setdefault((host.device.name, host.num_devices, host.link.name), []).append(number)
    return tuple(
        Pool(
            hosts=tuple(hosts),
            devices_per_host=cluster.hosts[hosts[0]].num_devices,
            first_device=cluster.devices_of_host(hosts[0]).start,
        )
        for hosts in found.values()
    )


def sizes_of(pool: Pool, *, whole_hosts: bool) -> tuple[int, ...]:
    """Devices a stage on the pool may have, ascending."""
    each, count = pool.devices_per_host, len(pool.hosts)
    inside = () if whole_hosts else range(1, each)
    few = range(1, min(count, 8) + 1)
    many = {count // ways for ways in range(1, 9)} | set(divisors(count))
    return tuple(sorted({*inside, *(each * hosts for hosts in {*few, *many} if hosts)}))


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOption:
    """What a stage does on a sub-mesh."""

    pool: int
    tp: int
    sequence_parallel: bool
    data_parallel: int
    dp_shard: int
    """Devices ZeRO shards over; 1 without ZeRO."""
    zero_stage: int
    recompute: Recompute

    @property
    def num_devices(self) -> int:
        """Devices of the sub-mesh."""
        return self.tp * self.data_parallel

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each of ``AXIS_NAMES``."""
        return {
            **dict.fromkeys(AXIS_NAMES, 1),
            "dp_replicate": self.data_parallel // self.dp_shard,
            "dp_shard": self.dp_shard,
            "tp": self.tp,
        }

    @property
    def uniform(self) -> UniformChoice:
        """The same for all segments."""
        sizes = self.sizes
        return UniformChoice(
            dp_replicate=sizes["dp_replicate"],
            dp_shard=sizes["dp_shard"],
            tp=self.tp,
            sequence_parallel=self.sequence_parallel,
            zero_stage=self.zero_stage,
            recompute=self.recompute,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionCosts:
    """What an option costs every segment; arrays of shape (V,)."""

    option: StageOption
    time_s: FloatArray
    """Of one micro-batch, and of what comes once a step the part of one micro-batch."""
    fixed_bytes: FloatArray
    """Parameters, their gradients and state."""
    kept_bytes: FloatArray
    """Kept for one micro-batch."""
    spare_bytes: FloatArray
    """Alive while the segment is at work; a stage needs the most of its segments'."""
    capacity_bytes: float
    """What is left of a device after what every stage holds."""


def _options_of(
    context: SearchContext,
    pool: int,
    pools: Sequence[Pool],
    size: int,
    *,
    num_microbatches: int,
    sequence_parallel: bool,
) -> Iterator[StageOption]:
    """Ways to run a stage on ``size`` devices of a pool that the batch allows."""
    for tp in tensor_parallel_sizes(context):
        within = min(size, pools[pool].devices_per_host)
        data = size // tp
        if within % tp or context.batch % (data * num_microbatches):
            continue
        for recompute in Recompute:
            for zero_stage, dp_shard in _zero_choices(data, max(within // tp, 1)):
                yield StageOption(
                    pool=pool,
                    tp=tp,
                    sequence_parallel=sequence_parallel,
                    data_parallel=data,
                    dp_shard=dp_shard,
                    zero_stage=zero_stage,
                    recompute=recompute,
                )


def _zero_choices(data: int, near: int) -> Iterator[tuple[int, int]]:
    """ZeRO stage and ``dp_shard``: over all data-parallel ranks, or those of one host."""
    yield 0, 1
    for dp_shard in sorted({data, near} - {1}):
        for zero_stage in _ZERO_STAGES:
            if data % dp_shard == 0:
                yield zero_stage, dp_shard


def option_costs(
    context: SearchContext, option: StageOption, first_device: int, num_microbatches: int
) -> OptionCosts:
    """Price an option for every segment.

    Raises:
        PlanRefused: the graph cannot be sharded so.
    """
    pricer = context.model.pricer
    table = table_of(context, replace(option.uniform, num_microbatches=num_microbatches))
    count = table.num_segments
    split = Split(
        axis_sizes=tuple(option.sizes.items()), num_microbatches=num_microbatches, num_stages=1
    )
    choice = Choice(
        split=split,
        starts=(0,),
        first_devices=(first_device,),
        zero_stages=(option.zero_stage,) * count,
        policies=(option.recompute,) * count,
        schedule=ScheduleName.ONE_F_ONE_B,
        bucket_bytes=CommunicationOptions().bucket_bytes,
    )
    work = pricer.segment_work(table, choice)
    device, usable = pricer.device_of_stage(first_device, option.num_devices)
    times = table.segment_times(
        split,
        choice.policies,
        roofline=pricer.rooflines[device.name],
        prices=pricer.prices,
    )
    once_s = times.free_s + times.prologue_s / num_microbatches
    fixed, kept, spare = _bytes(context, table, choice)
    return OptionCosts(
        option=option,
        time_s=work.own_s(num_microbatches) / num_microbatches - once_s,
        fixed_bytes=fixed,
        kept_bytes=kept,
        spare_bytes=spare,
        capacity_bytes=usable - table.shared_bytes(split) - 2.0 * choice.bucket_bytes,
    )


def _bytes(
    context: SearchContext, table: CostTable, choice: Choice
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """(V,) fixed, kept, alive at work; parameters count with the first segment that has them."""
    fixed, kept, _ = context.model.pricer.segment_bytes(table, choice)
    spare = table.transient_bytes(choice.split, choice.policies).max(axis=0)
    if choice.zero_stages[0] == 3:
        parameter, segment = table.parameters.columns.use
        state = table.parameters.state(
            choice.zero_stages,
            dp_shard=choice.split.sizes["dp_shard"],
            optimizer=context.model.pricer.optimizer,
            calibration=context.model.pricer.calibration,
        )
        gathered = sums_by(segment, state.padded_bytes[parameter], table.num_segments)
        spare = spare + 2.0 * gathered
    return fixed, kept, spare


def stage_costs(
    options: Sequence[OptionCosts], units: IntArray, num_levels: int, num_microbatches: int
) -> tuple[FloatArray, IntArray]:
    """(L, K, K) seconds of the best option that fits, and its number.

    Args:
        options: on one sub-mesh.
        units: (V,) unit of each segment, ascending.
        num_levels: stages from the last that hold ever more micro-batches.
        num_microbatches: no stage holds more.
    """
    count = int(units.max()) + 1
    best = np.full((num_levels, count, count), math.inf)
    which = np.zeros(best.shape, dtype=np.int64)
    flight = np.minimum(np.arange(1, num_levels + 1), num_microbatches)
    upper = np.triu(np.ones((count, count), dtype=np.bool_))
    for number, costs in enumerate(options):
        time_s = _sums(sums_by(units, costs.time_s, count))
        fixed = _sums(sums_by(units, costs.fixed_bytes, count))
        kept = _sums(sums_by(units, costs.kept_bytes, count))
        spare = np.zeros(count)
        np.maximum.at(spare, units, costs.spare_bytes)
        most = np.maximum.accumulate(np.where(upper, spare, 0.0), axis=1)
        need = fixed + most + flight[:, None, None] * kept
        better = upper & (need <= costs.capacity_bytes) & (time_s < best)
        best = np.where(better, time_s, best)
        which[better] = number
    return best, which


def _sums(amounts: FloatArray) -> FloatArray:
    """(K, K) sums from the first unit to the last, inclusive."""
    before = np.concatenate([[0.0], np.cumsum(amounts)])
    return np.asarray(before[None, 1:] - before[:-1, None])


def priced_options(
    context: SearchContext,
    pools: Sequence[Pool],
    pool: int,
    size: int,
    *,
    num_microbatches: int,
    sequence_parallel: bool,
) -> list[OptionCosts]:
    """Every way to run a stage on ``size`` devices of a pool, priced, but for those refused."""
    found = []
    for option in _options_of(
        context,
        pool,
        pools,
        size,
        num_microbatches=num_microbatches,
        sequence_parallel=sequence_parallel,
    ):
        try:
            found.append(option_costs(context, option, pools[pool].first_device, num_microbatches))
        except PlanRefused:
            continue
    return found


def whole_hosts_only(cluster: Cluster) -> bool:
    """Whether stages smaller than a host are left out."""
    return cluster.num_devices > _WHOLE_HOSTS_FROM
