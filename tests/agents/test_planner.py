"""What the policy plans one instance at a time is what it does in the batch."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from meshwright.agents.evaluation import play
from meshwright.agents.planner import PolicyDecider, best_of_rows, sample_plans
from meshwright.agents.policy import OnInstances, PlacementPolicy
from meshwright.agents.weights import new_policy
from meshwright.api import plan_reference
from meshwright.cluster import parse_cluster
from meshwright.cost.pricing import ANALYTIC
from meshwright.env.batched import BatchedPlacement
from meshwright.env.build import instance_of
from meshwright.env.instance import Instance
from meshwright.env.rooms import OutOfTimeError, PricedRooms
from meshwright.env.toys import random_instance, toy_instances
from meshwright.plans.plan import JobSpec
from meshwright.solvers.planner import make_context
from meshwright.space.evaluate import price_decision
from meshwright.space.search import SearchContext
from tests.cost.graphs import tiny_gpt


def drawn(count: int) -> list[Instance]:
    rng = np.random.default_rng(0)
    return [random_instance(rng, num_groups=1 + number % 4) for number in range(count)]


def decided(seed: int = 0) -> PlacementPolicy:
    policy = new_policy(hidden=32, seed=seed)
    with torch.no_grad():
        policy.score.weight.normal_(generator=torch.Generator().manual_seed(seed))
    return policy


def test_the_greedy_plan_is_that_of_the_batch() -> None:
    instances = [*toy_instances(), *drawn(8)]
    policy = decided()
    environment = BatchedPlacement(instances, len(instances))
    play(OnInstances(policy, [item.graph for item in instances]), environment,
         np.arange(len(instances)))  # fmt: skip

    for instance, expected in zip(instances, environment.placed(), strict=True):
        (greedy,) = sample_plans(policy, instance, num_samples=0, seed=0)
        assert expected == greedy.placed
        assert expected in [p.placed for p in sample_plans(policy, instance, num_samples=3, seed=0)]


def test_plans_fit_are_distinct_sorted_and_decided_by_the_seed() -> None:
    instance = drawn(3)[2]
    first, again, other = (
        sample_plans(decided(), instance, num_samples=40, seed=seed) for seed in (0, 0, 1)
    )
    times = [
        float(instance.rooms.open(p.placed.row).time_s[(*p.placed.variants, p.placed.cut)])
        for p in first
    ]

    assert first == again
    assert first != other
    assert len({plan.placed for plan in first}) == len(first) > 5
    assert times == [plan.time_s for plan in first] == sorted(times)
    assert bool(np.isfinite(times).all())


def test_samples_are_drawn_with_the_probabilities_of_the_policy() -> None:
    """An indifferent policy takes each of the toy's three first choices about as often."""
    toy = toy_instances()[2]
    policy = new_policy(hidden=8)
    with torch.no_grad():
        policy.score.weight.zero_()
    (greedy,) = sample_plans(policy, toy, num_samples=0, seed=0)
    counts = np.zeros(3)
    for seed in range(400):
        plans = [p.placed for p in sample_plans(policy, toy, num_samples=1, seed=seed)]
        (plan,) = [p for p in plans if p != greedy.placed] or [greedy.placed]
        counts[min(plan.row, 2)] += 1

    assert [0.33, 0.33, 0.33] == pytest.approx(counts / counts.sum(), abs=0.12)


def test_a_higher_temperature_draws_more_different_plans() -> None:
    instance = drawn(3)[2]
    cold, warm = (
        sample_plans(decided(), instance, num_samples=40, seed=0, temperature=temperature)
        for temperature in (0.01, 5.0)
    )

    assert len(cold) < len(warm)


