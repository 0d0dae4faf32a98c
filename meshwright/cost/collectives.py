"""Time of collectives: latency plus bytes over bandwidth, by algorithm and level.

For ``n`` ranks on one link of latency ``a`` and bandwidth ``w``, with payload ``B`` as
``Collective.num_bytes`` defines it::

    all-reduce      ring   2 (n - 1) a + 2 (n - 1) / n B / w
                    tree   2 ceil(log2 n) a + 2 B / w
    all-gather,     ring   (n - 1) a + (n - 1) / n B / w
    reduce-scatter  tree   ceil(log2 n) a + 2 (n - 1) / n B / w
    all-to-all             ceil(log2 n) a + (n - 1) / n B / w
    send, halo             a + B / w
    ring attention         (n - 1) a + (n - 1) / n B / w

(Thakur, Rabenseifner, Gropp 2005 for the rings; the tree of all-gather stands for NCCL's PAT, whose
half bandwidth is an assumption.) A group that spreads evenly over several levels may also go level
by level: within hosts first, then each rank with its ``1 / k`` share across hosts, as NCCL's
rings over all ports of a host amount to. The fastest of these counts. ``w`` is
``LINK_EFFICIENCY`` of the data sheet.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from meshwright.cluster.model import Cluster, GroupLevel, Link
from meshwright.plans.plan import AXIS_NAMES
from meshwright.spmd.program import CollectiveKind

__all__ = [
    "LINK_EFFICIENCY",
    "Affine",
    "CollectivePrices",
    "alternatives",
    "collective_time_s",
]

LINK_EFFICIENCY = 0.8
"""Share of a link's data sheet bandwidth that large messages reach. Assumption, between what
nccl-tests print for NVLink rings (about 0.8) and InfiniBand (about 0.9)."""

Affine = tuple[float, float]
"""``(seconds, seconds per byte)``."""


def alternatives(
    kind: CollectiveKind, levels: Sequence[GroupLevel], num_ranks: int
) -> tuple[Affine, ...]:
    """Affine costs in the payload of every algorithm a group can use; none for one rank."""
    if num_ranks == 1 or not levels:
        return ()
    top = levels[-1].link
    uniform = all(level.is_uniform for level in levels)
    sizes = [max(level.group_sizes) for level in levels]
    hops = [math.ceil(math.log2(size)) for size in sizes]
    tree_s = sum(h * level.link.latency_s for h, level in zip(hops, levels, strict=True))
    share = (num_ranks - 1) / num_ranks
    if kind == CollectiveKind.ALL_TO_ALL:
        return ((tree_s, _all_to_all_s_per_byte(levels, sizes, num_ranks, uniform)),)
    if kind == CollectiveKind.HALO:
        return ((top.latency_s, 1 / _bandwidth(top)),)
    if kind == CollectiveKind.RING:
        return (((num_ranks - 1) * top.latency_s, share / _bandwidth(top)),)
    rounds = 2 if kind == CollectiveKind.ALL_REDUCE else 1
    found = [(rounds * (num_ranks - 1) * top.latency_s, rounds * share / _bandwidth(top))]
    tree_share = 1.0 if kind == CollectiveKind.ALL_REDUCE else share
    found.append((rounds * tree_s, 2 * tree_share / _bandwidth(top)))
    if uniform and len(levels) > 1:
        found += _hierarchical(levels, sizes, hops, rounds)
    return tuple(found)


def _bandwidth(link: Link) -> float:
    return link.bytes_per_s * LINK_EFFICIENCY


def _hierarchical(
    levels: Sequence[GroupLevel], sizes: Sequence[int], hops: Sequence[int], rounds: int
) -> list[Affine]:
    """Level by level; by rings, or by a tree of half the bandwidth on the top level."""
    ring_s = per_byte_s = 0.0
    inner = 1
    for level, size in zip(levels[:-1], sizes[:-1], strict=True):
        ring_s += rounds * (size - 1) * level.link.latency_s
        per_byte_s += rounds * (size - 1) / size / inner / _bandwidth(level.link)
        inner *= size
    top, size = levels[-1].link, sizes[-1]
    top_s_per_byte = rounds * (size - 1) / size / inner / _bandwidth(top)
    return [
        (ring_s + rounds * (size - 1) * top.latency_s, per_byte_s + top_s_per_byte),
        (ring_s + rounds * hops[-1] * top.latency_s, per_byte_s + 2 * top_s_per_byte),
    ]


def _all_to_all_s_per_byte(
    levels: Sequence[GroupLevel], sizes: Sequence[int], num_ranks: int, uniform: bool
) -> float:
    """Every rank sends ``1 / n`` of its operand to each other, over the level they meet on."""
    if not uniform:
        return (num_ranks - 1) / num_ranks / _bandwidth(levels[-1].link)
    per_byte_s = 0.0
    inner = 1
    for level, size in zip(levels, sizes, strict=True):
        per_byte_s += (size - 1) * inner / num_ranks / _bandwidth(level.link)
        inner *= size
    return per_byte_s


def collective_time_s(
    kind: CollectiveKind, num_bytes: float, *, cluster: Cluster, ranks: Iterable[int]
) -> float:
    """Time of one collective among ``ranks``, seconds; nothing for one rank or no bytes."""
    members = sorted(set(ranks))
    costs = alternatives(kind, cluster.group_levels(members), len(members))
    if not costs or num_bytes <= 0:
        return 0.0
    return min(fixed_s + num_bytes * per_byte_s for fixed_s, per_byte_s in costs)


@dataclass(frozen=True, slots=True)
class _Group:
    """Ranks ``first + stride * i`` of every axis: ``(size, stride)``, outermost first."""

    axes: tuple[tuple[int, int], ...]

    def ranks(self, first: int) -> list[int]:
        members = [first]
        for size, stride in self.axes:
            members = [member + stride * i for member in members for i in range(size)]
        return members


class CollectivePrices:
    """Prices of collectives along mesh axes on one cluster; remembers what it worked out.

    A group's price depends on where its ranks lie. The first and the last group of the devices in
    use stand for all: the dearer one counts, since the slowest group holds up the rest.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._costs: dict[tuple[_Group, int, int, CollectiveKind], tuple[tuple[Affine, ...], ...]]
        self._costs = {}
        self._links: dict[tuple[int, int], Link] = {}

    def send_time_s(self, num_bytes: float, source: int, target: int) -> float:
        """Time of one message between two devices, seconds."""
        if num_bytes <= 0 or source == target:
            return 0.0
        key = (source, target)
        if key not in self._links:
            self._links[key] = self.cluster.link_between(key)[1]
        link = self._links[key]
        return link.latency_s + num_bytes / _bandwidth(link)

    def time_s(
        self,
        kind: CollectiveKind,
        num_bytes: ArrayLike,
        *,
        axes: Sequence[str],
        axis_sizes: Mapping[str, int],
        num_stages: int = 1,
        first_device: int = 0,
    ) -> NDArray[np.float64]:
        """Seconds for each payload in ``num_bytes``, along ``axes`` of a mesh of ``axis_sizes``.

        The mesh is that of ``num_stages`` stages side by side from ``first_device`` on.
        """
        payload = np.asarray(num_bytes, dtype=np.float64)
        worst = np.zeros_like(payload)
        for costs in self._group_costs(kind, axes, axis_sizes, num_stages, first_device):
            if costs:
                times = [fixed_s + payload * per_byte_s for fixed_s, per_byte_s in costs]
                worst = np.maximum(worst, np.minimum.reduce(times))
        return np.where(payload > 0, worst, 0.0)

    def _group_costs(
        self,
        kind: CollectiveKind,
        axes: Sequence[str],
        axis_sizes: Mapping[str, int],
        num_stages: int,
        first_device: int,
    ) -> tuple[tuple[Affine, ...], ...]:
        group, per_stage = _group(axes, axis_sizes)
        key = (group, first_device, per_stage * num_stages, kind)
        if key not in self._costs:
            span = group.ranks(first_device)
            last = first_device + per_stage * num_stages - 1 - max(span)
            samples = [span, [last + rank for rank in span]] if last > 0 else [span]
            self._costs[key] = tuple(
                dict.fromkeys(
                    alternatives(kind, self.cluster.group_levels(ranks), len(ranks))
                    for ranks in samples
                )
            )
        return self._costs[key]


def _group(axes: Sequence[str], axis_sizes: Mapping[str, int]) -> tuple[_Group, int]:
    """The group along ``axes`` with neighboring axes merged, and the devices of a stage."""
    stride = 1
    found: list[tuple[int, int]] = []
    for axis in reversed(AXIS_NAMES):
        size = axis_sizes.get(axis, 1)
        if axis in axes and size > 1:
            if found and found[-1][0] * found[-1][1] == stride:
                found[-1] = (found[-1][0] * size, found[-1][1])
            else:
                found.append((size, stride))
        stride *= size
    return _Group(tuple(reversed(found))), stride
