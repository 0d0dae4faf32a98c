"""Clusters that instances are about: any shape, of catalog devices and links."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from meshwright.cluster.catalog import default_levels, find_device, find_link, makers_of
from meshwright.cluster.model import Cluster, Host, Link

__all__ = [
    "DEVICES",
    "HELD_OUT_DEVICES",
    "ClusterPart",
    "ClusterSpec",
    "cluster_of",
    "draw_cluster",
    "num_devices",
]

HELD_OUT_DEVICES = ("h200-sxm-141gb", "mi300x-192gb", "l40s", "v100-sxm2-32gb")
"""No cluster of theirs is trained on."""

DEVICES = (
    "p100-sxm2-16gb",
    "v100-sxm2-16gb",
    "v100-pcie-32gb",
    "t4",
    "rtx-2080-ti",
    "rtx-3090",
    "rtx-4090",
    "a10g",
    "a40",
    "l4",
    "a100-pcie-40gb",
    "a100-sxm-40gb",
    "a100-sxm-80gb",
    "a800-sxm-80gb",
    "h100-pcie-80gb",
    "h100-sxm-80gb",
    "h20-sxm-96gb",
    "gh200-96gb",
    "b200-sxm-180gb",
    "gb200-186gb",
    "mi250x-gcd",
    "mi355x-288gb",
)
"""What training clusters are made of."""

_NETWORKS = (
    "infiniband-ndr",
    "infiniband-hdr",
    "infiniband-edr",
    "infiniband-edr-half",
    "ethernet-100g-eighth",
    "ethernet-10g",
)
_OTHER_HOST_LINKS = ("pcie3", "pcie4", "pcie5")
_PER_HOST = (1, 2, 4, 4, 8, 8, 16)
_MIXED_SHARE = 0.1
_UNUSUAL_SHARE = 0.35
"""Of the number of devices in a host, of its link, and of the network, each."""
_RACK_SHARE = 0.3
"""Of clusters of four hosts and more: a slower network above racks."""
_SPINE_SHARE = 0.25
"""Of the network's rate between racks."""


class ClusterPart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Equal hosts."""

    num_hosts: int
    devices_per_host: int
    device: str


class ClusterSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Hosts, and how they are joined."""

    parts: tuple[ClusterPart, ...]
    host_link: str = ""
    """Empty: what the device usually comes with, as the network."""
    network: str = ""
    rack_hosts: int = 0
    """Hosts of a rack, where a slower network joins racks; 0: there are none."""

    @property
    def name(self) -> str:
        """Shorthand, and what differs from the usual: ``4x8xa100-sxm-80gb,ethernet-10g``."""
        hosts = "+".join(
            f"{part.num_hosts}x{part.devices_per_host}x{part.device}" for part in self.parts
        )
        racks = f"racks of {self.rack_hosts}" if self.rack_hosts else ""
        return ",".join(word for word in (hosts, self.host_link, self.network, racks) if word)


def num_devices(spec: ClusterSpec) -> int:
    """All devices of the cluster."""
    return sum(part.num_hosts * part.devices_per_host for part in spec.parts)


def memory_bytes(spec: ClusterSpec) -> int:
    """Of all devices together."""
    return sum(
        part.num_hosts
        * part.devices_per_host
        * find_device(part.device, where=spec.name).device.memory_bytes
        for part in spec.parts
    )


def cluster_of(spec: ClusterSpec) -> Cluster:
    """The cluster that ``spec`` describes.

    Raises:
        BadClusterFile: a device or link is not known.
    """
    where = f"cluster {spec.name!r}"
    hosts: list[Host] = []
    kinds = []
    own_link = find_link(spec.host_link, where=where) if spec.host_link else None
    for part in spec.parts:
        entry = find_device(part.device, where=where)
        link = own_link or entry.host_link
        host = Host(device=entry.device, num_devices=part.devices_per_host, link=link)
        hosts += [host] * part.num_hosts
        kinds += [(entry, part.devices_per_host)] * part.num_hosts
    levels = default_levels(tuple(kinds))
    if spec.network and len(hosts) > 1:
        levels = ((len(hosts), find_link(spec.network, where=where)),)
    if 1 < spec.rack_hosts < len(hosts) and len(levels) == 1:
        inner = levels[0][1]
        levels = ((spec.rack_hosts, inner), (len(hosts), _spine(inner)))
    return Cluster(name=spec.name, hosts=tuple(hosts), levels=levels)


