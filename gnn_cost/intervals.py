"""Intervals that hold what is measured with a stated probability, by conformal calibration.

The score of a held-out measurement is ``|log(measured / predicted)|`` over a scale that grows with
the members' disagreement and as trust falls; the interval of a prediction is its scale times the
quantile of the scores of its family (of all families where it has few). That covers measurements
that are like the held-out ones: other shapes on devices that were measured. Errors on a device
that was not are larger; there the scale is ``_UNSEEN_DEVICE`` times as much. How often that is
enough is told by fits that leave a device out (their ``coverage``).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from meshwright.cost.work import Family

__all__ = ["COVERAGE", "fit_intervals", "half_widths", "scales"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

COVERAGE = 0.9
_BASE_SCALE = 0.05
_DISTRUST_SCALE = 0.2
_LEAST_SCORES = 40
_UNSEEN_DEVICE = 1.15
"""By this factor intervals held 90 % of the measurements on 16 GPUs, each left out in turn
(``benchmarks/results/operator_prediction.json``)."""


def scales(
    spread_N: FloatArray, trust_N: FloatArray, is_measured_N: NDArray[np.bool_]
) -> FloatArray:
    """(N,) expected size of an error in logarithms, but for a factor.

    Args:
        spread_N: standard deviation of the members' log times.
        trust_N: from 0 to 1.
        is_measured_N: whether its device was measured, with its family and width of elements.
    """
    scale_N = _BASE_SCALE + spread_N + _DISTRUST_SCALE * (1.0 - trust_N)
    return np.asarray(np.where(is_measured_N, 1.0, _UNSEEN_DEVICE) * scale_N)


def fit_intervals(
    error_N: FloatArray, scale_N: FloatArray, family_N: IntArray
) -> dict[str, NDArray[np.float32]]:
    """Tensors for ``half_widths``: a quantile for each family.

    Args:
        error_N: log(measured / predicted) of held-out measurements.
        scale_N: of ``scales``.
        family_N: numbers of ``Family``.
    """
    score_N = np.abs(error_N) / scale_N
    everything = _quantile(score_N) if len(score_N) else 3.0
    quantiles = np.full(len(Family), everything)
    for family in np.unique(family_N):
        own = score_N[family_N == family]
        if len(own) >= _LEAST_SCORES:
            quantiles[family] = _quantile(own)
    return {"interval_quantile": quantiles.astype(np.float32)}


def half_widths(
    tensors: dict[str, NDArray[np.float32]], scale_N: FloatArray, family_N: IntArray
) -> FloatArray:
    """(N,) w such that the interval is from ``t * exp(-w)`` to ``t * exp(w)``."""
    return np.asarray(tensors["interval_quantile"][family_N] * scale_N)


def _quantile(scores: FloatArray) -> float:
    """The conformal quantile: of n scores the ceil((n + 1) * COVERAGE)-th."""
    rank = min(math.ceil((len(scores) + 1) * COVERAGE), len(scores))
    return float(np.sort(scores)[rank - 1])
