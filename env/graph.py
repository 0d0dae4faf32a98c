"""An instance's model and cluster as one small graph.

Nodes are groups of segments, types of device and levels of links. Columns of a node are logarithms
of amounts over typical ones, and shares; those of other types of node are 0.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from meshwright.cluster.model import Cluster
from meshwright.cost.precision import TORCH_DTYPE
from meshwright.env.estimates import Totals
from meshwright.env.instance import EdgeType, Float32Array, InstanceGraph, IntArray, NodeType
from meshwright.space.search import SearchContext

__all__ = ["MAX_EDGES", "MAX_NODES", "NODE_FEATURES", "NUM_NODE_FEATURES", "graph_of", "padded"]

_GROUP_FEATURES = (
    "log_work_s",
    "work_share",
    "log_launch_s",
    "log_parameter_bytes",
    "log_state_bytes",
    "log_kept_bytes",
    "log_least_kept_bytes",
    "log_boundary_bytes",
    "log_num_segments",
    "segment_share",
    "first_place",
    "last_place",
    "log_batch",
    "log_sequence",
    "has_experts",
    "has_heads",
    "has_vocab",
)
_DEVICE_FEATURES = (
    "log_flop_per_s",
    "log_memory_bytes",
    "log_memory_bytes_per_s",
    "log_launch_latency_s",
    "log_num_devices",
    "device_share",
)
_LEVEL_FEATURES = ("log_bytes_per_s", "log_latency_s", "log_span", "log_num_units", "level")

NODE_FEATURES = (*_GROUP_FEATURES, *_DEVICE_FEATURES, *_LEVEL_FEATURES)
"""Columns of ``InstanceGraph.node_features``."""

NUM_NODE_FEATURES = len(NODE_FEATURES)

_MAX_TYPES = 6
_MAX_LEVELS = 5
"""A cluster's most frequent types of device, and its lowest levels, have nodes."""

MAX_NODES = 4 + _MAX_TYPES + _MAX_LEVELS
MAX_EDGES = 2 * (4 * 3 // 2 + _MAX_TYPES + _MAX_LEVELS + 4 * _MAX_TYPES)


def graph_of(
    context: SearchContext, totals: Totals, group_classes: tuple[tuple[int, ...], ...]
) -> InstanceGraph:
    """The graph of a context whose segments are decided in groups."""
    group_of = {number: g for g, classes in enumerate(group_classes) for number in classes}
    segments = np.array([group_of[c] for c in context.model.segment_classes])
    cluster = context.cluster
    types = _types(cluster)
    levels = _levels(cluster)
    num_groups = len(group_classes)
    nodes = [
        *(_group_row(context, totals, segments, group) for group in range(num_groups)),
        *(_device_row(context, *each) for each in types),
        *(_level_row(place, *level) for place, level in enumerate(levels)),
    ]
    kinds = [NodeType.GROUP] * num_groups + [NodeType.DEVICE] * len(types)
    kinds += [NodeType.LEVEL] * len(levels)
    first_level = num_groups + len(types)
    edges: list[tuple[int, int, EdgeType]] = []

    def joined(one: int, other: int, there: EdgeType, back: EdgeType) -> None:
        edges.extend(((one, other, there), (other, one, back)))

    follow = {(a, b) for a, b in pairwise(segments.tolist()) if a != b}
    for one, other in sorted({(min(pair), max(pair)) for pair in follow}):
        joined(one, other, EdgeType.NEXT, EdgeType.PREVIOUS)
    for device in range(num_groups, first_level):
        joined(device, first_level, EdgeType.WITHIN, EdgeType.AROUND)
        for group in range(num_groups):
            joined(group, device, EdgeType.RUNS_ON, EdgeType.RUNS)
    for level in range(first_level, first_level + len(levels) - 1):
        joined(level, level + 1, EdgeType.WITHIN, EdgeType.AROUND)
    ends = [(source, target) for source, target, _ in edges]
    return InstanceGraph(
        node_type=np.array(kinds, dtype=np.int64),
        node_features=np.stack(nodes).astype(np.float32),
        edge_index=np.array(ends, dtype=np.int64).reshape(-1, 2).T,
        edge_type=np.array([kind for _, _, kind in edges], dtype=np.int64),
    )


def padded(graph: InstanceGraph) -> dict[str, Float32Array | IntArray]:
    """The graph's arrays filled up with zeros to ``MAX_NODES`` and ``MAX_EDGES``, and its sizes."""
    num_nodes, num_edges = len(graph.node_type), len(graph.edge_type)
    features = np.zeros((MAX_NODES, NUM_NODE_FEATURES), dtype=np.float32)
    features[:num_nodes] = graph.node_features
    node_type = np.zeros(MAX_NODES, dtype=np.int64)
    node_type[:num_nodes] = graph.node_type
    edge_index = np.zeros((2, MAX_EDGES), dtype=np.int64)
    edge_index[:, :num_edges] = graph.edge_index
    edge_type = np.zeros(MAX_EDGES, dtype=np.int64)
    edge_type[:num_edges] = graph.edge_type
    return {
        "node_features": features,
        "node_type": node_type,
        "edge_index": edge_index,
        "edge_type": edge_type,
        "num_nodes": np.asarray(num_nodes, dtype=np.int64),
        "num_edges": np.asarray(num_edges, dtype=np.int64),
    }


# Rows of nodes -----------------------------------------------------------------------------------


def _types(cluster: Cluster) -> list[tuple[str, int]]:
    """Names and numbers of the most frequent types of device."""
    counts: dict[str, int] = {}
    for host in cluster.hosts:
        counts[host.device.name] = counts.get(host.device.name, 0) + host.num_devices
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_MAX_TYPES]


