"""Annealing, the genetic search and the beam as proposers, over everything a context allows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from meshwright.errors import PlanRefused
from meshwright.solvers.annealing import anneal
from meshwright.solvers.base import Candidate, Proposer, SearchContext, SolveResult, SolveStatus
from meshwright.solvers.beam import build
from meshwright.solvers.decision import Decision, Skeleton, Strategy
from meshwright.solvers.evaluate import PlanSpace, candidate_of_decision, price_decision
from meshwright.solvers.genetic import breed
from meshwright.solvers.landscape import Draft, Landscape, Opened, Place
from meshwright.solvers.neighborhood import Neighborhood
from meshwright.solvers.schedules import with_schedules
from meshwright.solvers.skeletons import skeletons, strategies_for
from meshwright.solvers.walk import Search, WalkSettings

__all__ = ["LOCAL_SEARCHES", "LocalSearch", "opener"]

_MAX_EVALUATIONS = 3000
_MAX_JUDGED = 200


class LocalSearch:
    """Searches all skeletons, strategies of segments and stages by one method; a ``Proposer``.

    Deterministic for the context's seed unless the deadline cuts it short.
    """

    def __init__(
        self,
        name: str,
        search: Search,
        *,
        num_walkers: int,
        max_evaluations: int = _MAX_EVALUATIONS,
    ) -> None:
        """A search under a name.

        Args:
            name: for provenance and reports.
            search: the method.
            num_walkers: places it keeps at a time.
            max_evaluations: distinct plans it prices at most.
        """
        self._name = name
        self._search = search
        self._num_walkers = num_walkers
        self._max_evaluations = max_evaluations

    @property
    def name(self) -> str:
        """``annealing``, ``genetic`` or ``beam``."""
        return self._name

    def with_evaluations(self, count: int) -> LocalSearch:
        """The same search with another number of plans to price."""
        return LocalSearch(
            self._name, self._search, num_walkers=self._num_walkers, max_evaluations=count
        )

    def propose(self, context: SearchContext, deadline_s: float | None = None) -> SolveResult:
        """The best plans found, exactly priced; the one nearest to fitting where none fits."""
        start_s = time.monotonic()
        landscape = _landscape(context, self._max_evaluations, deadline_s)
        rng = np.random.default_rng(context.seed)
        settings = WalkSettings(
            max_evaluations=self._max_evaluations, num_walkers=self._num_walkers, rng=rng
        )
        moves = Neighborhood(landscape, context.model.segment_classes, rng)
        self._search(landscape, moves, settings)
        places = landscape.best or tuple(p for p in (landscape.leanest,) if p is not None)
        decisions = [_decision(landscape, place.draft) for place in places]
        candidates = _candidates(context, decisions, solver=self._name)
        status = SolveStatus.STOPPED
        if not candidates:
            status = SolveStatus.NOT_APPLICABLE
        elif not candidates[0].cost.fits:
            status = SolveStatus.NOTHING_FITS
        return SolveResult(
            candidates=candidates,
            evaluations=landscape.evaluations,
            seconds=time.monotonic() - start_s,
            status=status,
        )


def _landscape(context: SearchContext, max_evaluations: int, deadline_s: float | None) -> Landscape:
    """Everything the context allows; what seems best is priced exactly."""

    def judge(draft: Draft) -> Place | None:
        try:
            cost = price_decision(context, _decision(landscape, draft))
        except PlanRefused:
            return None
        return Place(
            draft=draft,
            time_s=cost.time_s,
            excess=float((cost.memory.peak_bytes / cost.capacity_bytes).max()) - 1.0,
            fits=cost.fits,
            is_judged=True,
        )

    landscape = Landscape(
        tuple(skeletons(context)),
        opener(context),
        max_evaluations=max_evaluations,
        deadline_s=deadline_s,
        judge=judge,
        max_judged=_MAX_JUDGED,
    )
    return landscape


def _decision(landscape: Landscape, draft: Draft) -> Decision:
    room = landscape.room(draft.skeleton)
    assert room is not None, "drafts are made in rooms that have plans"
    return Decision(
        skeleton=landscape.skeletons[draft.skeleton],
        starts=tuple(draft.starts.tolist()),
        strategies=tuple(room.strategies[number] for number in draft.assignment.tolist()),
    )


def _candidates(
    context: SearchContext, decisions: Sequence[Decision], *, solver: str
) -> tuple[Candidate, ...]:
    """Exactly priced under each schedule, best first; without those the graph refuses."""
    found = []
    for decision in decisions:
        try:
            for scheduled in with_schedules(context, decision):
                found.append(candidate_of_decision(context, scheduled, solver=solver))
        except PlanRefused as error:
            context.report(f"{solver}: {error}")
    return tuple(sorted(found, key=lambda c: (not c.cost.fits, c.time_s)))


def opener(context: SearchContext) -> Callable[[Skeleton], Opened]:
    """What prices a skeleton's plans; without the ways of sharding the graph refuses."""

    def opened(skeleton: Skeleton) -> Opened:
        strategies = strategies_for(context, skeleton)
        try:
            return PlanSpace(context, skeleton, strategies), strategies
        except PlanRefused:
            left = tuple(s for s in strategies if _is_possible(context, skeleton, s))
            if not left:
                raise
            return PlanSpace(context, skeleton, left), left

    return opened


def _is_possible(context: SearchContext, skeleton: Skeleton, strategy: Strategy) -> bool:
    try:
        PlanSpace(context, skeleton, (strategy,))
    except PlanRefused:
        return False
    return True


LOCAL_SEARCHES: tuple[Proposer, ...] = (
    LocalSearch("annealing", anneal, num_walkers=32),
    LocalSearch("genetic", breed, num_walkers=64),
    LocalSearch("beam", build, num_walkers=8),
)
