"""Clusters: devices, links and levels; the catalog; shorthand, files and detection."""

from __future__ import annotations

from meshwright.cluster.catalog import CatalogEntry, known_devices, known_links
from meshwright.cluster.cpu import cpu_cluster
from meshwright.cluster.detect import detect_machine
from meshwright.cluster.files import (
    cluster_from_dict,
    cluster_to_dict,
    cluster_to_toml,
    read_cluster_file,
)
from meshwright.cluster.model import Cluster, Device, GroupLevel, Host, Link
from meshwright.cluster.parse import parse_cluster
from meshwright.cluster.shorthand import parse_shorthand

__all__ = [
    "CatalogEntry",
    "Cluster",
    "Device",
    "GroupLevel",
    "Host",
    "Link",
    "cluster_from_dict",
    "cluster_to_dict",
    "cluster_to_toml",
    "cpu_cluster",
    "detect_machine",
    "known_devices",
    "known_links",
    "parse_cluster",
    "parse_shorthand",
    "read_cluster_file",
]
