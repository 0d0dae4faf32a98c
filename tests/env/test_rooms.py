"""Rooms priced from a context: what fits, cuts, decisions and their exact price."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from meshwright.env.build import instance_of, stored
from meshwright.env.decode import Placed, best_of, decision_of
from meshwright.env.instance import CUTS, ROW_DECISIONS, Instance
from meshwright.env.rooms import PricedRooms
from meshwright.env.rows import SCHEDULES
from meshwright.errors import NoFeasiblePlan, PlanRefused
from meshwright.plans.plan import Recompute, ScheduleName
from meshwright.space.evaluate import candidate_of_decision, price_decision
from meshwright.space.pins import parse_pins
from tests.env.contexts import rooms_of, tiny_context, tiny_instance

NARROW_BYTES = 300_000


def column(instance: Instance, name: str) -> np.ndarray:
    return instance.rows[:, ROW_DECISIONS.index(name)]


def fresh_rooms(instance: Instance, memory_bytes: int | None) -> PricedRooms:
    return PricedRooms(
        tiny_context(memory_bytes=memory_bytes),
        rows=instance.rows,
        variants=instance.variants,
        group_classes=instance.group_classes,
        num_cuts=instance.num_cuts,
    )


@pytest.mark.parametrize("memory_bytes", [NARROW_BYTES, 200_000])
def test_fits_says_what_the_opened_room_says(memory_bytes: int) -> None:
    instance = tiny_instance(memory_bytes)
    rooms = fresh_rooms(instance, memory_bytes)
    asked = [rooms.fits(row) for row in range(len(instance.rows))]
    opened = [bool(np.isfinite(time_s).any()) for time_s in rooms_of(instance)]

    assert opened == asked
    assert {True, False} == set(opened)


def test_a_price_is_the_exact_one() -> None:
    """But for what pipelines of values that skip stages round off."""
    instance, context = tiny_instance(NARROW_BYTES), tiny_context(memory_bytes=NARROW_BYTES)
    rng = np.random.default_rng(0)
    rooms = rooms_of(instance)
    compared = 0
    for row in rng.permutation(len(rooms))[:40]:
        fitting = np.argwhere(np.isfinite(rooms[row]))
        for place in fitting[rng.permutation(len(fitting))[:3]]:
            *variants, cut = (int(number) for number in place)
            placed = Placed(row=int(row), variants=tuple(variants), cut=cut)
            cost = price_decision(context, decision_of(context, instance, placed))

            assert cost.fits
            assert pytest.approx(cost.time_s, rel=0.03) == rooms[row][tuple(place)]
            compared += 1
    assert compared > 20


def test_what_does_not_fit_does_not_by_the_exact_price() -> None:
    instance, context = tiny_instance(NARROW_BYTES), tiny_context(memory_bytes=NARROW_BYTES)
    refused = 0
    for row, time_s in enumerate(rooms_of(instance)):
        if row % 9 or np.isfinite(time_s).any():
            continue
        placed = Placed(row=row, variants=(0,) * instance.num_groups, cut=0)

        assert not price_decision(context, decision_of(context, instance, placed)).fits
        refused += 1
    assert refused > 2


def test_the_best_plan_becomes_a_plan_that_fits() -> None:
    instance, context = tiny_instance(), tiny_context()
    best_s, placed = best_of(instance)
    candidate = candidate_of_decision(
        context, decision_of(context, instance, placed), solver="test"
    )

    assert candidate.cost.fits
    assert pytest.approx(best_s, rel=1e-3) == candidate.time_s
    assert column(instance, "pp")[placed.row] == candidate.plan.mesh.pp
    assert column(instance, "dp")[placed.row] == candidate.plan.mesh.data_parallel


def test_stored_rooms_are_the_opened_ones_and_pickle() -> None:
    instance = tiny_instance(NARROW_BYTES)
    kept = stored(instance)
    copied = pickle.loads(pickle.dumps(kept))

    for row, time_s in enumerate(rooms_of(instance)):
        np.testing.assert_array_equal(time_s, copied.rooms.open(row).time_s)
        assert instance.rooms.fits(row) == copied.rooms.fits(row)
    assert best_of(instance) == best_of(copied)


def test_decisions_are_made_of_stored_instances_too() -> None:
    instance, context = tiny_instance(), tiny_context()
    _, placed = best_of(instance)

    wanted = decision_of(context, instance, placed)
    assert wanted == decision_of(context, stored(instance), placed)


def test_without_a_pipeline_there_is_one_cut_and_with_one_no_two_are_alike() -> None:
    instance = tiny_instance()
    rooms = instance.rooms
    assert isinstance(rooms, PricedRooms)
    seen = 0
    for row, stages in enumerate(column(instance, "pp")):
        for sharded in rooms.opened(row):
            starts = sharded.starts[list(sharded.cuts)]

            assert (len(CUTS), stages) == sharded.starts.shape
            assert len(starts) == len(np.unique(starts, axis=0))
            assert (starts[:, 0] == 0).all()
            assert (np.diff(starts, axis=1) > 0).all()
            assert stages > 1 or (0,) == sharded.cuts
            seen += len(starts) > 1
    assert seen > 0


def test_the_light_stage_takes_no_more_segments() -> None:
    instance = tiny_instance()
    assert isinstance(instance.rooms, PricedRooms)
    count = len(tiny_context().model.segment_classes)
    for row in np.flatnonzero(column(instance, "pp") == 2):
        even, _, light_first, light_last = (
            int(starts[1]) for starts in instance.rooms.opened(int(row))[0].starts
        )

        assert light_first <= even
        assert count - light_last <= count - even


def test_rows_that_share_prices_cost_what_they_do_alone() -> None:
    """A pipeline under one schedule takes the segments' prices from the row under the other."""
    instance = tiny_instance()
    gpipe = SCHEDULES.index(ScheduleName.GPIPE)
    together = rooms_of(instance)
    alone = np.flatnonzero(column(instance, "schedule") == gpipe)[::3]
    for row in alone:
        found = fresh_rooms(instance, None).open(int(row)).time_s

        np.testing.assert_array_equal(found, together[row])
    assert len(alone) > 3


