"""What the policy plans one instance at a time is what it does in the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from meshwright.agents.evaluation import play
from meshwright.agents.planner import sample_plans
from meshwright.agents.policy import OnInstances, PlacementPolicy
from meshwright.agents.weights import new_policy
from meshwright.env.batched import BatchedPlacement
from meshwright.env.instance import Instance
from meshwright.env.toys import random_instance, toy_instances


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
