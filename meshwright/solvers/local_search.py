"""Annealing, the genetic search and the beam as proposers, over everything a context allows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from meshwright.errors import PlanRefused
from meshwright.solvers.annealing import anneal
from meshwright.solvers.beam import build
from meshwright.solvers.frontier import Frontier
from meshwright.solvers.genetic import breed
from meshwright.solvers.landscape import Draft, Landscape, Opened, Place
from meshwright.solvers.neighborhood import Neighborhood
from meshwright.solvers.walk import Search, WalkSettings
from meshwright.space.decision import Decision, Skeleton, Strategy
from meshwright.space.evaluate import PlanSpace, candidate_of_decision, price_decision
from meshwright.space.schedules import with_schedules
from meshwright.space.search import Candidate, Proposer, SearchContext, SolveResult, SolveStatus
from meshwright.space.skeletons import skeletons, strategies_for

__all__ = [
    "LOCAL_SEARCHES",
    "LocalSearch",
    "Rooms",
    "candidates_of",
    "decision_of",
    "judged_landscape",
    "local_searches",
    "opener",
]

_MAX_EVALUATIONS = 3000
_MAX_JUDGED = 200

_MIN_ROOMS, _MAX_ROOMS = 6, 48
_MAX_SEGMENTS = 1500
"""Of all skeletons together that the searches of ``-O2`` look at, given ``_MIN_ROOMS``."""


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
        rooms: Rooms | None = None,
    ) -> None:
        """A search under a name.

        Args:
            name: for provenance and reports.
            search: the method.
            num_walkers: places it keeps at a time.
            max_evaluations: distinct plans it prices at most.
            rooms: shared with other searches; everything the context allows by default.
        """
        self._name = name
        self._search = search
        self._num_walkers = num_walkers
        self._max_evaluations = max_evaluations
        self._rooms = rooms

    @property
    def name(self) -> str:
        """``annealing``, ``genetic`` or ``beam``."""
        return self._name

    def with_evaluations(self, count: int) -> LocalSearch:
        """The same search with another number of plans to price."""
        return LocalSearch(
            self._name,
            self._search,
            num_walkers=self._num_walkers,
            max_evaluations=count,
            rooms=self._rooms,
        )

    def propose(self, context: SearchContext, deadline_s: float | None = None) -> SolveResult:
        """The best plans found, exactly priced; the one nearest to fitting where none fits."""
        start_s = time.monotonic()
        rooms = self._rooms or Rooms(context)
        landscape = judged_landscape(context, rooms, self._max_evaluations, deadline_s)
        rng = np.random.default_rng(context.seed)
        settings = WalkSettings(
            max_evaluations=self._max_evaluations, num_walkers=self._num_walkers, rng=rng
        )
        moves = Neighborhood(landscape, context.model.segment_classes, rng)
        self._search(landscape, moves, settings)
        places = landscape.best or tuple(p for p in (landscape.leanest,) if p is not None)
        decisions = [decision_of(landscape, place.draft) for place in places]
        candidates = candidates_of(context, decisions, solver=self._name)
        status = SolveStatus.STOPPED if landscape.is_late else SolveStatus.SAMPLED
        if landscape.is_known:
            status = SolveStatus.DONE
        if not candidates:
            status = SolveStatus.STOPPED if landscape.is_late else SolveStatus.NOT_APPLICABLE
        elif not candidates[0].cost.fits:
            status = SolveStatus.NOTHING_FITS
        return SolveResult(
            candidates=candidates,
            evaluations=landscape.evaluations,
            seconds=time.monotonic() - start_s,
            status=status,
        )


class Rooms:
    """Skeletons that searches of one context share, and what was worked out for them.

    With a ``Frontier`` they are its most promising, the fewer the longer the model is: pricing
    every strategy of a skeleton takes longer than a search on it.
    """

    def __init__(
        self,
        context: SearchContext,
        frontier: Frontier | None = None,
        *,
        only: Sequence[Skeleton] | None = None,
    ) -> None:
        """Nothing is worked out yet; ``only``: no others than these."""
        self._context, self._frontier, self._only = context, frontier, only
        self._open = opener(context)
        self._known: dict[Skeleton, Opened | PlanRefused] = {}

    def skeletons(self, deadline_s: float | None) -> tuple[Skeleton, ...]:
        """What the searches may use."""
        if self._only is not None:
            return tuple(self._only)
        if self._frontier is None:
            return tuple(skeletons(self._context))
        count = len(self._context.model.segment_classes)
        at_most = min(max(_MAX_SEGMENTS // count, _MIN_ROOMS), _MAX_ROOMS)
        return self._frontier.promising(at_most, deadline_s)

    def open(self, skeleton: Skeleton) -> Opened:
        """What prices a skeleton's plans, worked out once.

        Raises:
            PlanRefused: it has none.
        """
        if skeleton not in self._known:
            try:
                self._known[skeleton] = self._open(skeleton)
            except PlanRefused as error:
                self._known[skeleton] = error
        found = self._known[skeleton]
        if isinstance(found, PlanRefused):
            raise found
        return found


def judged_landscape(
    context: SearchContext, rooms: Rooms, max_evaluations: int, deadline_s: float | None
) -> Landscape:
    """What the rooms allow; what seems best is priced exactly."""

    def judge(draft: Draft) -> Place | None:
        try:
            cost = price_decision(context, decision_of(landscape, draft))
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
        rooms.skeletons(deadline_s),
        rooms.open,
        max_evaluations=max_evaluations,
        deadline_s=deadline_s,
        judge=judge,
        max_judged=_MAX_JUDGED,
    )
    return landscape


def decision_of(landscape: Landscape, draft: Draft) -> Decision:
    """A draft as a decision."""
    room = landscape.room(draft.skeleton)
    assert room is not None, "drafts are made in rooms that have plans"
    return Decision(
        skeleton=landscape.skeletons[draft.skeleton],
        starts=tuple(draft.starts.tolist()),
        strategies=tuple(room.strategies[number] for number in draft.assignment.tolist()),
    )


def candidates_of(
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
        if not strategies:
            raise PlanRefused("the pins leave no strategy")
        try:
            space = PlanSpace(context, skeleton, strategies)
        except PlanRefused:
            left = tuple(s for s in strategies if _is_possible(context, skeleton, s))
            if not left:
                raise
            space = PlanSpace(context, skeleton, left)
        return space, space.strategies

    return opened


def _is_possible(context: SearchContext, skeleton: Skeleton, strategy: Strategy) -> bool:
    try:
        PlanSpace(context, skeleton, (strategy,))
    except PlanRefused:
        return False
    return True


def local_searches(rooms: Rooms | None = None) -> tuple[LocalSearch, ...]:
    """The three methods, on ``rooms`` or on everything a context allows."""
    return (
        LocalSearch("annealing", anneal, num_walkers=32, rooms=rooms),
        LocalSearch("genetic", breed, num_walkers=64, rooms=rooms),
        LocalSearch("beam", build, num_walkers=8, rooms=rooms),
    )


LOCAL_SEARCHES: tuple[Proposer, ...] = local_searches()
