"""What every model of operators can do, so that one run judges them all."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from meshwright.gnn_cost.features import arithmetic_and_traffic_s, ideal_time_s
from meshwright.gnn_cost.samples import MeasuredGraphs

__all__ = [
    "KERNEL_FLOOR_S",
    "OperatorModel",
    "family_weights",
    "graph_sum",
    "row_ideal_s",
    "row_serial_s",
]

FloatArray = NDArray[np.float64]

KERNEL_FLOOR_S = 2e-6
"""Start and drain of one kernel, where no model says better: the least time of small operators in
tables of kernel times is 1.8 to 3 microseconds on A100, L40S, H100 and B200."""


class OperatorModel(Protocol):
    """Learns times of graphs."""

    def fit(self, graphs: MeasuredGraphs) -> None:
        """Learn from measured graphs, forgetting what was learned."""
        ...

    def predict(self, graphs: MeasuredGraphs) -> FloatArray:
        """Times of graphs, ``rest_s`` included; (G,), seconds."""
        ...


def row_ideal_s(graphs: MeasuredGraphs) -> FloatArray:
    """Least time of every row on its device; (N,)."""
    return ideal_time_s(graphs.work, graphs.devices, graphs.device[graphs.graph])


def row_serial_s(graphs: MeasuredGraphs) -> FloatArray:
    """Arithmetic and traffic of every row one after the other; (N,)."""
    of_rows = graphs.device[graphs.graph]
    arithmetic_s, traffic_s = arithmetic_and_traffic_s(graphs.work, graphs.devices, of_rows)
    return np.asarray(arithmetic_s + traffic_s)


def graph_sum(graphs: MeasuredGraphs, of_rows: FloatArray) -> FloatArray:
    """Weighted sum over the rows of each graph; (G,)."""
    return np.asarray(
        np.bincount(graphs.graph, graphs.weight * of_rows, minlength=graphs.count), np.float64
    )


def family_weights(graphs: MeasuredGraphs) -> FloatArray:
    """Weights that give each kind of operator on each device the same say, up to a factor of 10.

    (G,), of mean 1. Tables hold a hundred times more products than norms.
    """
    family = np.zeros(graphs.count, np.int64)
    family[graphs.graph] = graphs.work.family
    group = family * len(graphs.devices) + graphs.device
    _, inverse, counts = np.unique(group, return_inverse=True, return_counts=True)
    weights = 1.0 / counts[inverse]
    weights = np.clip(weights / np.median(weights), 0.1, 10.0)
    return np.asarray(weights / weights.mean())
