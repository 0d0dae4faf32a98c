"""What measured steps correct: the price of a finished plan, as a cause of its own."""

from __future__ import annotations

import math
from functools import cache

import msgspec
import pytest

from meshwright.cost.choice import CORRECTION_CAUSE, TIME_CAUSES
from meshwright.cost.pricing import ANALYTIC, Correction, Pricing
from meshwright.cost.step_graph import step_graph
from meshwright.plans.plan import ParallelPlan, Prediction
from meshwright.report import breakdown_tables, correction_words
from meshwright.space.search import SearchContext
from tests.cost.graphs import zoo
from tests.cost.learned import FixedSteps
from tests.cost.plans import context_of, uniform_plan

GPT = "tiny-gpt?num_layers=4&hidden=32&num_heads=4&vocab_size=64&seq_len=8"


@cache
def context(pricing: Pricing = ANALYTIC) -> SearchContext:
    return context_of(zoo(GPT, 16), "8xh100", 16, pricing=pricing)


def plan_of(*, pp: int = 2, micro: int = 4) -> ParallelPlan:
    return uniform_plan(context(), pp=pp, dp_replicate=2, num_microbatches=micro)


def predicted(steps: FixedSteps | None, plan: ParallelPlan) -> Prediction:
    return context(Pricing(name="test", steps=steps)).model.predict(plan)


@pytest.mark.parametrize("factor", [0.9, 1.2])
def test_a_correction_is_a_cause_and_the_causes_still_sum_up(factor: float) -> None:
    before = predicted(None, plan_of())
    after = predicted(FixedSteps(factor_of_tp={1: factor}, trust=0.8), plan_of())

    assert pytest.approx(factor * before.step_time_s) == after.step_time_s
    assert pytest.approx(after.step_time_s) == sum(after.breakdown.values())
    assert {*TIME_CAUSES, CORRECTION_CAUSE} == set(after.breakdown)
    assert 0.8 == after.sources[CORRECTION_CAUSE]
    assert before.peak_memory_bytes == after.peak_memory_bytes
    assert set(TIME_CAUSES) == set(before.breakdown)


def test_explain_says_factor_and_trust() -> None:
    after = predicted(FixedSteps(factor_of_tp={1: 0.97}, trust=0.8), plan_of())
    far = predicted(FixedSteps(factor_of_tp={}, trust=0.0), plan_of())

    assert correction_words(after) == "Learned step correction x0.97, trust 0.80."
    assert correction_words(far) == (
        "Learned step correction x1, trust 0.00: no step like it was measured."
    )
    assert correction_words(predicted(None, plan_of())) == ""
    causes = list(breakdown_tables(after)[0].columns[0].cells)
    assert "what measured steps take beyond the sum of their parts" in causes


def test_the_interval_is_the_correction_s_as_far_as_it_is_trusted() -> None:
    usual_s = (0.8, 1.5)
    sure, none, half = (
        Correction(factor=1.0, trust=trust, log_half_width=0.1).interval_s(1.0, usual_s)
        for trust in (1.0, 0.0, 0.5)
    )

    assert pytest.approx((math.exp(-0.1), math.exp(0.1))) == sure
    assert pytest.approx(usual_s) == none
    assert usual_s[0] < half[0] < sure[0]
    assert sure[1] < half[1] < usual_s[1]


def test_far_from_all_steps_a_prediction_stays_as_it_was() -> None:
    before = predicted(None, plan_of())
    after = predicted(FixedSteps(factor_of_tp={}, trust=0.0), plan_of())

    assert before.step_time_s == after.step_time_s
    assert pytest.approx(before.step_time_interval_s) == after.step_time_interval_s


@pytest.mark.parametrize(("pp", "micro"), [(1, 1), (2, 4), (4, 8)])
def test_the_shape_is_that_of_the_step_s_graph(pp: int, micro: int) -> None:
    steps = FixedSteps(factor_of_tp={})
    plan = plan_of(pp=pp, micro=micro)
    predicted(steps, plan)
    (shape,) = steps.asked
    graph = step_graph(context().model, plan, stretch=False)

    assert pytest.approx(graph.operators_s) == shape.family_s.sum()
    assert pytest.approx(graph.weight.sum()) == shape.num_runs
    assert (2 * pp, 1, pp, micro) == (
        shape.num_devices,
        shape.tp,
        shape.num_stages,
        shape.num_microbatches,
    )


def test_steps_of_slices_are_unlike_all_that_was_measured() -> None:
    steps = FixedSteps(factor_of_tp={1: 1.3})
    plan = msgspec.structs.replace(plan_of(), token_slices=[4, 4])
    found = predicted(steps, plan)

    assert [] == steps.asked
    assert 0.0 == found.breakdown[CORRECTION_CAUSE] == found.sources[CORRECTION_CAUSE]
