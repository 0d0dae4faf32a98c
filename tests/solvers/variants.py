"""Clusters that differ in one respect from another."""

from __future__ import annotations

from dataclasses import replace

from meshwright.cluster.model import Cluster


def with_memory(cluster: Cluster, memory_bytes: int) -> Cluster:
    """The same devices with so much memory each."""
    hosts = tuple(
        replace(host, device=replace(host.device, memory_bytes=memory_bytes))
        for host in cluster.hosts
    )
    return replace(cluster, hosts=hosts)


def with_faster_links(cluster: Cluster, factor: float) -> Cluster:
    """The same devices, every link ``factor`` times as fast; latencies unchanged."""
    hosts = tuple(
        replace(host, link=replace(host.link, bytes_per_s=host.link.bytes_per_s * factor))
        for host in cluster.hosts
    )
    levels = tuple(
        (count, replace(link, bytes_per_s=link.bytes_per_s * factor))
        for count, link in cluster.levels
    )
    return replace(cluster, hosts=hosts, levels=levels)
