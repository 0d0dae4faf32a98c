"""Layer-wise mixtures of what the integer program found for operators.

On the best skeletons of the layer-wise search, the shardings of the Pareto set over time, memory
and boundary (``operators.operator_shardings``) join the skeleton's best rule as strategies, and
every segment chooses among them.
"""

from __future__ import annotations

import time
from dataclasses import replace

from meshwright.errors import PlanRefused
from meshwright.solvers.frontier import Found, Frontier
from meshwright.solvers.mixture import best_mixture, polished
from meshwright.solvers.operators import FREE_AXES, operator_shardings
from meshwright.solvers.refit import judged
from meshwright.space.decision import Decision, Strategy
from meshwright.space.evaluate import PlanSpace
from meshwright.space.search import SearchContext, SolveResult, SolveStatus

__all__ = ["OperatorMixtures"]

_NUM_SKELETONS = 2
_NUM_SHARDINGS = 3
"""Of the Pareto set, the fastest: every pair of shardings has boundaries to price."""


class OperatorMixtures:
    """A ``Proposer`` behind the layer-wise search."""

    def __init__(self, frontier: Frontier) -> None:
        """``frontier``: of the same search."""
        self._frontier = frontier

    @property
    def name(self) -> str:
        """``operator-mixtures``."""
        return "operator-mixtures"

    def propose(self, context: SearchContext, deadline_s: float | None = None) -> SolveResult:
        """The best mixture on each skeleton, fastest first."""
        start_s = time.monotonic()
        decisions: list[Decision] = []
        evaluations = 0
        is_complete = True
        seeds: dict[object, Found] = {}
        for one in self._frontier.mixtures(deadline_s):
            sizes = one.space.skeleton.sizes
            if one.mixture.fits and any(sizes[axis] > 1 for axis in FREE_AXES):
                seeds.setdefault(one.space.skeleton, one)
        for seed in list(seeds.values())[:_NUM_SKELETONS]:
            if deadline_s is not None and time.monotonic() > deadline_s:
                is_complete = False
                break
            try:
                space = _space(context, seed, deadline_s)
            except PlanRefused as error:
                context.report(f"{self.name}: {error}")
                continue
            found, count = best_mixture(space, starts=seed.mixture.starts, deadline_s=deadline_s)
            evaluations += count
            if found is not None:
                found, count = polished(space, found, deadline_s=deadline_s)
                evaluations += count
                decisions.append(space.decision(found.assignment, found.starts))
        candidates = judged(context, decisions, self.name)
        status = SolveStatus.DONE if is_complete else SolveStatus.STOPPED
        return SolveResult(
            candidates=candidates,
            evaluations=evaluations + len(candidates),
            seconds=time.monotonic() - start_s,
            status=status if candidates else SolveStatus.NOTHING_FITS,
        )


def _space(context: SearchContext, seed: Found, deadline_s: float | None) -> PlanSpace:
    """The seed's strategies, and the same with the shardings of the integer program.

    Raises:
        PlanRefused: the program finds nothing, or the pins leave none of it.
    """
    skeleton = seed.space.skeleton
    known = seed.space.costs.strategies
    shardings = operator_shardings(context, skeleton, deadline_s=deadline_s)[:_NUM_SHARDINGS]
    if not shardings:
        raise PlanRefused("no operator can be sharded along a free axis")
    added = [replace(strategy, sharding=sharding) for sharding in shardings for strategy in known]
    every: list[Strategy] = [s for s in dict.fromkeys(added) if context.allows_strategy(s)]
    return PlanSpace(context, skeleton, [*known, *every])
