"""The best mixture of strategies on one skeleton: cut and price, fill up memory, polish.

``stage_cut`` says where stages begin and which two rows of strategies each mixes; here the rows
become whole plans, judged by ``PlanSpace.evaluate``. Where the linear costs promised too much, the
capacity is lowered by what was missing and the cut is made anew. ``polished`` then changes a plan
as long as something helps: runs of equal segments change strategy or grow at their ends, and stages
move their ends.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np

from meshwright.cost.columns import IntArray
from meshwright.solvers.stage_cut import Rows, StageTimes, best_cuts, price_rows, stage_times
from meshwright.space.evaluate import PlanSpace
from meshwright.space.linear import LinearCosts, linear_costs

__all__ = ["Mixture", "best_mixture", "polished"]

_NUM_PRICES = 12
_NUM_CUTS = 4
_SHARES = np.linspace(-0.4, 0.4, 9)
"""Tried around the share that the linear costs promise."""

_ROUNDS = 5
_POLISHING_ROUNDS = 12
_STEPS = (1, 2, 4, 8)
_MAX_NEIGHBORS = 1500
_MARGIN = 0.004
"""Of the capacity, left free by mixtures: what neighbors of unequal recompute keep together is
estimated."""


@dataclass(frozen=True, slots=True, eq=False)
class Mixture:
    """A plan of a space."""

    assignment: IntArray
    """(V,)"""
    starts: IntArray
    """(P,)"""
    time_s: float
    excess: float

    @property
    def fits(self) -> bool:
        """Every stage fits."""
        return self.excess <= 0.0

    @property
    def rank(self) -> tuple[float, float]:
        """Ascending from the best: what fits by time, then the rest by what is missing."""
        return (0.0, self.time_s) if self.fits else (self.excess, self.time_s)


@dataclass(slots=True)
class _Judge:
    """Evaluates and counts."""

    space: PlanSpace
    deadline_s: float | None
    spare: float
    evaluations: int = 0

    @property
    def is_late(self) -> bool:
        return self.deadline_s is not None and time.monotonic() > self.deadline_s

    def best(self, plans: list[tuple[IntArray, IntArray]]) -> Mixture:
        """The best by the closed form."""
        assignment = np.stack([plan[0] for plan in plans])
        starts = np.stack([plan[1] for plan in plans])
        found = self.space.evaluate(assignment, starts, simulate=False)
        self.evaluations += len(plans)
        mixes = (assignment != assignment[:, :1]).any(axis=1)
        excess = found.excess + (_MARGIN + self.spare) * mixes
        order = np.lexsort((found.time_s, np.maximum(excess, 0.0)))
        first = int(order[0])
        return Mixture(
            assignment[first],
            starts[first],
            float(found.time_s[first]),
            float(excess[first]),
        )


def best_mixture(
    space: PlanSpace,
    *,
    starts: IntArray | None = None,
    deadline_s: float | None = None,
    spare: float = 0.0,
) -> tuple[Mixture | None, int]:
    """The best plan found on a space, and how many were evaluated.

    Uniform plans on the stages tried, and on those that begin at ``starts``, are among them.
    ``None`` where no stages fit even by the linear costs. Mixtures leave ``spare`` of the capacity
    free, a fraction, beside what they always leave.
    """
    costs: LinearCosts = linear_costs(space)
    judge = _Judge(space, deadline_s, spare)
    micro = space.skeleton.num_microbatches
    in_flight, capacity = space.in_flight, space.capacity_bytes
    rows = price_rows(
        costs, num_microbatches=micro, in_flight=float(np.mean(in_flight)), num=_NUM_PRICES
    )
    room = 1.0 - spare
    best: Mixture | None = None
    seeds = [] if starts is None else [starts]
    if seeds:
        best = judge.best(list(_uniform(space, seeds)))
    for _ in range(_ROUNDS):
        times = stage_times(
            rows,
            in_flight=in_flight,
            capacity_bytes=capacity * room,
            always_bytes=float(space.costs.shared_bytes.max()),
        )
        cuts = best_cuts(times, num_microbatches=micro, num=_NUM_CUTS)
        plans = [plan for _, cut in cuts for plan in _filled(rows, times, cut)]
        if not plans:
            break
        plans += _uniform(space, [np.array(cut, dtype=np.int64) for _, cut in cuts])
        found = judge.best(plans)
        if best is None or found.rank < best.rank:
            best = found
        if found.fits or judge.is_late:
            break
        room *= 1 - min(found.excess * 1.1 + 0.005, 0.5)
    return best, judge.evaluations


def _uniform(space: PlanSpace, starts: list[IntArray]) -> Iterator[tuple[IntArray, IntArray]]:
    """One strategy everywhere."""
    for strategy in range(space.num_strategies):
        for where in starts:
            yield np.full(space.num_segments, strategy, dtype=np.int64), where


def _filled(
    rows: Rows, times: StageTimes, starts: tuple[int, ...]
) -> Iterator[tuple[IntArray, IntArray]]:
    """Plans around what the linear costs promise for a cut."""
    _, num_prices, count = rows.strategy.shape
    flat = rows.strategy.reshape(-1, count)
    ends = (*starts[1:], count)
    where = np.array(starts, dtype=np.int64)
    seen = set()
    for from_front in (True, False):
        for shift in _SHARES:
            assignment = np.empty(count, dtype=np.int64)
            for stage, (start, end) in enumerate(zip(starts, ends, strict=True)):
                row = int(times.row[stage, start, end])
                before = row - 1 if row % num_prices else row
                share = float(np.clip(times.share[stage, start, end] + shift, 0.0, 1.0))
                lean, fast = flat[row, start:end], flat[before, start:end]
                differ = np.flatnonzero(lean != fast)
                number = round(share * len(differ))
                changed = differ[:number] if from_front else differ[len(differ) - number :]
                assignment[start:end] = lean
                assignment[start + changed] = fast[changed]
            key = assignment.tobytes()
            if key not in seen:
                seen.add(key)
                yield assignment, where


# Polishing ---------------------------------------------------------------------------------------


def polished(
    space: PlanSpace, start: Mixture, *, deadline_s: float | None = None, spare: float = 0.0
) -> tuple[Mixture, int]:
    """``start`` after every change that helps, and how many plans were evaluated.

    ``spare`` as for ``best_mixture``.
    """
    judge = _Judge(space, deadline_s, spare)
    best = start
    for _ in range(_POLISHING_ROUNDS):
        plans = list(islice(_neighbors(space, best), _MAX_NEIGHBORS))
        if not plans or judge.is_late:
            break
        found = judge.best(plans)
        if found.rank >= best.rank:
            break
        best = found
    return best, judge.evaluations


def _neighbors(space: PlanSpace, mixture: Mixture) -> Iterator[tuple[IntArray, IntArray]]:
    """Plans one change away: ends of stages, ends of runs, then runs, the longest first."""
    assignment, starts = mixture.assignment, mixture.starts
    count = len(assignment)
    is_start = np.zeros(count, dtype=np.bool_)
    is_start[starts] = True
    changes = np.append(True, assignment[1:] != assignment[:-1])
    bounds = np.append(np.flatnonzero(is_start | changes), count).tolist()

    def changed(first: int, last: int, strategy: int) -> tuple[IntArray, IntArray]:
        other = assignment.copy()
        other[first:last] = strategy
        return other, starts

    for stage in range(1, len(starts)):
        for step in (-2, -1, 1, 2):
            moved = starts.copy()
            moved[stage] += step
            ends = np.append(moved[1:], count)
            if (moved < ends).all() and moved[stage] > moved[stage - 1]:
                yield assignment, moved
    for cut in np.flatnonzero(changes)[1:].tolist():
        for step in _STEPS:
            yield changed(max(cut - step, 0), cut, int(assignment[cut]))
            yield changed(cut, min(cut + step, count), int(assignment[cut - 1]))
    for first, last in sorted(pairwise(bounds), key=lambda run: (run[0] - run[1], run[0])):
        yield from (changed(*run) for run in _run_changes(space, first, last, assignment[first]))


def _run_changes(
    space: PlanSpace, first: int, last: int, own: int
) -> Iterator[tuple[int, int, int]]:
    """Another strategy for a run, or within its way of sharding for its ends and a half."""
    sharding = space.costs.sharding_of
    for strategy in range(space.num_strategies):
        if strategy == own:
            continue
        yield first, last, strategy
        if sharding[strategy] == sharding[own] and last - first > 1:
            yield first, first + 1, strategy
            yield last - 1, last, strategy
            yield first, (first + last) // 2, strategy
