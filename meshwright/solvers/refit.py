"""Mixtures that the exact judge finds too large, solved anew with less room.

What a mixture needs is estimated: neighbors of unequal recompute or ZeRO stage keep, gather and
reduce together in ways that sums over segments do not tell. Where the exact peak is above the
estimate and does not fit, the same solver answers again with so much of the capacity left free.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from meshwright.errors import PlanRefused
from meshwright.solvers.mixture import Mixture
from meshwright.space.decision import Decision
from meshwright.space.evaluate import PlanSpace, candidate_of_decision, price_decision
from meshwright.space.schedules import with_schedules
from meshwright.space.search import Candidate, SearchContext

__all__ = ["Solve", "Solved", "judged", "refitted"]


class Solved(Protocol):
    """What a solver answers; ``Found`` and ``IntegerMixture`` are such."""

    @property
    def mixture(self) -> Mixture | None:
        """The best mixture; ``None`` for none."""
        ...


Solve = Callable[[float], Solved]
"""The best mixture that leaves a fraction of the capacity free."""

_NUM_TRIES = 4
_MORE = 1e-3
"""Of the capacity, left free beside what was missing."""


def judged(context: SearchContext, decisions: list[Decision], solver: str) -> tuple[Candidate, ...]:
    """Exactly priced, those that fit, fastest first."""
    found = []
    for decision in dict.fromkeys(decisions):
        for scheduled in with_schedules(context, decision):
            try:
                candidate = candidate_of_decision(context, scheduled, solver=solver)
            except PlanRefused as error:
                context.report(f"{solver}: {error}")
                continue
            if candidate.cost.fits:
                found.append(candidate)
    return tuple(sorted(found, key=lambda candidate: candidate.time_s))


def refitted(
    context: SearchContext, space: PlanSpace, first: Solved, solve: Solve, *, solver: str
) -> tuple[Candidate, ...]:
    """``first`` exactly priced; where it does not fit, what ``solve`` finds with less room.

    Empty where that does not fit after a few tries either, or the graph cannot be sharded so.
    """
    mixture = first.mixture
    spare = 0.0
    for _ in range(_NUM_TRIES):
        if mixture is None or not mixture.fits:
            return ()
        decision = space.decision(mixture.assignment, mixture.starts)
        found = judged(context, [decision], solver)
        if found:
            return found
        try:
            cost = price_decision(context, decision)
        except PlanRefused:
            return ()
        needed = float((cost.memory.peak_bytes / cost.capacity_bytes).max()) - 1
        priced = space.evaluate(mixture.assignment[None], mixture.starts[None], simulate=False)
        spare = max(spare, needed - float(priced.excess[0])) + _MORE
        mixture = solve(spare).mixture
    return ()
