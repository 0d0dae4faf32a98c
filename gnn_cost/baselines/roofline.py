"""Rooflines: the data sheet alone, and with a fitted constant share of it for each family."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright.cost.work import Family
from meshwright.gnn_cost.baselines.base import KERNEL_FLOOR_S, graph_sum, row_ideal_s
from meshwright.gnn_cost.samples import MeasuredGraphs

__all__ = ["FittedRoofline", "PlainRoofline"]

FloatArray = NDArray[np.float64]

_FLOORS_S = np.geomspace(1e-6, 2e-5, 14)
_EFFICIENCIES = np.linspace(0.05, 1.0, 39)


class PlainRoofline:
    """The least time by data sheet, and one kernel's floor for each row; learns nothing."""

    def fit(self, graphs: MeasuredGraphs) -> None:
        """Nothing."""

    def predict(self, graphs: MeasuredGraphs) -> FloatArray:
        """Times, (G,)."""
        return graph_sum(graphs, KERNEL_FLOOR_S + row_ideal_s(graphs)) + graphs.rest_s


class FittedRoofline:
    """One efficiency and one floor for each family, of least mean error in logarithms."""

    def __init__(self) -> None:
        """Unfitted: efficiency 1."""
        self.efficiency = np.ones(len(Family))
        self.floor_s = np.full(len(Family), KERNEL_FLOOR_S)

    def fit(self, graphs: MeasuredGraphs) -> None:
        """Fit the families with rows of their own; by grid, one family after another."""
        self.efficiency[:] = 0.7
        self.floor_s[:] = KERNEL_FLOOR_S
        ideal_s = row_ideal_s(graphs)
        for family in np.unique(graphs.work.family):
            mine = graphs.work.family == family
            touched = np.flatnonzero(np.bincount(graphs.graph[mine], minlength=graphs.count))
            self._fit_family(graphs, int(family), mine, ideal_s, touched)

    def _fit_family(
        self,
        graphs: MeasuredGraphs,
        family: int,
        mine: NDArray[np.bool_],
        ideal_s: FloatArray,
        touched: NDArray[np.int64],
    ) -> None:
        others = graph_sum(graphs, np.where(mine, 0.0, self._rows_s(graphs, ideal_s)))
        fixed = (others + graphs.rest_s)[touched]
        count = graph_sum(graphs, mine.astype(np.float64))[touched]
        total_s = graph_sum(graphs, np.where(mine, ideal_s, 0.0))[touched]
        log_time = np.log(graphs.time_s[touched])
        best = (np.inf, 0.0, 0.0)
        for floor_s in _FLOORS_S:
            for efficiency in _EFFICIENCIES:
                predicted = fixed + count * floor_s + total_s / efficiency
                error = float(np.abs(np.log(predicted) - log_time).mean())
                best = min(best, (error, float(floor_s), float(efficiency)))
        self.floor_s[family], self.efficiency[family] = best[1], best[2]

    def _rows_s(self, graphs: MeasuredGraphs, ideal_s: FloatArray) -> FloatArray:
        family = graphs.work.family
        return np.asarray(self.floor_s[family] + ideal_s / self.efficiency[family])

    def predict(self, graphs: MeasuredGraphs) -> FloatArray:
        """Times, (G,)."""
        return graph_sum(graphs, self._rows_s(graphs, row_ideal_s(graphs))) + graphs.rest_s
