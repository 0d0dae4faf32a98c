"""Time of a collective as a function of its bytes, with a few constants that measurements give.

For one algorithm on one group of ranks::

    t(B) = fixed_s + fill_s * B / (B + half_bytes) + s_per_byte * B

``fixed_s`` is what a tiny message takes (start of the kernel, and a latency for every hop), the
second term what filling a pipeline of chunks adds once messages are split, and ``s_per_byte`` the
link's rate. Each is positive, so more bytes never take less. On one level of ``n`` ranks over a
link of ``w`` bytes/s, ``B`` as ``Collective.num_bytes`` defines it::

    fixed_s     = cycles (start + hop * steps(n))        steps: 2 (n - 1) all-reduce, n - 1
                                                         all-gather and reduce-scatter, log2 n
                                                         all-to-all, 1 a message
    fill_s      = fill (n / 2)^g (w / w0)^-f             g between 0 and 2; w0 of the link's family
    s_per_byte  = (share(n) + copy / n) / (efficiency w) share: 2 (n - 1) / n all-reduce,
                                                         (n - 1) / n, 1 a message
    half_bytes  = half (w / w0)^h

``cycles`` scales with the clock of the device (protocols of collectives are kernels that wait for
flags), ``copy / n`` is the rank's own part, copied or reduced in its memory (why two ranks reach a
lower bus bandwidth than eight), ``efficiency`` and ``copy`` are within (0, 1). Since ``copy <= 1``,
more ranks never cost less. Links between hosts take the hop latency of their data sheet.

A group over several levels adds the latencies of all levels; its bytes go through them at the same
time, chunk by chunk, so the slowest level counts, each with the ``1 / inner`` share of a rank whose
``inner`` neighbors below have ports of their own. Algorithms: rings through all ranks, each of
whose rounds takes ``n - 1`` hops, as many of them between hosts as there are hosts, less one
(``meshwright.cost.collectives``); a tree on the top level between hosts (latency ``log2``,
all-reduce at the full ``2 B``, the others at half bandwidth and of one rank a host only); reduction
inside the switch (NVLink 4 and later), where a rank sends and receives ``(1 + 1 / n) B``. The
fastest counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from meshwright.cluster.model import Device, GroupLevel, Link
from meshwright.spmd.program import CollectiveKind

__all__ = [
    "KINDS",
    "MAX_LEVELS",
    "REFERENCE_BYTES_PER_S",
    "Curve",
    "Groups",
    "LinkClass",
    "Terms",
    "best_time_s",
    "clock_hz",
    "curves",
    "kind_of",
    "link_class",
    "merged_levels",
    "stack_groups",
    "system_of",
]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv")
MAX_LEVELS = 3
REFERENCE_CLOCK_HZ = 1.7e9

_ALL_REDUCE, _ALL_TO_ALL, _SEND = 0, 3, 4


def kind_of(name: str) -> CollectiveKind:
    """The collective that is priced as one of ``KINDS``; a message is a ``HALO``."""
    return CollectiveKind.HALO if name == "send_recv" else CollectiveKind(name)


class LinkClass(IntEnum):
    """Families of links that share constants."""

    NVLINK = 0
    PCIE = 1
    NETWORK = 2
    OTHER = 3
    """Nothing is learned of these."""


REFERENCE_BYTES_PER_S = np.array([300e9, 32e9, 25e9, 300e9])
"""By ``LinkClass``: a link on which ``fill`` and ``half`` are themselves."""

_CLASS_OF_PREFIX = {
    "nvlink": LinkClass.NVLINK,
    "pcie": LinkClass.PCIE,
    "infiniband": LinkClass.NETWORK,
    "ethernet": LinkClass.NETWORK,
    "roce": LinkClass.NETWORK,
    "slingshot": LinkClass.NETWORK,
    "efa": LinkClass.NETWORK,
}

_CUBE_MESH = {2: 1 / 3, 3: 1 / 3, 4: 2 / 3, 5: 1 / 4, 6: 1 / 3, 7: 2 / 3, 8: 1.0}
"""Share of a V100's six links that rings of so many ranks can use in the hybrid cube mesh of a
DGX-1 or HGX-1 (edge-disjoint rings of its published wiring; two ranks: a pair with two links). An
all-to-all uses half of them at most: a pair has one link, and not every pair has one."""


def link_class(link: Link) -> LinkClass:
    """The family of a link, by the beginning of its name."""
    for prefix, family in _CLASS_OF_PREFIX.items():
        if link.name.lower().startswith(prefix) and link.name != "nvlink-c2c":
            return family
    return LinkClass.OTHER


def clock_hz(device: Device) -> float:
    """The boost clock that the float32 rate of the data sheet amounts to; 1.7 GHz where unknown.

    Two operations a clock for each lane; 128 lanes in a unit, or 64 where 128 would mean a clock
    below 1 GHz (V100, A100, T4).
    """
    if not device.num_units:
        return REFERENCE_CLOCK_HZ
    clock = device.flop_per_s["float32"] / (2 * 128 * device.num_units)
    clock = clock if clock >= 1e9 else 2 * clock
    return min(max(clock, 1.0e9), 2.6e9)


def system_of(device: Device, link: Link) -> str:
    """What two devices share whose collectives behave alike: link, units and clock."""
    return f"{link.name}/{device.num_units}/{clock_hz(device) / 1e9:.2f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """N groups of ranks as the formulas see them; levels beyond a group's own have size 1."""

    kind: IntArray
    """(N,) place in ``KINDS``."""
    num_ranks: FloatArray
    """(N,)"""
    cycle_ratio: FloatArray
    """(N,) duration of a clock cycle over that at 1.7 GHz."""
    is_multi_die: FloatArray
    """(N,) 1 where the device has more units than one die has room for (144)."""
    can_reduce_in_switch: NDArray[np.bool_]
    """(N,)"""
    has_network_tree: NDArray[np.bool_]
    """(N,)"""
    size: FloatArray
    """(L, N)"""
    bytes_per_s: FloatArray
    """(L, N) of the data sheet, as far as the topology lets a group use it."""
    sheet_bytes_per_s: FloatArray
    """(L, N) of the data sheet."""
    latency_s: FloatArray
    """(L, N) of the data sheet."""
    family: IntArray
    """(L, N) ``LinkClass``."""
    inner: FloatArray
    """(L, N) ranks of the group that share a unit of the level; 1 on the lowest."""

    def __len__(self) -> int:
        """N."""
        return len(self.kind)

    def take(self, index: IntArray) -> Groups:
        """The groups at ``index``, one for each of its entries."""
        return Groups(**{name: getattr(self, name)[..., index] for name in self.__slots__})


