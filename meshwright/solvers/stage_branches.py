"""Pipelines whose stages follow the graph: parallel branches on parallel stages.

``shapes`` ranks numbers of stages and of micro-batches, and what equal stages do, by what they take
at least; ``unequal_shapes`` lets every stage choose its sub-mesh. For the best of them an integer
program (``stage_dag``) gives every unit its stage. Units are runs of segments of which each needs
the one before. Where every unit needs the one before it, nothing is gained over a chain.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meshwright.cost.columns import FloatArray, IntArray, sums_by
from meshwright.cost.table import Split
from meshwright.errors import PlanRefused
from meshwright.plans.plan import AXIS_NAMES, ParallelPlan
from meshwright.solvers.stage_dag import DagProblem, solve_dag
from meshwright.solvers.stage_options import (
    OptionCosts,
    Pool,
    pools_of,
    priced_options,
    sizes_of,
    whole_hosts_only,
)
from meshwright.solvers.staged import StagePick, staged_plan
from meshwright.space.partition import least_bottleneck
from meshwright.space.search import Candidate, SearchContext
from meshwright.space.uniform import UniformChoice, stage_times_s

__all__ = [
    "GraphUnits",
    "Shape",
    "branch_candidates",
    "chain_plan",
    "graph_units",
    "shapes",
    "unequal_shapes",
]

_NUM_UNITS = 20
_STAGES = (2, 3, 4, 6, 8)
_SHAPES = 5
"""Shapes the integer program is solved for."""

_UNEQUAL_STAGES = (2, 3, 4)
_UNEQUAL_SPLITS = 1
"""Numbers of micro-batches for which stages may have unequal meshes."""

_SIZES = 6
"""Sizes of sub-mesh, the largest."""

_TIME_LIMIT_S = 6.0
"""Of one integer program, where there is a deadline."""

_ROOM = 0.95
"""Share of a device that a stage may fill by estimate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphUnits:
    """The graph of segments, joined to units."""

    unit_of: IntArray
    """(V,) ascending."""
    passing_bytes: dict[tuple[int, int], float]
    """Edge between units, lower to higher, to the bytes of a whole step, there and back."""

    @property
    def num_units(self) -> int:
        """Units."""
        return int(self.unit_of.max()) + 1

    @property
    def is_chain(self) -> bool:
        """Every unit needs the one before."""
        return all((unit, unit + 1) in self.passing_bytes for unit in range(self.num_units - 1))


