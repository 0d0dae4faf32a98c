"""Uniform plans of test graphs, and the programs they are lowered to."""

from __future__ import annotations

from meshwright.cluster import parse_cluster
from meshwright.cost.model import choice_of
from meshwright.cost.pricing import ANALYTIC, Pricing
from meshwright.graph.opgraph import OpGraph
from meshwright.plans.plan import JobSpec, ParallelPlan, Precision, Recompute
from meshwright.solvers.planner import make_context
from meshwright.space.search import SearchContext
from meshwright.space.uniform import UniformChoice, plan_of
from meshwright.spmd.layout import MICRO
from meshwright.spmd.lower import lower
from meshwright.spmd.program import StageProgram
from meshwright.spmd.sharded import shard_graph
from meshwright.spmd.stage import SegmentChoices


def context_of(
    graph: OpGraph,
    cluster: str,
    batch: int,
    precision: Precision = Precision.FP32,
    pricing: Pricing = ANALYTIC,
) -> SearchContext:
    """A context with a job of ``batch``."""
    return make_context(
        graph,
        reference="test",
        cluster=parse_cluster(cluster),
        job=JobSpec(global_batch=batch, precision=precision),
        pricing=pricing,
    )


def uniform_plan(
    context: SearchContext,
    *,
    dp_replicate: int = 1,
    dp_shard: int = 1,
    tp: int = 1,
    pp: int = 1,
    num_microbatches: int = 1,
    zero_stage: int = 0,
    recompute: Recompute = Recompute.NONE,
    sequence_parallel: bool = False,
) -> ParallelPlan:
    """A plan whose stages have about equally many segments."""
    count = len(context.model.segmentation.segments)
    choice = UniformChoice(
        dp_replicate=dp_replicate,
        dp_shard=dp_shard,
        tp=tp,
        starts=tuple(round(stage * count / pp) for stage in range(pp)),
        num_microbatches=num_microbatches,
        zero_stage=zero_stage,
        recompute=recompute,
        sequence_parallel=sequence_parallel,
    )
    return plan_of(context, choice, solver="test")


def lowered(context: SearchContext, plan: ParallelPlan) -> tuple[StageProgram, ...]:
    """The programs of ``plan``."""
    model = context.model
    choice = choice_of(plan, model.segment_classes)
    entries = plan.segment_plans(model.segment_classes)
    sharded = shard_graph(
        model.analysis,
        model.segmentation,
        model.labels,
        shards=[entry.shard for entry in entries],
        operators=[entry.operators_by_number for entry in entries],
        axis_sizes={**choice.split.sizes, MICRO: plan.num_microbatches},
    )
    return lower(
        sharded,
        stage_of_segment=plan.stage_of_segment,
        choices=[
            SegmentChoices(zero_stage=zero, recompute=policy)
            for zero, policy in zip(choice.zero_stages, choice.policies, strict=True)
        ],
        bucket_bytes=plan.communication.bucket_bytes,
    )
