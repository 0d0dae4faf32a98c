"""Rooms: what all plans of a row cost.

A room of a ``SearchContext`` is every variant of every group times every cut, priced by
``PlanSpace.evaluate``, with the schedule simulated unless asked otherwise. All groups of a plan are
sharded in one way and differ in what they recompute: so prices are exact, but for pipelines whose
values skip stages.
Cuts are the same for all plans of a row and a way of sharding: stages of equal time or bytes when
every segment does what the first variant says.

Before anything is priced a sum tells cuts on which nothing can fit: parameters, optimizer state and
gradients lie on a stage at least as the leanest variant of each segment has them. What fits is
thereby never left out.

V segments, S variants, G groups, C cuts, P stages, n plans.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from meshwright.env.instance import CUTS, Float32Array, FloatArray, IntArray, Room, Variant
from meshwright.env.rows import SCHEDULES, skeleton_of, strategies_of
from meshwright.errors import PlanRefused
from meshwright.plans.plan import Recompute
from meshwright.space.decision import Sharding, Strategy
from meshwright.space.evaluate import PlanSpace
from meshwright.space.linear import linear_costs
from meshwright.space.partition import least_bottleneck
from meshwright.space.search import SearchContext

__all__ = ["OutOfTimeError", "PricedRooms", "Sharded", "StoredRooms"]

_LIGHT_SHARE = 0.25
"""Of a stage's mean time: what a light first or last stage takes less."""

_MAX_OPENED = 8
"""Rows whose prices stay in memory; their rooms all do."""


class StoredRooms:
    """Rooms computed before."""

    def __init__(self, times: Sequence[Float32Array]) -> None:
        """``times``: ``Room.time_s`` of every row."""
        self.times = tuple(times)
        self._fits = np.array([bool(np.isfinite(time_s).any()) for time_s in self.times])

    def open(self, row: int) -> Room:
        """All plans of a row."""
        return Room(time_s=self.times[row])

    def fits(self, row: int) -> bool:
        """Whether some plan of the row fits."""
        return bool(self._fits[row])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sharded:
    """A row whose segments are priced in one way of sharding."""

    space: PlanSpace
    variants: tuple[int, ...]
    """The number of the variant that each of the space's strategies is."""
    starts: IntArray
    """(C, P) first segment of each stage by cut."""
    cuts: tuple[int, ...]
    """Those unlike any before them, on which the fixed bytes fit: where a plan may fit at all."""


class OutOfTimeError(Exception):
    """A room was to be priced after the deadline."""


