"""The prediction where nothing is learned: the ideal time over a family's typical efficiency.

::

    t = floor_s + ideal_s / efficiency

with two constants a family, of least mean error in logarithms over the measured operators. Families
without measurements take the efficiencies of the analytic model.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright.cost.work import Family
from meshwright.gnn_cost.features import MATRIX_FAMILIES, MAX_FLOOR_S, MIN_FLOOR_S, ideal_time_s
from meshwright.gnn_cost.samples import MeasuredGraphs

__all__ = ["fit_typical", "typical_times_s"]

Array32 = NDArray[np.float32]
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

_MATRIX_EFFICIENCY = 0.7
_MEMORY_EFFICIENCY = 0.8
"""As ``meshwright.cost.roofline`` has them."""

_DEFAULT_FLOOR_S = 3e-6
_FLOORS_S = np.geomspace(MIN_FLOOR_S, MAX_FLOOR_S, 14)
_EFFICIENCIES = np.linspace(0.05, 1.0, 39)
_LEAST_GRAPHS = 24
_MOST_GRAPHS = 8000
"""Of a family; evenly drawn from more."""


def fit_typical(graphs: MeasuredGraphs) -> dict[str, Array32]:
    """Tensors for ``typical_times_s``, by family's number.

    A family is fitted on the graphs that are one row of it. Where there are none, on all that hold
    it, the other rows at what was found for them before.
    """
    floors_s = np.full(len(Family), _DEFAULT_FLOOR_S)
    slowdowns = np.full(len(Family), 1.0 / _MEMORY_EFFICIENCY)
    slowdowns[list(MATRIX_FAMILIES)] = 1.0 / _MATRIX_EFFICIENCY
    ideal_s = ideal_time_s(graphs.work, graphs.devices, graphs.device[graphs.graph])
    family = graphs.work.family
    is_alone = np.bincount(graphs.graph, minlength=graphs.count)[graphs.graph] == 1
    found = np.unique(family)
    with_rows = np.isin(found, family[is_alone])
    for number in (*found[with_rows], *found[~with_rows]):
        is_own = family == number
        held = np.unique(graphs.graph[is_own & is_alone])
        if not len(held):
            held = np.unique(graphs.graph[is_own])
        if len(held) < _LEAST_GRAPHS:
            continue
        held = held[:: -(-len(held) // _MOST_GRAPHS)]
        row_s = np.where(is_own, 0.0, floors_s[family] + ideal_s * slowdowns[family])
        fixed_s = _sums(graphs, row_s) + graphs.rest_s
        count = _sums(graphs, is_own.astype(np.float64))
        own_s = _sums(graphs, np.where(is_own, ideal_s, 0.0))
        floors_s[number], slowdowns[number] = _best(
            fixed_s[held], count[held], own_s[held], graphs.time_s[held]
        )
    return {
        "typical_floor_s": floors_s.astype(np.float32),
        "typical_slowdown": slowdowns.astype(np.float32),
    }


def typical_times_s(
    tensors: dict[str, Array32], ideal_s_N: FloatArray, family_N: IntArray
) -> FloatArray:
    """(N,) times in seconds."""
    floor_s = tensors["typical_floor_s"][family_N].astype(np.float64)
    return np.asarray(floor_s + ideal_s_N * tensors["typical_slowdown"][family_N])


def _sums(graphs: MeasuredGraphs, of_rows: FloatArray) -> FloatArray:
    """(G,) weighted."""
    sums = np.bincount(graphs.graph, graphs.weight * of_rows, minlength=graphs.count)
    return sums.astype(np.float64)


def _best(
    fixed_s: FloatArray, count: FloatArray, ideal_s: FloatArray, time_s: FloatArray
) -> tuple[float, float]:
    """Floor and slow-down, by grid."""
    log_time = np.log(time_s)
    best = (np.inf, 0.0, 1.0)
    for floor_s in _FLOORS_S:
        for efficiency in _EFFICIENCIES:
            predicted_s = fixed_s + count * floor_s + ideal_s / efficiency
            error = float(np.abs(np.log(predicted_s) - log_time).mean())
            best = min(best, (error, float(floor_s), 1.0 / float(efficiency)))
    return best[1], best[2]
