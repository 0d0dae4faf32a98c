"""Cluster files: TOML, YAML or JSON, read strictly.

    name = "two kinds"                  # optional

    [[hosts]]
    count = 4                           # equal hosts in a row; 1 unless given
    device = "a100-80gb"                # a catalog name, or a table of every field of Device
    num_devices = 8                     # as usual for the device unless given
    link = "nvlink3"                    # a catalog name, or a table; as usual unless given

    [[levels]]                          # lowest first; as usual for catalog devices unless given
    hosts_per_group = 4                 # the last level may leave it out: it joins all hosts
    link = { name = "fabric", bytes_per_s = 25e9, latency_s = 5e-6 }

Unknown or repeated keys, wrong types and numbers out of range are errors of one line with the path
of the key. ``cluster_to_dict`` and ``cluster_to_toml`` write the same form back, in full.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Hashable
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import msgspec
import yaml

from meshwright.cluster.catalog import (
    CatalogEntry,
    default_levels,
    find_device,
    find_link,
)
from meshwright.cluster.cpu import LOOPBACK, cpu_device
from meshwright.cluster.model import Cluster, Device, Host, Link
from meshwright.errors import BadClusterFile

__all__ = [
    "CLUSTER_SUFFIXES",
    "cluster_from_dict",
    "cluster_to_dict",
    "cluster_to_toml",
    "read_cluster_file",
]

CLUSTER_SUFFIXES = (".toml", ".yaml", ".yml", ".json")

_MAX_FILE_BYTES = 2**20
_MAX_HOSTS = 2**20
_MAX_QUOTE = 60
"""Characters of the user's line that an error repeats."""

_Positive = Annotated[float, msgspec.Meta(gt=0)]
_NotNegative = Annotated[float, msgspec.Meta(ge=0)]
_Count = Annotated[int, msgspec.Meta(ge=1, le=_MAX_HOSTS)]
_UnitCount = Annotated[int, msgspec.Meta(ge=0, le=2**20)]
_ByteCount = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
_Text = Annotated[str, msgspec.Meta(min_length=1)]


class _LinkForm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: _Text
    bytes_per_s: _Positive
    latency_s: _NotNegative
    source: str = ""


class _DeviceForm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: _Text
    memory_bytes: Annotated[int, msgspec.Meta(ge=1, le=2**62)]
    memory_bytes_per_s: _Positive
    flop_per_s: dict[str, _Positive]
    launch_latency_s: _NotNegative
    to_host_bytes_per_s: _NotNegative = 0.0
    num_units: _UnitCount = 0
    cache_bytes: _ByteCount = 0
    sustained_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    source: str = ""


class _HostForm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    device: str | _DeviceForm
    count: _Count = 1
    num_devices: _Count | None = None
    link: str | _LinkForm | None = None


class _LevelForm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    link: str | _LinkForm
    hosts_per_group: _Count | None = None


class _ClusterForm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    hosts: Annotated[list[_HostForm], msgspec.Meta(min_length=1)]
    name: _Text | None = None
    levels: list[_LevelForm] | None = None


def read_cluster_file(path: Path) -> Cluster:
    """The cluster described by a TOML, YAML or JSON file; its name defaults to the file's stem.

    Raises:
        BadClusterFile: the file cannot be read or does not follow the form.
    """
    where = f"cluster file {str(path)!r}"
    try:
        if path.exists() and not path.is_file():
            raise BadClusterFile(f"{where}: not a file; give the path of a cluster file")
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise BadClusterFile(f"{where}: larger than 1 MiB; use count for equal hosts")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise BadClusterFile(f"{where}: no such file; check the path") from error
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or no path at all
        raise BadClusterFile(f"{where}: cannot read it: {_one_line(error)}") from error
    try:
        raw = _parse(text, path.suffix.lower(), where=where)
    except RecursionError as error:
        raise BadClusterFile(f"{where}: nested too deeply; a cluster needs 4 levels") from error
    return cluster_from_dict(raw, where=where, default_name=path.stem)


