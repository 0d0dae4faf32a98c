"""Figures of a set of runs, worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from meshwright.bench.outcomes import Outcome, summarize
from meshwright.bench.regret import rule_scores


def outcome(plan: str, measured_s: float | None, predicted_s: float, **changes: Any) -> Outcome:
    """A run of the job ``job``; it ran and was predicted to fit, unless told otherwise."""
    values: dict[str, Any] = {
        "run_id": plan, "source": "s", "gpu": "g", "group": "job", "plan": plan,
        "measured_s": measured_s, "predicted_s": predicted_s,
        "interval_s": (predicted_s * 0.9, predicted_s * 1.1),
        "measured_bytes": None, "predicted_bytes": 50.0, "capacity_bytes": 100.0, "fits": True,
        "ran": measured_s is not None,
        "rules": rule_scores(dp=1, tp=1, pp=1, micro_batch=1, gpus_per_host=8),
        "breakdown": {}, "memory_breakdown": {}, "trust": (), "assumptions": (), "labels": {},
    }  # fmt: skip
    return Outcome(**(values | changes))


def test_one_group() -> None:
    """Predicted first is b, of 3 s, where a takes 2 s; the order of a, b, c is 2, 1, 3."""
    found = summarize([outcome("a", 2.0, 2.2), outcome("b", 3.0, 2.1), outcome("c", 4.0, 4.0)])

    assert (3, 1) == (found.n, found.groups)
    assert pytest.approx((0.1 + 0.3 + 0) / 3) == found.mape
    assert pytest.approx((0.1 - 0.3 + 0) / 3) == found.bias
    assert pytest.approx(0.5) == found.regret_top1_mean
    assert 0.0 == found.regret_top3_mean
    assert pytest.approx(0.5) == found.spearman_in_group
    assert pytest.approx(2 / 3) == found.interval_coverage
    assert pytest.approx(0.5) == found.baselines["random"].regret_top1_mean


def test_repeats_of_a_plan_are_one_choice() -> None:
    """Plan a took 1, 2 and 6 s: 2 s by the median, less than b's 3 s."""
    runs = [outcome("a", t, 1.0) for t in (1.0, 2.0, 6.0)] + [outcome("b", 3.0, 0.5)]
    found = summarize(runs)

    assert (4, 1) == (found.n, found.groups)
    assert pytest.approx(0.5) == found.regret_top1_mean


def test_a_group_of_one_plan_is_no_choice() -> None:
    found = summarize([outcome("a", 2.0, 2.0), outcome("a", 2.1, 2.0)])

    assert (2, 0) == (found.n, found.groups)
    assert found.regret_top1_mean is None
    assert found.spearman_in_group is None
    assert found.baselines["megatron"].regret_top1_mean is None


def test_equal_times_have_no_order_but_no_regret_either() -> None:
    found = summarize([outcome("a", 2.0, 1.0), outcome("b", 2.0, 3.0)])

    assert (1, 0.0) == (found.groups, found.regret_top1_mean)
    assert found.spearman_in_group is None


def test_memory_and_what_ran_out_of_it() -> None:
    """Errors of memory -50 % and +25 %; c ran out and would have been chosen."""
    runs = [
        outcome("a", 2.0, 2.0, measured_bytes=100.0),
        outcome("b", 3.0, 3.0, measured_bytes=40.0, fits=False),
        outcome("c", None, 1.0),
        outcome("d", None, 0.5, fits=False),
    ]
    found = summarize(runs)

    assert (2, 2) == (found.n, found.memory_n)
    assert pytest.approx(0.375) == found.memory_median_error
    assert pytest.approx(-0.125) == found.memory_bias
    assert {
        "predicted_fits_ran": 1, "predicted_fits_oom": 1,
        "predicted_oom_ran": 1, "predicted_oom_oom": 1,
    } == found.oom_confusion  # fmt: skip
    assert 1 == found.oom_choices


def test_what_is_predicted_not_to_fit_comes_last() -> None:
    """By time b is first, and best; it is thought not to fit, so a is taken."""
    found = summarize([outcome("a", 3.0, 3.0), outcome("b", 2.0, 2.0, fits=False)])

    assert 0.0 == found.regret_top1_mean
    assert pytest.approx(0.5) == found.regret_fitting_top1_mean


def test_no_runs() -> None:
    found = summarize([])

    assert (0, 0, None, None) == (found.n, found.groups, found.mape, found.regret_top1_mean)
