"""Pipelines of unequal stages, on mixed clusters and on graphs that are no chains."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest

from meshwright.cluster.catalog import catalog_cluster, find_device
from meshwright.cluster.model import Cluster
from meshwright.graph.opgraph import OpGraph
from meshwright.plans.checks import check_structure
from meshwright.plans.plan import JobSpec
from meshwright.solvers.batch_shares import whole_shares
from meshwright.solvers.exhaustive import Exhaustive
from meshwright.solvers.planner import make_context
from meshwright.solvers.stage_branches import branch_candidates, chain_plan, graph_units, shapes
from meshwright.solvers.stages import Stages, units_of
from meshwright.space.search import SearchContext, fitting
from tests.cost.graphs import tiny_gpt
from tests.cost.towers import towers


def slow(cluster: Cluster, factor: float = 1e4) -> Cluster:
    """Devices so slow that links and launches hardly count."""
    hosts = tuple(
        dataclasses.replace(
            host,
            device=dataclasses.replace(
                host.device,
                flop_per_s={k: v / factor for k, v in host.device.flop_per_s.items()},
                memory_bytes_per_s=host.device.memory_bytes_per_s / factor,
            ),
        )
        for host in cluster.hosts
    )
    return dataclasses.replace(cluster, hosts=hosts)


def hosts_of(*kinds: tuple[str, int]) -> Cluster:
    """Hosts of a type and a number of devices."""
    entries = tuple((find_device(name, where="test"), count) for name, count in kinds)
    return slow(catalog_cluster("test", entries))


def context_on(graph: OpGraph, cluster: Cluster, batch: int) -> SearchContext:
    return make_context(graph, reference="test", cluster=cluster, job=JobSpec(global_batch=batch))


def best_s(cluster: Cluster, solver: Exhaustive | Stages, batch: int = 16) -> float:
    """The fastest plan of tiny GPT that fits."""
    found = fitting(solver.propose(context_on(tiny_gpt(batch), cluster, batch)).candidates)
    return found[0].time_s


def test_a_mixed_cluster_beats_each_half_and_an_even_split() -> None:
    both = hosts_of(("a100", 2), ("v100", 2))
    halves_s = [best_s(hosts_of((name, 2)), Exhaustive(), 64) for name in ("a100", "v100")]
    even_s = best_s(both, Exhaustive(), 64)

    found_s = best_s(both, Stages(), 64)

    assert found_s < min(*halves_s, even_s)


def test_three_devices_are_all_used_though_the_batch_is_a_power_of_two() -> None:
    cluster = hosts_of(("a100", 3))
    context = context_on(tiny_gpt(16), cluster, 16)

    result = Stages().propose(context)

    best = fitting(result.candidates)[0]
    assert best.time_s <= best_s(cluster, Exhaustive()) * (1 + 1e-9)
    pipelines = [c.plan for c in result.candidates if len(c.plan.stages) > 1]
    assert any(sum(s.num_devices for s in plan.stages) == 3 for plan in pipelines)


def test_candidates_are_plans_that_check_and_cost_what_they_say() -> None:
    context = context_on(tiny_gpt(16), hosts_of(("a100", 2), ("t4", 2)), 16)

    candidates = Stages().propose(context).candidates

    assert candidates
    for candidate in candidates:
        check_structure(candidate.plan)
        assert candidate.time_s == context.model.cost(candidate.plan).time_s
        used = sorted((s.first_device, s.devices.stop) for s in candidate.plan.stages)
        assert all(before[1] <= after[0] for before, after in pairwise(used))


def test_towers_run_side_by_side() -> None:
    """Equal towers on equal stages: the branches' plan is faster than any cut of the order."""
    context = context_on(towers(), hosts_of(("a100", 4)), 64)
    units = graph_units(context)
    chains = [
        chain_plan(context, units, shape, solver="") for shape in shapes(context, units, (1,))
    ]
    chain_s = min(context.model.cost(plan).time_s for plan in chains if plan is not None)

    found = branch_candidates(context, (1,), solver="stages")

    assert not units.is_chain
    assert min(candidate.time_s for candidate in found) < chain_s
    for candidate in found:
        check_structure(candidate.plan)


def test_a_chain_has_no_branches() -> None:
    context = context_on(tiny_gpt(16), hosts_of(("a100", 4)), 16)

    assert graph_units(context).is_chain
    assert [] == branch_candidates(context, (1,), solver="stages")


def test_units_hold_about_equal_time() -> None:
    units = units_of([1.0] * 100)

    assert list(range(40)) == sorted(set(units.tolist()))[:40]
    assert 3 >= max(units.tolist().count(unit) for unit in set(units.tolist()))


@pytest.mark.parametrize(
    ("speeds", "num_samples", "steps", "expected"),
    [
        ((3.0, 1.0), 8, (1, 1), [6, 2]),
        ((3.0, 1.0), 8, (4, 4), [4, 4]),
        ((100.0, 1.0), 8, (1, 1), [7, 1]),
        ((1.0, 1.0), 7, (2, 2), []),
    ],
)
def test_shares_are_whole_samples(
    speeds: tuple[float, ...], num_samples: int, steps: tuple[int, ...], expected: list[int]
) -> None:
    assert expected == whole_shares(speeds, num_samples, steps)
