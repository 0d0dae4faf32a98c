"""Stages of a graph that is no chain, by an integer program.

Units v take ``time_s[w, v]`` of one micro-batch where their stage runs in way w, on ``devices[w]``
devices; edges say who needs whose values. Every unit gets a stage, x[v, s] = 1, and every stage a
way, y[s, w] = 1, so that values never go to a lower stage and the devices suffice::

    sum over r <= s of x[u, r]  >=  sum over r <= s of x[v, r]      for every edge u -> v and s
    sum over s, w of devices[w] y[s, w]  <=  total

Such stages are convex, and the graph of stages has no cycle. Stages without a path between them run
at the same time, so towers side by side make a pipeline no deeper than one of them. With own[s] the
time of stage s, T that of the slowest, e[s] when the first micro-batch has passed stage s, and
z[u, v] = 1 where an edge joins two stages, the step takes about ::

    minimize  (M - 1) T + D + sum of passing_s[u, v] z[u, v]
    T >= own[s] >= sum over v of time_s[w, v] x[v, s] - big (1 - y[s, w])
    e[s] >= own[s],   e[s] >= e[r] + own[s] - big (1 - f[r, s]),   D >= e[s]
    f[r, s] >= x[u, r] + x[v, s] - 1       for every edge
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meshwright.cost.columns import FloatArray
from meshwright.solvers.ilp import IntegerProgram

__all__ = ["DagProblem", "DagStages", "dag_time_s", "solve_dag"]

Edge = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class DagProblem:
    """V units, in an order in which values only go up, and W ways to run a stage."""

    time_s: FloatArray
    """(W, V) forward and backward of one micro-batch."""
    memory_bytes: FloatArray
    """(W, V) brought to a stage."""
    capacity_bytes: tuple[float, ...]
    """(W,)"""
    devices: tuple[int, ...]
    """(W,) that a stage takes."""
    total_devices: int
    passing_s: dict[Edge, float]
    """For every edge the seconds its values take between stages, there and back."""
    num_stages: int
    num_microbatches: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DagStages:
    """An answer."""

    stage_of: tuple[int, ...]
    """(V,)"""
    way_of: tuple[int, ...]
    """(stages,)"""
    time_s: float
    """By the formula of the module docstring."""
    bound_s: float
    """No stages take less."""


def dag_time_s(problem: DagProblem, stage_of: Sequence[int], way_of: Sequence[int]) -> float:
    """Seconds of a step by the formula of the module docstring."""
    own = np.zeros(problem.num_stages)
    for unit, stage in enumerate(stage_of):
        own[stage] += problem.time_s[way_of[stage], unit]
    ends = own.copy()
    joined = {(stage_of[u], stage_of[v]) for u, v in problem.passing_s}
    for stage in range(problem.num_stages):
        before = [ends[r] for r, s in joined if s == stage and r < stage]
        ends[stage] += max(before, default=0.0)
    passing = sum(s for (u, v), s in problem.passing_s.items() if stage_of[u] != stage_of[v])
    return float((problem.num_microbatches - 1) * own.max() + ends.max() + passing)


def solve_dag(problem: DagProblem, *, time_limit_s: float | None = None) -> DagStages | None:
    """The stages of the least time; ``None`` where nothing fits or none was found in time."""
    program = IntegerProgram()
    num_ways, num_units = problem.time_s.shape
    stages, ways = range(problem.num_stages), range(num_ways)
    x = [[program.variable() for _ in stages] for _ in range(num_units)]
    y = [[program.variable() for _ in ways] for _ in stages]
    for row in (*x, *y):
        program.choose_one(row)
    needed = _reduced(list(problem.passing_s), num_units)
    for u, v in needed:
        for stage in stages[:-1]:
            terms = [(x[u][r], 1.0) for r in range(stage + 1)]
            program.row(terms + [(x[v][r], -1.0) for r in range(stage + 1)], lower=0.0)
    taken = [(y[s][w], float(problem.devices[w])) for s in stages for w in ways]
    program.row(taken, upper=problem.total_devices)
    for stage in stages:
        program.row([(row[stage], 1.0) for row in x], lower=1.0)
        for way in ways:
            most = float(problem.memory_bytes[way].sum())
            terms = [(x[v][stage], float(problem.memory_bytes[way, v])) for v in range(num_units)]
            limit = problem.capacity_bytes[way] + most
            program.row([*terms, (y[stage][way], most)], upper=limit)
    _add_times(program, problem, (x, y), needed)
    _add_passing(program, problem, x)
    solution = program.minimize(time_limit_s=time_limit_s, relative_gap=1e-3)
    if not solution.is_found:
        return None
    stage_of, way_of = (
        tuple(
            next(i for i, variable in enumerate(row) if solution.is_set(variable)) for row in rows
        )
        for rows in (x, y)
    )
    return DagStages(
        stage_of=stage_of,
        way_of=way_of,
        time_s=dag_time_s(problem, stage_of, way_of),
        bound_s=solution.bound,
    )


def _add_passing(program: IntegerProgram, problem: DagProblem, x: list[list[int]]) -> None:
    """What passes between stages."""
    for (u, v), seconds in problem.passing_s.items():
        if seconds > 0:
            apart = program.variable(cost=seconds, is_integer=False)
            for stage in range(problem.num_stages - 1):
                terms = [(x[u][r], 1.0) for r in range(stage + 1)]
                terms += [(x[v][r], -1.0) for r in range(stage + 1)]
                program.row([*terms, (apart, -1.0)], upper=0.0)


def _add_times(
    program: IntegerProgram,
    problem: DagProblem,
    chosen: tuple[list[list[int]], list[list[int]]],
    needed: Sequence[Edge],
) -> None:
    """The slowest stage, and the way of the first micro-batch."""
    x, y = chosen
    stages, units = range(problem.num_stages), range(len(x))
    least = problem.time_s.min(axis=0)
    total_s = float(problem.time_s.sum(axis=1).max())
    # Work in device-seconds is shared by all devices at best.
    work = (problem.time_s * np.array(problem.devices)[:, None]).min(axis=0).sum()
    even_s = max(float(least.max()), float(work) / problem.total_devices)

    def seconds(cost: float, lower: float = 0.0) -> int:
        return program.variable(cost=cost, lower=lower, upper=total_s, is_integer=False)

    slowest = seconds(problem.num_microbatches - 1, even_s)
    depth = seconds(1.0, _longest_path_s(problem, least))
    own, end = [seconds(0.0) for _ in stages], [seconds(0.0) for _ in stages]
    for stage in stages:
        for way, times_s in enumerate(problem.time_s):
            most_s = float(times_s.sum())
            terms = [(x[v][stage], -float(times_s[v])) for v in units]
            program.row([(own[stage], 1.0), *terms, (y[stage][way], -most_s)], lower=-most_s)
        program.row([(slowest, 1.0), (own[stage], -1.0)], lower=0.0)
        program.row([(end[stage], 1.0), (own[stage], -1.0)], lower=0.0)
        program.row([(depth, 1.0), (end[stage], -1.0)], lower=0.0)
        for before in range(stage):
            follows = program.variable(is_integer=False)
            for u, v in needed:
                terms = [(follows, 1.0), (x[u][before], -1.0), (x[v][stage], -1.0)]
                program.row(terms, lower=-1.0)
            terms = [(end[stage], 1.0), (end[before], -1.0), (own[stage], -1.0)]
            program.row([*terms, (follows, -total_s)], lower=-total_s)


def _longest_path_s(problem: DagProblem, least_s: FloatArray) -> float:
    ends = least_s.astype(np.float64).copy()
    for u, v in sorted(problem.passing_s, key=lambda edge: edge[1]):
        ends[v] = max(ends[v], ends[u] + least_s[v])
    return float(ends.max())


def _reduced(edges: Sequence[Edge], num_units: int) -> list[Edge]:
    """Edges without those that a longer path implies."""
    reach = np.zeros((num_units, num_units), dtype=np.bool_)
    found: list[Edge] = []
    # From the nearest target to the farthest, for each source from the last to the first.
    for u in reversed(range(num_units)):
        for v in sorted(v for s, v in edges if s == u):
            if not reach[u, v]:
                found.append((u, v))
                reach[u] |= reach[v]
                reach[u, v] = True
    return found