def stack_groups(
    items: Sequence[tuple[str, Sequence[GroupLevel], int, Device]],
    ring_bytes_per_s: Sequence[float | None] | None = None,
) -> Groups:
    """Groups from ``(kind of KINDS, levels, ranks, device)`` each.

    Args:
        items: the groups.
        ring_bytes_per_s: for each group, what the lowest level's wiring gives it where that is
            known and not the data sheet's figure.
    """
    count = len(items)
    size = np.ones((MAX_LEVELS, count))
    rate = np.full((MAX_LEVELS, count), math.inf)
    sheet = rate.copy()
    latency = np.zeros((MAX_LEVELS, count))
    family = np.full((MAX_LEVELS, count), int(LinkClass.OTHER))
    inner = np.ones((MAX_LEVELS, count))
    in_switch, tree = np.zeros(count, dtype=bool), np.zeros(count, dtype=bool)
    for column, (kind, levels, num_ranks, _) in enumerate(items):
        merged = merged_levels(kind, levels, num_ranks)
        below = 1.0
        for row, (link, ranks) in enumerate(merged):
            size[row, column], latency[row, column] = ranks, link.latency_s
            sheet[row, column] = link.bytes_per_s
            rate[row, column] = link.bytes_per_s * _mesh_share(link, kind, ranks)
            family[row, column], inner[row, column] = link_class(link), below
            below *= ranks
        known = ring_bytes_per_s[column] if ring_bytes_per_s else None
        if known is not None:
            rate[0, column] = known
        top = merged[-1][0]
        tree[column] = link_class(top) == LinkClass.NETWORK
        in_switch[column] = (
            kind == "all_reduce" and len(merged) == 1 and num_ranks > 2 and _has_switch(top)
        )
    devices = [device for _, _, _, device in items]
    return Groups(
        kind=np.array([KINDS.index(kind) for kind, _, _, _ in items], dtype=np.int64),
        num_ranks=np.array([ranks for _, _, ranks, _ in items], dtype=np.float64),
        cycle_ratio=np.array([REFERENCE_CLOCK_HZ / clock_hz(device) for device in devices]),
        is_multi_die=np.array([float(device.num_units > 144) for device in devices]),
        can_reduce_in_switch=in_switch,
        has_network_tree=tree,
        size=size,
        bytes_per_s=rate,
        sheet_bytes_per_s=sheet,
        latency_s=latency,
        family=family,
        inner=inner,
    )


def merged_levels(
    kind: str, levels: Sequence[GroupLevel], num_ranks: int
) -> list[tuple[Link, float]]:
    """Links and ranks of the levels that count, lowest first.

    NVLink domains of racks are one level with the hosts' own NVLink; uneven groups and messages
    lie on the top link alone.
    """
    if kind == "send_recv":
        return [(levels[-1].link, 2.0)]
    if not all(level.is_uniform for level in levels):
        return [(levels[-1].link, float(num_ranks))]
    found: list[tuple[Link, float]] = []
    for level in levels:
        ranks = float(max(level.group_sizes))
        if found and found[-1][0].name == level.link.name and _is_nvlink(level.link):
            found[-1] = (level.link, found[-1][1] * ranks)
        else:
            found.append((level.link, ranks))
    return found if len(found) <= MAX_LEVELS else [(levels[-1].link, float(num_ranks))]


