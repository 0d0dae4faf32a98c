"""Pipelines of unequal stages: sub-meshes of any size, each with its own way of parallelism.

For every number of micro-batches, ``stage_chain`` cuts the chain of segments and shares out the
devices; what it finds is priced exactly. Segments are first joined to about ``_MAX_UNITS`` units of
equal time, so the effort does not grow with depth. Where hosts are of different types, every stage
lies on one type, and one stage over all of them with shares of the samples to each type's speed is
tried besides (``batch_shares``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from meshwright.cost.columns import FloatArray, IntArray
from meshwright.cost.table import Split
from meshwright.errors import PlanRefused
from meshwright.plans.plan import AXIS_NAMES
from meshwright.solvers.batch_shares import shared_plans
from meshwright.solvers.stage_branches import branch_candidates
from meshwright.solvers.stage_chain import ChainProblem, solve_chain
from meshwright.solvers.stage_options import (
    OptionCosts,
    Pool,
    pools_of,
    priced_options,
    sizes_of,
    stage_costs,
    whole_hosts_only,
)
from meshwright.solvers.staged import StagePick, staged_plan
from meshwright.space.search import Candidate, SearchContext, SolveResult, SolveStatus
from meshwright.space.uniform import UniformChoice, divisors, stage_times_s

__all__ = ["Stages", "splits_of"]

_MAX_UNITS = 40
_MAX_STAGES = 40
_MAX_SPLITS = 7
"""Numbers of micro-batches tried."""

_SEQUENCE_SPLITS = 2
"""Of these, the best also with sequence parallelism."""

_MANY, _SPLITS_OF_MANY = 64, 4
"""With more hosts or devices than this fewer numbers of micro-batches are tried."""

_SHORTLIST = 6
"""Plans priced exactly."""


@dataclass(slots=True)
class _State:
    """The mutable part of one search."""

    deadline_s: float | None
    evaluations: int = 0
    stopped: bool = False
    found: list[tuple[float, int, tuple[StagePick, ...]]] = field(default_factory=list)
    """Estimated seconds, micro-batches, stages."""

    def is_late(self) -> bool:
        """Whether the time is up."""
        if self.deadline_s is not None and time.monotonic() > self.deadline_s:
            self.stopped = True
        return self.stopped


@dataclass(frozen=True, slots=True, kw_only=True)
class _Way:
    """A sub-mesh; arrays of shape (levels, units, units), first and last unit of a stage."""

    options: list[OptionCosts]
    cost_s: FloatArray
    """Of the best option that fits."""
    best: IntArray
    """Its number."""


class Stages:
    """Unequal stages on unequal sub-meshes; a ``Proposer``."""

    @property
    def name(self) -> str:
        """``stages``."""
        return "stages"

    def propose(self, context: SearchContext, deadline_s: float | None = None) -> SolveResult:
        """The best pipelines of unequal stages, fastest first."""
        start_s = time.monotonic()
        state = _State(deadline_s)
        pools = pools_of(context.cluster)
        units = units_of(stage_times_s(context, UniformChoice()))
        cuts = _cut_bytes(context, units)
        is_large = sum(_num_counted(context, pools)) > _MANY
        splits = splits_of(context, at_most=_SPLITS_OF_MANY if is_large else _MAX_SPLITS)
        for num_microbatches in splits:
            self._search(context, state, pools, (units, cuts), num_microbatches, False)
        ranked = dict.fromkeys(micro for _, micro, _ in sorted(state.found, key=lambda x: x[0]))
        for num_microbatches in list(ranked)[: 1 if is_large else _SEQUENCE_SPLITS]:
            self._search(context, state, pools, (units, cuts), num_microbatches, True)
        candidates = self._priced(context, state, pools)
        candidates += branch_candidates(
            context, splits_of(context), solver=self.name, deadline_s=deadline_s
        )
        if len(pools) > 1:
            candidates += shared_plans(
                context, splits_of(context), solver=self.name, deadline_s=deadline_s
            )
        fits = sorted((c for c in candidates if c.cost.fits), key=lambda c: c.time_s)
        status = SolveStatus.STOPPED if state.stopped else SolveStatus.DONE
        return SolveResult(
            candidates=tuple(fits),
            evaluations=state.evaluations + len(candidates),
            seconds=time.monotonic() - start_s,
            status=status if fits else SolveStatus.NOTHING_FITS,
        )

    def _search(
        self,
        context: SearchContext,
        state: _State,
        pools: Sequence[Pool],
        chain: tuple[IntArray, FloatArray],
        num_microbatches: int,
        sequence_parallel: bool,
    ) -> None:
        """The best chain of stages with one number of micro-batches, and the best single stage."""
        if state.is_late():
            return
        context.report(f"{self.name}: {num_microbatches} micro-batches")
        units, _ = chain
        ways = self._ways(context, state, pools, chain, num_microbatches, sequence_parallel)
        if not ways:
            return
        of_unit = _devices_of_unit(context, pools)
        uses = np.zeros((len(ways), len(pools)), dtype=np.int64)
        for row, way in enumerate(ways):
            option = way.options[0].option
            uses[row, option.pool] = option.num_devices // of_unit[option.pool]
        problem = ChainProblem(
            cost_s=np.stack([way.cost_s for way in ways]),
            uses=uses,
            devices=tuple(_num_counted(context, pools)),
            num_microbatches=num_microbatches,
            max_stages=min(_MAX_STAGES, int(units.max()) + 1),
        )
        for max_stages in (1, problem.max_stages):
            solution = solve_chain(replace(problem, max_stages=max_stages))
            if solution is None:
                continue
            picks = []
            for stage in solution.stages:
                way = ways[stage.way]
                level = min(stage.level, len(way.best)) - 1
                option = way.options[int(way.best[level, stage.first, stage.last])].option
                inside = np.flatnonzero((units >= stage.first) & (units <= stage.last))
                picks.append(StagePick(segments=tuple(inside.tolist()), option=option))
            state.found.append((solution.time_s, num_microbatches, tuple(picks)))

    def _ways(
        self,
        context: SearchContext,
        state: _State,
        pools: Sequence[Pool],
        chain: tuple[IntArray, FloatArray],
        num_microbatches: int,
        sequence_parallel: bool,
    ) -> list[_Way]:
        """Every sub-mesh on which some stage fits; none where the time is up."""
        units, cuts = chain
        whole_hosts = whole_hosts_only(context.cluster)
        levels = min(_MAX_STAGES, num_microbatches, int(units.max()) + 1)
        found = []
        for number, pool in enumerate(pools):
            for size in sizes_of(pool, whole_hosts=whole_hosts):
                if state.is_late():
                    return []
                options = priced_options(
                    context,
                    pools,
                    number,
                    size,
                    num_microbatches=num_microbatches,
                    sequence_parallel=sequence_parallel,
                )
                state.evaluations += len(options)
                if options:
                    cost_s, best = stage_costs(options, units, levels, num_microbatches)
                    cost_s += _passing_s(context, pool, size, cuts / num_microbatches)
                    if np.isfinite(cost_s).any():
                        found.append(_Way(options=options, cost_s=cost_s, best=best))
        return found

    def _priced(
        self, context: SearchContext, state: _State, pools: Sequence[Pool]
    ) -> list[Candidate]:
        candidates = []
        ranked = sorted(state.found, key=lambda item: item[0])
        alone = [item for item in ranked if len(item[2]) == 1][: _SHORTLIST // 2]
        several = [item for item in ranked if len(item[2]) > 1][:_SHORTLIST]
        for _, num_microbatches, picks in (*alone, *several):
            plan = staged_plan(
                context, picks, pools, num_microbatches=num_microbatches, solver=self.name
            )
            if plan is None or not context.pins.allows_plan(plan):
                continue
            try:
                cost = context.model.cost(plan)
            except PlanRefused:
                continue
            candidates.append(Candidate(plan=plan, cost=cost, solver=self.name))
        return candidates


def _devices_of_unit(context: SearchContext, pools: Sequence[Pool]) -> list[int]:
    """For each pool the devices that are counted as one."""
    whole_hosts = whole_hosts_only(context.cluster)
    return [pool.devices_per_host if whole_hosts else 1 for pool in pools]


def _num_counted(context: SearchContext, pools: Sequence[Pool]) -> list[int]:
    """For each pool how many such units it has."""
    of_unit = _devices_of_unit(context, pools)
    return [pool.num_devices // unit for pool, unit in zip(pools, of_unit, strict=True)]


def units_of(times_s: Sequence[float]) -> IntArray:
    """(V,) unit of each segment: neighbors joined to at most ``_MAX_UNITS`` of about equal time."""
    if len(times_s) <= _MAX_UNITS:
        return np.arange(len(times_s))
    enough_s = sum(times_s) / _MAX_UNITS
    found = []
    unit, filled_s = 0, 0.0
    for seconds in times_s:
        if filled_s and filled_s + seconds > enough_s * (1 + 1e-9):
            unit, filled_s = unit + 1, 0.0
        found.append(unit)
        filled_s += seconds
    return np.array(found, dtype=np.int64)


def splits_of(context: SearchContext, *, at_most: int = _MAX_SPLITS) -> tuple[int, ...]:
    """Numbers of micro-batches to try: divisors of the batch, about evenly by their logarithm."""
    if not context.can_split_step:
        return (1,)
    every = divisors(context.batch)
    if len(every) <= at_most:
        return every
    wanted = [math.exp(math.log(every[-1]) * step / (at_most - 1)) for step in range(at_most)]
    near = {min(every, key=lambda d: abs(math.log(d / want))) for want in wanted}
    return tuple(sorted(near))


def _cut_bytes(context: SearchContext, units: IntArray) -> FloatArray:
    """(K,) bytes of a whole step that pass between a unit's predecessors and the rest."""
    table = context.model.whole_table(1)
    split = Split(
        axis_sizes=tuple((axis, 1) for axis in AXIS_NAMES), num_microbatches=1, num_stages=1
    )
    found = np.zeros(int(units.max()) + 1)
    passing = table.crossing_bytes(split, np.arange(table.num_segments))
    for (_, source, target), num_bytes in passing.items():
        low, high = sorted((int(units[source]), int(units[target])))
        found[low + 1 : high + 1] += num_bytes
    return found


def _passing_s(context: SearchContext, pool: Pool, size: int, cut_bytes: FloatArray) -> FloatArray:
    """(K, 1) seconds in which a stage of ``size`` devices receives and returns what it needs.

    By the links' data sheets, for choosing among cuts; the plan is priced as all are.
    """
    cluster, prices = context.cluster, context.model.pricer.prices
    within = size < pool.devices_per_host or cluster.num_hosts == 1
    link = cluster.hosts[pool.hosts[0]].link if within else cluster.levels[-1][1]
    seconds = cut_bytes / size / (link.bytes_per_s * prices.link_efficiency)
    return np.asarray(seconds + 2 * link.latency_s * (cut_bytes > 0))[:, None]
