"""Rooflines: the data sheet alone, and with a fitted constant share of it for each family."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright.gnn_cost.baselines.base import KERNEL_FLOOR_S, graph_sum, row_ideal_s
from meshwright.gnn_cost.operators.typical import fit_typical, typical_times_s
from meshwright.gnn_cost.samples import MeasuredGraphs

__all__ = ["FittedRoofline", "PlainRoofline"]

FloatArray = NDArray[np.float64]


class PlainRoofline:
    """The least time by data sheet, and one kernel's floor for each row; learns nothing."""

    def fit(self, graphs: MeasuredGraphs) -> None:
        """Nothing."""

    def predict(self, graphs: MeasuredGraphs) -> FloatArray:
        """Times, (G,)."""
        return graph_sum(graphs, KERNEL_FLOOR_S + row_ideal_s(graphs)) + graphs.rest_s


class FittedRoofline:
    """One efficiency and one floor for each family: what the network is drawn to far from data."""

    def __init__(self) -> None:
        """Unfitted."""
        self.tensors: dict[str, NDArray[np.float32]] = {}

    def fit(self, graphs: MeasuredGraphs) -> None:
        """Fit the families there are."""
        self.tensors = fit_typical(graphs)

    def predict(self, graphs: MeasuredGraphs) -> FloatArray:
        """Times, (G,)."""
        row_s = typical_times_s(self.tensors, row_ideal_s(graphs), graphs.work.family)
        return graph_sum(graphs, row_s) + graphs.rest_s
