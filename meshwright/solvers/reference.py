"""What a person would get by hand: the measure of what a planner gains."""

from __future__ import annotations

import math

from meshwright.solvers.exhaustive import Exhaustive
from meshwright.solvers.rules import RULES
from meshwright.space.search import Proposer, SearchContext

__all__ = ["rule_time_s"]


def rule_time_s(context: SearchContext) -> float:
    """Step time of the best rule of thumb that fits.

    Where none fits, that of the best uniform plan; infinite where that does not fit either.
    """
    by_rule = min(_times_s(context, RULES), default=math.inf)
    if math.isfinite(by_rule):
        return by_rule
    return min(_times_s(context, (Exhaustive(),)), default=math.inf)


def _times_s(context: SearchContext, proposers: tuple[Proposer, ...]) -> list[float]:
    return [
        candidate.time_s
        for proposer in proposers
        for candidate in proposer.propose(context).candidates
        if candidate.cost.fits
    ]