def cluster_from_dict(raw: object, *, where: str, default_name: str = "cluster") -> Cluster:
    """The cluster that a plain dictionary describes, in the form of a cluster file.

    Args:
        raw: what a TOML, YAML or JSON reader gives.
        where: start of error messages.
        default_name: used where ``raw`` gives no name.

    Raises:
        BadClusterFile: unknown key, wrong type or value; the message holds the path of the key.
    """
    try:
        form = msgspec.convert(raw, _ClusterForm, strict=True)
    except msgspec.ValidationError as error:
        raise BadClusterFile(f"{where}: {_one_line(error)}; see `meshwright clusters`") from error
    if sum(host.count for host in form.hosts) > _MAX_HOSTS:
        raise BadClusterFile(f"{where}: $.hosts: more than {_MAX_HOSTS} hosts; lower the counts")
    hosts: list[Host] = []
    entries: list[tuple[CatalogEntry, int]] = []
    for index, host_form in enumerate(form.hosts):
        host, entry = _host(host_form, where=f"{where}: $.hosts[{index}]")
        hosts.extend([host] * host_form.count)
        if entry is not None:
            entries.extend([(entry, host.num_devices)] * host_form.count)
    if form.levels is not None:
        levels = _levels(form.levels, num_hosts=len(hosts), where=where)
    elif len(hosts) == 1:
        levels = ()
    elif len(entries) == len(hosts):
        levels = default_levels(tuple(entries))
    else:
        raise BadClusterFile(
            f"{where}: $.levels is missing; {len(hosts)} hosts of devices that are not all in the "
            f"catalog need at least one [[levels]] with a link"
        )
    try:
        return Cluster(name=form.name or default_name, hosts=tuple(hosts), levels=levels)
    except BadClusterFile as error:
        raise BadClusterFile(f"{where}: {error}") from error


def cluster_to_dict(cluster: Cluster) -> dict[str, Any]:
    """The cluster in the form of a cluster file, every figure written out; fit for JSON."""
    hosts = []
    for host, run in groupby(cluster.hosts):
        hosts.append(
            {
                "count": len(list(run)),
                "device": _device_to_dict(host.device),
                "num_devices": host.num_devices,
                "link": _link_to_dict(host.link),
            }
        )
    levels = [
        {"hosts_per_group": size, "link": _link_to_dict(link)} for size, link in cluster.levels
    ]
    return {"name": cluster.name, "hosts": hosts, "levels": levels}


def cluster_to_toml(cluster: Cluster) -> str:
    """The cluster as the text of a TOML file that reads back to an equal one."""
    form = cluster_to_dict(cluster)
    blocks = [f"name = {_toml_value(form['name'])}\n"]
    for key in ("hosts", "levels"):
        for table in form[key]:
            lines = [f"{name} = {_toml_value(value)}" for name, value in table.items()]
            blocks.append("\n".join([f"[[{key}]]", *lines]) + "\n")
    return "\n".join(blocks)


def _host(form: _HostForm, *, where: str) -> tuple[Host, CatalogEntry | None]:
    entry: CatalogEntry | None = None
    link: Link | None = None
    num_devices = form.num_devices
    if isinstance(form.device, _DeviceForm):
        device = _build_device(form.device, where=f"{where}.device")
    elif form.device.strip().lower() == "cpu":
        device, link = cpu_device(num_ranks=num_devices or 1), LOOPBACK
        num_devices = num_devices or 1
    else:
        entry = find_device(form.device, where=f"{where}.device")
        device, link = entry.device, entry.host_link
        num_devices = num_devices or entry.devices_per_host
    if num_devices is None:
        raise BadClusterFile(f"{where}.num_devices is missing; say how many devices the host has")
    if form.link is not None:
        link = _build_link(form.link, where=f"{where}.link")
    if link is None:
        raise BadClusterFile(f"{where}.link is missing; a device of your own needs the host's link")
    return Host(device=device, num_devices=num_devices, link=link), entry


def _levels(forms: list[_LevelForm], *, num_hosts: int, where: str) -> tuple[tuple[int, Link], ...]:
    levels: list[tuple[int, Link]] = []
    for index, form in enumerate(forms):
        path = f"{where}: $.levels[{index}]"
        size = form.hosts_per_group
        if size is None:
            if index < len(forms) - 1:
                raise BadClusterFile(
                    f"{path}.hosts_per_group is missing; only the last level may leave it out"
                )
            size = num_hosts
        levels.append((size, _build_link(form.link, where=f"{path}.link")))
    return tuple(levels)


