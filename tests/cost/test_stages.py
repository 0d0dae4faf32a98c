"""Stages that differ: sets of segments, meshes, types of device, shares of the batch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from msgspec.structs import replace as changed

from meshwright.cluster import parse_cluster
from meshwright.cluster.catalog import catalog_cluster, find_device
from meshwright.cluster.model import Cluster
from meshwright.cost.calibration import DEFAULTS
from meshwright.cost.collectives import CollectivePrices
from meshwright.cost.model import choice_of
from meshwright.cost.resharding import resharding_time_s
from meshwright.cost.stage_work import StageOrder
from meshwright.errors import PlanRefused
from meshwright.plans.plan import JobSpec, ParallelPlan, Stage
from meshwright.solvers.planner import make_context
from meshwright.space.search import SearchContext
from tests.cost.graphs import tiny_gpt
from tests.cost.plans import context_of, uniform_plan
from tests.cost.towers import towers


def two_hosts(*names: str) -> Cluster:
    """Hosts of two devices each, whose launches take no time."""
    cluster = catalog_cluster(
        "hosts", tuple((find_device(name, where="test"), 2) for name in names)
    )
    hosts = tuple(
        dataclasses.replace(host, device=dataclasses.replace(host.device, launch_latency_s=0.0))
        for host in cluster.hosts
    )
    return dataclasses.replace(cluster, hosts=hosts)


def context_on(cluster: Cluster) -> SearchContext:
    graph = tiny_gpt(16)
    return make_context(graph, reference="tiny", cluster=cluster, job=JobSpec(global_batch=16))


def with_meshes(plan: ParallelPlan, *meshes: dict[str, int]) -> ParallelPlan:
    """The plan with a mesh for each stage, devices one after the other."""
    stages: list[Stage] = []
    first = 0
    for stage, mesh in zip(plan.stages, meshes, strict=True):
        count = int(np.prod(list(mesh.values())))
        stages.append(changed(stage, mesh=mesh, first_device=first, num_devices=count))
        first += count
    return changed(plan, stages=stages)


def test_equal_stages_cost_the_same_whichever_way_they_are_priced() -> None:
    context = context_of(tiny_gpt(16), "4xa100", 16)
    plan = uniform_plan(context, dp_shard=2, pp=2, num_microbatches=4, zero_stage=2)
    choice = choice_of(plan, context.model.segment_classes)
    table = context.model.table_of_plan(plan)
    one_by_one = dataclasses.replace(
        choice,
        stage_of_segment=tuple(choice.stage_of(table.num_segments).tolist()),
        stage_splits=(choice.split, choice.split),
    )

    expected = context.model.pricer.price(table, choice)
    found = context.model.pricer.price_stages([table, table], one_by_one, whole=table)

    assert expected.breakdown_s == found.breakdown_s
    assert expected.memory.peak_bytes.tolist() == found.memory.peak_bytes.tolist()
    assert expected.capacity_bytes.tolist() == found.capacity_bytes.tolist()


def test_a_stage_of_two_runs_adds_them_up() -> None:
    order = StageOrder.of(np.array([0, 1, 1, 0, 2]))

    assert [0, 3, 1, 2, 4] == order.segments.tolist()
    assert [5.0, 5.0, 16.0] == order.sums(np.array([1.0, 2.0, 3.0, 4.0, 16.0])).tolist()


def test_stages_of_several_runs_hold_all_that_one_stage_holds() -> None:
    """Each stage has the first or the last half of both towers."""
    context = context_of(towers(), "2xa100", 64)
    count = len(context.model.segment_classes)
    quarter = count // 4
    plan = uniform_plan(context, pp=2)
    first = changed(
        plan.stages[0], last_segment=quarter - 1, branches=[(2 * quarter, 3 * quarter - 1)]
    )
    second = changed(
        plan.stages[1],
        first_segment=quarter,
        last_segment=2 * quarter - 1,
        branches=[(3 * quarter, count - 1)],
    )
    whole = context.model.cost(uniform_plan(context))

    cost = context.model.cost(changed(plan, stages=[first, second]))

    for cause in ("parameters", "optimizer", "gradients"):
        found = cost.memory.by_cause[cause]
        assert whole.memory.by_cause[cause][0] == found.sum()
        assert found.min() > 0


def test_a_stage_on_twice_the_devices_computes_in_half_the_time() -> None:
    context = context_of(tiny_gpt(16), "4xa100", 16)
    plan = uniform_plan(context, pp=2, num_microbatches=2, dp_replicate=2)
    unequal = with_meshes(plan, {"dp_replicate": 1}, {"dp_replicate": 2})
    narrow = changed(plan, mesh=changed(plan.mesh, dp_replicate=1))
    narrow = with_meshes(narrow, {"dp_replicate": 1}, {"dp_replicate": 1})

    mixed = context.model.cost(unequal).memory.by_cause["activations"]
    even = context.model.cost(plan).memory.by_cause["activations"]
    alone = context.model.cost(narrow).memory.by_cause["activations"]

    assert alone[0] == mixed[0]
    assert even[1] == mixed[1]
    assert even[0] < mixed[0]


def test_resharding_sends_every_element_once_and_gathers_locally() -> None:
    """8 MB held by 2 devices go to 4, each of which needs all of it."""
    cluster = parse_cluster("8xa100")
    prices = CollectivePrices(cluster)
    link = cluster.hosts[0].link
    rate = link.bytes_per_s * DEFAULTS.link_efficiency

    sent_s = resharding_time_s(
        prices, source=(0, 2), target=(2, 4), whole_bytes=8e6, target_bytes=2e6
    )
    gathered_s = resharding_time_s(
        prices, source=(0, 2), target=(2, 4), whole_bytes=8e6, target_bytes=8e6
    )

    assert pytest.approx(link.latency_s + 4e6 / rate) == sent_s
    assert pytest.approx(sent_s + 3 * link.latency_s + 0.75 * 8e6 / rate) == gathered_s


def test_a_mixed_stage_is_as_slow_as_its_slowest_device() -> None:
    mixed, slow = context_on(two_hosts("a100", "t4")), context_on(two_hosts("t4", "t4"))

    costs = [c.model.cost(uniform_plan(c, dp_replicate=4)).breakdown_s for c in (mixed, slow)]

    assert costs[0] == costs[1]


def test_shares_of_the_batch_relieve_the_slow_host() -> None:
    context = context_on(two_hosts("a100", "t4"))
    plan = uniform_plan(context, dp_replicate=4)

    def shared(*shares: float) -> float:
        stages = [changed(plan.stages[0], batch_shares=list(shares))]
        return context.model.cost(changed(plan, stages=stages)).time_s

    even_s = context.model.cost(plan).time_s
    assert pytest.approx(even_s) == shared(0.5, 0.5)
    assert shared(0.75, 0.25) < even_s < shared(0.25, 0.75)


def test_shares_need_one_for_each_host() -> None:
    context = context_on(two_hosts("a100", "t4"))
    plan = uniform_plan(context, dp_replicate=4)
    stages = [changed(plan.stages[0], batch_shares=[1.0])]

    with pytest.raises(PlanRefused, match="one for each of its hosts"):
        context.model.cost(changed(plan, stages=stages))
