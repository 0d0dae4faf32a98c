"""Parts of a plan whose stages differ: in mesh, in type of device, in the samples their hosts take.

A ``StagePart`` is one way of computing: a table, a mesh at its place in the cluster, a type of
device. The whole choice is worked out once for each part, and every stage takes the column of its
own part. A stage whose hosts take unequal shares of the samples has a part for each type of device;
it is as slow as the slowest of these and as full as the fullest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from meshwright.cluster.model import Cluster
from meshwright.cost.columns import FloatArray, IntArray
from meshwright.cost.memory import StageMemory
from meshwright.cost.roofline import Roofline
from meshwright.cost.stage_work import StageWork, merged_columns
from meshwright.cost.table import CostTable, Split
from meshwright.errors import PlanRefused

__all__ = [
    "Places",
    "StagePart",
    "at_place",
    "fullest_part",
    "host_scales",
    "merged_memory",
    "merged_work",
    "slowest_part",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePart:
    """One way in which some stages compute."""

    table: CostTable
    split: Split
    stages: tuple[int, ...]
    """Those that compute so."""
    rooflines: tuple[Roofline, ...]
    """One for every stage of the plan."""
    capacity_bytes: FloatArray
    """(stages,) of the smallest device; counts for ``stages`` only."""


class Places:
    """Where stages lie: stages in like places are priced alike."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._first: dict[tuple[object, ...], int] = {}
        self._found: dict[tuple[int, int], int] = {}
        self.is_even = cluster.is_homogeneous
        """Every device is of one type."""

    def representative(self, first: int, count: int) -> int:
        """First device of the first run seen that lies in the cluster like this one."""
        key = (first, count)
        if key not in self._found:
            self._found[key] = self._first.setdefault(self._signature(first, count), first)
        return self._found[key]

    def _signature(self, first: int, count: int) -> tuple[object, ...]:
        cluster = self._cluster
        start, stop = cluster.host_of(first), cluster.host_of(first + count - 1)
        hosts = tuple(
            (cluster.hosts[h].device.name, cluster.hosts[h].num_devices, cluster.hosts[h].link.name)
            for h in range(start, stop + 1)
        )
        offset = first - cluster.devices_of_host(start).start
        units = tuple(start % size for size, _ in cluster.levels[:-1]) if stop > start else ()
        return (count, offset, hosts, units)


def host_scales(
    cluster: Cluster, first: int, count: int, shares: Sequence[float]
) -> dict[tuple[str, float], None]:
    """Device type and samples of its devices, over an even share, of the hosts of a stage.

    Raises:
        PlanRefused: the shares are not one for each host, positive, with sum 1.
    """
    hosts = range(cluster.host_of(first), cluster.host_of(first + count - 1) + 1)
    if len(shares) != len(hosts) or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise PlanRefused(
            f"$.stages: the batch_shares {list(shares)} of the stage at device {first} must be "
            f"{len(hosts)} positive numbers, one for each of its hosts, with sum 1"
        )
    found: dict[tuple[str, float], None] = {}
    for host, share in zip(hosts, shares, strict=True):
        ranks = cluster.devices_of_host(host)
        devices = min(ranks.stop, first + count) - max(ranks.start, first)
        found[cluster.hosts[host].device.name, share * count / devices] = None
    return found


def at_place(split: Split, first: int, scale: float = 1.0) -> Split:
    """``split`` of one stage whose first device is ``first``."""
    return replace(split, first_device=first, num_stages=1, batch_scale=scale)


def slowest_part(
    parts: Sequence[StagePart], works: Sequence[StageWork], num_microbatches: int
) -> IntArray:
    """(stages,) for each stage the part of it that works longest."""
    return _largest(parts, [work.own_s(num_microbatches) for work in works])


def fullest_part(parts: Sequence[StagePart], memories: Sequence[StageMemory]) -> IntArray:
    """(stages,) for each stage the part of it with the least room."""
    loads = [m.peak_bytes / p.capacity_bytes for p, m in zip(parts, memories, strict=True)]
    return _largest(parts, loads)


def _largest(parts: Sequence[StagePart], amounts: Sequence[FloatArray]) -> IntArray:
    table = np.full((len(parts), len(amounts[0])), -np.inf)
    for row, (part, amount) in enumerate(zip(parts, amounts, strict=True)):
        table[row, list(part.stages)] = amount[list(part.stages)]
    return np.asarray(np.argmax(table, axis=0))


def merged_work(works: Sequence[StageWork], part_of_stage: IntArray) -> StageWork:
    """For every stage the work of its part."""
    return StageWork(
        forward=merged_columns([work.forward for work in works], part_of_stage),
        backward=merged_columns([work.backward for work in works], part_of_stage),
        tail=merged_columns([work.tail for work in works], part_of_stage),
        parts=merged_columns([work.parts for work in works], part_of_stage),
    )


def merged_memory(memories: Sequence[StageMemory], part_of_stage: IntArray) -> StageMemory:
    """For every stage the memory of its part."""
    return StageMemory(by_cause=merged_columns([m.by_cause for m in memories], part_of_stage))
