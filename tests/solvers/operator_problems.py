"""Operator-level problems on small models, and what their answers communicate."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cache

from meshwright.cluster import parse_cluster
from meshwright.plans.plan import JobSpec, Precision
from meshwright.solvers.operators import OperatorPlan, OperatorProblem
from meshwright.solvers.planner import make_context
from meshwright.solvers.segment_ilp import GraphChoice
from meshwright.space.decision import Sharding, Skeleton
from meshwright.space.search import SearchContext
from meshwright.spmd.layout import MICRO
from meshwright.spmd.nodes import ConvertNode, ShardedGraph, ShardedPhase
from meshwright.spmd.sharded import shard_graph
from tests.cost.graphs import zoo

GIB = 2**30


@cache
def context_of(reference: str, batch: int, cluster: str, dtype: str = "bfloat16") -> SearchContext:
    """A search context of a zoo model."""
    precision = Precision.BF16 if dtype == "bfloat16" else Precision.FP32
    return make_context(
        zoo(reference, batch, dtype),
        reference=reference,
        cluster=parse_cluster(cluster),
        job=JobSpec(global_batch=batch, precision=precision),
    )


@dataclass(frozen=True)
class Answer:
    """A problem, its answer, and the graph sharded by it."""

    problem: OperatorProblem
    choice: GraphChoice
    plan: OperatorPlan
    sharded: ShardedGraph

    @property
    def sharding(self) -> Sharding:
        return self.plan.sharding

    def label_lists(self, axis: str) -> list[tuple[str, ...]]:
        """By segment class."""
        return [dict(labels)[axis] for labels in self.sharding.by_class]

    def collectives(self, segment: int, phase: ShardedPhase) -> Counter[str]:
        """Collectives of one segment's redistributions in one micro-batch, scalars left out."""
        graph = self.sharded.analysis.graph
        return Counter(
            step.kind.value
            for node in self.sharded.nodes
            if isinstance(node, ConvertNode)
            and node.segment == segment
            and node.phase == phase
            and graph.values[self.sharded.graph_value[node.source]].shape
            for step in node.steps
            if step.kind not in {"slice", "mask"}
        )

    def parameter_ways(self) -> dict[str, int]:
        """Parameter to the devices it is cut over along free axes."""
        found = {}
        for item in self.sharded.analysis.graph.parameters:
            layout = self.sharded.layouts[self.sharded.inputs[item.value]]
            ways = 1
            for axis in layout.sharding_axes:
                ways *= self.sharded.axis_sizes[axis] if axis in self.problem.free else 1
            found[item.name] = ways
        return found


def solved(
    context: SearchContext,
    skeleton: Skeleton,
    *,
    without: frozenset[str] = frozenset(),
    memory_bytes: float | None = None,
    lean: float | None = None,
) -> Answer:
    """The integer program's answer.

    Args:
        context: what to plan.
        skeleton: mesh and micro-batches.
        without: labels no free axis may shard.
        memory_bytes: bound on all segments.
        lean: the same as a share of the way from the least memory any choice needs (0) to what
            the fastest needs (1).
    """
    names = {name for labels in context.model.labels.by_segment for name in labels}
    allowed = dict.fromkeys(("cp", "ep", "tp"), frozenset(names - without))
    problem = OperatorProblem(context, skeleton, allowed=allowed)
    choice = problem.solve(memory_bytes=memory_bytes)
    assert choice is not None
    if lean is not None:
        least = problem.program.least_memory_bytes
        choice = problem.solve(memory_bytes=least + lean * (choice.memory_bytes - least))
        assert choice is not None
    plan = problem.plan(choice)
    return Answer(problem, choice, plan, _sharded(context, skeleton, plan.sharding))


def _sharded(context: SearchContext, skeleton: Skeleton, sharding: Sharding) -> ShardedGraph:
    model = context.model
    classes = model.segment_classes
    exceptions = sharding.operators_by_class
    return shard_graph(
        model.analysis,
        model.segmentation,
        model.labels,
        shards=[sharding.labels_of(number) for number in classes],
        operators=[{n: dict(labels) for n, labels in exceptions[number]} for number in classes]
        if exceptions
        else (),
        axis_sizes={**skeleton.sizes, MICRO: skeleton.num_microbatches},
    )


def with_tp(tp: int, *, num_microbatches: int = 1, **sizes: int) -> Skeleton:
    """A skeleton of one stage."""
    return replace(Skeleton.of({"tp": tp, **sizes}), num_microbatches=num_microbatches)
