"""All plans of a context as a landscape that local searches walk through.

A place is a skeleton, a strategy for every segment, and the stages' first segments. Places are
priced in batches, skeleton by skeleton, and remembered, so that coming back costs nothing. The
height of a place is the logarithm of its step time, raised where it does not fit by how much its
fullest stage exceeds the capacity: differences of heights are relative differences of time.

Batch prices may be estimates, and a search finds those that are too low. So whatever seems to be
faster than the best place so far is priced again by the exact judge, as often as ``max_judged``
allows, and keeps that price.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import PlanRefused
from meshwright.plans.plan import Recompute, ScheduleName
from meshwright.space.decision import Skeleton, Strategy

__all__ = [
    "BatchPricer",
    "Draft",
    "Judge",
    "Landscape",
    "Opened",
    "Place",
    "Priced",
    "Room",
    "scaled_starts",
]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

_NUM_NEIGHBORS = 8
_MISFIT = 0.02
"""Height of not fitting at all, however little is missing: 2 % of time."""

_EXCESS_WEIGHT = 2.0
"""Height of needing twice the capacity, in units of ``log(time)``."""

_NUM_BEST = 8
"""Places remembered as the best; as many of those judged, and of those never judged."""


class Priced(Protocol):
    """What a batch of plans costs; arrays of shape (plans,)."""

    @property
    def time_s(self) -> FloatArray:
        """Step times."""
        ...

    @property
    def excess(self) -> FloatArray:
        """By how much the fullest stage exceeds its capacity, a fraction of it; negative: room."""
        ...

    @property
    def fits(self) -> NDArray[np.bool_]:
        """Whether every stage fits."""
        ...


class BatchPricer(Protocol):
    """Prices plans of one skeleton; ``PlanSpace`` is one."""

    @property
    def num_segments(self) -> int:
        """Length of an assignment."""
        ...

    @property
    def num_strategies(self) -> int:
        """Entries of an assignment are below this."""
        ...

    def evaluate(self, assignment: IntArray, starts: IntArray) -> Priced:
        """Costs of plans: ``assignment`` (plans, segments), ``starts`` (plans, stages)."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Room:
    """One skeleton's part of the landscape."""

    pricer: BatchPricer
    strategies: tuple[Strategy, ...]
    num_stages: int
    related: tuple[IntArray, ...]
    """For each strategy those that differ from it in one respect only."""

    @property
    def num_plans(self) -> int:
        """Ways to choose strategies and stages."""
        count, choices = self.pricer.num_segments, self.pricer.num_strategies
        return math.prod([choices] * count) * math.comb(count - 1, self.num_stages - 1)


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """A place that has no price yet."""

    skeleton: int
    """Index into the landscape's skeletons."""
    assignment: IntArray
    """(segments,) strategies."""
    starts: IntArray
    """(stages,) first segments, ascending from 0."""

    @property
    def key(self) -> Hashable:
        """Equal for equal places."""
        return (self.skeleton, self.assignment.tobytes(), self.starts.tobytes())


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """A priced place."""

    draft: Draft
    time_s: float
    excess: float
    fits: bool
    is_judged: bool = False
    """The price is exact."""

    @property
    def height(self) -> float:
        """What searches descend; see the module."""
        penalty = 0.0 if self.fits else _MISFIT + _EXCESS_WEIGHT * max(self.excess, 0.0)
        return float(np.log(max(self.time_s, 1e-12))) + penalty


@dataclass(slots=True)
class _Memory:
    """What a search has seen."""

    places: dict[Hashable, Place] = field(default_factory=dict)
    judged: list[Place] = field(default_factory=list)
    """Those that fit, fastest first."""
    estimated: list[Place] = field(default_factory=list)
    """Those that seem to fit and were not judged, fastest first."""
    leanest: Place | None = None
    evaluations: int = 0
    num_judged: int = 0


Opened = tuple[BatchPricer, Sequence[Strategy]]

Judge = Callable[[Draft], Place | None]
"""The exact price of a draft; ``None`` where it has none."""


