"""The planner that comes with the package."""

from __future__ import annotations

import shlex

import numpy as np

from meshwright.agents.planner import PRETRAINED, PolicyDecider, sample_plans
from meshwright.agents.weights import load_policy
from meshwright.env.decode import best_of
from meshwright.env.frozen import frozen_sets
from meshwright.env.toys import random_instance, toy_instances


def test_it_is_small_and_says_how_to_make_it_again() -> None:
    _, card = load_policy(PRETRAINED)
    words = shlex.split(str(card["reproduce"]))
    count = int(words[words.index("--instances") + 1])

    assert 5_000_000 > PRETRAINED.stat().st_size
    assert ["meshwright", "train"] == words[:2]
    assert frozen_sets()["train"].count >= count
    assert "finished" == card["status"]


def test_it_plans_what_it_never_saw_and_finds_most_optima_of_the_toys() -> None:
    policy = PolicyDecider.pretrained().policy
    rng = np.random.default_rng(0)
    strangers = [random_instance(rng, num_groups=1 + number % 4) for number in range(4)]
    gaps = []
    for instance in (*toy_instances(), *strangers):
        best_s, _ = best_of(instance)
        found = sample_plans(policy, instance, num_samples=64, seed=0)
        gaps.append(found[0].time_s / best_s - 1)

    assert min(gaps) >= -1e-6
    assert np.median(gaps) <= 0.01