def _spine(link: Link) -> Link:
    return Link(
        name=f"{link.name}-oversubscribed",
        bytes_per_s=link.bytes_per_s * _SPINE_SHARE,
        latency_s=2 * link.latency_s,
        source=f"assumption: racks share {_SPINE_SHARE:.0%} of {link.name}",
    )


def draw_cluster(
    rng: np.random.Generator,
    devices: Sequence[str],
    *,
    sizes: tuple[int, int],
    least_memory_bytes: float = 0.0,
) -> ClusterSpec | None:
    """A cluster of ``sizes`` devices, both bounds included; every doubling is a little likelier.

    Args:
        rng: what draws it.
        devices: catalog names to draw from.
        sizes: least and greatest number of devices.
        least_memory_bytes: of all its devices.

    Returns:
        ``None`` where some tries gave no cluster of so much memory.
    """
    for _ in range(20):
        spec = _drawn(rng, devices, sizes)
        if sizes[0] <= num_devices(spec) <= sizes[1] and memory_bytes(spec) >= least_memory_bytes:
            return spec
    return None


def _drawn(rng: np.random.Generator, devices: Sequence[str], sizes: tuple[int, int]) -> ClusterSpec:
    device = str(rng.choice(devices))
    entry = find_device(device, where="instances")
    total = _size(rng, sizes)
    per_host = entry.devices_per_host
    if rng.random() < _UNUSUAL_SHARE:
        per_host = int(rng.choice(_PER_HOST))
    per_host = min(per_host, total)
    num_hosts = max(1, round(total / per_host))
    parts = [ClusterPart(num_hosts=num_hosts, devices_per_host=per_host, device=device)]
    others = [name for name in devices if makers_of((name,)) == makers_of((device,))]
    if num_hosts > 1 and rng.random() < _MIXED_SHARE:
        other = str(rng.choice(others))
        half = num_hosts // 2
        parts = [
            ClusterPart(num_hosts=num_hosts - half, devices_per_host=per_host, device=device),
            ClusterPart(num_hosts=half, devices_per_host=per_host, device=other),
        ]
    host_link = network = ""
    if per_host > 1 and rng.random() < _UNUSUAL_SHARE:
        link = find_link(str(rng.choice(_OTHER_HOST_LINKS)), where="instances")
        if link.bytes_per_s < entry.host_link.bytes_per_s:
            host_link = link.name
    if num_hosts > 1 and rng.random() < _UNUSUAL_SHARE:
        network = str(rng.choice(_NETWORKS))
    rack = 0
    if num_hosts >= 4 and entry.domain is None and rng.random() < _RACK_SHARE:
        rack = next(ways for ways in range(math.isqrt(num_hosts), 0, -1) if num_hosts % ways == 0)
    rack = rack if rack > 1 else 0
    if len(parts) == 2 and parts[0].device == parts[1].device:
        parts = [ClusterPart(num_hosts=num_hosts, devices_per_host=per_host, device=device)]
    return ClusterSpec(parts=tuple(parts), host_link=host_link, network=network, rack_hosts=rack)


def _size(rng: np.random.Generator, sizes: tuple[int, int]) -> int:
    """Mostly a power of two, else 3 or 5 times one, sometimes any number."""
    low, high = sizes
    wanted: float = low * ((high + 0.5) / low) ** float(rng.random() ** 0.5)
    kind = rng.random()
    if kind > 0.95:
        return min(high, max(low, round(wanted)))
    unit = 1 if kind < 0.75 else int(rng.choice((3, 5)))
    return min(high, max(low, unit << max(0, round(float(np.log2(wanted / unit))))))