class Landscape:
    """Rooms, prices and memory of one search; see the module docstring."""

    def __init__(
        self,
        skeletons: Sequence[Skeleton],
        open_room: Callable[[Skeleton], Opened],
        *,
        max_evaluations: int,
        deadline_s: float | None = None,
        judge: Judge | None = None,
        max_judged: int = 0,
    ) -> None:
        """Nothing is priced yet.

        Args:
            skeletons: rooms of the landscape.
            open_room: pricer and strategies of a skeleton; raises ``PlanRefused`` where it has
                none.
            max_evaluations: distinct plans that may be priced.
            deadline_s: ``time.monotonic()`` after which nothing more is priced.
            judge: the exact judge; without one the batch prices are taken for exact.
            max_judged: places it may judge.
        """
        self.skeletons = tuple(skeletons)
        self._open_room = open_room
        self._rooms: dict[int, Room | None] = {}
        self._max_evaluations = max_evaluations
        self._deadline_s = deadline_s
        self._judge = judge
        self._max_judged = max_judged
        self._memory = _Memory()
        self._num_plans: int | None = None
        self._distances = _distances(self.skeletons)
        self._translations: dict[tuple[int, int], IntArray] = {}

    # Search state --------------------------------------------------------------------------------

    @property
    def evaluations(self) -> int:
        """Distinct plans priced so far."""
        return self._memory.evaluations

    @property
    def is_late(self) -> bool:
        """The deadline has passed."""
        return self._deadline_s is not None and time.monotonic() > self._deadline_s

    @property
    def is_exhausted(self) -> bool:
        """No more plans may be priced."""
        return self._memory.evaluations >= self._max_evaluations or self.is_late or self.is_known

    @property
    def is_known(self) -> bool:
        """Every plan of the landscape has been priced."""
        if len(self._rooms) < len(self.skeletons):
            return False
        if self._num_plans is None:
            self._num_plans = sum(room.num_plans for room in self._rooms.values() if room)
        return self._memory.evaluations >= self._num_plans

    @property
    def best(self) -> tuple[Place, ...]:
        """The fastest places seen that fit: first those judged, then those that were not."""
        return (*self._memory.judged, *self._memory.estimated)

    @property
    def best_s(self) -> float:
        """Step time of the best place; infinite before one fits."""
        return self.best[0].time_s if self.best else math.inf

    @property
    def leanest(self) -> Place | None:
        """The place seen that is nearest to fitting."""
        return self._memory.leanest

    # Rooms -------------------------------------------------------------------------------------

    def room(self, skeleton: int) -> Room | None:
        """The room of a skeleton, opened once; ``None`` where it has no plans."""
        if skeleton not in self._rooms:
            self._rooms[skeleton] = self._opened(self.skeletons[skeleton])
        return self._rooms[skeleton]

    def _opened(self, skeleton: Skeleton) -> Room | None:
        try:
            pricer, strategies = self._open_room(skeleton)
        except PlanRefused:
            return None
        if not strategies or skeleton.num_stages > pricer.num_segments:
            return None
        return Room(
            pricer=pricer,
            strategies=tuple(strategies),
            num_stages=skeleton.num_stages,
            related=_related(strategies),
        )

    def neighbors(self, skeleton: int) -> IntArray:
        """The skeletons most like this one."""
        order = np.argsort(self._distances[skeleton], kind="stable")
        return np.asarray(order[order != skeleton][:_NUM_NEIGHBORS])

    def moved(self, draft: Draft, skeleton: int) -> Draft | None:
        """``draft`` as it would be on another skeleton; ``None`` where that has no plans."""
        here, there = self.room(draft.skeleton), self.room(skeleton)
        if here is None or there is None:
            return None
        key = (draft.skeleton, skeleton)
        if key not in self._translations:
            self._translations[key] = _translation(here.strategies, there.strategies)
        return Draft(
            skeleton=skeleton,
            assignment=self._translations[key][draft.assignment],
            starts=scaled_starts(draft.starts, there.pricer.num_segments, there.num_stages),
        )

    # Prices ------------------------------------------------------------------------------------

    def priced(self, drafts: Sequence[Draft]) -> list[Place | None]:
        """Price of each draft; ``None`` for those the limits leave no room for."""
        wanted: dict[int, dict[Hashable, Draft]] = {}
        for draft in drafts:
            if draft.key not in self._memory.places:
                wanted.setdefault(draft.skeleton, {}).setdefault(draft.key, draft)
        for skeleton, fresh in wanted.items():
            left = self._max_evaluations - self._memory.evaluations
            if left <= 0 or self.is_late:
                break
            self._price(skeleton, list(fresh.values())[:left])
        return [self._memory.places.get(draft.key) for draft in drafts]

    def _price(self, skeleton: int, drafts: list[Draft]) -> None:
        room = self.room(skeleton)
        assert room is not None, "drafts are made in rooms that have plans"
        found = room.pricer.evaluate(
            np.stack([draft.assignment for draft in drafts]),
            np.stack([draft.starts for draft in drafts]),
        )
        self._memory.evaluations += len(drafts)
        rows = zip(
            drafts,
            found.time_s.tolist(),
            found.excess.tolist(),
            found.fits.tolist(),
            strict=True,
        )
        places = [Place(draft=d, time_s=t, excess=e, fits=f) for d, t, e, f in rows]
        for place in sorted(places, key=lambda item: item.time_s):
            known = self._checked(place)
            self._memory.places[place.draft.key] = known
            self._remember(known)

    def _checked(self, place: Place) -> Place:
        """``place`` with its exact price, where it claims to be the best and may be judged."""
        memory = self._memory
        if self._judge is None:
            return replace(place, is_judged=True)
        best_s = memory.judged[0].time_s if memory.judged else math.inf
        if not place.fits or place.time_s >= best_s or memory.num_judged >= self._max_judged:
            return place
        if self.is_late:
            return place
        memory.num_judged += 1
        return self._judge(place.draft) or replace(place, time_s=math.inf, fits=False)

    def _remember(self, place: Place) -> None:
        memory = self._memory
        if memory.leanest is None or place.excess < memory.leanest.excess:
            memory.leanest = place
        if not place.fits:
            return
        best = memory.judged if place.is_judged else memory.estimated
        if len(best) == _NUM_BEST and place.time_s >= best[-1].time_s:
            return
        best.append(place)
        best.sort(key=lambda item: item.time_s)
        del best[_NUM_BEST:]

    # Where to start ----------------------------------------------------------------------------

    def uniform(self, skeleton: int) -> list[Draft]:
        """One draft for every strategy of a room, the same everywhere, stages of equal length."""
        room = self.room(skeleton)
        if room is None:
            return []
        count = room.pricer.num_segments
        starts = scaled_starts(np.zeros(1, np.int64), count, room.num_stages)
        return [
            Draft(
                skeleton=skeleton,
                assignment=np.full(count, strategy, np.int64),
                starts=starts,
            )
            for strategy in range(room.pricer.num_strategies)
        ]


