"""Measured graphs as arrays a network is trained on, and minibatches of them.

N = rows of operators, G = graphs, F = features, P = sizes, K = kinds, E = edges.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from meshwright.cost.work import Family, components
from meshwright.gnn_cost.features import ideal_time_s, operator_features
from meshwright.gnn_cost.forward import kind_columns, size_columns
from meshwright.gnn_cost.network import GraphInputs, directed
from meshwright.gnn_cost.samples import MeasuredGraphs

__all__ = [
    "Batch",
    "TrainingRows",
    "batch_of",
    "group_weights",
    "split_groups",
    "training_rows",
]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Array32 = NDArray[np.float32]

_GROUP_LABELS = ("source", "op", "direction", "dtype")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRows:
    """All measured graphs, ready to be batched."""

    features: Array32
    """(N, F)"""
    sizes: Array32
    """(N, P) ``forward.size_columns``."""
    kinds: Array32
    """(N, K) ``forward.kind_columns``."""
    ideal_s: Array32
    """(N,)"""
    weight: Array32
    """(N,)"""
    component: IntArray
    """(N,)"""
    has_edge: Array32
    """(N,) 1 for rows that meet another."""
    is_pooled: Array32
    """(N,) 1 but for collectives."""
    row_start: IntArray
    """(G + 1,) first row of each graph, and N."""
    edges: IntArray
    """(2, E) sorted by graph."""
    edge_kind: IntArray
    """(E,)"""
    edge_start: IntArray
    """(G + 1,) first edge of each graph, and E."""
    log_time_s: Array32
    """(G,) of seconds."""
    rest_s: Array32
    """(G,)"""
    group: IntArray
    """(G,) equal for graphs of one source, device, operator, direction and dtype."""
    split_group: IntArray
    """(G,) equal for graphs so alike that they belong to one side of a split: ``split_groups``."""

    @property
    def count(self) -> int:
        """G."""
        return len(self.log_time_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Some graphs, as tensors."""

    inputs: GraphInputs
    weight: torch.Tensor
    """(n,)"""
    has_edge: torch.Tensor
    """(n,)"""
    graph: torch.Tensor
    """(n,) place in the batch."""
    log_time_s: torch.Tensor
    """(g,)"""
    rest_s: torch.Tensor
    """(g,)"""


def training_rows(graphs: MeasuredGraphs) -> TrainingRows:
    """Features, ideal times and groups of all graphs."""
    work, devices = graphs.work, graphs.devices
    device_rows = graphs.device[graphs.graph]
    edge_graph = graphs.graph[work.edges[0]]
    order = np.argsort(edge_graph, kind="stable")
    has_edge = np.zeros(work.count, np.float32)
    has_edge[work.edges.ravel()] = 1.0
    steps = np.arange(graphs.count + 1)
    features = operator_features(work, devices, device_rows)
    return TrainingRows(
        features=features,
        sizes=size_columns(features),
        kinds=kind_columns(features),
        ideal_s=ideal_time_s(work, devices, device_rows).astype(np.float32),
        weight=graphs.weight.astype(np.float32),
        component=components(work.edges, work.count),
        has_edge=has_edge,
        is_pooled=(work.family != Family.COLLECTIVE).astype(np.float32),
        row_start=np.searchsorted(graphs.graph, steps),
        edges=work.edges[:, order],
        edge_kind=work.edge_kind[order],
        edge_start=np.searchsorted(edge_graph[order], steps),
        log_time_s=np.log(graphs.time_s).astype(np.float32),
        rest_s=graphs.rest_s.astype(np.float32),
        group=_numbered(
            [graphs.device, *(graphs.labels[one] for one in _GROUP_LABELS if one in graphs.labels)]
        ),
        split_group=split_groups(graphs),
    )


def split_groups(graphs: MeasuredGraphs) -> IntArray:
    """(G,) numbers, equal for one operator's shape at about one size on whatever device.

    Sizes within a factor of eight of traffic count as one; graphs without a label ``shape`` are
    told apart by operator and size alone. They do not depend on the order of the graphs.
    """
    start = np.searchsorted(graphs.graph, np.arange(graphs.count))
    octave = np.log2(np.add.reduceat(graphs.work.num_bytes, start)) // 3
    names = [graphs.labels[one] for one in ("op", "shape") if one in graphs.labels]
    number = _numbered([*names, octave])
    _, found, inverse = np.unique(number, return_index=True, return_inverse=True)
    texts = ["|".join([*(str(one[at]) for one in names), str(octave[at])]) for at in found]
    return np.array([zlib.crc32(text.encode()) for text in texts], np.int64)[inverse]


def group_weights(group: IntArray, *, balance: float) -> Array32:
    """(G,) weights of mean 1: a group of n counts as ``n ** (1 - balance)``."""
    _, inverse, counts = np.unique(group, return_inverse=True, return_counts=True)
    weight = counts[inverse].astype(np.float64) ** -balance
    return (weight / weight.mean()).astype(np.float32)


def batch_of(rows: TrainingRows, chosen: IntArray) -> Batch:
    """The graphs of those numbers."""
    row, graph = _ranges(rows.row_start, chosen)
    edge, edge_graph = _ranges(rows.edge_start, chosen)
    first = np.concatenate([[0], np.cumsum(np.bincount(graph, minlength=len(chosen)))])
    shift = first[edge_graph] - rows.row_start[chosen[edge_graph]]
    edges, kinds = directed(
        torch.from_numpy(rows.edges[:, edge] + shift), torch.from_numpy(rows.edge_kind[edge])
    )
    found, component = np.unique(rows.component[row], return_inverse=True)
    inputs = GraphInputs(
        sizes=torch.from_numpy(rows.sizes[row]),
        kinds=torch.from_numpy(rows.kinds[row]),
        ideal_s=torch.from_numpy(rows.ideal_s[row]),
        edges=edges,
        edge_kind=kinds,
        component=torch.from_numpy(component),
        num_components=len(found),
        is_pooled=torch.from_numpy(rows.is_pooled[row]),
    )
    return Batch(
        inputs=inputs,
        weight=torch.from_numpy(rows.weight[row]),
        has_edge=torch.from_numpy(rows.has_edge[row]),
        graph=torch.from_numpy(graph),
        log_time_s=torch.from_numpy(rows.log_time_s[chosen]),
        rest_s=torch.from_numpy(rows.rest_s[chosen]),
    )


def _ranges(start: IntArray, chosen: IntArray) -> tuple[IntArray, IntArray]:
    """All of ``start[i]`` up to ``start[i + 1]`` for the chosen i, and the place of i in them."""
    counts = start[chosen + 1] - start[chosen]
    place = np.repeat(np.arange(len(chosen)), counts)
    before = np.cumsum(counts) - counts
    return (start[chosen] - before)[place] + np.arange(len(place)), place


def _numbered(columns: Sequence[NDArray[np.generic]]) -> IntArray:
    """(G,) one number for each combination of values."""
    number = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        found, inverse = np.unique(column, return_inverse=True)
        number = np.unique(number * len(found) + inverse, return_inverse=True)[1]
    return number.astype(np.int64)
