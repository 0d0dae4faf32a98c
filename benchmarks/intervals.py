"""Figures with their uncertainty: interquartile means, bootstrap intervals, win rates.

Scores are tables (S, I): runs by instances. The stratified bootstrap (Agarwal et al. 2021, arXiv
2108.13264) draws the runs of each instance anew, each for itself: how far the figure depends on the
seed. Drawing the instances anew tells how far it depends on which problems were asked. Intervals
are percentiles, 95 %.

S runs (seeds), I instances, n bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.agents.evaluation import EXACT

__all__ = ["difference", "gap_figures", "interquartile_mean", "interval", "win_rates"]

FloatArray = NDArray[np.float64]
Statistic = Callable[[FloatArray], float]

_DRAWS = 1000
_LEVELS = (0.025, 0.975)


def interquartile_mean(scores: FloatArray) -> float:
    """The mean of the middle half of all scores: a quarter is cut off at each end."""
    ordered = np.sort(scores, axis=None)
    cut = len(ordered) // 4
    return float(ordered[cut : len(ordered) - cut].mean())


def interval(
    score_SI: FloatArray, statistic: Statistic, *, over: str = "seeds", seed: int = 0
) -> list[float]:
    """Lower and upper end of the bootstrap interval of ``statistic``.

    Args:
        score_SI: runs by instances.
        statistic: of such a table.
        over: ``seeds``: stratified; ``instances``: whole columns are drawn.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    num_runs, num_instances = score_SI.shape
    found = []
    for _ in range(_DRAWS):
        if over == "seeds":
            run_SI = rng.integers(num_runs, size=score_SI.shape)
            found.append(statistic(np.take_along_axis(score_SI, run_SI, axis=0)))
        else:
            found.append(statistic(score_SI[:, rng.integers(num_instances, size=num_instances)]))
    low, high = np.quantile(found, _LEVELS, method="nearest")
    return [float(low), float(high)]


def gap_figures(gap_SI: FloatArray) -> dict[str, Any]:
    """What is told of gaps to the optimum, 0 being exact; plans that do not fit have none.

    An infinite gap (no plan that fits) counts in ``without_a_plan`` and makes the mean infinite;
    so does it in JSON as ``null``.
    """
    finite = np.isfinite(gap_SI)
    return {
        "runs": int(gap_SI.shape[0]),
        "instances": int(gap_SI.shape[1]),
        "mean": _number(gap_SI.mean()),
        "mean_interval_over_instances": _pair(interval(gap_SI, _mean, over="instances")),
        "interquartile_mean": _number(interquartile_mean(gap_SI)),
        "interquartile_mean_interval_over_seeds": _pair(interval(gap_SI, interquartile_mean)),
        "p95": _number(np.quantile(gap_SI, 0.95, method="lower")),
        "worst": _number(gap_SI.max()),
        "exact_share": float((gap_SI <= EXACT).mean()),
        "exact_share_interval_over_instances": interval(gap_SI, _exact_share, over="instances"),
        "mean_of_each_run": [_number(value) for value in gap_SI.mean(axis=1)],
        "without_a_plan": int((~finite).sum()),
    }


def difference(one_SI: FloatArray, other_SI: FloatArray) -> dict[str, Any]:
    """Mean of ``one - other``, pair by pair, and its interval over instances."""
    less_SI = one_SI - other_SI
    return {
        "mean": _number(less_SI.mean()),
        "interval_over_instances": _pair(interval(less_SI, _mean, over="instances")),
    }


def win_rates(one_SI: FloatArray, other_SI: FloatArray, *, tie: float = EXACT) -> dict[str, float]:
    """Shares of pairs in which ``one`` is less, equal within ``tie``, or more."""
    wins, losses = one_SI < other_SI - tie, one_SI > other_SI + tie
    return {
        "wins": float(wins.mean()),
        "ties": float((~wins & ~losses).mean()),
        "losses": float(losses.mean()),
    }


def _mean(scores: FloatArray) -> float:
    return float(scores.mean())


def _exact_share(scores: FloatArray) -> float:
    return float((scores <= EXACT).mean())


def _number(value: float | np.floating[Any]) -> float | None:
    return float(value) if np.isfinite(value) else None


def _pair(values: Sequence[float]) -> list[float | None]:
    return [_number(value) for value in values]