def scaled_starts(starts: IntArray, num_segments: int, num_stages: int) -> IntArray:
    """Boundaries of another number of stages where ``starts`` has them, as far as can be.

    The boundaries are read as shares of the way and interpolated; every stage keeps a segment.
    """
    if len(starts) == num_stages:
        return starts
    marks = np.append(starts, num_segments).astype(np.float64)
    where = np.linspace(0.0, len(starts), num_stages + 1)[:-1]
    found = np.rint(np.interp(where, np.arange(len(marks)), marks)).astype(np.int64)
    found[0] = 0
    # Ascending, and with room for the stages that follow.
    steps = np.arange(num_stages)
    found = np.maximum.accumulate(found - steps) + steps
    return np.minimum(found, num_segments - num_stages + steps)


def _features(skeleton: Skeleton) -> list[float]:
    sizes = skeleton.sizes
    data = sizes["dp_replicate"] * sizes["dp_shard"]
    options = skeleton.communication
    return [
        *np.log2([data, sizes["cp"], sizes["ep"], sizes["tp"], skeleton.num_stages]).tolist(),
        float(np.log2(skeleton.num_microbatches)),
        0.5 * float(np.log2(sizes["dp_shard"])),
        0.5 * float(np.log2(max(len(skeleton.token_slices), 1))),
        *(0.5 * (skeleton.schedule is name) for name in ScheduleName),
        0.5 * len({options.tensor_parallel, options.pipeline}),
    ]


def _distances(skeletons: Sequence[Skeleton]) -> FloatArray:
    """(skeletons, skeletons): factors of two between the sizes, summed."""
    features = np.array([_features(skeleton) for skeleton in skeletons]).reshape(len(skeletons), -1)
    found = np.zeros((len(skeletons), len(skeletons)))
    for column in features.T:
        found += np.abs(column[:, None] - column[None, :])
    return found


def _respects(strategy: Strategy) -> tuple[Hashable, ...]:
    order = list(Recompute)
    return (
        strategy.sharding.name,
        strategy.zero_stage,
        order.index(strategy.recompute),
        strategy.offload,
    )


def _differences(mine: Sequence[Strategy], theirs: Sequence[Strategy]) -> IntArray:
    """(mine, theirs): in how many respects two strategies differ."""
    found = np.zeros((len(mine), len(theirs)), np.int64)
    for row, one in enumerate(mine):
        for column, other in enumerate(theirs):
            pairs = zip(_respects(one), _respects(other), strict=True)
            found[row, column] = sum(a != b for a, b in pairs)
    return found


def _related(strategies: Sequence[Strategy]) -> tuple[IntArray, ...]:
    differs = _differences(strategies, strategies)
    return tuple(np.flatnonzero(row == 1) for row in differs)


def _translation(mine: Sequence[Strategy], theirs: Sequence[Strategy]) -> IntArray:
    return np.asarray(_differences(mine, theirs).argmin(axis=1))
