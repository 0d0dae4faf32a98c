"""How far predictions lie from measurements: errors, ranks, intervals.

A relative error is ``predicted / measured - 1``: above 0 where the prediction is too slow (or too
large). MAPE is the mean of its absolute values, *bias* its mean. All are fractions. A figure that
nothing was left to compute from is None, never NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Errors",
    "average_ranks",
    "covered_fraction",
    "mean_interval",
    "relative_errors",
    "relative_errors_of",
    "spearman",
]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """Relative errors of n predictions in five numbers; None for none."""

    n: int
    mape: float | None
    median_ape: float | None
    p90_ape: float | None
    bias: float | None


def relative_errors(predicted: ArrayLike, measured: ArrayLike) -> FloatArray:
    """(N,) ``predicted / measured - 1``; measurements must be above zero."""
    measured_N = np.asarray(measured, dtype=np.float64)
    assert bool(np.all(measured_N > 0)), "a measurement of zero or less is no measurement"
    return np.asarray(predicted, dtype=np.float64) / measured_N - 1.0


def relative_errors_of(errors: FloatArray) -> Errors:
    """(N,) relative errors in five numbers."""
    if not len(errors):
        return Errors(n=0, mape=None, median_ape=None, p90_ape=None, bias=None)
    absolute = np.abs(errors)
    return Errors(
        n=len(errors),
        mape=float(absolute.mean()),
        median_ape=float(np.median(absolute)),
        p90_ape=float(np.quantile(absolute, 0.9)),
        bias=float(errors.mean()),
    )


def average_ranks(values: ArrayLike) -> FloatArray:
    """(N,) ranks from 1; equal values share the mean of theirs."""
    _, group, counts = np.unique(
        np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True
    )
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[group.reshape(-1)], dtype=np.float64)


def spearman(predicted: ArrayLike, measured: ArrayLike) -> float | None:
    """Rank correlation, from -1 to 1: Pearson's of the average ranks.

    None where all measurements are equal: there is no order to find. 0 where only all predictions
    are: they say nothing of it.
    """
    left, right = average_ranks(predicted), average_ranks(measured)
    left, right = left - left.mean(), right - right.mean()
    if not right.any():
        return None
    if not left.any():
        return 0.0
    rho = float(left @ right / np.sqrt((left @ left) * (right @ right)))
    return min(1.0, max(-1.0, rho))


def covered_fraction(measured: ArrayLike, low: ArrayLike, high: ArrayLike) -> float | None:
    """Share of measurements within their intervals, ends included; None for none."""
    measured_N = np.asarray(measured, dtype=np.float64)
    if not len(measured_N):
        return None
    return float(np.mean((np.asarray(low) <= measured_N) & (measured_N <= np.asarray(high))))


_DRAWS = 1000


def mean_interval(values: ArrayLike, *, seed: int = 0) -> tuple[float, float] | None:
    """95 % bootstrap interval of the mean: percentiles of means of values drawn anew.

    None of no values, and where an end is not finite.
    """
    values_N = np.asarray(values, dtype=np.float64)
    if not len(values_N):
        return None
    drawn = np.random.default_rng(seed).integers(len(values_N), size=(_DRAWS, len(values_N)))
    low, high = np.quantile(values_N[drawn].mean(axis=1), (0.025, 0.975), method="nearest")
    return (float(low), float(high)) if np.isfinite(high) else None
