"""From a graph, a cluster and a job to a plan with its prediction and its runners-up."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from meshwright.cluster.model import Cluster
from meshwright.cost.model import StepCostModel
from meshwright.cost.pricing import ANALYTIC, Pricing
from meshwright.errors import BadModel, BadRequest, NoFeasiblePlan, PlanRefused
from meshwright.graph.analyzed import analyze_graph
from meshwright.graph.dimensions import DimensionLabels
from meshwright.graph.factors import FactorAnalysis
from meshwright.graph.opgraph import InputRole, OpGraph
from meshwright.graph.serialize import graph_sha256
from meshwright.graph.simplify import with_explicit_factories
from meshwright.plans.plan import GraphReference, JobSpec, ParallelPlan
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
from meshwright.space.pinned import check_pins
from meshwright.space.pins import NO_PINS, Pins
from meshwright.space.search import Candidate, Progress, Proposer, SearchContext
from meshwright.space.uniform import UniformChoice, table_of

__all__ = [
    "PlanningResult",
    "RunnerUp",
    "SearchSummary",
    "SolverReport",
    "make_context",
    "plan_graph",
]

_LEVELS = ("O1", "O2")


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSummary:
    """How the search went."""

    seconds: float
    """Analysis of the graph included."""
    evaluations: int
    """Plans priced."""
    level: str
    lower_bound_s: float
    """No plan on this cluster is faster by the model (``bounds.time_lower_bound_s``)."""
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
        proposers: further solvers, asked after those of the level.
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
        (*proposers_of(context), *proposers),
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


def make_context(
    graph: OpGraph,
    *,
    reference: str,
    cluster: Cluster,
    job: JobSpec,
    level: str = "O1",
    progress: Progress | None = None,
    cluster_name: str | None = None,
    pricing: Pricing = ANALYTIC,
) -> SearchContext:
    """Analyze ``graph`` and set up its cost model; arguments and errors as ``plan_graph``."""
    if level not in _LEVELS:
        raise BadRequest(f"level {level!r} is unknown; use {' or '.join(_LEVELS)}")
    sha256 = graph_sha256(graph)
    found = analyze_graph(with_explicit_factories(graph))
    analysis, segmentation, labels = found.analysis, found.segmentation, found.labels
    if not segmentation.segments:
        raise BadModel(f"{reference}: no operator depends on a parameter; there is nothing to plan")
    batch = _checked_batch(analysis, labels, reference, job)
    model = StepCostModel(
        analysis,
        segmentation,
        labels,
        cluster=cluster,
        job=job,
        periods=found.periods,
        pricing=pricing,
    )
    context = SearchContext(
        model=model,
        reference=GraphReference(
            reference=reference,
            graph_sha256=sha256,
            num_parameters=graph.num_parameters,
            num_segments=len(segmentation.segments),
        ),
        cluster=cluster,
        cluster_name=cluster_name or cluster.name,
        job=job,
        level=level,
        batch=batch,
        can_split_step=False,
        progress=progress,
    )
    for target in analysis.operators_without_rule:
        context.report(f"operator {target} has no rule: every device runs all of it")
    return _with_splitting(context)


def _checked_batch(
    analysis: FactorAnalysis, labels: DimensionLabels, reference: str, job: JobSpec
) -> int:
    """Samples the batch axes may divide."""
    graph = analysis.graph
    sizes = Counter(
        graph.values[item.value].shape[0]
        for item in graph.inputs_of(InputRole.DATA)
        if graph.values[item.value].shape
    )
    if sizes and job.global_batch not in sizes:
        raise BadRequest(
            f"{reference}: captured with a batch of {sizes.most_common(1)[0][0]} but the job's "
            f"global batch is {job.global_batch}; capture it with the global batch"
        )
    if labels.batch is None:
        return 1
    # Some operator may split the batch dim; only its outer part can be divided.
    return min(analysis.class_size[labels.batch], job.global_batch)


def _with_splitting(context: SearchContext) -> SearchContext:
    """Find out whether the step may be cut into micro-batches."""
    factor = next((d for d in range(2, context.batch + 1) if context.batch % d == 0), 1)
    if factor == 1:
        return context
    try:
        table_of(context, UniformChoice(num_microbatches=factor))
    except PlanRefused as error:
        context.report(f"one micro-batch only: {error}")
        return context
    return replace(context, can_split_step=True)


def proposers_of(context: SearchContext) -> tuple[Proposer, ...]:
    """The solvers of the context's level.

    ``O1``: rules of thumb and uniform plans. ``O2``: these on every skeleton, layer-wise mixtures,
    shardings of single operators, unequal stages, and local searches. Both also plan for the
    devices of one type alone.
    """
    return (*_of_one_pool(context), OnePool(_of_one_pool))


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
            gap=result.winner.time_s / bound_s - 1 if bound_s else float("inf"),
            is_complete=result.is_complete,
            proven_optimal=result.winner.time_s <= bound_s * (1 + 1e-9),
            reason=result.reason,
            solvers=result.solvers,
        ),
        context=context,
    )


def _predicted(context: SearchContext, candidate: Candidate) -> ParallelPlan:
    devices = {device for stage in candidate.plan.stages for device in stage.devices}
    model = context.model
    learned = model.learned_shares(candidate.plan, candidate.cost)
    prediction = model.prediction(candidate.cost, len(devices), learned=learned)
    provenance = msgspec.structs.replace(
        candidate.plan.provenance,
        pins=list(context.pins.texts),
        allow_unrunnable=context.allow_unrunnable,
        seed=context.seed,
        cost_model=model.pricing.label,
    )
    return msgspec.structs.replace(candidate.plan, prediction=prediction, provenance=provenance)
