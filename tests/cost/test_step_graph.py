"""The operators of a plan's step, and how the step's time is made of theirs."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from msgspec.structs import replace

from meshwright.cost.step_graph import StepGraph, step_graph
from meshwright.cost.work import Family
from meshwright.errors import PlanRefused
from meshwright.plans.plan import ParallelPlan, Recompute
from meshwright.space.search import SearchContext
from tests.cost.graphs import zoo
from tests.cost.plans import context_of, uniform_plan

GPT = "tiny-gpt?num_layers=4&hidden=32&num_heads=4&vocab_size=64&seq_len=8"


@cache
def context() -> SearchContext:
    return context_of(zoo(GPT, 16), "8xh100", 16)


def plan_of(*, pp: int = 1, micro: int = 1, recompute: Recompute = Recompute.NONE) -> ParallelPlan:
    return uniform_plan(
        context(), pp=pp, dp_replicate=2, num_microbatches=micro, recompute=recompute
    )


def runs_of(found: StepGraph, family: Family) -> float:
    return float(found.weight[found.work.family == family].sum())


@pytest.mark.parametrize(("pp", "micro"), [(1, 1), (1, 4), (2, 4), (4, 8)])
@pytest.mark.parametrize("recompute", [Recompute.NONE, Recompute.FULL])
@pytest.mark.parametrize("stretch", [False, True])
def test_rows_and_rest_are_the_step(
    pp: int, micro: int, recompute: Recompute, stretch: bool
) -> None:
    plan = plan_of(pp=pp, micro=micro, recompute=recompute)
    found = step_graph(context().model, plan, stretch=stretch)
    cost = context().model.cost(plan)

    assert pytest.approx(cost.time_s) == found.weight @ found.time_s + found.rest_s
    assert 0.0 <= found.launch_s <= found.rest_s * (1 + 1e-9)
    assert "h100-sxm-80gb" == found.device.name
    if not stretch:
        # What free operators wait for launches is not theirs.
        assert cost.breakdown_s["compute"] >= found.operators_s * (1 - 1e-9)
        assert (found.weight == np.rint(found.weight)).all()


@pytest.mark.parametrize(("recompute", "forwards"), [(Recompute.NONE, 1), (Recompute.FULL, 2)])
def test_rows_count_layers_microbatches_and_recompute(recompute: Recompute, forwards: int) -> None:
    """4 layers, 4 micro-batches; on two stages the fuller has at least half of them."""
    whole = step_graph(context().model, plan_of(micro=4, recompute=recompute))

    assert 4 * 4 * forwards == runs_of(whole, Family.ATTENTION)
    assert 4 * 4 == runs_of(whole, Family.ATTENTION_BACKWARD)
    plan = plan_of(pp=2, micro=4, recompute=recompute)
    half = step_graph(context().model, plan, stretch=False)
    assert runs_of(half, Family.ATTENTION_BACKWARD) in (2 * 4, 3 * 4)
    assert whole.work.count == half.work.count
    assert 0.0 == half.weight.min()


def test_weights_carry_the_bubble() -> None:
    plan = plan_of(pp=4, micro=4)
    plain = step_graph(context().model, plan, stretch=False)
    stretched = step_graph(context().model, plan)
    causes = context().model.cost(plan).breakdown_s
    own_s = sum(causes.values()) - causes["bubble"] - causes["pipeline_transfer"]

    assert causes["bubble"] > 0.0
    assert pytest.approx(plain.weight * (1 + causes["bubble"] / own_s)) == stretched.weight
    assert plain.time_s.tolist() == stretched.time_s.tolist()


def test_steps_of_unlike_operators_are_refused() -> None:
    plan = replace(plan_of(pp=2, micro=4), token_slices=[4, 4])

    with pytest.raises(PlanRefused, match="token slices"):
        step_graph(context().model, plan)
