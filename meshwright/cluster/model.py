"""A cluster as the planner sees it: devices, and a tree of levels that join them.

Devices are numbered host by host. Level 0 joins the devices of one host, level 1 the hosts (of one
rack, where there is a level 2), and so on. A group of devices talks over the lowest level that
holds them all.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby, pairwise

from meshwright.errors import BadClusterFile, BadRequest
from meshwright.units import format_bytes

__all__ = ["Cluster", "Device", "GroupLevel", "Host", "Link"]

_VECTOR_DTYPES = frozenset(
    ("bool", "uint8", "int16", "int32", "int64", "complex32", "complex64", "complex128")
)

_RATE_KEYS = (
    "float64",
    "float32",
    "tf32",
    "bfloat16",
    "float16",
    "float8_e4m3fn",
    "float8_e5m2",
    "int8",
    "nvfp4",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One type of accelerator (or a CPU rank), described by its data sheet.

    Rates are dense peaks, decimal, as printed by the vendor.
    """

    name: str
    """Canonical name, ``"h100-sxm-80gb"``."""
    memory_bytes: int
    memory_bytes_per_s: float
    flop_per_s: dict[str, float] = field(hash=False)
    """By torch dtype name (``"bfloat16"``, ``"float32"``, ``"float64"``...); matrix units where
    it has them. ``"tf32"`` is float32 input rounded for the matrix units, used only on request;
    ``"nvfp4"`` four bits with a scale for every 16."""
    launch_latency_s: float
    """Host time of starting one operator."""
    source: str
    """Where the figures stand, with the date they were read."""
    to_host_bytes_per_s: float = 0.0
    """To the memory of its host and back, each direction; 0 where it is the host's memory already,
    or nothing is known."""
    num_units: int = 0
    """Streaming multiprocessors or compute units; 0: not known."""
    sustained_share: float = 1.0
    """Share of the rate of a short matrix product that its power allows for long."""
    cache_bytes: int = 0
    """Last cache before the memory, all of it; 0: not known."""

    def __post_init__(self) -> None:
        where = f"device {self.name!r}"
        if not self.name:
            raise BadClusterFile("device: name is empty; name it, such as 'h100-sxm-80gb'")
        _require_positive(where, "memory_bytes", self.memory_bytes)
        _require_positive(where, "memory_bytes_per_s", self.memory_bytes_per_s)
        _require_not_negative(where, "launch_latency_s", self.launch_latency_s)
        _require_not_negative(where, "to_host_bytes_per_s", self.to_host_bytes_per_s)
        _require_not_negative(where, "num_units", self.num_units)
        _require_not_negative(where, "cache_bytes", self.cache_bytes)
        if not 0 < self.sustained_share <= 1:
            raise BadClusterFile(
                f"{where}: sustained_share is {self.sustained_share}; use one in (0, 1]"
            )
        if "float32" not in self.flop_per_s:
            raise BadClusterFile(f"{where}: flop_per_s lacks 'float32'; give at least that rate")
        for dtype, rate in self.flop_per_s.items():
            if dtype not in _RATE_KEYS:
                raise BadClusterFile(
                    f"{where}: flop_per_s.{dtype} is no dtype; use {', '.join(_RATE_KEYS)}"
                )
            _require_positive(where, f"flop_per_s.{dtype}", rate)

    def peak_flop_per_s(self, dtype: str) -> float:
        """Dense peak for a torch dtype name, flop/s.

        Integer, bool and complex arithmetic without a figure of its own runs on the vector units
        and counts at the float32 rate.

        Raises:
            BadRequest: the device has no unit for ``dtype`` (float8 on an A100).
        """
        rate = self.flop_per_s.get(dtype)
        if rate is not None:
            return rate
        if dtype in _VECTOR_DTYPES or dtype == "int8":
            return self.flop_per_s["float32"]
        raise BadRequest(
            f"{self.name} has no peak for {dtype}; it knows "
            f"{', '.join(sorted(self.flop_per_s))}: choose another precision or device"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One level of the tree."""

    name: str
    """``"nvlink4"``, ``"pcie4"``, ``"infiniband-ndr"``, ``"loopback"``..."""
    bytes_per_s: float
    """Per device and direction, decimal."""
    latency_s: float
    """Of one hop."""
    source: str

    def __post_init__(self) -> None:
        where = f"link {self.name!r}"
        if not self.name:
            raise BadClusterFile("link: name is empty; name it, such as 'nvlink4'")
        _require_positive(where, "bytes_per_s", self.bytes_per_s)
        _require_not_negative(where, "latency_s", self.latency_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A machine with equal devices."""

    device: Device
    num_devices: int
    link: Link
    """Joins its devices."""

    def __post_init__(self) -> None:
        if self.num_devices < 1:
            raise BadClusterFile(
                f"host of {self.device.name}: num_devices is {self.num_devices}; it must be >= 1"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLevel:
    """How the members of a group of devices meet on one level, for hierarchical collectives."""

    level_index: int
    """0 for the hosts, ``i`` for ``Cluster.levels[i - 1]``."""
    link: Link
    """The slowest of those in use on this level."""
    group_sizes: tuple[int, ...]
    """Level 0: members of the group in each host that has any. Above: units of the level below
    (hosts in a rack, racks in the cluster) that have any, for each unit of this level."""

    @property
    def is_uniform(self) -> bool:
        """All sizes equal, so that a hierarchical collective is balanced."""
        return len(set(self.group_sizes)) == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Hosts in order, and the links above them, lowest first."""

    name: str
    hosts: tuple[Host, ...]
    levels: tuple[tuple[int, Link], ...]
    """``(hosts per group, link)``, growing; the last group holds every host. Empty for one
    host."""
    _end_devices: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """One past the last device of each host."""

    def __post_init__(self) -> None:
        where = f"cluster {self.name!r}"
        if not self.hosts:
            raise BadClusterFile(f"{where}: no hosts; give at least one")
        sizes = [hosts_per_group for hosts_per_group, _ in self.levels]
        if len(self.hosts) == 1 and sizes:
            raise BadClusterFile(f"{where}: one host needs no levels; remove them")
        if len(self.hosts) > 1 and (not sizes or sizes[-1] < len(self.hosts)):
            raise BadClusterFile(
                f"{where}: no level joins all {len(self.hosts)} hosts; give the last level "
                f"hosts_per_group = {len(self.hosts)}"
            )
        if any(low >= high for low, high in pairwise([1, *sizes])):
            raise BadClusterFile(
                f"{where}: hosts_per_group of the levels is {sizes}; it must grow from level to "
                f"level and start at 2 or more"
            )
        for low, high in pairwise(sizes):
            if high % low and high < len(self.hosts):
                raise BadClusterFile(
                    f"{where}: hosts_per_group {high} is no multiple of the {low} of the level "
                    f"below; levels must nest"
                )
        ends = tuple(accumulate(host.num_devices for host in self.hosts))
        object.__setattr__(self, "_end_devices", ends)

    @property
    def num_devices(self) -> int:
        """Devices of all hosts."""
        return self._end_devices[-1]

    @property
    def num_hosts(self) -> int:
        """Machines, counting one for each entry of ``hosts``."""
        return len(self.hosts)

    @property
    def is_homogeneous(self) -> bool:
        """Every device is of one type (hosts may still differ in size)."""
        first = self.hosts[0].device
        return all(host.device is first or host.device == first for host in self.hosts)

    @property
    def min_memory_bytes(self) -> int:
        """Memory of the smallest device."""
        return min(host.device.memory_bytes for host in self.hosts)

    @property
    def devices(self) -> tuple[Device, ...]:
        """Types of device, in order of first appearance."""
        seen: dict[Device, None] = dict.fromkeys(host.device for host in self.hosts)
        return tuple(seen)

    def host_of(self, rank: int) -> int:
        """Index in ``hosts`` of the host that holds device ``rank``; O(log hosts)."""
        self._require_rank(rank)
        return bisect_right(self._end_devices, rank)

    def device_of(self, rank: int) -> Device:
        """Type of device ``rank``."""
        return self.hosts[self.host_of(rank)].device

    def devices_of_host(self, host_index: int) -> range:
        """Ranks on one host."""
        end = self._end_devices[host_index]
        return range(end - self.hosts[host_index].num_devices, end)

    def link_between(self, devices: Sequence[int]) -> tuple[int, Link]:
        """The lowest level that holds all ``devices``: its index and its link.

        Level 0 is the host's own link, level ``i`` is ``levels[i - 1]``; one device alone is on
        level 0. Units of a level are contiguous runs of ranks, so the first and the last rank
        decide: O(len(devices)) to find them, O(log hosts) after that.

        Raises:
            BadRequest: no devices, or one the cluster has not.
        """
        if len(devices) == 0:
            raise BadRequest("link_between needs at least one device; the group is empty")
        first, last = self.host_of(min(devices)), self.host_of(max(devices))
        if first == last:
            return 0, self.hosts[first].link
        for index, (hosts_per_group, link) in enumerate(self.levels, start=1):
            if first // hosts_per_group == last // hosts_per_group:
                return index, link
        raise AssertionError("the last level holds every host; __post_init__ checks it")

    def group_levels(self, ranks: Iterable[int]) -> tuple[GroupLevel, ...]:
        """How a group of devices spreads over hosts, racks and so on, lowest level first.

        A hierarchical collective runs once per entry. Levels on which no two members (or units
        of the level below) meet are left out, so a group of one gives ``()``, and for a uniform
        group the sizes multiply to the number of members.
        """
        members = Counter(self.host_of(rank) for rank in set(ranks))
        if not members:
            raise BadRequest("group_levels needs at least one device; the group is empty")
        found: list[GroupLevel] = []
        sizes = tuple(members[host] for host in sorted(members))
        if max(sizes) > 1:
            links = (self.hosts[host].link for host, count in members.items() if count > 1)
            slowest = min(links, key=lambda link: (link.bytes_per_s, -link.latency_s))
            found.append(GroupLevel(level_index=0, link=slowest, group_sizes=sizes))
        units = set(members)
        hosts_per_unit = 1
        for index, (hosts_per_group, link) in enumerate(self.levels, start=1):
            meeting = Counter(unit * hosts_per_unit // hosts_per_group for unit in units)
            sizes = tuple(meeting[unit] for unit in sorted(meeting))
            if max(sizes) > 1:
                found.append(GroupLevel(level_index=index, link=link, group_sizes=sizes))
            units, hosts_per_unit = set(meeting), hosts_per_group
        return tuple(found)

    def describe(self) -> str:
        """One line for a person: what stands where, and whether the last host is smaller."""
        parts = [
            _plural(len(list(run)), f"host of {host.num_devices} x {host.device.name}")
            for host, run in groupby(self.hosts)
        ]
        links = list(dict.fromkeys(host.link.name for host in self.hosts if host.num_devices > 1))
        links += [f"{link.name} joins {size} hosts" for size, link in self.levels]
        text = f"{_plural(self.num_devices, 'device')}: {', '.join(parts)}"
        if links:
            text += f"; {', '.join(links)}"
        return f"{text}; {format_bytes(self.min_memory_bytes)} on the smallest device"

    def _require_rank(self, rank: int) -> None:
        if not 0 <= rank < self.num_devices:
            raise BadRequest(
                f"cluster {self.name!r} has no device {rank}; devices are 0 to "
                f"{self.num_devices - 1}"
            )


def _plural(count: int, noun: str) -> str:
    if count == 1:
        return f"1 {noun}"
    head, separator, tail = noun.partition(" ")
    return f"{count} {head}s{separator}{tail}"


def _require_positive(where: str, key: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise BadClusterFile(f"{where}: {key} is {value}; it must be a finite number above 0")


def _require_not_negative(where: str, key: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise BadClusterFile(f"{where}: {key} is {value}; it must be a finite number, 0 or more")
