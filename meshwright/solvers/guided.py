"""A decider's plans as a proposer: priced exactly, then annealed on their skeletons."""

from __future__ import annotations

import time

import numpy as np

from meshwright.solvers.annealing import anneal
from meshwright.solvers.landscape import Draft, Landscape
from meshwright.solvers.local_search import (
    Rooms,
    candidates_of,
    decision_of,
    judged_landscape,
)
from meshwright.solvers.neighborhood import Neighborhood
from meshwright.solvers.walk import WalkSettings
from meshwright.space.decision import Decision
from meshwright.space.search import Decider, SearchContext, SolveResult, SolveStatus

__all__ = ["Guided"]

_MAX_SKELETONS = {"O1": 3, "O2": 12}
"""Skeletons of the decider's plans that are searched, the most promising first."""

_MAX_EVALUATIONS = {"O1": 256, "O2": 3000}

_DECIDERS_SHARE = 0.5
"""Of the time that is left; the rest is for the search."""


class Guided:
    """Plans of a decider and what annealing makes of them; a ``Proposer``.

    Deterministic for the context's seed unless the deadline cuts it short.
    """

    def __init__(
        self,
        decider: Decider,
        *,
        max_evaluations: int | None = None,
        max_skeletons: int | None = None,
    ) -> None:
        """A search from what ``decider`` decides.

        Args:
            decider: where to start.
            max_evaluations: distinct plans priced at most besides what the decider prices itself;
                by default what the level allows. All that it decides are always priced.
            max_skeletons: skeletons searched at most; by default what the level allows.
        """
        self._decider = decider
        self._max_evaluations = max_evaluations
        self._max_skeletons = max_skeletons

    @property
    def name(self) -> str:
        """The decider's."""
        return self._decider.name

    def propose(self, context: SearchContext, deadline_s: float | None = None) -> SolveResult:
        """The best plans found, exactly priced, the decider's own among them."""
        start_s = time.monotonic()
        share_s = None
        if deadline_s is not None:
            share_s = start_s + _DECIDERS_SHARE * (deadline_s - start_s)
        decided = self._decider.decide(context, share_s)
        decisions = decided.decisions
        if not decisions:
            nothing = SolveStatus.NOT_APPLICABLE if decided.is_complete else SolveStatus.STOPPED
            return SolveResult(
                candidates=(),
                evaluations=decided.evaluations,
                seconds=time.monotonic() - start_s,
                status=nothing,
            )
        budget = self._max_evaluations or _MAX_EVALUATIONS[context.level]
        skeletons = tuple(dict.fromkeys(decision.skeleton for decision in decisions))
        skeletons = skeletons[: self._max_skeletons or _MAX_SKELETONS[context.level]]
        landscape = judged_landscape(
            context, Rooms(context, only=skeletons), max(budget, len(decisions)), deadline_s
        )
        drafts = tuple(
            draft
            for draft in (_draft_of(landscape, decision) for decision in decisions)
            if draft is not None
        )
        if drafts:
            rng = np.random.default_rng(context.seed)
            anneal(
                landscape,
                Neighborhood(landscape, context.model.segment_classes, rng),
                WalkSettings(
                    max_evaluations=budget, num_walkers=len(drafts), rng=rng, drafts=drafts
                ),
            )
        places = landscape.best or tuple(p for p in (landscape.leanest,) if p is not None)
        found = [decision_of(landscape, place.draft) for place in places]
        candidates = candidates_of(context, found, solver=self.name)
        is_complete = decided.is_complete and not landscape.is_late
        status = SolveStatus.SAMPLED if is_complete else SolveStatus.STOPPED
        if not candidates:
            status = SolveStatus.NOT_APPLICABLE if is_complete else SolveStatus.STOPPED
        elif not candidates[0].cost.fits:
            status = SolveStatus.NOTHING_FITS
        return SolveResult(
            candidates=candidates,
            evaluations=decided.evaluations + landscape.evaluations,
            seconds=time.monotonic() - start_s,
            status=status,
        )


def _draft_of(landscape: Landscape, decision: Decision) -> Draft | None:
    """``None`` where the landscape has no such skeleton or strategy."""
    if decision.skeleton not in landscape.skeletons:
        return None
    skeleton = landscape.skeletons.index(decision.skeleton)
    room = landscape.room(skeleton)
    if room is None or not set(decision.strategies) <= set(room.strategies):
        return None
    places = {strategy: place for place, strategy in enumerate(room.strategies)}
    return Draft(
        skeleton=skeleton,
        assignment=np.array([places[strategy] for strategy in decision.strategies], np.int64),
        starts=np.array(decision.starts, np.int64),
    )
