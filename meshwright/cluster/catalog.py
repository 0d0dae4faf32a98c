"""The devices and links we know by their data sheets, read from ``catalog.toml``.

Every figure's source stands beside it in that file, with the date on which it was read.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from meshwright.cluster.cpu import LOOPBACK, cpu_device
from meshwright.cluster.model import Cluster, Device, Host, Link
from meshwright.errors import BadClusterFile

__all__ = [
    "CatalogEntry",
    "catalog_cluster",
    "default_levels",
    "find_device",
    "find_link",
    "known_devices",
    "known_links",
    "makers_of",
    "match_driver_name",
    "name_of_driver",
]


_USUAL_MAKER = "NVIDIA"
"""Of entries that name none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogEntry:
    """A device, and the machine and network it usually comes in."""

    device: Device
    aliases: tuple[str, ...]
    """Other names for it in shorthand and files."""
    driver_names: tuple[str, ...]
    """What the vendor's driver calls it."""
    maker: str
    """``"NVIDIA"``, ``"AMD"``; empty for a CPU."""
    devices_per_host: int
    host_link: Link
    network: Link
    """Between hosts."""
    domain: tuple[int, Link] | None = None
    """``(hosts, link)`` of a rack whose hosts share a faster link, as in NVL72."""


def known_devices() -> tuple[CatalogEntry, ...]:
    """Every device of the catalog in its order, then this machine's CPU as one rank."""
    cpu = CatalogEntry(
        device=cpu_device(num_ranks=1),
        aliases=(),
        driver_names=(),
        maker="",
        devices_per_host=1,
        host_link=LOOPBACK,
        network=_links()["ethernet-10g"],
    )
    return (*_entries().values(), cpu)


def known_links() -> tuple[Link, ...]:
    """Every link a cluster file may name."""
    return (*_links().values(), LOOPBACK)


def find_device(name: str, *, where: str) -> CatalogEntry:
    """The GPU called ``name``, by canonical name or alias, in any case.

    Args:
        name: as the user wrote it; ``_`` counts as ``-``.
        where: start of the error message, such as ``"cluster '8xh10'"``.

    Raises:
        BadClusterFile: no such device; the message offers the nearest names.
    """
    wanted = name.strip().lower().replace("_", "-")
    entry = _by_name().get(wanted)
    if entry is None:
        raise BadClusterFile(
            f"{where}: unknown device {name!r}; {_did_you_mean(wanted, [*_by_name(), 'cpu'])}"
            f"`meshwright clusters` lists them all, or describe it in a cluster file"
        )
    return entry


def find_link(name: str, *, where: str) -> Link:
    """The link called ``name``; ``where`` starts the error message.

    Raises:
        BadClusterFile: no such link; the message offers the nearest names.
    """
    by_name = {link.name: link for link in known_links()}
    link = by_name.get(name.strip().lower())
    if link is None:
        raise BadClusterFile(
            f"{where}: unknown link {name!r}; {_did_you_mean(name, list(by_name))}"
            f"known are {', '.join(by_name)}, or give bytes_per_s and latency_s"
        )
    return link


def match_driver_name(driver_name: str) -> CatalogEntry | None:
    """The device that the driver calls ``driver_name``, or ``None``."""
    wanted = " ".join(driver_name.split()).lower()
    for entry in _entries().values():
        if wanted in (name.lower() for name in entry.driver_names):
            return entry
    return None


def name_of_driver(driver_name: str) -> str:
    """The catalog's name of what the driver calls ``driver_name``; that name where it has none."""
    entry = match_driver_name(driver_name)
    return driver_name if entry is None else entry.device.name


def makers_of(devices: Iterable[str]) -> frozenset[str]:
    """Who makes devices of these canonical names; what the catalog lacks has no maker."""
    return frozenset(_entries()[name].maker for name in devices if name in _entries())


def catalog_cluster(name: str, hosts: tuple[tuple[CatalogEntry, int], ...]) -> Cluster:
    """A cluster of catalog hosts with their usual links.

    Args:
        name: of the cluster.
        hosts: entry and number of devices for each host, in order.

    Hosts of one type with a domain (NVL72 racks) get a level for it. One level joins all hosts,
    by the slowest network among them; a full-bandwidth fabric is assumed above the ports.
    """
    built = {
        key: Host(device=key[0].device, num_devices=key[1], link=key[0].host_link)
        for key in dict.fromkeys(hosts)
    }
    return Cluster(
        name=name,
        hosts=tuple(built[key] for key in hosts),
        levels=default_levels(hosts),
    )


def default_levels(hosts: tuple[tuple[CatalogEntry, int], ...]) -> tuple[tuple[int, Link], ...]:
    """Usual levels above these hosts, given as ``(type, number of devices)`` each."""
    num_hosts = len(hosts)
    if num_hosts == 1:
        return ()
    kinds = tuple(dict.fromkeys(entry for entry, _ in hosts))
    levels: list[tuple[int, Link]] = []
    usual_size = all(num_devices <= entry.devices_per_host for entry, num_devices in hosts)
    if len(kinds) == 1 and kinds[0].domain is not None and usual_size:
        size, link = kinds[0].domain
        if num_hosts <= size:
            return ((num_hosts, link),)
        levels.append((size, link))
    slowest = min((entry.network for entry in kinds), key=lambda link: link.bytes_per_s)
    return (*levels, (num_hosts, slowest))


def _did_you_mean(wanted: str, names: list[str]) -> str:
    close = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}? " if close else ""


@cache
def _raw() -> dict[str, Any]:
    text = resources.files("meshwright.cluster").joinpath("catalog.toml").read_text("utf-8")
    return tomllib.loads(text)


@cache
def _links() -> dict[str, Link]:
    read = _raw()["date_read"]
    return {
        name: Link(
            name=name,
            bytes_per_s=raw["bytes_per_s"],
            latency_s=raw["latency_s"],
            source=f"{raw['source']}; read {read}",
        )
        for name, raw in _raw()["links"].items()
    }


@cache
def _entries() -> dict[str, CatalogEntry]:
    return {name: _entry(name, raw) for name, raw in _raw()["devices"].items()}


def _entry(name: str, raw: dict[str, Any]) -> CatalogEntry:
    launch = _raw()["launch"]
    domain = raw.get("domain")
    to_host = _links()[raw["to_host"]]
    return CatalogEntry(
        device=Device(
            name=name,
            memory_bytes=raw["memory_bytes"],
            memory_bytes_per_s=raw["memory_bytes_per_s"],
            flop_per_s=dict(raw["flop_per_s"]),
            launch_latency_s=launch["latency_s"],
            to_host_bytes_per_s=to_host.bytes_per_s,
            num_units=raw["num_units"],
            cache_bytes=int(raw["cache_mib"] * 2**20),
            sustained_share=raw.get("sustained_share", 1.0),
            source=f"{raw['source']}; launch: {launch['source']}; to the host: {to_host.source}; "
            f"read {_raw()['date_read']}",
        ),
        aliases=tuple(raw["aliases"]),
        driver_names=tuple(raw["driver_names"]),
        maker=raw.get("maker", _USUAL_MAKER),
        devices_per_host=raw["devices_per_host"],
        host_link=_links()[raw["host_link"]],
        network=_links()[raw["network"]],
        domain=None if domain is None else (domain["hosts_per_group"], _links()[domain["link"]]),
    )


@cache
def _by_name() -> dict[str, CatalogEntry]:
    table: dict[str, CatalogEntry] = {}
    for entry in _entries().values():
        for name in (entry.device.name, *entry.aliases):
            assert name not in table, f"catalog.toml: {name} names two devices"
            table[name] = entry
    return table
