"""The last ranking: plans as measured steps correct them, and one number wherever it is shown."""

from __future__ import annotations

import pytest

from meshwright.cluster import parse_cluster
from meshwright.cost.pricing import Pricing
from meshwright.plans.plan import JobSpec
from meshwright.solvers.planner import PlanningResult, plan_graph
from meshwright.solvers.rules import RULES
from tests.cost.graphs import zoo
from tests.cost.learned import FixedSteps

BATCH = 8
GPT = "gpt2?num_layers=2&seq_len=128"


def planned(factor_of_tp: dict[int, float] | None, level: str = "O1") -> PlanningResult:
    steps = None if factor_of_tp is None else FixedSteps(factor_of_tp=factor_of_tp)
    return plan_graph(
        zoo(GPT, BATCH),
        reference="gpt",
        cluster=parse_cluster("4xa100"),
        job=JobSpec(global_batch=BATCH),
        level=level,
        pricing=Pricing(name="test", steps=steps),
    )


@pytest.fixture(scope="module")
def plain() -> PlanningResult:
    return planned(None)


def test_a_correction_can_change_the_winner(plain: PlanningResult) -> None:
    own = plain.plan.mesh.tp
    other = 4 if own == 1 else 1
    found = planned({own: 1.4, other: 0.7})

    assert own != found.plan.mesh.tp


def test_no_rule_is_faster_by_the_corrected_price(plain: PlanningResult) -> None:
    names = {rule.name for rule in RULES}
    found = planned({plain.plan.mesh.tp: 1.4})
    assert found.plan.prediction is not None
    rules_s = [
        item.plan.prediction.step_time_s
        for item in found.alternatives
        if item.solver in names and item.plan.prediction and item.plan.prediction.fits
    ]

    assert len(rules_s) > 0
    assert found.plan.prediction.step_time_s <= min(rules_s) * (1 + 0.05)


def test_plans_carry_the_number_that_explain_says(plain: PlanningResult) -> None:
    found = planned({1: 1.1, 2: 0.9, 4: 0.95})
    model = found.context.model
    plans = [found.plan, *(item.plan for item in found.alternatives)]

    assert len(plans) > 1
    for plan in plans:
        assert plan.prediction is not None
        again = model.predict(plan)
        assert pytest.approx(again.step_time_s, rel=1e-9) == plan.prediction.step_time_s
        assert again.breakdown.keys() == plan.prediction.breakdown.keys()
        assert pytest.approx(again.step_time_interval_s) == plan.prediction.step_time_interval_s


def test_search_does_not_ask_for_corrections() -> None:
    """It is asked for a few dozen plans at the end, not for all that are priced."""
    steps = FixedSteps(factor_of_tp={})
    found = plan_graph(
        zoo(GPT, BATCH),
        reference="gpt",
        cluster=parse_cluster("4xa100"),
        job=JobSpec(global_batch=BATCH),
        pricing=Pricing(name="test", steps=steps),
    )

    assert 0 < len(steps.asked) <= 80
    assert found.search.evaluations > len(steps.asked)
