"""Offloaded optimizer state: chosen where memory demands it, never where there is room."""

from __future__ import annotations

import msgspec
import pytest

from meshwright.cluster import parse_cluster
from meshwright.errors import NoFeasiblePlan
from meshwright.plans.plan import JobSpec, ParallelPlan
from meshwright.solvers.exhaustive import Exhaustive
from meshwright.solvers.frontier import Frontier
from meshwright.solvers.planner import PlanningResult, make_context, plan_graph
from meshwright.space.decision import Skeleton
from meshwright.space.search import SearchContext
from meshwright.space.skeletons import shardings_for, strategies_for
from tests.cost.graphs import tiny_gpt
from tests.solvers.test_planner import small_memory

JOB = JobSpec(global_batch=4)
TIGHT_BYTES = 330_000
"""On one device the leanest plan with optimizer state needs 450 kB, without it 260 kB."""


def context_of(memory_bytes: int, cluster: str = "1xa100") -> SearchContext:
    where = small_memory(parse_cluster(cluster), memory_bytes)
    return make_context(tiny_gpt(4), reference="tiny", cluster=where, job=JOB, level="O2")


def planned(memory_bytes: int, level: str) -> PlanningResult:
    where = small_memory(parse_cluster("1xa100"), memory_bytes)
    return plan_graph(tiny_gpt(4), reference="tiny", cluster=where, job=JOB, level=level)


def without_offload(plan: ParallelPlan) -> ParallelPlan:
    segments = [msgspec.structs.replace(entry, offload=False) for entry in plan.segments]
    return msgspec.structs.replace(plan, segments=segments)


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_offload_is_chosen_where_the_plan_fits_only_so(level: str) -> None:
    result = planned(TIGHT_BYTES, level)

    assert any(entry.offload for entry in result.plan.segments)
    assert [] == result.plan.unrunnable
    assert result.plan.prediction is not None
    assert result.plan.prediction.fits
    assert not result.context.model.cost(without_offload(result.plan)).fits


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_offload_is_not_chosen_where_there_is_room(level: str) -> None:
    assert not any(entry.offload for entry in planned(10**9, level).plan.segments)


def test_a_device_without_a_way_to_its_host_offers_none() -> None:
    skeleton = Skeleton.of({})

    assert not any(s.offload for s in strategies_for(context_of(10**9, "cpu:1"), skeleton))
    assert any(s.offload for s in strategies_for(context_of(10**9), skeleton))


@pytest.mark.parametrize(("memory_bytes", "expected"), [(TIGHT_BYTES, True), (10**9, False)])
def test_mixtures_offload_only_where_memory_is_tight(memory_bytes: int, expected: bool) -> None:
    context = context_of(memory_bytes)
    frontier = Frontier(context)
    item = frontier.survey().skeletons[0]
    space = frontier.space(item.skeleton, shardings_for(context, item.skeleton))

    assert expected == any(strategy.offload for strategy in space.strategies)


def test_what_fits_with_nothing_says_where_the_bytes_go() -> None:
    with pytest.raises(NoFeasiblePlan, match=r"needs .* has .* \(parameters .*, gradients .*\)"):
        planned(100_000, "O1")

    (leanest,) = Exhaustive().propose(context_of(100_000)).candidates

    assert 0.0 == float(leanest.cost.memory.by_cause["optimizer"].max())
