"""Gradient-boosted trees on the logarithm of the slow-down against arithmetic plus traffic.

Trees extend the last leaf to whatever is larger than all they saw. So what they divide by is the
sum of both times, which measured times follow more closely than the larger one, and sizes count
only up to where efficiency has saturated: more of them is more of the same.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingRegressor

from meshwright.gnn_cost.baselines.base import (
    KERNEL_FLOOR_S,
    family_weights,
    graph_sum,
    row_serial_s,
)
from meshwright.gnn_cost.features import FEATURE_NAMES, operator_features
from meshwright.gnn_cost.samples import MeasuredGraphs

__all__ = ["BoostedTrees"]

FloatArray = NDArray[np.float64]

_LEAST_LOG_SLOWDOWN, _LARGEST_LOG_SLOWDOWN = -1.0, 7.0

_SATURATED = {
    "log_ideal_us": 4.0,
    "log_compute_us": 4.0,
    "log_memory_us": 4.0,
    "log_blocks_to_units": 2.5,
    "log_small_blocks_to_units": 3.5,
    "log_b_to_units": 1.0,
    "log_m_to_tile": 2.5,
    "log_n_to_tile": 2.5,
    "log_k_to_tile": 2.5,
    "log_bytes_to_cache": 3.0,
}
"""By feature: where it ends. 55 microseconds, a dozen waves, a dozen tiles, 20 times the cache."""


class BoostedTrees:
    """Trees of scikit-learn; every row of a graph is taught the graph's slow-down.

    Args:
        seed: of the draws of the trees.
        without: features that are not looked at.
        num_trees: boosting rounds.
    """

    def __init__(
        self, *, seed: int = 0, without: tuple[str, ...] = (), num_trees: int = 120
    ) -> None:
        """Unfitted."""
        self._columns = [
            place for place, name in enumerate(FEATURE_NAMES) if name not in frozenset(without)
        ]
        self._trees = HistGradientBoostingRegressor(
            loss="absolute_error",
            learning_rate=0.1,
            max_iter=num_trees,
            max_leaf_nodes=31,
            min_samples_leaf=20,
            l2_regularization=1.0,
            early_stopping=False,
            random_state=seed,
        )

    def fit(self, graphs: MeasuredGraphs) -> None:
        """Learn from graphs with a positive time beside ``rest_s``."""
        base_s = graph_sum(graphs, KERNEL_FLOOR_S + row_serial_s(graphs))
        device_s = np.maximum(graphs.time_s - graphs.rest_s, 0.2 * base_s)
        target = np.log(device_s / base_s)
        self._trees.fit(
            self._features(graphs),
            target[graphs.graph],
            sample_weight=family_weights(graphs)[graphs.graph],
        )

    def predict(self, graphs: MeasuredGraphs) -> FloatArray:
        """Times, (G,)."""
        slower = np.clip(self._trees.predict(self._features(graphs)), -1.0, _LARGEST_LOG_SLOWDOWN)
        rows_s = (KERNEL_FLOOR_S + row_serial_s(graphs)) * np.exp(slower)
        return graph_sum(graphs, rows_s) + graphs.rest_s

    def _features(self, graphs: MeasuredGraphs) -> NDArray[np.float32]:
        rows = operator_features(graphs.work, graphs.devices, graphs.device[graphs.graph])
        for name, end in _SATURATED.items():
            place = FEATURE_NAMES.index(name)
            rows[:, place] = np.minimum(rows[:, place], end)
        return rows[:, self._columns]
