"""A decider's plans, improved."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from meshwright.cluster import parse_cluster
from meshwright.plans.plan import JobSpec
from meshwright.solvers.guided import Guided
from meshwright.solvers.planner import make_context
from meshwright.space.decision import Decision, Skeleton
from meshwright.space.evaluate import PlanSpace, price_decision
from meshwright.space.search import Decided, SearchContext, SolveStatus
from meshwright.space.skeletons import strategies_for
from tests.cost.graphs import tiny_gpt


@dataclass(frozen=True)
class Fixed:
    """Decides what it was told."""

    decisions: tuple[Decision, ...]
    name: str = "fixed"
    evaluations: int = 0
    is_complete: bool = True

    def decide(self, context: SearchContext, deadline_s: float | None = None) -> Decided:
        return Decided(
            decisions=self.decisions, evaluations=self.evaluations, is_complete=self.is_complete
        )


@pytest.fixture(scope="module")
def context() -> SearchContext:
    return make_context(
        tiny_gpt(16),
        reference="tiny",
        cluster=parse_cluster("4xa100"),
        job=JobSpec(global_batch=16),
    )


def uniform(context: SearchContext, skeleton: Skeleton, number: int) -> Decision:
    strategies = strategies_for(context, skeleton)
    space = PlanSpace(context, skeleton, strategies)
    starts = np.arange(skeleton.num_stages) * (space.num_segments // skeleton.num_stages)
    return space.decision(np.full(space.num_segments, number), starts)


def test_never_worse_than_what_was_decided(context: SearchContext) -> None:
    skeleton = Skeleton.of({"tp": 2}, num_stages=2, num_microbatches=2)
    last = len(strategies_for(context, skeleton)) - 1
    decision = uniform(context, skeleton, last)

    result = Guided(Fixed((decision,))).propose(context)

    assert SolveStatus.SAMPLED is result.status
    assert price_decision(context, decision).time_s > result.candidates[0].time_s
    assert 256 >= result.evaluations
    assert "fixed" == result.candidates[0].solver


def test_the_same_seed_gives_the_same_plan(context: SearchContext) -> None:
    decision = uniform(context, Skeleton.of({"dp_shard": 4}, num_microbatches=2), 3)

    first, second = (Guided(Fixed((decision,))).propose(context).candidates for _ in range(2))

    assert [c.plan for c in first] == [c.plan for c in second]


def test_nothing_decided_is_not_applicable(context: SearchContext) -> None:
    assert SolveStatus.NOT_APPLICABLE is Guided(Fixed(())).propose(context).status


def test_what_the_decider_priced_counts(context: SearchContext) -> None:
    decision = uniform(context, Skeleton.of({"dp_shard": 4}, num_microbatches=2), 3)
    without = Guided(Fixed((decision,)), max_evaluations=20).propose(context)
    counted = Guided(Fixed((decision,), evaluations=632), max_evaluations=20).propose(context)

    assert 20 == without.evaluations
    assert 652 == counted.evaluations
    assert 7 == Guided(Fixed((), evaluations=7)).propose(context).evaluations


def test_a_decider_cut_short_was_stopped(context: SearchContext) -> None:
    decision = uniform(context, Skeleton.of({"dp_shard": 4}, num_microbatches=2), 3)
    for decisions in ((), (decision,)):
        result = Guided(Fixed(decisions, is_complete=False)).propose(context)
        assert SolveStatus.STOPPED is result.status
        assert bool(decisions) == bool(result.candidates)