def test_the_best_of_the_rows_is_never_slower_than_the_samples() -> None:
    faster = 0
    for instance in drawn(8):
        sampled = sample_plans(decided(), instance, num_samples=4, seed=0)
        found = best_of_rows(instance, (plan.placed.row for plan in sampled))
        rows = {plan.placed.row for plan in sampled}

        assert sorted(rows) == sorted(plan.placed.row for plan in found)
        assert [float(instance.rooms.open(plan.placed.row).time_s.min()) for plan in found] == [
            plan.time_s for plan in found
        ]
        assert sampled[0].time_s >= found[0].time_s
        faster += found[0].time_s < sampled[0].time_s

    assert faster > 0


def test_rows_on_which_nothing_fits_have_no_best_plan() -> None:
    narrow = random_instance(np.random.default_rng(0), num_rows=40, fitting_share=0.2)
    every = range(len(narrow.rows))

    assert [row for row in every if narrow.rooms.fits(row)] == sorted(
        plan.placed.row for plan in best_of_rows(narrow, every)
    )


# --- As a decider ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def context() -> SearchContext:
    return make_context(
        tiny_gpt(16),
        reference="tiny",
        cluster=parse_cluster("4xa100"),
        job=JobSpec(global_batch=16),
    )


def test_decisions_are_the_best_of_what_was_priced_and_all_of_that_counts(
    context: SearchContext,
) -> None:
    decided_of = PolicyDecider(decided(), num_samples=8).decide(context)
    instance = instance_of(context, reference=lambda _: 1.0, simulate=False)
    sampled = sample_plans(decided(), instance, num_samples=8, seed=0)
    rooms = [instance.rooms.open(row) for row in {plan.placed.row for plan in sampled}]
    best_s = min(float(room.time_s.min()) for room in rooms)

    assert 8 == len(set(decided_of.decisions))
    assert decided_of.is_complete
    assert (
        pytest.approx(best_s, rel=0.02) == price_decision(context, decided_of.decisions[0]).time_s
    )
    assert sum(int(np.isfinite(room.time_s).sum()) for room in rooms) <= decided_of.evaluations


def test_a_late_decider_says_that_it_was_cut_short(context: SearchContext) -> None:
    found = PolicyDecider(decided()).decide(context, time.monotonic() - 1.0)

    assert ((), 0, False) == (found.decisions, found.evaluations, found.is_complete)


@pytest.mark.parametrize("rooms_in_time", [0, 3, 24])
def test_where_time_runs_out_among_the_rooms_the_plans_so_far_stand(
    context: SearchContext, monkeypatch: pytest.MonkeyPatch, rooms_in_time: int
) -> None:
    asked = [0]

    def until_then(rooms: PricedRooms) -> None:
        asked[0] += rooms.deadline_s is not None
        if rooms.deadline_s is not None and asked[0] > rooms_in_time:
            raise OutOfTimeError

    monkeypatch.setattr(PricedRooms, "_require_time", until_then)
    decider = PolicyDecider(decided(), num_samples=8)
    found = decider.decide(context, time.monotonic() + 3600.0)
    every = decider.decide(context)

    assert asked[0] > rooms_in_time
    assert bool(found.decisions) == (rooms_in_time == 24)
    assert found.is_complete == bool(found.decisions)
    assert found.evaluations < every.evaluations


@pytest.mark.parametrize(("budget_s", "is_named"), [(None, True), (0.0, False)])
def test_plans_name_the_planner_that_answered(budget_s: float | None, is_named: bool) -> None:
    planned = plan_reference(
        "tiny-mlp",
        cluster="cpu:4",
        job=JobSpec(global_batch=8),
        pricing=ANALYTIC,
        planner="pretrained",
        budget_s=budget_s,
    ).result
    (policy,) = [solver for solver in planned.search.solvers if solver.name == "policy"]

    assert is_named == (policy.status == "sampled") == (policy.evaluations > 0)
    assert (not is_named) == (policy.status == "stopped")
    assert {is_named} == {
        bool(one.plan.provenance.planner) for one in (planned, *planned.alternatives)
    }
