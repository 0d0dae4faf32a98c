"""Evaluating thousands of plans against pricing each of them exactly."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from meshwright.cost.calibration import DEFAULTS, Origin
from meshwright.cost.pricing import Pricing
from meshwright.plans.plan import Precision, Recompute, ScheduleName
from meshwright.space.decision import Skeleton
from meshwright.space.evaluate import PlanSpace, candidate_of_decision, price_decision
from meshwright.space.search import SearchContext
from meshwright.space.skeletons import skeletons, strategies_for
from tests.cost.graphs import tiny_gpt, zoo
from tests.cost.learned import FixedCollectives, PeakOperators
from tests.cost.plans import context_of

SIZES = (
    ({"dp_shard": 4, "tp": 2}, 1, 2),
    ({"dp_shard": 2, "tp": 2}, 2, 4),
    ({"dp_replicate": 2, "dp_shard": 2}, 2, 2),
    ({"tp": 2}, 4, 4),
)


def space_of(
    context: SearchContext, sizes: dict[str, int], num_stages: int, num_microbatches: int
) -> PlanSpace:
    skeleton = Skeleton.of(sizes, num_stages=num_stages, num_microbatches=num_microbatches)
    every = strategies_for(context, skeleton)
    # One way of sharding at a time: resharding is not what is tested here.
    return PlanSpace(context, skeleton, [s for s in every if s.sharding == every[-1].sharding])


def even_starts(space: PlanSpace) -> np.ndarray:
    count, num_stages = space.num_segments, space.skeleton.num_stages
    return np.array([round(stage * count / num_stages) for stage in range(num_stages)])


@pytest.fixture(scope="module", params=["tiny-gpt", "gpt2", "t5", "moe"])
def context(request: pytest.FixtureRequest) -> SearchContext:
    if request.param == "tiny-gpt":
        return context_of(tiny_gpt(), "cpu:8", 16)
    model = {"gpt2": "gpt2?num_layers=3", "t5": "tiny-t5", "moe": "tiny-gpt-moe"}[request.param]
    return context_of(zoo(model, 16, "bfloat16"), "8xa100", 16, Precision.BF16)


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_uniform_plans_cost_what_the_exact_price_says(
    context: SearchContext, shape: tuple[dict[str, int], int, int]
) -> None:
    space = space_of(context, *shape)
    numbers = np.arange(space.num_strategies)
    assignment = np.repeat(numbers[:, None], space.num_segments, axis=1)
    starts = np.repeat(even_starts(space)[None], len(numbers), axis=0)
    found = space.evaluate(assignment, starts)
    for number in numbers:
        cost = price_decision(context, space.decision(assignment[number], starts[number]))
        share = float((cost.memory.peak_bytes / cost.capacity_bytes).max())

        # Values that skip stages are not simulated, only counted in the closed form.
        assert found.time_s[number] == pytest.approx(cost.time_s, rel=0.03)
        assert 1 + found.excess[number] == pytest.approx(share, rel=1e-3)
        assert bool(found.fits[number]) == cost.fits


def test_one_stage_is_exact_to_the_last_digit() -> None:
    context = context_of(tiny_gpt(), "cpu:8", 16)
    space = space_of(context, {"dp_shard": 4, "tp": 2}, 1, 2)
    zeros = np.zeros((1, space.num_segments), dtype=np.int64)
    start = np.zeros((1, 1), dtype=np.int64)
    cost = price_decision(context, space.decision(zeros[0], start[0]))

    assert space.evaluate(zeros, start).time_s[0] == pytest.approx(cost.time_s, rel=1e-12)


def test_learned_and_calibrated_prices_are_as_exact() -> None:
    """Every figure away from its default: what searches look at is what the model says."""
    figures = {
        **{"overlap_fraction": 0.6, "compute_slowdown": 0.1, "communication_slowdown": 0.3},
        **{"host_s_per_microbatch": 1e-3, "host_s_per_step": 2e-3, "data_loading_share": 0.05},
        **{"straggler_share": 0.01, "optimizer_traffic": 0.5, "clipping_passes": 3.0},
        **{"allocator_share": 0.1, "gradient_item_bytes": 4, "reduction_item_bytes": 4},
        **{"launch_scale": 2.0, "reserved_bytes": 2**30},
        **{"gather_overlap": 0.3, "gather_s_per_byte": 5e-11},
    }
    pricing = Pricing(
        name="test",
        operators=PeakOperators(),
        collectives=FixedCollectives(),
        calibration=DEFAULTS.with_figures(Origin.LEARNED, **figures),
    )
    context = context_of(tiny_gpt(), "8xa100", 16, pricing=pricing)
    space = space_of(context, {"dp_shard": 4, "tp": 2}, 1, 2)
    assignment = (np.arange(space.num_segments) * 5 % space.num_strategies)[None]
    start = np.zeros((1, 1), dtype=np.int64)
    cost = price_decision(context, space.decision(assignment[0], start[0]))
    found = space.evaluate(assignment, start)
    share = float((cost.memory.peak_bytes / cost.capacity_bytes).max())

    assert found.time_s[0] == pytest.approx(cost.time_s, rel=1e-9)
    assert 1 + found.excess[0] == pytest.approx(share, rel=1e-3)


def test_mixtures_of_zero_and_recompute_are_exact_with_one_sharding() -> None:
    """Every segment its own strategy: 4 ZeRO stages and 3 ways of recompute in turn."""
    context = context_of(tiny_gpt(), "cpu:8", 16)
    space = space_of(context, {"dp_shard": 4, "tp": 2}, 1, 2)
    assignment = (np.arange(space.num_segments) * 5 % space.num_strategies)[None]
    start = np.zeros((1, 1), dtype=np.int64)
    cost = price_decision(context, space.decision(assignment[0], start[0]))

    assert space.evaluate(assignment, start).time_s[0] == pytest.approx(cost.time_s, rel=1e-9)


def test_mixtures_of_shardings_are_estimated_within_a_tenth() -> None:
    context = context_of(zoo("gpt2?num_layers=3", 16, "bfloat16"), "8xa100", 16, Precision.BF16)
    skeleton = Skeleton.of({"dp_shard": 4, "tp": 2}, num_microbatches=2)
    strategies = [
        strategy
        for strategy in strategies_for(context, skeleton)
        if strategy.zero_stage == 0 and strategy.recompute is Recompute.NONE
    ]
    space = PlanSpace(context, skeleton, strategies)
    start = np.zeros((1, 1), dtype=np.int64)
    half = space.num_segments // 2
    for before, after in product(range(len(strategies)), repeat=2):
        assignment = np.repeat([before, after], [half, space.num_segments - half])[None]
        cost = price_decision(context, space.decision(assignment[0], start[0]))

        assert space.evaluate(assignment, start).time_s[0] == pytest.approx(cost.time_s, rel=0.1)


def test_many_plans_cost_what_each_costs_alone() -> None:
    context = context_of(tiny_gpt(), "cpu:8", 16)
    space = space_of(context, {"dp_shard": 2, "tp": 2}, 2, 4)
    rng = np.random.default_rng(0)
    assignment = rng.integers(space.num_strategies, size=(50, space.num_segments))
    starts = np.stack([np.zeros(50, np.int64), rng.integers(1, space.num_segments, 50)], axis=1)
    together = space.evaluate(assignment, starts)
    alone = [space.evaluate(assignment[i : i + 1], starts[i : i + 1]) for i in range(50)]

    assert together.time_s.tolist() == pytest.approx([one.time_s[0] for one in alone])
    assert together.excess.tolist() == pytest.approx([one.excess[0] for one in alone])


def test_nothing_to_evaluate() -> None:
    context = context_of(tiny_gpt(), "cpu:8", 16)
    space = space_of(context, {"tp": 2}, 1, 1)
    found = space.evaluate(np.zeros((0, space.num_segments), np.int64), np.zeros((0, 1), np.int64))

    assert (0,) == found.time_s.shape


def test_a_decision_becomes_a_plan_with_its_exceptions() -> None:
    """The second segment recomputes, the others do not: one entry more, for that segment."""
    context = context_of(tiny_gpt(), "cpu:8", 16)
    space = space_of(context, {"dp_shard": 4}, 1, 1)
    numbers = {(s.zero_stage, s.recompute): i for i, s in enumerate(space.strategies)}
    assignment = np.full(space.num_segments, numbers[1, Recompute.NONE])
    assignment[1] = numbers[1, Recompute.FULL]
    decision = space.decision(assignment, np.zeros(1, np.int64))
    plan = candidate_of_decision(context, decision, solver="test").plan
    entries = plan.segment_plans(context.model.segment_classes)

    assert [Recompute.NONE, Recompute.FULL] == [entry.recompute for entry in entries[:2]]
    assert {1} == {entry.zero_stage for entry in entries}
    assert [] == plan.unrunnable


def test_without_zero_all_data_parallelism_replicates() -> None:
    context = context_of(tiny_gpt(), "cpu:8", 16)
    space = space_of(context, {"dp_shard": 8}, 1, 1)
    zeros = np.zeros(space.num_segments, dtype=np.int64)
    plan = candidate_of_decision(
        context, space.decision(zeros, np.zeros(1, np.int64)), solver="test"
    ).plan

    assert (8, 1) == (plan.mesh.dp_replicate, plan.mesh.dp_shard)


def test_every_skeleton_uses_no_more_devices_than_there_are() -> None:
    """Six devices on a host: not a power of two."""
    context = context_of(tiny_gpt(12), "cpu:6", 12)
    found = list(skeletons(context))

    assert any(skeleton.num_stages * skeleton.num_devices_per_stage == 6 for skeleton in found)
    assert all(skeleton.num_stages * skeleton.num_devices_per_stage <= 6 for skeleton in found)


def test_offloaded_optimizer_state_is_priced_as_exactly() -> None:
    context = context_of(zoo("gpt2?num_layers=3", 16, "bfloat16"), "8xa100", 16, Precision.BF16)
    context = replace(context, allow_unrunnable=True)
    skeleton = Skeleton.of({"dp_shard": 8})
    space = PlanSpace(context, skeleton, strategies_for(context, skeleton))
    numbers = [i for i, s in enumerate(space.strategies) if s.offload and s.zero_stage < 2]
    start = np.zeros((1, 1), dtype=np.int64)
    for number in numbers:
        assignment = np.full((1, space.num_segments), number)
        found = space.evaluate(assignment, start)
        cost = price_decision(context, space.decision(assignment[0], start[0]))
        share = float((cost.memory.peak_bytes / cost.capacity_bytes).max())

        assert found.time_s[0] == pytest.approx(cost.time_s, rel=1e-3)
        assert 1 + found.excess[0] == pytest.approx(share, rel=1e-3)
    assert numbers


def test_context_parallelism_is_priced_as_exactly() -> None:
    context = context_of(zoo("gpt2?num_layers=3", 16, "bfloat16"), "8xa100", 16, Precision.BF16)
    space = space_of(context, {"dp_shard": 4, "cp": 2}, 1, 2)
    zeros, start = np.zeros((1, space.num_segments), np.int64), np.zeros((1, 1), np.int64)
    cost = price_decision(context, space.decision(zeros[0], start[0]))

    assert space.evaluate(zeros, start).time_s[0] == pytest.approx(cost.time_s, rel=1e-3)


@pytest.mark.parametrize("num_microbatches", [2, 4, 8])
@pytest.mark.parametrize("num_stages", [2, 4])
def test_zb_h1_is_priced_by_its_own_schedule(num_stages: int, num_microbatches: int) -> None:
    """Time by its simulation, memory with what the gradients of parameters wait for."""
    model = f"gpt2?num_layers={2 * num_stages}"
    context = context_of(zoo(model, 16, "bfloat16"), "8xa100", 16, Precision.BF16)
    found = {}
    for schedule in (ScheduleName.ONE_F_ONE_B, ScheduleName.ZB_H1):
        plain = Skeleton.of(
            {"dp_shard": 2}, num_stages=num_stages, num_microbatches=num_microbatches
        )
        skeleton = replace(plain, schedule=schedule)
        space = PlanSpace(context, skeleton, strategies_for(context, skeleton)[:3])
        assignment = np.zeros((1, space.num_segments), np.int64)
        starts = even_starts(space)[None]
        priced, closed = (space.evaluate(assignment, starts, simulate=s) for s in (True, False))
        cost = price_decision(context, space.decision(assignment[0], starts[0]))
        share = float((cost.memory.peak_bytes / cost.capacity_bytes).max())

        assert priced.time_s[0] == pytest.approx(cost.time_s, rel=1e-3)
        assert closed.time_s[0] == pytest.approx(cost.time_s, rel=0.08)
        assert 1 + priced.excess[0] == pytest.approx(share, rel=0.01)
        assert 1 + priced.excess[0] >= share * (1 - 1e-6)
        found[schedule] = float(priced.time_s[0])

    assert found[ScheduleName.ZB_H1] < found[ScheduleName.ONE_F_ONE_B]


@pytest.mark.parametrize("schedule", [ScheduleName.GPIPE, ScheduleName.ZB_H1])
def test_a_space_under_another_schedule_is_that_of_its_skeleton(schedule: ScheduleName) -> None:
    context = context_of(tiny_gpt(), "cpu:8", 16)
    usual = space_of(context, {"dp_shard": 2}, 4, 8)
    starts = even_starts(usual)[None].repeat(usual.num_strategies, axis=0)
    assignment = np.arange(usual.num_strategies)[:, None].repeat(usual.num_segments, axis=1)
    skeleton = replace(usual.skeleton, schedule=schedule)
    fresh = PlanSpace(context, skeleton, usual.strategies).evaluate(assignment, starts)
    found = usual.under(schedule).evaluate(assignment, starts)
    again = usual.under(schedule).under(ScheduleName.ONE_F_ONE_B).evaluate(assignment, starts)

    np.testing.assert_array_equal(fresh.time_s, found.time_s)
    np.testing.assert_array_equal(fresh.excess, found.excess)
    np.testing.assert_array_equal(usual.evaluate(assignment, starts).time_s, again.time_s)
    assert (found.time_s != again.time_s).any()