def _is_nvlink(link: Link) -> bool:
    return link_class(link) == LinkClass.NVLINK


def _has_switch(link: Link) -> bool:
    return _is_nvlink(link) and link.name >= "nvlink4"


def _mesh_share(link: Link, kind: str, ranks: float) -> float:
    if link.name not in ("nvlink1", "nvlink2"):
        return 1.0
    share = _CUBE_MESH.get(int(ranks), 1.0)
    return min(share, 0.5) if kind == "all_to_all" else share


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Constants of the formulas for N groups (or one for all), effects of their systems included.

    Arrays are (N,) or (L, N); anything that broadcasts.
    """

    start_s: FloatArray
    hop_s: FloatArray
    """(L, N) of one step."""
    fill_s: FloatArray
    half_bytes: FloatArray
    efficiency: FloatArray
    """(L, N)"""
    copy: FloatArray
    switch_start_s: FloatArray
    switch_efficiency: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One algorithm's time as a function of bytes, for N groups."""

    fixed_s: FloatArray
    fill_s: FloatArray
    half_bytes: FloatArray
    s_per_byte: FloatArray

    def time_s(self, num_bytes: FloatArray) -> FloatArray:
        """Seconds for each payload."""
        fill = self.fill_s * num_bytes / (num_bytes + self.half_bytes)
        result: FloatArray = self.fixed_s + fill + self.s_per_byte * num_bytes
        return result


def curves(groups: Groups, terms: Terms) -> dict[str, Curve]:
    """Curves by algorithm: ``ring`` for all; where a group cannot use another, infinite times."""
    kind, n = groups.kind, groups.num_ranks
    is_reduce, is_swap, is_send = (kind == k for k in (_ALL_REDUCE, _ALL_TO_ALL, _SEND))
    rounds = np.where(is_reduce, 2.0, 1.0)
    steps = np.where(is_swap, np.log2(groups.size), rounds * (groups.size - 1))
    steps = np.where(is_send, groups.size > 1, steps)
    above = n / groups.inner / groups.size
    ring_steps = np.where(is_swap | is_send, steps, steps * above)
    moved = np.where(
        is_swap,
        (groups.size - 1) * groups.inner / n,
        rounds * (groups.size - 1) / groups.size / groups.inner,
    )
    moved = np.where(is_send & (groups.size > 1), 1.0, moved)
    per_byte = moved / (terms.efficiency * groups.bytes_per_s)
    own_rate = terms.efficiency[0] * groups.bytes_per_s[0]
    own = np.where(is_send, 0.0, terms.copy / n / own_rate)
    ring = Curve(
        fixed_s=terms.start_s + (ring_steps * terms.hop_s).sum(axis=0),
        fill_s=terms.fill_s,
        half_bytes=terms.half_bytes,
        s_per_byte=per_byte.max(axis=0) + own,
    )
    found = {"ring": ring}
    if groups.has_network_tree.any():
        found["tree"] = _tree(groups, terms, steps, per_byte, own)
    if groups.can_reduce_in_switch.any():
        rate = terms.switch_efficiency * groups.bytes_per_s[0]
        fixed = terms.switch_start_s + terms.hop_s[0] * 2
        found["switch"] = Curve(
            fixed_s=np.where(groups.can_reduce_in_switch, fixed, math.inf),
            fill_s=terms.fill_s,
            half_bytes=terms.half_bytes,
            s_per_byte=(1 + 1 / n) / rate,
        )
    return found


def _tree(
    groups: Groups, terms: Terms, below_steps: FloatArray, per_byte: FloatArray, own: FloatArray
) -> Curve:
    """Rings below, of so many steps on each level, and a tree between hosts."""
    is_reduce = groups.kind == _ALL_REDUCE
    top = np.argmax(np.cumsum(groups.size > 1, axis=0), axis=0)
    level = np.arange(len(groups.size))[:, None] == top
    size = np.where(level, groups.size, 1.0).max(axis=0)
    steps = np.where(level, np.where(is_reduce, 2.0, 1.0) * np.ceil(np.log2(size)), below_steps)
    full = 2 / (groups.inner * terms.efficiency * groups.bytes_per_s)
    rate = np.where(level, np.where(is_reduce, full, 2 * per_byte), per_byte)
    can = groups.has_network_tree & ((groups.kind <= 2) & (size > 2))
    can &= is_reduce | (size == groups.num_ranks)
    fixed = terms.start_s + (steps * terms.hop_s).sum(axis=0)
    return Curve(
        fixed_s=np.where(can, fixed, math.inf),
        fill_s=terms.fill_s,
        half_bytes=terms.half_bytes,
        s_per_byte=rate.max(axis=0) + own,
    )


def best_time_s(found: Mapping[str, Curve], num_bytes: FloatArray) -> FloatArray:
    """Seconds of the fastest algorithm, for each payload."""
    result: FloatArray = np.minimum.reduce([curve.time_s(num_bytes) for curve in found.values()])
    return result
