"""What the policy proposes one instance at a time is what it does in the batch."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from meshwright.agents.evaluation import play
from meshwright.agents.policy import OnInstances, PlacementPolicy
from meshwright.agents.proposals import propose
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


def test_the_first_proposal_is_the_greedy_plan_of_the_batch() -> None:
    instances = [*toy_instances(), *drawn(8)]
    policy = decided()
    environment = BatchedPlacement(instances, len(instances))
    play(OnInstances(policy, [item.graph for item in instances]), environment,
         np.arange(len(instances)))  # fmt: skip
    rng = np.random.default_rng(0)

    for instance, expected in zip(instances, environment.placed(), strict=True):
        assert expected == propose(policy, instance, num_samples=3, rng=rng)[0]


def test_proposals_fit_are_distinct_and_decided_by_the_seed() -> None:
    instance = drawn(3)[2]
    first, again, other = (
        propose(decided(), instance, num_samples=40, rng=np.random.default_rng(seed))
        for seed in (0, 0, 1)
    )
    times = [float(instance.rooms.open(p.row).time_s[(*p.variants, p.cut)]) for p in first]

    assert first == again
    assert first != other
    assert len(set(first)) == len(first) > 5
    assert bool(np.isfinite(times).all())


def test_samples_are_drawn_with_the_probabilities_of_the_policy() -> None:
    """An indifferent policy takes each of the toy's three first choices about as often."""
    toy = toy_instances()[2]
    policy = new_policy(hidden=8)
    with torch.no_grad():
        policy.score.weight.zero_()
    rng = np.random.default_rng(0)
    counts = np.zeros(3)
    for _ in range(400):
        plan = propose(policy, toy, num_samples=1, rng=rng)[-1]
        counts[min(plan.row, 2)] += 1
    alone = propose(policy, toy, num_samples=0, rng=rng)

    assert 1 == len(alone)
    assert [0.33, 0.33, 0.33] == pytest.approx(counts / counts.sum(), abs=0.12)


def test_a_higher_temperature_draws_more_different_plans() -> None:
    instance = drawn(3)[2]
    cold, warm = (
        propose(
            decided(),
            instance,
            num_samples=40,
            rng=np.random.default_rng(0),
            temperature=temperature,
        )
        for temperature in (0.01, 5.0)
    )

    assert cold[0] == warm[0]
    assert len(cold) < len(warm)


def test_a_greedy_plan_takes_under_a_tenth_of_a_second() -> None:
    rng = np.random.default_rng(1)
    instance = random_instance(rng, num_rows=256, num_groups=3, num_variants=6, num_cuts=4)
    policy = new_policy()
    propose(policy, instance, num_samples=0, rng=rng)
    spent_s = []
    for _ in range(5):
        started_s = time.process_time()
        propose(policy, instance, num_samples=0, rng=rng)
        spent_s.append(time.process_time() - started_s)

    assert min(spent_s) < 0.1
