"""``meshwright clusters``: the devices we know, or what one cluster consists of."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from meshwright.cli.options import JsonOption
from meshwright.cli.output import Output, output_for
from meshwright.cluster import Cluster, cluster_to_dict, known_devices, parse_cluster
from meshwright.units import format_bytes

__all__ = ["clusters"]


def clusters(
    cluster: Annotated[
        str | None, typer.Argument(metavar="CLUSTER", help="Describe this one only.")
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """List the built-in devices, or describe one cluster with the source of each figure."""
    with output_for(as_json=json_output) as out:
        if cluster is None:
            _show_devices(out)
        else:
            _show_cluster(out, parse_cluster(cluster))


def _show_cluster(out: Output, found: Cluster) -> None:
    out.say(f"{found.name}: {found.describe()}")
    for device in found.devices:
        out.say(f"{device.name}: {device.source}")
    links = [host.link for host in found.hosts if host.num_devices > 1]
    for link in dict.fromkeys([*links, *(link for _, link in found.levels)]):
        rate = f"{link.bytes_per_s / 1e9:g} GB/s, {link.latency_s * 1e6:g} us"
        out.say(f"{link.name}: {rate}: {link.source}")
    out.document(
        {
            "name": found.name,
            "num_devices": found.num_devices,
            "num_hosts": found.num_hosts,
            "description": found.describe(),
            "cluster": cluster_to_dict(found),
        }
    )


def _show_devices(out: Output) -> None:
    entries = known_devices()
    table = Table(box=None, pad_edge=False)
    table.add_column("device")
    for name in ("memory", "GB/s", "bf16 Tflop/s", "fp32 Tflop/s", "per host"):
        table.add_column(name, justify="right")
    table.add_column("in a host")
    table.add_column("also called")
    for entry in entries:
        rates = entry.device.flop_per_s
        table.add_row(
            entry.device.name,
            format_bytes(entry.device.memory_bytes),
            f"{entry.device.memory_bytes_per_s / 1e9:,.0f}",
            f"{rates['bfloat16'] / 1e12:,.1f}" if "bfloat16" in rates else "-",
            f"{rates['float32'] / 1e12:,.1f}",
            str(entry.devices_per_host),
            entry.host_link.name,
            ", ".join(entry.aliases),
        )
    out.show(table)
    out.say()
    out.say("A cluster is written 8xh100, 2x8xa100-80gb, 8xa100+8xt4, cpu:4, or is a file.")
    out.document(
        {
            "devices": [
                {
                    "name": entry.device.name,
                    "aliases": list(entry.aliases),
                    "memory_bytes": entry.device.memory_bytes,
                    "memory_bytes_per_s": entry.device.memory_bytes_per_s,
                    "flop_per_s": dict(entry.device.flop_per_s),
                    "devices_per_host": entry.devices_per_host,
                    "host_link": entry.host_link.name,
                    "network": entry.network.name,
                    "source": entry.device.source,
                }
                for entry in entries
            ]
        }
    )
