"""What layer-wise solvers share in one search: the survey, plan spaces, and the mixtures found.

The skeletons of the best uniform plans come first, then others in order of the survey's estimate,
which no mixture on them can much undercut, until it is no less than the best plan found. Each is
searched with the way of sharding of its best uniform plan. The best are polished, and searched
again with every way of sharding.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from meshwright.cost.columns import IntArray
from meshwright.errors import PlanRefused
from meshwright.plans.plan import Recompute
from meshwright.solvers.mixture import Mixture, best_mixture, polished
from meshwright.solvers.survey import Survey, Surveyed, Uniform, everything, survey
from meshwright.space.decision import Decision, Sharding, Skeleton
from meshwright.space.evaluate import PlanSpace
from meshwright.space.search import SearchContext
from meshwright.space.skeletons import shardings_for, strategies_for

__all__ = ["Found", "Frontier"]

_MAX_SKELETONS = 24
_NUM_LEADERS = 8
"""Uniform plans whose skeletons come first."""

_NUM_POLISHED = 4
_NUM_WIDE = 2
"""Skeletons searched with every way of sharding."""


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """A mixture and its space."""

    space: PlanSpace
    mixture: Mixture

    @property
    def decision(self) -> Decision:
        """The mixture as a decision."""
        return self.space.decision(self.mixture.assignment, self.mixture.starts)


class Frontier:
    """Mutable: remembers what was worked out for one context."""

    def __init__(self, context: SearchContext) -> None:
        """Nothing is worked out yet."""
        self.context = context
        self.evaluations = 0
        self.is_complete = True
        self._survey: Survey | None = None
        self._spaces: dict[tuple[Skeleton, tuple[Sharding, ...]], PlanSpace] = {}
        self._found: list[Found] | None = None

    def survey(self, deadline_s: float | None = None) -> Survey:
        """The look at all skeletons."""
        if self._survey is None:
            self._survey = survey(self.context, within=everything, deadline_s=deadline_s)
        return self._survey

    def space(self, skeleton: Skeleton, shardings: tuple[Sharding, ...]) -> PlanSpace:
        """All strategies of some ways of sharding; offload only where memory is tight.

        Raises:
            PlanRefused: the graph cannot be sharded so, or the pins leave nothing.
        """
        key = (skeleton, shardings)
        if key not in self._spaces:
            strategies = [
                strategy
                for strategy in strategies_for(self.context, skeleton)
                if strategy.sharding in shardings
            ]
            if not self._is_tight(skeleton):
                strategies = [s for s in strategies if not s.offload] or strategies
            if not strategies:
                raise PlanRefused("the pins leave no strategy")
            self._spaces[key] = PlanSpace(self.context, skeleton, strategies)
        return self._spaces[key]

    def promising(self, at_most: int, deadline_s: float | None = None) -> tuple[Skeleton, ...]:
        """Skeletons of the best uniform plans, then others by what they take at least."""
        self.survey(deadline_s)
        return tuple(item.skeleton for item in self._in_order()[:at_most])

    def mixtures(self, deadline_s: float | None = None) -> list[Found]:
        """The best mixture of every skeleton searched, best first; found once."""
        if self._found is not None:
            return self._found
        looked = self.survey(deadline_s)
        best_s = looked.best_s
        found: list[Found] = []
        for item in self._in_order():
            if item.estimate_s >= best_s or len(found) >= _MAX_SKELETONS:
                break
            if self._is_late(deadline_s):
                break
            one = self._mixture(item.skeleton, *self._of_uniform(item), deadline_s)
            if one is not None:
                found.append(one)
                if one.mixture.fits:
                    best_s = min(best_s, one.mixture.time_s)
        found.sort(key=lambda one: one.mixture.rank)
        for number, one in enumerate(found[:_NUM_POLISHED]):
            found[number] = self._polished(one, deadline_s)
        for one in found[:_NUM_WIDE]:
            every = shardings_for(self.context, one.space.skeleton)
            if len(every) > 1 and not self._is_late(deadline_s):
                starts = one.mixture.starts
                wide = self._mixture(one.space.skeleton, every, starts, deadline_s)
                found += [self._polished(wide, deadline_s)] if wide is not None else []
        found.sort(key=lambda one: one.mixture.rank)
        self._found = found
        return found

    def _is_late(self, deadline_s: float | None) -> bool:
        if deadline_s is not None and time.monotonic() > deadline_s:
            self.is_complete = False
            return True
        return False

    def _in_order(self) -> list[Surveyed]:
        """Skeletons of the best uniform plans, then all by estimate."""
        looked = self.survey()
        leaders = {u.decision.skeleton: None for u in looked.fitting[:_NUM_LEADERS]}
        first = [item for item in looked.skeletons if item.skeleton in leaders]
        return first + [item for item in looked.skeletons if item.skeleton not in leaders]

    def roomier(self, one: Found, spare: float, deadline_s: float | None = None) -> Found:
        """The best mixture on the same space that leaves ``spare`` of the capacity free."""
        mixture, evaluations = best_mixture(
            one.space, starts=one.mixture.starts, deadline_s=deadline_s, spare=spare
        )
        self.evaluations += evaluations
        start = one if mixture is None else Found(one.space, mixture)
        return self._polished(start, deadline_s, spare)

    def uniform_of(self, skeleton: Skeleton) -> Uniform | None:
        """The best uniform plan of a skeleton; the one nearest to fitting where none fits."""
        mine = [u for u in self.survey().uniform if u.decision.skeleton == skeleton]
        return min(mine, key=lambda u: (max(u.excess, 0.0), u.time_s), default=None)

    def _polished(self, one: Found, deadline_s: float | None, spare: float = 0.0) -> Found:
        mixture, evaluations = polished(one.space, one.mixture, deadline_s=deadline_s, spare=spare)
        self.evaluations += evaluations
        return Found(one.space, mixture)

    def _of_uniform(self, item: Surveyed) -> tuple[tuple[Sharding, ...], IntArray | None]:
        """Sharding and stages of the skeleton's best uniform plan."""
        best = self.uniform_of(item.skeleton)
        if best is None:
            return item.shardings[:1], None
        return (best.strategy.sharding,), np.array(best.decision.starts, dtype=np.int64)

    def _is_tight(self, skeleton: Skeleton) -> bool:
        """Whether the skeleton's best uniform plan pays with time for memory, or does not fit."""
        best = self.uniform_of(skeleton)
        if best is None or not best.fits:
            return True
        return best.strategy.offload or best.strategy.recompute is not Recompute.NONE

    def _mixture(
        self,
        skeleton: Skeleton,
        shardings: tuple[Sharding, ...],
        starts: IntArray | None,
        deadline_s: float | None,
    ) -> Found | None:
        try:
            space = self.space(skeleton, shardings)
        except PlanRefused:
            return None
        mixture, evaluations = best_mixture(space, starts=starts, deadline_s=deadline_s)
        self.evaluations += evaluations
        return None if mixture is None else Found(space, mixture)
