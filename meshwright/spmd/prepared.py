"""A captured graph made ready for planning and lowering, and a plan applied to it."""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.errors import PlanRefused
from meshwright.graph.dimensions import DimensionLabels, label_dimensions
from meshwright.graph.factors import FactorAnalysis, analyze_factors
from meshwright.graph.opgraph import OpGraph
from meshwright.graph.segments import Segmentation, find_segments
from meshwright.graph.serialize import graph_sha256
from meshwright.graph.simplify import with_explicit_factories
from meshwright.plans.plan import AXIS_NAMES, ParallelPlan, SegmentPlan
from meshwright.plans.runnable import check_runnable
from meshwright.spmd.layout import MICRO
from meshwright.spmd.lower import lower, lower_stage
from meshwright.spmd.program import StageProgram
from meshwright.spmd.sharded import OpNode, ShardedGraph, shard_graph
from meshwright.spmd.stage import SegmentChoices
from meshwright.strict_json import FieldError

__all__ = ["PreparedGraph", "lower_plan", "prepare", "segment_entries", "shard_plan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedGraph:
    """A graph with its rules, segments and dimension labels."""

    graph: OpGraph
    sha256: str
    """Of the graph as captured; what ``ParallelPlan.model.graph_sha256`` names."""
    analysis: FactorAnalysis
    segmentation: Segmentation
    labels: DimensionLabels


def prepare(graph: OpGraph) -> PreparedGraph:
    """Find the rules, segments and labels of a captured graph."""
    explicit = with_explicit_factories(graph)
    analysis = analyze_factors(explicit)
    segmentation = find_segments(explicit, analysis.rules)
    return PreparedGraph(
        graph=explicit,
        sha256=graph_sha256(graph),
        analysis=analysis,
        segmentation=segmentation,
        labels=label_dimensions(analysis, segmentation),
    )


def segment_entries(prepared: PreparedGraph, plan: ParallelPlan) -> tuple[SegmentPlan, ...]:
    """What ``plan`` says of each segment.

    Raises:
        PlanRefused: it says nothing of one, or two things.
    """
    try:
        return plan.segment_plans([s.segment_class for s in prepared.segmentation.segments])
    except FieldError as error:
        raise PlanRefused(f"$.{error.key}: {error.problem}; plan again for this model") from error


def shard_plan(prepared: PreparedGraph, plan: ParallelPlan) -> ShardedGraph:
    """Every placement and redistribution of ``plan``.

    Raises:
        PlanRefused: the plan is for another graph, names unknown dimension classes, or cannot be
            cut into its micro-batches.
    """
    if plan.model.graph_sha256 != prepared.sha256:
        raise PlanRefused(
            f"the plan is for graph {plan.model.graph_sha256[:12]} but the model captures as "
            f"{prepared.sha256[:12]}; plan again for this model, batch and sequence length"
        )
    sizes = dict(zip(AXIS_NAMES, plan.mesh.stage_shape, strict=True))
    entries = segment_entries(prepared, plan)
    sharded = shard_graph(
        prepared.analysis,
        prepared.segmentation,
        prepared.labels,
        shards=[entry.shard for entry in entries],
        operators=[entry.operators_by_number for entry in entries],
        axis_sizes={**sizes, MICRO: plan.num_microbatches},
    )
    used = {axis for node in sharded.nodes if isinstance(node, OpNode) for axis, _ in node.choice}
    for axis, size in sizes.items():
        if size > 1 and axis not in used:
            raise PlanRefused(
                f"$.mesh.{axis} is {size} but no operator is cut along it: none of the dimension "
                f"classes the segments list for {axis} divides by {size}; choose another size or "
                "other classes"
            )
    return sharded


def lower_plan(
    prepared: PreparedGraph, plan: ParallelPlan, *, stage: int | None = None
) -> tuple[StageProgram, ...]:
    """The programs of all stages of ``plan``, or of one.

    Raises:
        PlanRefused: as ``shard_plan``, a choice the runtime cannot carry, or stages whose order
            is not that of the values that pass between them.
    """
    check_runnable(plan)
    sharded = shard_plan(prepared, plan)
    stage_of_segment = plan.stage_of_segment
    choices = [
        SegmentChoices(
            zero_stage=entry.zero_stage, recompute=entry.recompute, offload=entry.offload
        )
        for entry in segment_entries(prepared, plan)
    ]
    bucket_bytes = plan.communication.bucket_bytes
    if stage is None:
        return lower(
            sharded,
            stage_of_segment=stage_of_segment,
            choices=choices,
            bucket_bytes=bucket_bytes,
        )
    return (
        lower_stage(
            sharded,
            stage,
            stage_of_segment=stage_of_segment,
            choices=choices,
            bucket_bytes=bucket_bytes,
        ),
    )
