"""Decision regret: how much slower than the best measured plan is the plan we would choose.

A group holds the measured plans of one job. Repeated measurements of one plan count once, by their
median. With k tries the best measured of the first k plans by score counts; regret is its time over
that of the best plan of the group, minus 1. Equal scores are no choice: what is given is then the
mean over all orders of the equal ones, exactly. A score that is the same for all plans is so the
random choice, and its top-1 regret the expected one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import comb

import numpy as np
from numpy.typing import NDArray

__all__ = ["RULES", "Score", "merged", "regret", "rule_scores"]

FloatArray = NDArray[np.float64]
Score = tuple[float, ...]
"""Smaller is better, compared part by part."""

RULES = ("random", "most_data_parallel", "megatron")
"""Choices without any model, as ``rule_scores`` knows them."""


def regret(measured_s: Sequence[float], scores: Sequence[Score], *, num_tries: int) -> float:
    """Of the best of the first ``num_tries`` plans by score over the best of all, minus 1.

    Args:
        measured_s: of each plan, above zero.
        scores: of each plan.
        num_tries: plans that may be measured before one is kept.
    """
    assert len(measured_s) == len(scores) > 0, "a group holds plans, each with a score"
    best_s = min(measured_s)
    certain_s = float("inf")
    left = num_tries
    for score in sorted(set(scores)):
        times_s = sorted(
            time_s for time_s, own in zip(measured_s, scores, strict=True) if own == score
        )
        if len(times_s) < left:
            certain_s = min(certain_s, times_s[0])
            left -= len(times_s)
            continue
        # The i-th fastest is the best of `left` drawn where all others drawn are slower.
        ways = comb(len(times_s), left)
        expected_s = sum(
            min(certain_s, time_s) * (comb(len(times_s) - i - 1, left - 1) / ways)
            for i, time_s in enumerate(times_s[: len(times_s) - left + 1])
        )
        return max(0.0, expected_s / best_s - 1.0)
    return max(0.0, certain_s / best_s - 1.0)


def rule_scores(
    *, dp: float, tp: float, pp: float, micro_batch: float, gpus_per_host: float
) -> Mapping[str, Score]:
    """What rules of thumb think of a plan, by the rule's name in ``RULES``.

    ``most_data_parallel``: most data parallelism, then the largest micro-batch. ``megatron``:
    tensor parallelism within a host, as little as there is; then pipeline stages behind as much of
    it as a host holds; the smallest micro-batch (Narayanan et al. 2021, arXiv 2104.04473, takeaways
    1 to 3, as ``plan --rule megatron``). All plans that ran did fit, so each takes the first.
    """
    return {
        "random": (0.0,),
        "most_data_parallel": (-dp, -micro_batch),
        "megatron": (float(tp > gpus_per_host), pp, tp if pp <= 1 else -tp, micro_batch),
    }


def merged(keys: Sequence[str], values: FloatArray) -> dict[str, float]:
    """The median of the values of each key, keys in order of their first."""
    found: dict[str, list[float]] = {}
    for key, value in zip(keys, values.tolist(), strict=True):
        found.setdefault(key, []).append(value)
    return {key: float(np.median(each)) for key, each in found.items()}