def graph_units(context: SearchContext) -> GraphUnits:
    """Neighbors joined, where the later one needs the earlier, to units of about equal time."""
    table = context.model.whole_table(1)
    split = Split(
        axis_sizes=tuple((axis, 1) for axis in AXIS_NAMES), num_microbatches=1, num_stages=1
    )
    edges: dict[tuple[int, int], float] = {}
    passing = table.crossing_bytes(split, np.arange(table.num_segments))
    for (_, source, target), num_bytes in passing.items():
        edge = (min(source, target), max(source, target))
        edges[edge] = edges.get(edge, 0.0) + num_bytes
    times_s = stage_times_s(context, UniformChoice())
    enough_s = sum(times_s) / _NUM_UNITS
    unit_of, filled_s = [0], times_s[0]
    for segment in range(1, len(times_s)):
        joins = (segment - 1, segment) in edges and filled_s + times_s[segment] <= enough_s
        unit_of.append(unit_of[-1] + (not joins))
        filled_s = times_s[segment] + (filled_s if joins else 0.0)
    found: dict[tuple[int, int], float] = {}
    for (low, high), num_bytes in edges.items():
        between = (unit_of[low], unit_of[high])
        if between[0] != between[1]:
            found[between] = found.get(between, 0.0) + num_bytes
    return GraphUnits(unit_of=np.array(unit_of, dtype=np.int64), passing_bytes=found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A number of stages and micro-batches, and what a stage may do."""

    num_stages: int
    num_microbatches: int
    ways: tuple[OptionCosts, ...]
    least_s: float
    """No stages of this shape take less, passing aside."""


def shapes(
    context: SearchContext, units: GraphUnits, splits: Sequence[int], *, at_most: int = _SHAPES
) -> list[Shape]:
    """The most promising shapes of equal stages, the least time first; none for unequal hosts."""
    pools = pools_of(context.cluster)
    devices = context.cluster.num_devices
    found: list[Shape] = []
    for num_stages in _STAGES if len(pools) == 1 else ():
        if devices % num_stages or num_stages > units.num_units:
            continue
        for num_microbatches in splits:
            for costs in _options(context, pools, devices // num_stages, num_microbatches):
                shape = _shape(units, num_stages, num_microbatches, (costs,))
                if shape is not None:
                    found.append(shape)
    found.sort(key=lambda shape: shape.least_s)
    return found[:at_most]


def unequal_shapes(context: SearchContext, units: GraphUnits, splits: Sequence[int]) -> list[Shape]:
    """For some numbers of stages all sizes of sub-mesh, each with the fastest way that may fit."""
    pools = pools_of(context.cluster)
    found: list[Shape] = []
    for num_microbatches in splits if len(pools) == 1 else ():
        sizes = sizes_of(pools[0], whole_hosts=whole_hosts_only(context.cluster))
        options = [_options(context, pools, size, num_microbatches) for size in sizes[-_SIZES:]]
        for num_stages in _UNEQUAL_STAGES:
            flight = min(num_stages, num_microbatches)
            ways = []
            for costs in options:
                able = [c for c in costs if _need_bytes(c, num_stages, flight) <= c.capacity_bytes]
                if able:
                    ways.append(min(able, key=lambda c: float(c.time_s.sum())))
            if ways and num_stages <= units.num_units:
                shape = _shape(units, num_stages, num_microbatches, tuple(ways))
                found += [shape] if shape is not None else []
    return found


def _options(
    context: SearchContext, pools: Sequence[Pool], size: int, num_microbatches: int
) -> list[OptionCosts]:
    return priced_options(
        context, pools, 0, size, num_microbatches=num_microbatches, sequence_parallel=False
    )


def _need_bytes(costs: OptionCosts, num_stages: int, flight: int) -> float:
    """What a stage needs where all hold equally much."""
    held = float(costs.fixed_bytes.sum() + flight * costs.kept_bytes.sum() / 2)
    return held / num_stages + float(costs.spare_bytes.max())


def _shape(
    units: GraphUnits, num_stages: int, num_microbatches: int, ways: tuple[OptionCosts, ...]
) -> Shape | None:
    """The shape with its least time; ``None`` where it cannot fit."""
    flight = min(num_stages, num_microbatches)
    if all(_need_bytes(costs, num_stages, flight) > costs.capacity_bytes for costs in ways):
        return None
    each = np.min([sums_by(units.unit_of, c.time_s, units.num_units) for c in ways], axis=0)
    slowest_s = max(float(each.sum()) / num_stages, float(each.max()))
    ends = each.copy()
    for low, high in sorted(units.passing_bytes, key=lambda edge: edge[1]):
        ends[high] = max(ends[high], ends[low] + each[high])
    least_s = (num_microbatches - 1) * slowest_s + float(ends.max())
    return Shape(
        num_stages=num_stages, num_microbatches=num_microbatches, ways=ways, least_s=least_s
    )


def branch_candidates(
    context: SearchContext,
    splits: Sequence[int],
    *,
    solver: str,
    deadline_s: float | None = None,
) -> list[Candidate]:
    """Pipelines on the graph's own shape that fit; none where the graph is a chain.

    Args:
        context: what to plan.
        splits: numbers of micro-batches to try.
        solver: who proposes.
        deadline_s: ``time.monotonic()`` after which to return what there is.
    """
    units = graph_units(context)
    if units.is_chain:
        return []
    equal = shapes(context, units, splits)
    best = list(dict.fromkeys(shape.num_microbatches for shape in equal)) or list(splits[:1])
    found: list[Candidate] = []
    for shape in (*equal, *unequal_shapes(context, units, best[:_UNEQUAL_SPLITS])):
        left_s = None
        if deadline_s is not None:
            left_s = min(_TIME_LIMIT_S, deadline_s - time.monotonic())
            if left_s <= 0:
                break
        stages = solve_dag(_problem(context, units, shape), time_limit_s=left_s)
        if stages is None:
            continue
        stage_of = np.array(stages.stage_of)[units.unit_of]
        plan = _plan(context, shape, stage_of, stages.way_of, solver=solver)
        if plan is None or not context.pins.allows_plan(plan):
            continue
        try:
            cost = context.model.cost(plan)
        except PlanRefused:
            continue
        if cost.fits:
            found.append(Candidate(plan=plan, cost=cost, solver=solver))
    return found


def chain_plan(
    context: SearchContext, units: GraphUnits, shape: Shape, *, solver: str
) -> ParallelPlan | None:
    """Equal stages of the shape cut from the captured order, the slowest as fast as can be."""
    each: FloatArray = sums_by(units.unit_of, shape.ways[0].time_s, units.num_units)
    starts = least_bottleneck(each.tolist(), shape.num_stages)
    if starts is None:
        return None
    stage_of = np.searchsorted(np.array(starts), np.arange(units.num_units), side="right") - 1
    ways = (0,) * shape.num_stages
    return _plan(context, shape, stage_of[units.unit_of], ways, solver=solver)


def _plan(
    context: SearchContext,
    shape: Shape,
    stage_of: IntArray,
    way_of: Sequence[int],
    *,
    solver: str,
) -> ParallelPlan | None:
    picks = [
        StagePick(
            segments=tuple(np.flatnonzero(stage_of == stage).tolist()),
            option=shape.ways[way].option,
        )
        for stage, way in enumerate(way_of)
    ]
    return staged_plan(
        context,
        picks,
        pools_of(context.cluster),
        num_microbatches=shape.num_microbatches,
        solver=solver,
    )


def _problem(context: SearchContext, units: GraphUnits, shape: Shape) -> DagProblem:
    count, ways = units.num_units, shape.ways
    prices, devices = context.model.pricer.prices, context.cluster.num_devices
    sizes = tuple(costs.option.num_devices for costs in ways)
    passing_s = {}
    for edge, num_bytes in units.passing_bytes.items():
        each = num_bytes / shape.num_microbatches / min(c.option.data_parallel for c in ways)
        passing_s[edge] = prices.send_time_s(each, 0, min(devices - 1, max(sizes)))
    flight = min(shape.num_stages, shape.num_microbatches)

    def by_unit(amounts: Sequence[FloatArray]) -> FloatArray:
        return np.stack([sums_by(units.unit_of, amount, count) for amount in amounts])

    return DagProblem(
        time_s=by_unit([costs.time_s for costs in ways]),
        memory_bytes=by_unit([c.fixed_bytes + flight * c.kept_bytes for c in ways]),
        capacity_bytes=tuple(
            _ROOM * costs.capacity_bytes - float(costs.spare_bytes.max()) for costs in ways
        ),
        devices=sizes,
        total_devices=devices,
        passing_s=passing_s,
        num_stages=shape.num_stages,
        num_microbatches=shape.num_microbatches,
    )
