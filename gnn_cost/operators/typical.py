"""The prediction where nothing is learned: the ideal time over a family's typical efficiency.

::

    t = floor_s + ideal_s / efficiency

with two constants a family: the median efficiency of its large measured operators, and the floor of
its small ones. Families without measurements take the efficiencies of the analytic model.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright.cost.work import Family
from meshwright.gnn_cost.features import MATRIX_FAMILIES, MAX_FLOOR_S, MIN_FLOOR_S

__all__ = ["fit_typical", "typical_times_s"]

Array32 = NDArray[np.float32]
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_MATRIX_EFFICIENCY = 0.7
_MEMORY_EFFICIENCY = 0.8
"""As ``meshwright.cost.roofline`` has them."""

_DEFAULT_FLOOR_S = 3e-6
_LARGE_S = 5e-5
_SMALL_S = 5e-7
_LEAST_ROWS = 24


def fit_typical(
    ideal_s_N: FloatArray, time_s_N: FloatArray, family_N: IntArray
) -> dict[str, Array32]:
    """Tensors for ``typical_times_s`` from operators measured alone; by family's number."""
    floors = np.full(len(Family), _DEFAULT_FLOOR_S)
    slowdowns = np.full(len(Family), 1.0 / _MEMORY_EFFICIENCY)
    slowdowns[list(MATRIX_FAMILIES)] = 1.0 / _MATRIX_EFFICIENCY
    for family in np.unique(family_N):
        own = family_N == family
        small = own & (ideal_s_N < _SMALL_S)
        if small.sum() >= _LEAST_ROWS:
            floors[family] = np.clip(np.median(time_s_N[small]), MIN_FLOOR_S, MAX_FLOOR_S)
        large = own & (ideal_s_N > _LARGE_S)
        if large.sum() >= _LEAST_ROWS:
            excess = (time_s_N[large] - floors[family]) / ideal_s_N[large]
            slowdowns[family] = max(float(np.median(excess)), 1.0)
    return {
        "typical_floor_s": floors.astype(np.float32),
        "typical_slowdown": slowdowns.astype(np.float32),
    }


def typical_times_s(
    tensors: dict[str, Array32], ideal_s_N: FloatArray, family_N: IntArray
) -> FloatArray:
    """(N,) times in seconds."""
    floor_s = tensors["typical_floor_s"][family_N].astype(np.float64)
    return np.asarray(floor_s + ideal_s_N * tensors["typical_slowdown"][family_N])