def _build_device(form: _DeviceForm, *, where: str) -> Device:
    try:
        return Device(
            name=form.name,
            memory_bytes=form.memory_bytes,
            memory_bytes_per_s=form.memory_bytes_per_s,
            flop_per_s=dict(form.flop_per_s),
            launch_latency_s=form.launch_latency_s,
            to_host_bytes_per_s=form.to_host_bytes_per_s,
            num_units=form.num_units,
            cache_bytes=form.cache_bytes,
            sustained_share=form.sustained_share,
            source=form.source or "the user's cluster file",
        )
    except BadClusterFile as error:
        raise BadClusterFile(f"{where}: {error}") from error


def _build_link(form: str | _LinkForm, *, where: str) -> Link:
    if isinstance(form, str):
        return find_link(form, where=where)
    try:
        return Link(
            name=form.name,
            bytes_per_s=form.bytes_per_s,
            latency_s=form.latency_s,
            source=form.source or "the user's cluster file",
        )
    except BadClusterFile as error:
        raise BadClusterFile(f"{where}: {error}") from error


def _device_to_dict(device: Device) -> dict[str, Any]:
    return {
        "name": device.name,
        "memory_bytes": device.memory_bytes,
        "memory_bytes_per_s": device.memory_bytes_per_s,
        "flop_per_s": dict(device.flop_per_s),
        "launch_latency_s": device.launch_latency_s,
        "to_host_bytes_per_s": device.to_host_bytes_per_s,
        "num_units": device.num_units,
        "cache_bytes": device.cache_bytes,
        "sustained_share": device.sustained_share,
        "source": device.source,
    }


def _link_to_dict(link: Link) -> dict[str, Any]:
    return {
        "name": link.name,
        "bytes_per_s": link.bytes_per_s,
        "latency_s": link.latency_s,
        "source": link.source,
    }


def _toml_value(value: object) -> str:
    if isinstance(value, str):
        # A JSON string is a TOML basic string, but for the one control character JSON leaves bare.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, dict):
        inside = ", ".join(f"{_toml_value(str(k))} = {_toml_value(v)}" for k, v in value.items())
        return f"{{ {inside} }}"
    assert isinstance(value, int | float), f"no TOML form for {type(value).__name__}"
    return repr(value)


def _parse(text: str, suffix: str, *, where: str) -> object:
    try:
        if suffix == ".toml":
            return tomllib.loads(text)
        if suffix == ".json":
            return json.loads(text, object_pairs_hook=_unique_pairs, parse_constant=_no_constant)
        if suffix in (".yaml", ".yml"):
            return yaml.load(text, Loader=_StrictLoader)
    except (ValueError, yaml.YAMLError) as error:
        raise BadClusterFile(f"{where}: {_parse_message(error, text)}") from error
    raise BadClusterFile(
        f"{where}: cannot tell its kind; let the name end in {', '.join(CLUSTER_SUFFIXES)}"
    )


def _unique_pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table: dict[str, object] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"key {key!r} appears twice; remove one")
        table[key] = value
    return table


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no number; write a finite one")


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses repeated keys and aliases, and reads ``25e9`` as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """As in the base class, after a look at the keys."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} appears twice; remove one", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """As in the base class; an alias could grow a small file without bound."""
        if self.check_event(yaml.events.AliasEvent):
            event: yaml.events.Event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(
                problem="aliases (*name) are not allowed; write it out",
                problem_mark=event.start_mark,  # type: ignore[arg-type]  # C and Python marks alike
            )
        return super().compose_node(parent, index)


# YAML 1.1 wants a dot and a sign ("2.5e+10") and would read 25e9 as text.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+"),
    list("-+0123456789"),
)


def _parse_message(error: Exception, text: str) -> str:
    """What the reader found wrong, with the line; the TOML reader does not name the key."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    message = _one_line(error)
    at_line = re.search(r"\(at line (\d+),", message)
    lines = text.splitlines()
    if at_line:
        message += f" in {lines[int(at_line.group(1)) - 1].strip()[:_MAX_QUOTE]!r}"
    elif lines and "(at end of document)" in message:
        message += f" after {lines[-1].strip()[:_MAX_QUOTE]!r}"
    return message


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
