"""Plans on the devices of one type, where a cluster has several.

What is fastest on a mixed cluster may leave its slower part idle. So the cluster is also planned as
if it had only the hosts of one pool, and those plans are priced again where they will run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec

from meshwright.cluster.model import Cluster
from meshwright.cost.model import StepCostModel
from meshwright.errors import PlanRefused
from meshwright.plans.plan import ParallelPlan
from meshwright.solvers.stage_options import Pool, pools_of
from meshwright.space.search import Candidate, Proposer, SearchContext, SolveResult, SolveStatus

__all__ = ["OnePool", "cluster_of_pool"]

_SHORTLIST = 4
"""Plans of each pool that are priced again."""


class OnePool:
    """Asks other proposers about each pool alone; a ``Proposer``."""

    def __init__(self, proposers_of: Callable[[SearchContext], Sequence[Proposer]]) -> None:
        """``proposers_of``: whom to ask about a context with one pool."""
        self._proposers_of = proposers_of

    @property
    def name(self) -> str:
        """``one-pool``."""
        return "one-pool"

    def propose(self, context: SearchContext, deadline_s: float | None = None) -> SolveResult:
        """The best plans on hosts of one type that stand side by side, fastest first."""
        start_s = time.monotonic()
        candidates: list[Candidate] = []
        evaluations = 0
        is_complete = True
        pools = pools_of(context.cluster)
        for pool in pools if len(pools) > 1 else ():
            hosts = pool.hosts
            if hosts != tuple(range(hosts[0], hosts[0] + len(hosts))):
                continue
            inside = _inside(context, pool)
            found: list[Candidate] = []
            for proposer in self._proposers_of(inside):
                context.report(f"{self.name}: {inside.cluster.describe()}: {proposer.name}")
                result = proposer.propose(inside, deadline_s)
                evaluations += result.evaluations
                is_complete = is_complete and result.status is not SolveStatus.STOPPED
                found += [c for c in result.candidates if c.cost.fits]
            found.sort(key=lambda c: c.time_s)
            candidates += _moved(context, found[:_SHORTLIST], pool, self.name)
        candidates.sort(key=lambda c: c.time_s)
        done = SolveStatus.DONE if is_complete else SolveStatus.STOPPED
        if len(pools) == 1:
            done = SolveStatus.NOT_APPLICABLE
        elif not candidates:
            done = SolveStatus.NOTHING_FITS
        return SolveResult(
            candidates=tuple(candidates),
            evaluations=evaluations + len(candidates),
            seconds=time.monotonic() - start_s,
            status=done,
        )


def cluster_of_pool(cluster: Cluster, pool: Pool) -> Cluster:
    """The pool's hosts, joined by the same levels as in ``cluster``."""
    count = len(pool.hosts)
    levels = [(min(size, count), link) for size, link in cluster.levels]
    joined = {size: link for size, link in reversed(levels) if size > 1}
    return Cluster(
        name=cluster.name,
        hosts=tuple(cluster.hosts[host] for host in pool.hosts),
        levels=tuple(sorted(joined.items(), key=lambda level: level[0])) if count > 1 else (),
    )


def _inside(context: SearchContext, pool: Pool) -> SearchContext:
    cluster, model = cluster_of_pool(context.cluster, pool), context.model
    return replace(
        context,
        cluster=cluster,
        model=StepCostModel(
            model.analysis,
            model.segmentation,
            model.labels,
            cluster=cluster,
            job=model.job,
            periods=model.periods,
            pricing=model.pricing,
        ),
    )


def _moved(
    context: SearchContext, candidates: Sequence[Candidate], pool: Pool, solver: str
) -> list[Candidate]:
    """The plans on the pool's devices in the whole cluster, priced there."""
    found = []
    for candidate in candidates:
        plan = _at(candidate.plan, pool.first_device)
        if not context.pins.allows_plan(plan):
            continue
        try:
            cost = context.model.cost(plan)
        except PlanRefused:
            continue
        found.append(Candidate(plan=plan, cost=cost, solver=solver))
    return found


def _at(plan: ParallelPlan, first_device: int) -> ParallelPlan:
    stages = [
        msgspec.structs.replace(stage, first_device=stage.first_device + first_device)
        for stage in plan.stages
    ]
    return msgspec.structs.replace(plan, stages=stages)