def _levels(cluster: Cluster) -> list[tuple[float, float, int, int]]:
    """Bytes a second, latency, devices and number of units of each level, lowest first."""
    per_host = max(host.num_devices for host in cluster.hosts)
    slowest = min((host.link for host in cluster.hosts), key=lambda link: link.bytes_per_s)
    found = [(slowest.bytes_per_s, slowest.latency_s, per_host, cluster.num_hosts)]
    for hosts, link in cluster.levels:
        units = -(-cluster.num_hosts // hosts)
        found.append((link.bytes_per_s, link.latency_s, min(hosts, cluster.num_hosts), units))
    return found[:_MAX_LEVELS]


def _group_row(
    context: SearchContext, totals: Totals, group_of_segment: IntArray, group: int
) -> Float32Array:
    mine = group_of_segment == group
    where = np.flatnonzero(mine)
    count = len(mine)
    names = {
        name.rstrip("0123456789")
        for place in where
        for name in context.model.labels.by_segment[place]
    }
    state = totals.optimizer_bytes[mine].sum() + totals.gradient_bytes[mine].sum()
    values = (
        _log(totals.work_s[mine].sum()),
        float(totals.work_s[mine].sum() / max(totals.work_s.sum(), 1e-30)),
        _log(totals.launch_s[mine].sum() / 1e-3),
        *(
            _log(amount / 2**30)
            for amount in (
                totals.parameter_bytes[mine].sum(),
                state,
                totals.kept_bytes[mine].sum(),
                totals.least_kept_bytes[mine].sum(),
                totals.boundary_bytes[mine].sum(),
            )
        ),
        _log(len(where) / 16),
        len(where) / count,
        where[0] / count,
        where[-1] / count,
        _log(context.batch / 64),
        _log(context.sequence_size / 1024),
        *(float(name in names) for name in ("experts", "heads", "vocab")),
    )
    return _row(0, values)


def _device_row(context: SearchContext, name: str, num_devices: int) -> Float32Array:
    device = next(d for d in context.cluster.devices if d.name == name)
    values = (
        _log(device.peak_flop_per_s(TORCH_DTYPE[context.job.precision]) / 1e14),
        _log(device.memory_bytes / 2**35),
        _log(device.memory_bytes_per_s / 1e12),
        _log(device.launch_latency_s / 5e-6),
        _log(num_devices / 8),
        num_devices / context.cluster.num_devices,
    )
    return _row(len(_GROUP_FEATURES), values)


def _level_row(
    place: int, bytes_per_s: float, latency_s: float, span: int, num_units: int
) -> Float32Array:
    values = (
        _log(bytes_per_s / 1e11),
        _log(latency_s / 5e-6),
        _log(span / 8),
        _log(num_units),
        float(place),
    )
    return _row(len(_GROUP_FEATURES) + len(_DEVICE_FEATURES), values)


def _row(first: int, values: tuple[float, ...]) -> Float32Array:
    found = np.zeros(NUM_NODE_FEATURES, dtype=np.float32)
    found[first : first + len(values)] = values
    return found


def _log(value: float) -> float:
    """A quarter of the logarithm: features of size one."""
    return min(max(math.log(value) / 4, -5.0), 5.0) if value > 0 else -5.0
