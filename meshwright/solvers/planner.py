"""From a graph, a cluster and a job to a plan with its prediction and its runners-up."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from meshwright.cluster.model import Cluster
from meshwright.cost.pricing import ANALYTIC, Pricing
from meshwright.errors import BadRequest, NoFeasiblePlan
from meshwright.graph.opgraph import OpGraph
from meshwright.plans.plan import JobSpec, ParallelPlan
from meshwright.plans.runnable import check_job_runnable
from meshwright.solvers.exhaustive import Exhaustive
from meshwright.solvers.frontier import Frontier
from meshwright.solvers.layerwise import LayerwiseDP, LayerwiseILP
from meshwright.solvers.local_search import Rooms, local_searches
from meshwright.solvers.one_pool import OnePool
from meshwright.solvers.operator_mixtures import OperatorMixtures
from meshwright.solvers.operator_search import OperatorLevel
from meshwright.solvers.portfolio import PortfolioResult, SolverReport, run_portfolio
from meshwright.solvers.rules import RULES
from meshwright.solvers.stages import Stages
from meshwright.space.bounds import time_lower_bound_s
from meshwright.space.contexts import make_context
from meshwright.space.pinned import check_pins
from meshwright.space.pins import NO_PINS, Pins
from meshwright.space.search import Candidate, Progress, Proposer, SearchContext, SolveResult

__all__ = [
    "PlanningResult",
    "RunnerUp",
    "SearchSummary",
    "SolverReport",
    "make_context",
    "plan_graph",
    "proposers_of",
]

_FURTHER_SHARE = 0.5
"""Of the time left when a further proposer is asked: what it may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSummary:
    """How the search went."""

    seconds: float
    """Analysis of the graph included."""
    evaluations: int
    """Plans priced."""
    level: str
    lower_bound_s: float
    """No plan on this cluster is faster by the model (``bounds.time_lower_bound_s``), before
    measured steps correct it; ``gap`` and ``proven_optimal`` likewise."""
    gap: float
    """How much slower the chosen plan is than the bound, as a fraction of it."""
    proven_optimal: bool
    """The chosen plan reaches the bound."""
    is_complete: bool
    """No solver was cut short."""
    reason: str
    """Why the chosen plan won."""
    solvers: tuple[SolverReport, ...] = ()
    """In the order they were asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerUp:
    """A plan that was not chosen, with its prediction, and why."""

    plan: ParallelPlan
    reason: str
    solver: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanningResult:
    """The plan and the case for it."""

    plan: ParallelPlan
    alternatives: tuple[RunnerUp, ...]
    search: SearchSummary
    context: SearchContext


def plan_graph(
    graph: OpGraph,
    *,
    reference: str,
    cluster: Cluster,
    job: JobSpec,
    level: str = "O1",
    top: int = 5,
    progress: Progress | None = None,
    cluster_name: str | None = None,
    proposers: Sequence[Proposer] = (),
    budget_s: float | None = None,
    pins: Pins = NO_PINS,
    allow_unrunnable: bool = False,
    seed: int = 0,
    rule: str | None = None,
    pricing: Pricing = ANALYTIC,
) -> PlanningResult:
    """The fastest plan that fits, by the cost model.

    Args:
        graph: as captured, at the job's global batch.
        reference: what the user called the model.
        cluster: where it shall run.
        job: batch, precision, optimizer.
        level: ``O1`` or ``O2``.
        top: how many plans to return, the chosen one included; rules of thumb that do not fit
            come on top, so that it shows why.
        progress: told what the search is doing.
        cluster_name: how the plan names the cluster; the cluster's own name by default.
        proposers: further solvers, in the order of ``proposers_of``.
        budget_s: seconds after which the search returns what it has. Without, it is bounded by
            what it prices, and the plan is the same on every machine.
        pins: what the user has decided.
        allow_unrunnable: a plan the runtime cannot carry yet may win.
        seed: of searches that draw lots.
        rule: one of ``rules.RULES`` by name, to be asked alone.
        pricing: what the cost model prices with; solvers know no learned model of their own.

    Raises:
        BadRequest: a pin fits nothing in the model or cluster, the graph's batch is not the
            job's, or the level is unknown.
        BadModel: the graph has nothing to parallelize.
        NoFeasiblePlan: nothing fits.
    """
    start_s = time.monotonic()
    check_job_runnable(job, allow_unrunnable=allow_unrunnable)
    context = make_context(
        graph,
        reference=reference,
        cluster=cluster,
        job=job,
        level=level,
        progress=progress,
        cluster_name=cluster_name,
        pricing=pricing,
    )
    context = replace(context, pins=pins, allow_unrunnable=allow_unrunnable, seed=seed)
    check_pins(context)
    if rule is not None:
        return _planning_result(context, _by_rule(context, rule), start_s)
    result = run_portfolio(
        context,
        proposers_of(context, proposers),
        top=top,
        deadline_s=None if budget_s is None else start_s + budget_s,
    )
    return _planning_result(context, result, start_s)


def _by_rule(context: SearchContext, name: str) -> PortfolioResult:
    """What one rule of thumb answers."""
    rules = [rule for rule in RULES if rule.name == name]
    if not rules:
        known = ", ".join(rule.name for rule in RULES)
        raise BadRequest(f"--rule: no rule {name!r}; use one of {known}")
    try:
        result = run_portfolio(context, rules, top=1)
    except NoFeasiblePlan as error:
        raise NoFeasiblePlan(f"--rule {name}: {error}") from error
    return replace(result, reason=f"it is what the rule {name} says; nothing else was tried")


def proposers_of(context: SearchContext, further: Sequence[Proposer] = ()) -> tuple[Proposer, ...]:
    """The solvers of the context's level, in the order they are asked.

    ``O1``: rules of thumb and uniform plans. ``O2``: these on every skeleton, layer-wise mixtures,
    shardings of single operators, unequal stages, and local searches. Both also plan for the
    devices of one type alone. ``further`` ones are asked right after the rules, each for
    ``_FURTHER_SHARE`` of the time left.
    """
    others = [proposer for proposer in _of_one_pool(context) if proposer not in RULES]
    return (*RULES, *map(_Sharing, further), *others, OnePool(_of_one_pool))


class _Sharing:
    """A proposer that leaves those after it some of the time."""

    def __init__(self, proposer: Proposer) -> None:
        self._proposer = proposer

    @property
    def name(self) -> str:
        return self._proposer.name

    def propose(self, context: SearchContext, deadline_s: float | None = None) -> SolveResult:
        if deadline_s is not None:
            now_s = time.monotonic()
            deadline_s = min(deadline_s, now_s + _FURTHER_SHARE * (deadline_s - now_s))
        return self._proposer.propose(context, deadline_s)


def _of_one_pool(context: SearchContext) -> tuple[Proposer, ...]:
    if context.level == "O1":
        return (*RULES, Exhaustive())
    frontier = Frontier(context)
    return (
        *RULES,
        Exhaustive(frontier.survey),
        LayerwiseDP(frontier),
        LayerwiseILP(frontier),
        OperatorLevel(),
        OperatorMixtures(frontier),
        Stages(),
        *local_searches(Rooms(context, frontier)),
    )


def _planning_result(
    context: SearchContext, result: PortfolioResult, start_s: float
) -> PlanningResult:
    bound_s = time_lower_bound_s(context)
    return PlanningResult(
        plan=_predicted(context, result.winner),
        alternatives=tuple(
            RunnerUp(
                plan=_predicted(context, item.candidate),
                reason=item.reason,
                solver=item.candidate.solver,
            )
            for item in result.alternatives
        ),
        search=SearchSummary(
            seconds=time.monotonic() - start_s,
            evaluations=result.evaluations,
            level=context.level,
            lower_bound_s=bound_s,
            gap=result.winner.cost.parts_s / bound_s - 1 if bound_s else float("inf"),
            is_complete=result.is_complete,
            proven_optimal=result.winner.cost.parts_s <= bound_s * (1 + 1e-9),
            reason=result.reason,
            solvers=result.solvers,
        ),
        context=context,
    )


def _predicted(context: SearchContext, candidate: Candidate) -> ParallelPlan:
    devices = {device for stage in candidate.plan.stages for device in stage.devices}
    model = context.model
    learned = model.learned_shares(candidate.plan, candidate.cost)
    cost = model.corrected(candidate.plan, candidate.cost)
    prediction = model.prediction(cost, len(devices), learned=learned)
    provenance = msgspec.structs.replace(
        candidate.plan.provenance,
        pins=list(context.pins.texts),
        allow_unrunnable=context.allow_unrunnable,
        seed=context.seed,
        cost_model=model.pricing.label,
    )
    return msgspec.structs.replace(candidate.plan, prediction=prediction, provenance=provenance)
