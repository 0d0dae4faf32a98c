"""A parameter that data parallelism itself cuts: no ZeRO is offered, and none is priced."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from meshwright.capture.captured import capture
from meshwright.cluster import parse_cluster
from meshwright.errors import PlanRefused
from meshwright.graph.opgraph import OpGraph
from meshwright.plans.plan import JobSpec
from meshwright.solvers.planner import make_context, plan_graph
from meshwright.space.decided import decided_plan
from meshwright.space.decision import Decision, Skeleton, Strategy
from meshwright.space.evaluate import price_decision
from meshwright.space.search import SearchContext
from meshwright.space.skeletons import shardings_for, strategies_for
from meshwright.spmd.prepared import lower_plan, prepare
from tests.cost.graphs import tiny_gpt
from tests.solvers.test_planner import small_memory

BATCH, WIDTH = 8, 32


class PerSample(nn.Module):
    """Each sample of the one batch has a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(BATCH, WIDTH))
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x) + self.bias)).square().mean()


@cache
def per_sample() -> OpGraph:
    return capture(PerSample(), (torch.randn(BATCH, WIDTH),)).graph


def context_of(graph: OpGraph) -> SearchContext:
    job = JobSpec(global_batch=BATCH)
    cluster = parse_cluster("2xa100")
    return make_context(graph, reference="model", cluster=cluster, job=job, level="O2")


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_the_price_refuses_what_lowering_refuses(zero_stage: int) -> None:
    graph = per_sample()
    context = context_of(graph)
    skeleton = Skeleton.of({"dp_shard": 2})
    strategy = Strategy(sharding=shardings_for(context, skeleton)[0], zero_stage=zero_stage)
    count = len(context.model.segment_classes)
    decision = Decision(skeleton=skeleton, starts=(0,), strategies=(strategy,) * count)
    messages = []
    for refuse in (
        lambda: price_decision(context, decision),
        lambda: lower_plan(prepare(graph), decided_plan(context, decision, solver="test")),
    ):
        with pytest.raises(PlanRefused, match="would cut bias along dp_shard") as caught:
            refuse()
        messages.append(str(caught.value))

    assert messages[0] == messages[1]


def test_zero_is_offered_but_for_such_a_model() -> None:
    skeleton = Skeleton.of({"dp_shard": 2})

    assert {0, 1, 2, 3} == {
        s.zero_stage for s in strategies_for(context_of(tiny_gpt(BATCH)), skeleton)
    }
    assert {0} == {s.zero_stage for s in strategies_for(context_of(per_sample()), skeleton)}


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_every_plan_shown_can_be_lowered(level: str) -> None:
    """With so little memory that ZeRO would be wanted."""
    graph = per_sample()
    result = plan_graph(
        graph,
        reference="model",
        cluster=small_memory(parse_cluster("2x2xt4"), 60_000),
        job=JobSpec(global_batch=BATCH),
        level=level,
    )
    plans = [result.plan, *(other.plan for other in result.alternatives)]
    lowered = [lower_plan(prepare(graph), plan) for plan in plans if not plan.unrunnable]

    assert lowered
    assert all(len(programs) >= 1 for programs in lowered)