class PricedRooms:
    """Rooms of a search context, priced when they are opened; every room once."""

    def __init__(
        self,
        context: SearchContext,
        *,
        rows: IntArray,
        variants: tuple[Variant, ...],
        group_classes: tuple[tuple[int, ...], ...],
        num_cuts: int,
        simulate: bool = True,
    ) -> None:
        """Nothing is priced yet; arguments as in ``Instance`` and of ``instance_of``."""
        self._simulate = simulate
        self.context = context
        self._rows, self._variants = rows, variants
        self._num_groups = len(group_classes)
        self._shape = (len(variants),) * self._num_groups + (num_cuts,)
        group_of = {number: g for g, classes in enumerate(group_classes) for number in classes}
        self.group_of_segment = np.array([group_of[c] for c in context.model.segment_classes])
        """(V,)"""
        self.evaluations = 0
        """Plans priced so far, those too that only tell whether a row fits."""
        self.deadline_s: float | None = None
        """``time.monotonic()`` after which nothing is priced any more: OutOfTimeError."""
        self._rooms: dict[int, Room] = {}
        self._known: dict[int, bool] = {}
        self._opened: dict[int, tuple[Sharded, ...]] = {}

    def open(self, row: int) -> Room:
        """All plans of a row; none where the graph cannot be sharded as the row wants."""
        if row not in self._rooms:
            self._require_time()
            time_s = np.full(self._shape, np.inf, dtype=np.float32)
            for sharded in self.opened(row):
                places = range(len(sharded.variants))
                every = np.array(list(product(places, repeat=self._num_groups)), dtype=np.int64)
                self._price(sharded, every, time_s)
            self._rooms[row] = Room(time_s=time_s)
            self._known[row] = self._rooms[row].fits
        return self._rooms[row]

    def fits(self, row: int) -> bool:
        """What ``open`` says; plans that recompute everything are tried first."""
        if row not in self._known:
            self._require_time()
            opened = self.opened(row)
            if not any(sharded.cuts for sharded in opened):
                self._known[row] = False
            else:
                lean = any(self._fits_leanly(sharded) for sharded in opened)
                self._known[row] = lean or self.open(row).fits
        return self._known[row]

    def _require_time(self) -> None:
        if self.deadline_s is not None and time.monotonic() >= self.deadline_s:
            raise OutOfTimeError

    def _fits_leanly(self, sharded: Sharded) -> bool:
        lean = [
            place
            for place, number in enumerate(sharded.variants)
            if self._variants[number].recompute is Recompute.FULL
        ]
        chosen = np.repeat(np.array(lean, dtype=np.int64)[:, None], self._num_groups, axis=1)
        # Bytes do not wait for one another: no schedule need be simulated.
        return any(
            bool(sharded.space.evaluate(assignment, starts, simulate=False).fits.any())
            for _, assignment, starts in self._plans(sharded, chosen)
        )

    def _price(self, sharded: Sharded, chosen: IntArray, time_s: Float32Array) -> None:
        """Write what plans take that fit: (n, G) places of variants, on every cut."""
        variants = np.array(sharded.variants)[chosen]
        for cut, assignment, starts in self._plans(sharded, chosen):
            found = sharded.space.evaluate(assignment, starts, simulate=self._simulate)
            time_s[(*variants.T, cut)] = np.where(found.fits, found.time_s, np.inf)

    def _plans(
        self, sharded: Sharded, chosen: IntArray
    ) -> Iterator[tuple[int, IntArray, IntArray]]:
        """Every cut with (n, V) strategies and (n, P) starts of plans on it, to be priced."""
        assignment = chosen[:, self.group_of_segment]
        for cut in sharded.cuts:
            self.evaluations += len(chosen)
            yield cut, assignment, np.repeat(sharded.starts[cut][None], len(chosen), axis=0)

    # A row's prices ----------------------------------------------------------------------------

    def opened(self, row: int) -> tuple[Sharded, ...]:
        """The row's segments priced, for each way of sharding that the graph allows."""
        if row not in self._opened:
            found = self._priced(row)
            while len(self._opened) >= _MAX_OPENED:
                del self._opened[next(iter(self._opened))]
            self._opened[row] = found
        return self._opened[row]

    def _priced(self, row: int) -> tuple[Sharded, ...]:
        num_cuts = self._shape[-1]
        for other, known in self._opened.items():
            # All but the schedule is the same: so are the prices of segments.
            if np.array_equal(self._rows[other, :-1], self._rows[row, :-1]):
                schedule = SCHEDULES[int(self._rows[row, -1])]
                return tuple(
                    _sharded(one.space.under(schedule), one.variants, num_cuts) for one in known
                )
        by_sharding: dict[Sharding, dict[int, Strategy]] = {}
        for number, one in strategies_of(self.context, self._rows[row], self._variants).items():
            by_sharding.setdefault(one.sharding, {})[number] = one
        skeleton = skeleton_of(self.context, self._rows[row])
        found = []
        for strategies in by_sharding.values():
            try:
                space = PlanSpace(self.context, skeleton, tuple(strategies.values()))
            except PlanRefused:
                continue
            found.append(_sharded(space, tuple(strategies), num_cuts))
        return tuple(found)


def _sharded(space: PlanSpace, variants: tuple[int, ...], num_cuts: int) -> Sharded:
    starts = _cuts(space, num_cuts)
    column = space.costs.column
    fixed = np.zeros(space.costs.amounts.shape[:2])
    for name in ("parameters", "optimizer", "gradients"):
        fixed += space.costs.amounts[:, :, column(name)]
    least_bytes = fixed.min(axis=1)
    cuts = []
    for cut, first in enumerate(starts):
        is_new = not (starts[:cut] == first).all(axis=1).any()
        if is_new and bool((np.add.reduceat(least_bytes, first) <= space.capacity_bytes).all()):
            cuts.append(cut)
    return Sharded(space=space, variants=variants, starts=starts, cuts=tuple(cuts))


def _cuts(space: PlanSpace, num_cuts: int) -> IntArray:
    """(C, P) first segments of stages, by ``CUTS``."""
    num_stages = space.skeleton.num_stages
    if num_stages == 1:
        return np.zeros((num_cuts, 1), dtype=np.int64)
    costs = linear_costs(space)
    time_s = costs.step_s(space.skeleton.num_microbatches)[:, 0]
    light_s = _LIGHT_SHARE * float(time_s.sum()) / num_stages
    held = costs.stage_bytes(float(space.in_flight.mean()))[:, 0]
    amounts: dict[str, FloatArray] = {
        "time": time_s,
        "memory": held,
        "light_first": time_s + light_s * (np.arange(len(time_s)) == 0),
        "light_last": time_s + light_s * (np.arange(len(time_s)) == len(time_s) - 1),
    }
    found = [least_bottleneck(amounts[name].tolist(), num_stages) for name in CUTS[:num_cuts]]
    assert all(starts is not None for starts in found), "no more stages than segments"
    return np.array(found, dtype=np.int64)
