"""Without a budget the search is bounded by what it prices, not by the clock."""

from __future__ import annotations

import itertools
import time

import pytest

from meshwright.cluster import parse_cluster
from meshwright.plans.plan import JobSpec, ParallelPlan
from meshwright.solvers.planner import PlanningResult, plan_graph
from tests.cost.graphs import zoo


def planned(budget_s: float | None = None) -> PlanningResult:
    return plan_graph(
        zoo("tiny-mlp", 8),
        reference="tiny",
        cluster=parse_cluster("2xa100"),
        job=JobSpec(global_batch=8),
        level="O2",
        budget_s=budget_s,
    )


def essence(plan: ParallelPlan) -> tuple[object, ...]:
    return plan.mesh, plan.num_microbatches, plan.schedule, repr(plan.stages), repr(plan.segments)


def test_a_slow_machine_finds_the_same_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock finds that a minute has passed."""
    quick = planned()
    ticks = itertools.count(0.0, 60.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks))
    slow = planned()

    assert essence(quick.plan) == essence(slow.plan)
    assert quick.search.evaluations == slow.search.evaluations
    assert quick.search.is_complete == slow.search.is_complete


def test_a_budget_cuts_by_time_and_says_so() -> None:
    cut = planned(budget_s=1e-3)

    assert not cut.search.is_complete
    assert cut.search.gap >= 0.0
    assert cut.search.evaluations < planned().search.evaluations
