"""What is assumed about systems whose collectives others measured, as data, with the reasons."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from meshwright.cluster.catalog import CatalogEntry, find_device, find_link, known_links
from meshwright.cluster.model import Device, GroupLevel, Link
from meshwright.errors import BadClusterFile

__all__ = ["Row", "placed", "reason_to_leave_out"]

T = TypeVar("T")

_GPUS = {
    "unknown_a100_like": "a100-sxm-80gb",  # galvatron: its rates are those of NVLink 3
    "b200": "b200-sxm-180gb",
    "gb200": "gb200-186gb",
}
"""Names the catalog does not know."""

_SINGLE_LINK_PAIRS = {"vtrain_lut": 25e9}
"""Bytes/s between GPUs 0 and 1 of a V100 host, by source: one NVLink in a DGX-1. Elsewhere two, as
those pairs reach more than one link can carry (aceso: 42 of 50 GB/s)."""

_UNSTATED_NETWORKS = {"vidur": "infiniband-edr", "aceso": "infiniband-edr"}
"""Between the two hosts of vidur and aceso: no source states their network. One port of 100 Gb/s
for all GPUs of a host is assumed (1, 2, 4 and 8 GPUs of a host together reach 6 to 12 GB/s); how
efficient networks are is therefore hardly learned from them (the prior's deviation is small)."""

_SMALLEST_BYTES = {
    ("vidur", "all_reduce", 1): 2.0**20,
    ("vidur", "all_reduce", 2): 2.0**17,
}
"""By source, collective and hosts: below, times of 45 to 60 microseconds that do not depend on the
size, with deviations of up to 90 %, are those of the host that launches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What identifies a measured group in a table."""

    source: str
    gpu: str
    fabric: str
    collective: str
    group_size: int
    hosts: int
    dtype: str
    node: str
    least_bytes: float

    @classmethod
    def of(cls, values: Mapping[str, Any], extra: Mapping[str, Any]) -> Row:
        """From the columns of a table; ``extra`` is its column of that name."""
        key = (values["source"], values["collective"], values["hosts"])
        return cls(
            source=str(values["source"]),
            gpu=str(values["gpu"]),
            fabric=str(values["fabric"] or ""),
            collective=str(values["collective"]),
            group_size=int(values["group_size"] or 0),
            hosts=int(values["hosts"] or 1),
            dtype=str(values["dtype"] or ""),
            node=str(extra.get("node") or ""),
            least_bytes=_SMALLEST_BYTES.get(key, 1.0),
        )


def reason_to_leave_out(row: Row) -> str:
    """Why rows of this group are not used; empty where they are."""
    pairwise = "pairwise" in row.node
    try:
        find_device(_GPUS.get(row.gpu, row.gpu), where="table")
    except BadClusterFile:
        return "GPU not in the catalog"
    if "custom_allreduce" in row.source:
        return "kernels of inference servers, not those of training"
    if row.dtype == "int8":
        return "int8: duplicates the fp16 rows of the same bytes"
    if row.fabric == "unknown":
        return "fabric and payload convention not verified"
    if row.fabric == "xgmi":
        return "xGMI: wiring of its groups not stated, one system"
    if row.collective == "send_recv" and pairwise:
        return "sends of pairwise nodes: above the link's rate, or two rates at once"
    if row.collective not in (
        "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv",
    ) or row.group_size < 2:  # fmt: skip
        return "not a collective that is priced"
    return ""


def placed(row: Row, make: Callable[..., T]) -> T:
    """The group of a row, on the links that are stated or assumed; ``make`` is its class."""
    entry = find_device(_GPUS.get(row.gpu, row.gpu), where=f"table of collectives: {row.gpu}")
    host_link, ring_bytes_per_s = entry.host_link, None
    num_parts, part_size = _parts(row, entry)
    on_pcie = row.fabric == "pcie" or ("pairwise" in row.node and part_size > 2)
    if on_pcie and not host_link.name.startswith("pcie"):
        host_link = _pcie_of(entry.device)
    if host_link.name == "nvlink2" and row.group_size == 2 and row.hosts == 1:
        ring_bytes_per_s = _SINGLE_LINK_PAIRS.get(row.source)
    levels = []
    if part_size > 1:
        sizes = (part_size,) * num_parts
        levels.append(GroupLevel(level_index=0, link=host_link, group_sizes=sizes))
    if num_parts > 1:
        network = entry.network
        if row.source in _UNSTATED_NETWORKS:
            network = find_link(_UNSTATED_NETWORKS[row.source], where="network of measured hosts")
            network = replace(network, bytes_per_s=network.bytes_per_s / part_size)
        levels.append(GroupLevel(level_index=1, link=network, group_sizes=(num_parts,)))
    return make(
        kind=row.collective,
        levels=tuple(levels),
        num_ranks=row.group_size,
        device=entry.device,
        source=f"{row.source} {row.node}".strip(),
        gpu=row.gpu,
        ring_bytes_per_s=ring_bytes_per_s,
    )


def _parts(row: Row, entry: CatalogEntry) -> tuple[int, int]:
    """How many parts of how many ranks the fast link joins: hosts, or racks that NVLink joins.

    Racks of ranks that do not divide among them evenly are taken as hosts.
    """
    if row.hosts > 1 and row.fabric in ("nvlink", "") and entry.domain is not None:
        num_racks = -(-row.group_size // (entry.domain[0] * entry.devices_per_host))
        if num_racks < row.hosts and row.group_size % num_racks == 0:
            return num_racks, row.group_size // num_racks
    return row.hosts, max(row.group_size // row.hosts, 1)


def _pcie_of(device: Device) -> Link:
    """The PCI Express generation a device reaches its host by; the fourth where unknown."""
    links = [link for link in known_links() if link.name.startswith("pcie")]
    same = [link for link in links if link.bytes_per_s == device.to_host_bytes_per_s]
    return same[0] if same else find_link("pcie4", where="PCI Express of a measured host")
