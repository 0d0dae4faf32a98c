"""The cluster a row tells of: its columns over the catalog's usual figures."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import lru_cache

from meshwright.bench.runs import MeasuredRun, checked_size
from meshwright.cluster.catalog import CatalogEntry, find_device, match_driver_name
from meshwright.cluster.model import Cluster, Device, Host, Link
from meshwright.errors import BadClusterFile, BadRequest

__all__ = ["cluster_of", "devices_of", "num_devices_of"]

_NO_NAMES = frozenset({
    "nvidia", "amd", "instinct", "tesla", "quadro", "geforce", "dgx", "hgx", "gpu", "gpus",
    "tensor", "core", "superpod", "grace", "blackwell", "hopper", "ampere",
})  # fmt: skip
"""Words about a device's maker, machine or family."""
_FORMS = frozenset({"pcie", "nvl"})


def cluster_of(run: MeasuredRun) -> tuple[Cluster, tuple[str, ...]]:
    """The cluster of ``run``, and what was assumed.

    Raises:
        BadRequest: the number of devices is not told and does not follow from degrees.
        BadClusterFile: a device is unknown.
    """
    said: list[str] = []
    entries = devices_of(run.gpu, said)
    count = num_devices_of(run)
    per_host = _per_host(run, entries[0], count, said)
    num_hosts = math.ceil(count / per_host)
    hosts = []
    for number in range(num_hosts):
        entry = entries[number * len(entries) // num_hosts]
        size = min(per_host, count - number * per_host)
        link = _with_rate(entry.host_link, run.intra_host_GBps)
        hosts.append(_host(entry.device, size, link))
    levels: list[tuple[int, Link]] = []
    if num_hosts > 1:
        domain = _even_part(num_hosts, _hosts_of_domain(run, entries[0], per_host))
        inner = hosts[0].link if entries[0].domain is None else entries[0].domain[1]
        inner = _with_rate(inner, run.intra_host_GBps)
        slowest = min((entry.network for entry in entries), key=lambda link: link.bytes_per_s)
        network = _with_rate(slowest, run.inter_host_GBps)
        if run.inter_host_GBps is None and domain < num_hosts:
            said.append(f"network between hosts not told: {network.name}")
        if domain >= num_hosts:
            levels.append((num_hosts, inner))
        else:
            if domain > 1:
                levels.append((domain, inner))
            levels.append((num_hosts, network))
    name = f"{count}x{run.gpu}"
    return Cluster(name=name, hosts=tuple(hosts), levels=tuple(levels)), tuple(said)


@lru_cache(maxsize=256)
def _host(device: Device, num_devices: int, link: Link) -> Host:
    return Host(device=device, num_devices=num_devices, link=link)


def num_devices_of(run: MeasuredRun) -> int:
    """Devices of a run: as told, or the product of its degrees.

    Raises:
        BadRequest: neither is known, or they are too many.
    """
    inner = (run.tp or 1) * (run.pp or 1) * (run.cp or 1)
    count = run.gpus
    if count is None and run.dp is not None:
        count = run.dp * inner
    if count is None and run.hosts is not None and run.gpus_per_host is not None:
        count = run.hosts * run.gpus_per_host
    if count is None:
        raise BadRequest("neither gpus nor dp is told: the number of devices is not known")
    checked_size("gpus", count)
    return count


def devices_of(gpu: str, said: list[str]) -> tuple[CatalogEntry, ...]:
    """Catalog entries of a column's text: one, or each of ``mixed:a+b``.

    Raises:
        BadClusterFile: a device is unknown.
    """
    text = gpu.strip().lower()
    parts = text.removeprefix("mixed:").split("+")
    return tuple(_device(part, said) for part in parts)


def _device(name: str, said: list[str]) -> CatalogEntry:
    """What the driver calls so; else by name without maker and machine, then by its beginnings."""
    driven = match_driver_name(name)
    if driven is not None:
        return driven
    words = _words_of(name)
    error: BadClusterFile | None = None
    for count in range(len(words), 0, -1):
        short = "-".join(words[:count])
        try:
            found = find_device(short, where=f"gpu {name!r}")
        except BadClusterFile as exc:
            error = error or exc
            continue
        if count < len(words):
            said.append(f"gpu {name}: data sheet of {found.device.name}")
        return found
    assert error is not None, "split gives at least one word"
    raise error


def _words_of(name: str) -> list[str]:
    """The device's own words, the form that tells parts apart right behind its number."""
    spaced = re.sub(r"\b(rtx|gtx)(?=\d)", r"\1 ", name.strip())
    spaced = re.sub(r"(?<=\d\d)ti\b", " ti", spaced)
    words = [word for word in re.split(r"[_\-\s()/,]+", spaced) if word]
    own = [
        word
        for word in words
        if word not in _NO_NAMES and not re.fullmatch(r"\d{1,2}x?|x\d{1,2}", word)
    ]
    own = [re.sub(r"^(\d+)g(ib)?$", r"\1gb", word) for word in own] or words
    forms = [word for word in own[1:] if word in _FORMS]
    return [own[0], *forms, *(word for word in own[1:] if word not in _FORMS)]


def _per_host(run: MeasuredRun, entry: CatalogEntry, count: int, said: list[str]) -> int:
    if run.gpus_per_host is not None:
        return min(run.gpus_per_host, count)
    if run.hosts is not None and count % run.hosts == 0:
        return count // run.hosts
    if count > entry.devices_per_host:
        said.append(f"gpus of a host not told: {entry.devices_per_host}")
    return min(entry.devices_per_host, count)


def _hosts_of_domain(run: MeasuredRun, entry: CatalogEntry, per_host: int) -> int:
    """Hosts that NVLink joins."""
    if run.nvlink_domain_gpus is not None:
        return max(run.nvlink_domain_gpus // per_host, 1)
    return 1 if entry.domain is None else entry.domain[0]


def _even_part(num_hosts: int, domain: int) -> int:
    """Hosts of each domain that a job takes.

    Schedulers leave some of a rack free rather than let groups of ranks straddle racks.
    """
    if domain >= num_hosts:
        return domain
    return max(size for size in range(1, domain + 1) if num_hosts % size == 0)


def _with_rate(link: Link, gigabytes_per_s: float | None) -> Link:
    if gigabytes_per_s is None or math.isclose(gigabytes_per_s * 1e9, link.bytes_per_s):
        return link
    return replace(link, bytes_per_s=gigabytes_per_s * 1e9, source="the table's column")
