"""The enumeration of small instances, and a dozen of them from the benchmark of gaps."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from benchmarks.optimality_gap import gaps_of, instances, row_of
from meshwright.cluster import parse_cluster
from meshwright.plans.plan import JobSpec
from meshwright.solvers.enumeration import Enumeration, num_plans
from meshwright.solvers.planner import make_context
from meshwright.space.decision import Decision
from meshwright.space.evaluate import price_decision
from meshwright.space.pins import parse_pins
from meshwright.space.search import SearchContext, SolveStatus
from meshwright.space.skeletons import skeletons, strategies_for
from tests.cost.graphs import zoo


def mlp_context() -> SearchContext:
    """One segment, two devices."""
    return make_context(
        zoo("tiny-mlp", 8),
        reference="mlp",
        cluster=parse_cluster("cpu:2"),
        job=JobSpec(global_batch=8),
        level="O2",
    )


def test_the_enumeration_finds_the_best_of_all_plans() -> None:
    """With one segment every plan is a skeleton and a strategy; here all are priced, unpruned."""
    context = mlp_context()
    every = [
        price_decision(context, Decision(skeleton=skeleton, starts=(0,), strategies=(strategy,)))
        for skeleton in skeletons(context)
        for strategy in strategies_for(context, skeleton)
    ]
    result = Enumeration().propose(context)

    assert len(every) == num_plans(context)
    assert min(cost.time_s for cost in every if cost.fits) == result.candidates[0].time_s
    assert result.is_proven
    assert result.evaluations <= len(every)


def test_the_enumeration_leaves_large_instances_alone() -> None:
    result = Enumeration(max_plans=10).propose(mlp_context())

    assert SolveStatus.NOT_APPLICABLE is result.status
    assert "plans are more than 10" in result.notes["enumeration"]
    assert not result.is_proven


def test_pins_leave_fewer_plans() -> None:
    context = mlp_context()
    pinned = replace(context, pins=parse_pins(("no-zero", "recompute=none")))

    assert 0 < num_plans(pinned) < num_plans(context)


@pytest.mark.slow
def test_the_second_level_is_nearly_optimal_on_a_dozen_instances() -> None:
    chosen = [item for item in instances() if item.model == "tiny-mlp" and item.links == 1.0]
    rows = [row_of(item, compare=False) for item in itertools.islice(chosen, 0, None, 2)]
    gaps = gaps_of(rows).clip(min=0)

    assert len(rows) == 12
    assert len(gaps) >= 6
    assert float(gaps.mean()) <= 0.005
    assert float(gaps.max()) <= 0.02
