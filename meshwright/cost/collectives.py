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
half bandwidth is an assumption, and which takes one rank of each host.) A group that spreads evenly
over several levels has rings over all ports of a host, each through all ranks, so that each link
between hosts carries the ``1 / k`` share of a rank. The payload moves in chunks, and while one
crosses between hosts the next are under way within: the levels have links of their own, so of the
bytes' times only that of the slowest level counts. Latencies add up: a ring of ``n`` ranks takes
``n - 1`` steps a round, of which one less than there are hosts lie between hosts
(``flat_ring_hops``; NCCL's src/graph/tuning.cc counts them so). An all-reduce may take a tree
between hosts instead; all-gather and reduce-scatter have none (NCCL issues 530, 1473). An
all-to-all sends to every level at once. The fastest of these algorithms counts. ``w`` is the share
``Calibration.link_efficiency`` of the data sheet.

A learned ``CollectivePricer`` takes the place of all this, but among CPUs. It is asked once for
each kind and group, for payloads from a byte to a terabyte, 9 % apart; between them times are
linear.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from meshwright.cluster.model import Cluster, Device, GroupLevel, Link
from meshwright.cost.calibration import DEFAULTS
from meshwright.cost.pricing import CollectivePricer, Priced
from meshwright.plans.plan import AXIS_NAMES
from meshwright.spmd.program import CollectiveKind

__all__ = [
    "Affine",
    "CollectivePrices",
    "alternatives",
    "collective_time_s",
    "flat_ring_hops",
]

_ASKED_BYTES = 2.0 ** (np.arange(8 * 40 + 1) / 8)

Affine = tuple[float, float]
"""``(seconds, seconds per byte)``."""


def alternatives(
    kind: CollectiveKind,
    levels: Sequence[GroupLevel],
    num_ranks: int,
    *,
    link_efficiency: float = DEFAULTS.link_efficiency,
) -> tuple[Affine, ...]:
    """Affine costs in the payload of every algorithm a group can use; none for one rank."""
    if num_ranks == 1 or not levels:
        return ()
    rates = [level.link.bytes_per_s * link_efficiency for level in levels]
    top, top_bytes_per_s = levels[-1].link, rates[-1]
    uniform = all(level.is_uniform for level in levels)
    sizes = [max(level.group_sizes) for level in levels]
    hops = [math.ceil(math.log2(size)) for size in sizes]
    tree_s = sum(h * level.link.latency_s for h, level in zip(hops, levels, strict=True))
    share = (num_ranks - 1) / num_ranks
    if kind == CollectiveKind.ALL_TO_ALL:
        return ((tree_s, _all_to_all_s_per_byte(rates, sizes, num_ranks, uniform)),)
    if kind == CollectiveKind.HALO:
        return ((top.latency_s, 1 / top_bytes_per_s),)
    if kind == CollectiveKind.RING:
        return (((num_ranks - 1) * top.latency_s, share / top_bytes_per_s),)
    rounds = 2 if kind == CollectiveKind.ALL_REDUCE else 1
    found = [(rounds * (num_ranks - 1) * top.latency_s, rounds * share / top_bytes_per_s)]
    is_reduce = kind == CollectiveKind.ALL_REDUCE
    if is_reduce or len(levels) == 1:
        found.append((rounds * tree_s, 2 * (1.0 if is_reduce else share) / top_bytes_per_s))
    if uniform and len(levels) > 1:
        rings = _hierarchical([level.link for level in levels], rates, sizes, hops, rounds)
        found += rings if is_reduce else rings[:1]
    return tuple(found)


def flat_ring_hops(sizes: Sequence[float]) -> tuple[float, ...]:
    """How often one round of a ring through all ranks crosses each level, lowest first.

    ``sizes`` are those of the levels; all but the first crossing of a level lie between its units::

        (sizes[0] - 1) sizes[1] sizes[2]...,  (sizes[1] - 1) sizes[2]...,  ...
    """
    return tuple((size - 1) * math.prod(sizes[i + 1 :]) for i, size in enumerate(sizes))


def _hierarchical(
    links: Sequence[Link],
    rates: Sequence[float],
    sizes: Sequence[int],
    hops: Sequence[int],
    rounds: int,
) -> list[Affine]:
    """Rings through all ranks; rings below and a tree of half the bandwidth on the top level.

    Latencies add up, since the first chunk passes every level; the slowest level sets the pace.
    """
    crossed = zip(flat_ring_hops(sizes), links, strict=True)
    flat_s = rounds * sum(times * link.latency_s for times, link in crossed)
    ring_s = per_byte_s = 0.0
    inner = 1
    for link, rate, size in zip(links[:-1], rates[:-1], sizes[:-1], strict=True):
        ring_s += rounds * (size - 1) * link.latency_s
        per_byte_s = max(per_byte_s, rounds * (size - 1) / size / inner / rate)
        inner *= size
    top, size = links[-1], sizes[-1]
    top_s_per_byte = rounds * (size - 1) / size / inner / rates[-1]
    return [
        (flat_s, max(per_byte_s, top_s_per_byte)),
        (ring_s + rounds * hops[-1] * top.latency_s, max(per_byte_s, 2 * top_s_per_byte)),
    ]


def _all_to_all_s_per_byte(
    rates: Sequence[float], sizes: Sequence[int], num_ranks: int, uniform: bool
) -> float:
    """Every rank sends ``1 / n`` of its operand to each other, over the level they meet on.

    All levels at once; the slowest counts.
    """
    if not uniform:
        return (num_ranks - 1) / num_ranks / rates[-1]
    per_byte_s = 0.0
    inner = 1
    for rate, size in zip(rates, sizes, strict=True):
        per_byte_s = max(per_byte_s, (size - 1) * inner / num_ranks / rate)
        inner *= size
    return per_byte_s


def collective_time_s(
    kind: CollectiveKind, num_bytes: float, *, cluster: Cluster, ranks: Iterable[int]
) -> float:
    """Analytic time of one collective among ``ranks``, seconds; 0 for one rank or no bytes."""
    return CollectivePrices(cluster).time_of_ranks_s(kind, num_bytes, ranks)


@dataclass(frozen=True, slots=True)
class _Group:
    """Ranks ``first + stride * i`` of every axis: ``(size, stride)``, outermost first."""

    axes: tuple[tuple[int, int], ...]

    def ranks(self, first: int) -> list[int]:
        members = [first]
        for size, stride in self.axes:
            members = [member + stride * i for member in members for i in range(size)]
        return members


@dataclass(frozen=True, slots=True, kw_only=True)
class _Members:
    """What a group is priced by."""

    levels: tuple[GroupLevel, ...]
    num_ranks: int
    device: Device
    """Of its first rank."""


class CollectivePrices:
    """Prices of collectives along mesh axes on one cluster; remembers what it worked out.

    A group's price depends on where its ranks lie. The first and the last group of the devices in
    use stand for all: the dearer one counts, since the slowest group holds up the rest.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        pricer: CollectivePricer | None = None,
        link_efficiency: float = DEFAULTS.link_efficiency,
    ) -> None:
        """Prices on ``cluster``: by ``pricer``, but among CPUs, or else analytic."""
        self.cluster = cluster
        self.link_efficiency = link_efficiency
        self._pricer = pricer
        self._groups: dict[tuple[_Group, int, int], tuple[_Members, ...]] = {}
        self._pairs: dict[tuple[int, int], _Members] = {}
        self._costs: dict[tuple[int, CollectiveKind], tuple[Affine, ...]] = {}
        self._asked: dict[tuple[int, CollectiveKind], Priced] = {}
        self._known: dict[_Members, _Members] = {}
        self._sent: dict[tuple[int, float], float] = {}

    @property
    def is_learned(self) -> bool:
        """Whether any group is priced by a learned model."""
        return self._pricer is not None and any(d.name != "cpu" for d in self.cluster.devices)

    def send_time_s(self, num_bytes: float, source: int, target: int) -> float:
        """Time of one message between two devices, seconds."""
        if num_bytes <= 0 or source == target:
            return 0.0
        members = self._pair(source, target)
        if self._is_learned(members):
            key = (id(members), num_bytes)
            if key not in self._sent:
                self._sent[key] = self._time_s(CollectiveKind.HALO, num_bytes, members)
            return self._sent[key]
        link = members.levels[-1].link
        return link.latency_s + num_bytes / (link.bytes_per_s * self.link_efficiency)

    def send_trust(self, num_bytes: float, source: int, target: int) -> float:
        """How far ``send_time_s`` is learned, 0 to 1."""
        if num_bytes <= 0 or source == target:
            return 0.0
        members = self._pair(source, target)
        if not self._is_learned(members):
            return 0.0
        payload = np.array([num_bytes], dtype=np.float64)
        return float(self._learned(CollectiveKind.HALO, payload, members)[1][0])

    def time_of_ranks_s(
        self, kind: CollectiveKind, num_bytes: float, ranks: Iterable[int]
    ) -> float:
        """Time of one collective among ``ranks``, seconds; 0 for one rank or no bytes."""
        return self._time_s(kind, num_bytes, self._members(sorted(set(ranks))))

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
        for members in self._samples(axes, axis_sizes, num_stages, first_device):
            worst = np.maximum(worst, self._times_s(kind, payload, members))
        return np.where(payload > 0, worst, 0.0)

    def trust(
        self,
        kind: CollectiveKind,
        num_bytes: ArrayLike,
        *,
        axes: Sequence[str],
        axis_sizes: Mapping[str, int],
        num_stages: int = 1,
        first_device: int = 0,
    ) -> NDArray[np.float64]:
        """How far each of ``time_s`` is learned, 0 to 1: the least of the groups that count."""
        payload = np.asarray(num_bytes, dtype=np.float64)
        least = np.ones_like(payload)
        for members in self._samples(axes, axis_sizes, num_stages, first_device):
            if not self._is_learned(members):
                return np.zeros_like(payload)
            least = np.minimum(least, self._learned(kind, payload, members)[1])
        return np.where(payload > 0, least, 0.0)

    # One group ---------------------------------------------------------------------------------

    def _samples(
        self,
        axes: Sequence[str],
        axis_sizes: Mapping[str, int],
        num_stages: int,
        first_device: int,
    ) -> tuple[_Members, ...]:
        """The distinct ones of the first and the last group."""
        group, per_stage = _group(axes, axis_sizes)
        key = (group, first_device, per_stage * num_stages)
        if key not in self._groups:
            span = group.ranks(first_device)
            last = first_device + per_stage * num_stages - 1 - max(span)
            samples = [span, [last + rank for rank in span]] if last > 0 else [span]
            self._groups[key] = tuple(dict.fromkeys(self._members(ranks) for ranks in samples))
        return self._groups[key]

    def _members(self, ranks: Sequence[int]) -> _Members:
        found = _Members(
            levels=self.cluster.group_levels(ranks),
            num_ranks=len(ranks),
            device=self.cluster.device_of(ranks[0]),
        )
        return self._known.setdefault(found, found)

    def _pair(self, source: int, target: int) -> _Members:
        key = (source, target)
        if key not in self._pairs:
            self._pairs[key] = self._members([source, target])
        return self._pairs[key]

    def _is_learned(self, members: _Members) -> bool:
        return self._pricer is not None and members.num_ranks > 1 and members.device.name != "cpu"

    def _time_s(self, kind: CollectiveKind, num_bytes: float, members: _Members) -> float:
        if num_bytes <= 0:
            return 0.0
        return float(self._times_s(kind, np.array([num_bytes], dtype=np.float64), members)[0])

    def _times_s(
        self, kind: CollectiveKind, payload: NDArray[np.float64], members: _Members
    ) -> NDArray[np.float64]:
        """Seconds of payloads in one group; of nothing, any."""
        if self._is_learned(members):
            return self._learned(kind, payload, members)[0]
        key = (id(members), kind)
        if key not in self._costs:
            self._costs[key] = alternatives(
                kind, members.levels, members.num_ranks, link_efficiency=self.link_efficiency
            )
        times = [fixed_s + payload * per_byte_s for fixed_s, per_byte_s in self._costs[key]]
        return np.asarray(np.minimum.reduce(times)) if times else np.zeros_like(payload)

    def _learned(
        self, kind: CollectiveKind, payload: NDArray[np.float64], members: _Members
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Seconds and trust, linear between the payloads the pricer was asked for."""
        key = (id(members), kind)
        if key not in self._asked:
            assert self._pricer is not None, "a learned price"
            self._asked[key] = self._pricer.collectives(
                kind,
                _ASKED_BYTES,
                levels=members.levels,
                num_ranks=members.num_ranks,
                device=members.device,
            )
        found = self._asked[key]
        time_s = np.interp(payload, _ASKED_BYTES, found.time_s)
        beyond = np.maximum(payload / _ASKED_BYTES[-1], 1.0)
        return time_s * beyond, np.interp(payload, _ASKED_BYTES, found.trust)


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
