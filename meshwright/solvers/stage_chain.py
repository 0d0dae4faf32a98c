"""Stages of a chain on sub-meshes of unequal size, by dynamic programming (arXiv 2201.12023, 5.2).

A way w runs units k..j of the chain as one stage on ``uses[w]`` devices of each type, in
``cost_s[w, level, k, j]`` seconds of one micro-batch; ``level`` counts the stages from the last
one, since those before hold more micro-batches in flight and so may not fit. The step takes ::

    sum of stage times + (M - 1) * time of the slowest stage

For a bound on the slowest stage, the least sum is

    best(level, k, d) = min over w, j of cost[w, level, k, j] + best(level - 1, j + 1, d - uses[w])

where every cost above the bound is left out. Bounds are tried upwards from the least possible one
for as long as a larger bound could still pay. All costs are tried as bounds where they are few;
otherwise bounds in steps of 3 %, so the answer is within 3 % of the least.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.cost.columns import FloatArray, IntArray

__all__ = ["ChainProblem", "ChainSolution", "ChainStage", "solve_chain"]

_FEW_BOUNDS = 300
_BOUND_STEP = 1.03


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainProblem:
    """K units, W ways, L levels, T types of devices."""

    cost_s: FloatArray
    """(W, L, K, K) seconds of units first to last, inclusive; infinite where that cannot be. Levels
    beyond the last cost what the last one costs."""
    uses: IntArray
    """(W, T)"""
    devices: tuple[int, ...]
    """(T,) of each type there are."""
    num_microbatches: int
    max_stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainStage:
    """A stage of a solution."""

    first: int
    last: int
    """Inclusive."""
    way: int
    level: int
    """Stages from this one to the last, itself included."""
    time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainSolution:
    """The best stages found, in the chain's order."""

    stages: tuple[ChainStage, ...]
    time_s: float
    """By the formula of the module docstring."""


def solve_chain(problem: ChainProblem) -> ChainSolution | None:
    """The stages of the least time; ``None`` where nothing fits."""
    loosest = _least_sum(problem, math.inf)
    if loosest is None:
        return None
    best = loosest
    least_sum_s = sum(stage.time_s for stage in loosest.stages)
    for bound_s in _bounds(problem, max(stage.time_s for stage in loosest.stages)):
        if (problem.num_microbatches - 1) * bound_s + least_sum_s > best.time_s:
            break
        found = _least_sum(problem, bound_s)
        if found is not None and found.time_s < best.time_s:
            best = found
    return best


def _bounds(problem: ChainProblem, loosest_s: float) -> Sequence[float]:
    """Bounds on the slowest stage, ascending, below that of the least sum."""
    cost_s = problem.cost_s
    # Every unit is in some stage, which takes at least as long as the unit alone.
    units = np.arange(cost_s.shape[2])
    alone = cost_s[:, 0, units, units].min(axis=0)
    least_s = float(alone[np.isfinite(alone)].max(initial=0.0))
    values = np.unique(cost_s[(cost_s >= least_s) & (cost_s < loosest_s)])
    if len(values) <= _FEW_BOUNDS:
        return [float(value) for value in values]
    low_s, high_s = float(values[0]), float(values[-1])
    # Up to the least bound that can be met nothing is tried twice.
    while high_s / low_s > _BOUND_STEP:
        middle_s = math.sqrt(low_s * high_s)
        if _least_sum(problem, middle_s) is None:
            low_s = middle_s
        else:
            high_s = middle_s
    count = math.ceil(math.log(max(loosest_s / high_s, 1.0)) / math.log(_BOUND_STEP))
    return [high_s * _BOUND_STEP**step for step in range(count + 1)]


def _least_sum(problem: ChainProblem, bound_s: float) -> ChainSolution | None:
    """The stages of the least sum none of which takes longer than ``bound_s``."""
    num_ways, num_levels, num_units, _ = problem.cost_s.shape
    shape = tuple(count + 1 for count in problem.devices)
    cost_s = np.where(problem.cost_s <= bound_s, problem.cost_s, np.inf)
    # best: (units + 1, devices used), flat over the types of devices.
    best: FloatArray = np.full((num_units + 1, *shape), np.inf)
    best[(num_units, *(0 for _ in shape))] = 0.0
    parents: list[tuple[IntArray, IntArray]] = []
    winner: tuple[float, int, int] | None = None
    for level in range(1, problem.max_stages + 1):
        row = min(level, num_levels) - 1
        found = np.full((num_units + 1, math.prod(shape)), np.inf)
        way_of = np.full(found.shape, -1, dtype=np.int64)
        end_of = np.full(found.shape, -1, dtype=np.int64)
        for way in range(num_ways):
            rest = _shifted(best, problem.uses[way]).reshape(num_units + 1, -1)
            _relax(cost_s[way, row], rest, way, (found, way_of, end_of))
        best = found.reshape(num_units + 1, *shape)
        parents.append((way_of, end_of))
        used = int(np.argmin(found[0]))
        if np.isfinite(found[0, used]):
            seconds = float(found[0, used])
            if winner is None or seconds < winner[0]:
                winner = (seconds, level, used)
        elif not np.isfinite(found).any():
            break
    if winner is None:
        return None
    return _walked(problem, parents, winner[1], winner[2], shape)


def _shifted(best: FloatArray, uses: IntArray) -> FloatArray:
    """``best`` with ``uses`` more devices used."""
    found = np.full(best.shape, np.inf)
    sizes = best.shape[1:]
    if any(use >= size for use, size in zip(uses.tolist(), sizes, strict=True)):
        return found
    to = tuple(slice(use, None) for use in uses.tolist())
    of = tuple(slice(0, size - use) for use, size in zip(uses.tolist(), sizes, strict=True))
    found[(slice(None), *to)] = best[(slice(None), *of)]
    return found


def _relax(
    cost_s: FloatArray,
    rest: FloatArray,
    way: int,
    best: tuple[FloatArray, IntArray, IntArray],
) -> None:
    """Let stages of one way start at every unit."""
    found, way_of, end_of = best
    reachable = np.asarray(np.isfinite(rest).any(axis=1))[1:]
    is_open: NDArray[np.bool_] = np.asarray(np.isfinite(cost_s) & reachable)
    for first in np.flatnonzero(is_open.any(axis=1)).tolist():
        ends = np.flatnonzero(is_open[first])
        sums = cost_s[first, ends][:, None] + rest[ends + 1]
        which = np.argmin(sums, axis=0)
        least = sums[which, np.arange(sums.shape[1])]
        better = least < found[first]
        found[first, better] = least[better]
        way_of[first, better] = way
        end_of[first, better] = ends[which[better]]


def _walked(
    problem: ChainProblem,
    parents: Sequence[tuple[IntArray, IntArray]],
    level: int,
    used: int,
    shape: tuple[int, ...],
) -> ChainSolution:
    stages = []
    first = 0
    for left in range(level, 0, -1):
        way_of, end_of = parents[left - 1]
        way, last = int(way_of[first, used]), int(end_of[first, used])
        row = min(left, problem.cost_s.shape[1]) - 1
        seconds = float(problem.cost_s[way, row, first, last])
        stages.append(ChainStage(first=first, last=last, way=way, level=left, time_s=seconds))
        place = np.array(np.unravel_index(used, shape)) - problem.uses[way]
        used = int(np.ravel_multi_index(tuple(place.tolist()), shape))
        first = last + 1
    times = [stage.time_s for stage in stages]
    total_s = sum(times) + (problem.num_microbatches - 1) * max(times)
    return ChainSolution(stages=tuple(stages), time_s=total_s)
