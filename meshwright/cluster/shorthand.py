"""Clusters written in one word.

    8xh100               8 devices, on as many hosts as they usually fill
    2x8xa100-80gb        2 hosts of 8 devices
    h100                 one device
    8xa100-80gb+8xt4     parts of different kinds, in order
    cpu:4                4 processes on this machine's CPU

A count that does not fill the last host makes a smaller last host: ``12xh100`` is a host of 8 and
a host of 4. ``Cluster.name`` is the same shorthand with the canonical device names.
"""

from __future__ import annotations

import re

from meshwright.cluster.catalog import CatalogEntry, catalog_cluster, find_device
from meshwright.cluster.cpu import cpu_cluster
from meshwright.cluster.model import Cluster
from meshwright.errors import BadClusterFile

__all__ = ["MAX_DEVICES", "parse_shorthand"]

MAX_DEVICES = 2**20
"""More than any machine hall holds; keeps a slip of the keyboard from filling the memory."""

_CPU = re.compile(r"cpu(?::(\d+))?|(\d+)xcpu")
_PART = re.compile(r"(?:(\d+)x)?(?:(\d+)x)?([a-z][a-z0-9._-]*)")

_FORMS = "write it like 8xh100, 2x8xa100-80gb, 8xa100+8xt4 or cpu:4, or give a .toml or .yaml file"


def parse_shorthand(text: str) -> Cluster:
    """The cluster that ``text`` names; see the module for the forms.

    Raises:
        BadClusterFile: no such form, unknown device, or a count out of range.
    """
    where = f"cluster {text!r}"
    compact = re.sub(r"\s+", "", text).lower()
    cpu = _CPU.fullmatch(compact)
    if cpu:
        digits = cpu.group(1) or cpu.group(2) or "1"
        return cpu_cluster(_count(digits, where=where))
    names: list[str] = []
    hosts: list[tuple[CatalogEntry, int]] = []
    for part in compact.split("+"):
        name, part_hosts = _parse_part(part, where=where, num_already=sum(n for _, n in hosts))
        names.append(name)
        hosts.extend(part_hosts)
    return catalog_cluster("+".join(names), tuple(hosts))


def _parse_part(
    part: str, *, where: str, num_already: int
) -> tuple[str, list[tuple[CatalogEntry, int]]]:
    """Canonical text and hosts of one part, such as ``2x8xa100``."""
    if _CPU.fullmatch(part):
        raise BadClusterFile(f"{where}: CPU ranks and GPUs do not mix; plan for one of them")
    match = _PART.fullmatch(part)
    if match is None:
        raise BadClusterFile(f"{where}: cannot read {part!r}; {_FORMS}")
    first, second, name = match.groups()
    entry = find_device(name, where=where)
    canonical = entry.device.name
    per_host = entry.devices_per_host
    if second is not None:
        num_hosts, per_host = _count(first, where=where), _count(second, where=where)
        total = num_hosts * per_host
        canonical = f"{num_hosts}x{per_host}x{canonical}"
    else:
        total = _count(first or "1", where=where)
        canonical = f"{total}x{canonical}"
    if num_already + total > MAX_DEVICES:
        raise BadClusterFile(f"{where}: more than {MAX_DEVICES} devices; lower the counts")
    full, rest = divmod(total, per_host)
    return canonical, [(entry, per_host)] * full + ([(entry, rest)] if rest else [])


def _count(digits: str, *, where: str) -> int:
    """A count of at least 1, refused before it is turned into a huge number."""
    if len(digits) > 9 or not 1 <= int(digits) <= MAX_DEVICES:
        raise BadClusterFile(f"{where}: count {digits[:12]} must be 1 to {MAX_DEVICES}")
    return int(digits)
