"""From a captured graph to the context of a search.

What is found out about a graph does not depend on the cluster: a ``Program`` holds it once for all
contexts of the same graph, with the sharded graphs that they price.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from meshwright.cluster.model import Cluster
from meshwright.cost.model import StepCostModel
from meshwright.cost.pricing import ANALYTIC, Pricing
from meshwright.cost.tabulate import Tabulator
from meshwright.errors import BadModel, BadRequest, PlanRefused
from meshwright.graph.analyzed import AnalyzedGraph, analyze_graph
from meshwright.graph.dimensions import DimensionLabels
from meshwright.graph.factors import FactorAnalysis
from meshwright.graph.opgraph import InputRole, OpGraph
from meshwright.graph.serialize import graph_sha256
from meshwright.graph.simplify import with_explicit_factories
from meshwright.plans.plan import GraphReference, JobSpec
from meshwright.space.search import Progress, SearchContext
from meshwright.space.uniform import UniformChoice, table_of

__all__ = ["Program", "make_context", "study"]

_LEVELS = ("O1", "O2")
_MAX_SHARDED = 96
"""Ways of sharding that a program remembers: those of experts are many, and each takes long."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Program:
    """A captured graph and all that is known of it without a cluster."""

    graph: OpGraph
    sha256: str
    analyzed: AnalyzedGraph
    tabulator: Tabulator
    """Remembers what shardings of the graph are made of."""


def study(graph: OpGraph) -> Program:
    """Analyze ``graph`` as captured, for many contexts."""
    analyzed = analyze_graph(with_explicit_factories(graph))
    return Program(
        graph=graph,
        sha256=graph_sha256(graph),
        analyzed=analyzed,
        tabulator=Tabulator(
            analyzed.analysis,
            analyzed.segmentation,
            analyzed.labels,
            analyzed.periods,
            max_sharded=_MAX_SHARDED,
        ),
    )


def make_context(
    graph: OpGraph | Program,
    *,
    reference: str,
    cluster: Cluster,
    job: JobSpec,
    level: str = "O1",
    progress: Progress | None = None,
    cluster_name: str | None = None,
    pricing: Pricing = ANALYTIC,
) -> SearchContext:
    """Set up the cost model of ``graph`` on ``cluster``.

    Args:
        graph: as captured, at the job's global batch; or what ``study`` found of it.
        reference: what the user called the model.
        cluster: where it shall run.
        job: batch, precision, optimizer.
        level: ``O1`` or ``O2``.
        progress: told what the search is doing.
        cluster_name: how plans name the cluster; the cluster's own name by default.
        pricing: what the cost model prices with.

    Raises:
        BadRequest: the graph's batch is not the job's, or the level is unknown.
        BadModel: the graph has nothing to parallelize.
    """
    if level not in _LEVELS:
        raise BadRequest(f"level {level!r} is unknown; use {' or '.join(_LEVELS)}")
    program = graph if isinstance(graph, Program) else study(graph)
    found = program.analyzed
    segmentation, labels = found.segmentation, found.labels
    if not segmentation.segments:
        raise BadModel(f"{reference}: no operator depends on a parameter; there is nothing to plan")
    batch = _checked_batch(found.analysis, labels, reference, job)
    model = StepCostModel(
        found.analysis,
        segmentation,
        labels,
        cluster=cluster,
        job=job,
        periods=found.periods,
        pricing=pricing,
        tabulator=program.tabulator,
    )
    context = SearchContext(
        model=model,
        reference=GraphReference(
            reference=reference,
            graph_sha256=program.sha256,
            num_parameters=program.graph.num_parameters,
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
    for target in found.analysis.operators_without_rule:
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