def test_ways_of_sharding_are_not_mixed() -> None:
    instance = tiny_instance()
    placed = Placed(
        row=int(np.flatnonzero(column(instance, "tp") == 2)[0]),
        variants=(0,) * (instance.num_groups - 1) + (3,),
        cut=0,
    )
    assert instance.variants[0].sharding != instance.variants[3].sharding
    assert np.isinf(instance.rooms.open(placed.row).time_s[placed.variants]).all()
    with pytest.raises(PlanRefused, match="no way of sharding row"):
        decision_of(tiny_context(), instance, placed)


def test_recomputing_everything_saves_memory_and_costs_time() -> None:
    instance, context = tiny_instance(), tiny_context()
    row = int(np.flatnonzero((instance.rows[:, :5] == (1, 1, 1, 1, 4)).all(axis=1))[0])
    numbers = {v.recompute: n for n, v in enumerate(instance.variants) if v.sharding == "tensor"}
    none, full = (
        price_decision(
            context,
            decision_of(
                context,
                instance,
                Placed(row=row, variants=(numbers[how],) * instance.num_groups, cut=0),
            ),
        )
        for how in (Recompute.NONE, Recompute.FULL)
    )

    assert none.time_s < full.time_s
    assert none.memory.peak_bytes.max() >= full.memory.peak_bytes.max()


def test_pins_of_modules_hold_whatever_the_variants_say() -> None:
    pins = parse_pins(["layers.0.attention:zero=3", "layers.1.*:recompute=full"])
    context = tiny_context(pins=pins)
    instance = instance_of(context, reference=lambda _: 1.0, max_plans=20)
    best_s, placed = best_of(instance)
    candidate = candidate_of_decision(
        context, decision_of(context, instance, placed), solver="test"
    )
    entries = candidate.plan.segment_plans(context.model.segment_classes)
    by_name = dict(zip((s.name for s in context.model.segmentation.segments), entries, strict=True))

    assert pytest.approx(best_s, rel=1e-3) == candidate.time_s
    assert 3 == by_name["layers.0.attention"].zero_stage
    assert Recompute.FULL is by_name["layers.1.attention"].recompute
    assert Recompute.FULL is by_name["layers.1.feed_forward"].recompute
    assert 1 < candidate.plan.mesh.dp_shard


def test_where_nothing_fits_it_says_so() -> None:
    context = tiny_context(memory_bytes=100_000)
    with pytest.raises(NoFeasiblePlan, match=r"tiny-gpt:16:cpu:4: no plan of \d+ rows fits"):
        instance_of(context, reference=lambda _: 1.0, store=True, max_plans=20)
    with pytest.raises(NoFeasiblePlan, match="nothing fits"):
        instance_of(context, reference=lambda _: float("inf"), max_plans=20)


def test_without_a_rule_that_fits_a_plan_is_the_reference() -> None:
    context = tiny_context(memory_bytes=NARROW_BYTES)
    instance = instance_of(context, reference=lambda _: float("inf"), max_plans=20)
    again = replace(instance, reference_s=1.0)

    assert best_of(again)[0] <= instance.reference_s < 10.0
