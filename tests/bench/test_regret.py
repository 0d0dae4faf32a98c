"""Regret of choices, by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from meshwright.bench.regret import RULES, merged, regret, rule_scores

TIMES_S = (4.0, 2.0, 3.0)


@pytest.mark.parametrize(
    ("scores", "top1", "top2"),
    [
        ((4, 2, 3), 0.0, 0.0),  # right order
        ((1, 3, 2), 1.0, 0.5),  # takes 4 s, then 3 s; the best takes 2 s
        ((1, 2, 3), 1.0, 0.0),
        ((0, 0, 0), 0.5, 1 / 6),
    ],
)
def test_regret_of_scores(scores: tuple[int, ...], top1: float, top2: float) -> None:
    """All equal: the mean of 4, 2, 3 over 2; of two drawn, the best is 2, 2 or 3 s."""
    given = [(float(score),) for score in scores]

    assert pytest.approx(top1) == regret(TIMES_S, given, num_tries=1)
    assert pytest.approx(top2) == regret(TIMES_S, given, num_tries=2)


def test_more_tries_than_plans_find_the_best() -> None:
    assert 0.0 == regret((5.0, 1.0), [(1.0,), (2.0,)], num_tries=3)


@pytest.mark.parametrize("num_tries", [1, 2, 3])
def test_equal_scores_give_the_mean_over_all_orders(num_tries: int) -> None:
    """Against trying every order of six plans, four of them equal."""
    rng = np.random.default_rng(num_tries)
    times_s = rng.uniform(1, 9, 6).tolist()
    scores = [(1.0,), (0.0,), (1.0,), (1.0,), (2.0,), (1.0,)]
    orders = [
        order
        for order in itertools.permutations(range(6))
        if [scores[i] for i in order] == sorted(scores)
    ]
    mean_s = np.mean([min(times_s[i] for i in order[:num_tries]) for order in orders])

    assert pytest.approx(mean_s / min(times_s) - 1) == regret(times_s, scores, num_tries=num_tries)


def test_a_thousand_equal_plans() -> None:
    """The mean of 1 to 1000 over 1."""
    found = regret(range(1, 1001), [(0.0,)] * 1000, num_tries=1)

    assert pytest.approx(499.5) == found


def test_rules_of_thumb() -> None:
    def best(rule: str, plans: list[tuple[int, int, int, int]]) -> tuple[int, int, int, int]:
        return min(
            plans,
            key=lambda p: rule_scores(dp=p[0], tp=p[1], pp=p[2], micro_batch=p[3], gpus_per_host=8)[
                rule
            ],
        )

    # dp, tp, pp, micro-batch on two hosts of 8 GPUs
    plans = [(2, 8, 1, 4), (2, 4, 2, 4), (1, 16, 1, 4), (4, 2, 2, 1), (4, 2, 2, 2)]

    assert (4, 2, 2, 2) == best("most_data_parallel", plans)
    assert (2, 8, 1, 4) == best("megatron", plans)
    assert (2, 4, 2, 4) == best("megatron", plans[1:])  # stages only behind full tensor parallelism
    assert set(RULES) == set(rule_scores(dp=1, tp=1, pp=1, micro_batch=1, gpus_per_host=8))


def test_repeats_count_once_by_their_median() -> None:
    assert {"a": 2.0, "b": 5.0} == merged(["a", "b", "a", "a"], np.array([1.0, 5.0, 9.0, 2.0]))
