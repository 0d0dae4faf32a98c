"""Module pins reach the segments whose work they name, and searches see nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from meshwright.cluster import parse_cluster
from meshwright.errors import BadRequest, NoFeasiblePlan
from meshwright.plans.plan import JobSpec, Recompute
from meshwright.solvers.planner import make_context
from meshwright.space.decision import Skeleton, Strategy
from meshwright.space.evaluate import PlanSpace, price_decision
from meshwright.space.linear import linear_costs
from meshwright.space.module_pins import readable_names
from meshwright.space.pinned import check_pins
from meshwright.space.pins import parse_pins
from meshwright.space.search import SearchContext
from meshwright.space.skeletons import strategies_for
from tests.cost.graphs import tiny_gpt

TP2 = Skeleton.of({"dp_shard": 2, "tp": 2}, num_microbatches=2)
ATTENTION, FEED_FORWARD = (2, 4), (3, 5)


@pytest.fixture(scope="module")
def plain() -> SearchContext:
    return make_context(
        tiny_gpt(16),
        reference="tiny",
        cluster=parse_cluster("8xh100"),
        job=JobSpec(global_batch=16),
    )


def pinned(context: SearchContext, *texts: str) -> SearchContext:
    return replace(context, pins=parse_pins(texts))


def reached(context: SearchContext, text: str) -> list[int]:
    of_segment = pinned(context, text).module_pins.of_segment
    return [number for number, mine in enumerate(of_segment) if mine]


@pytest.mark.parametrize(
    ("pattern", "segments"),
    [
        ("layers.*.attention", [2, 4]),
        ("layers.*.feed_forward", [3, 5]),
        ("layers.1", [4, 5]),
        ("layers.0-1", [2, 3, 4, 5]),
        ("embedding", [0, 1]),
        ("head", [6]),
        ("segment.6", [6]),
        ("segment.1-2", [1, 2]),
        ("*", [0, 1, 2, 3, 4, 5, 6]),
        # Half of the work of a feed-forward half.
        ("layers.0.feed_forward.up", [3]),
    ],
)
def test_patterns_reach_segments(plain: SearchContext, pattern: str, segments: list[int]) -> None:
    assert segments == reached(plain, f"{pattern}:recompute=full")


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        (["layers.*.mlp:zero=1"], "the model has embedding.token, embedding, layers.0-1.attention"),
        (["layers.1.attention.query:zero=1"], "is a small part of layers.1.attention, and a plan"),
        (
            ["layers.*:tp=heads"],
            "layers.0.feed_forward has no dimension class heads, but .*; pin the modules that have "
            "it: layers.0-1.attention",
        ),
        (
            ["layers.0:recompute=full", "layers.*.attention:recompute=none"],
            "layers.0:recompute=full decides otherwise for layers.0.attention",
        ),
    ],
)
def test_pins_no_segment_can_meet(plain: SearchContext, texts: list[str], problem: str) -> None:
    with pytest.raises(BadRequest, match=problem):
        check_pins(pinned(plain, *texts))


def test_pins_that_cut_nothing(plain: SearchContext) -> None:
    """The graph has 4 heads and sequences of 8 tokens."""
    with pytest.raises(NoFeasiblePlan, match=r"cuts nothing: .* heads has 4, which tp=8 does not"):
        check_pins(pinned(plain, "*.attention:tp=heads", "tp=8"))
    with pytest.raises(NoFeasiblePlan, match=r"cuts nothing: .* 8 parts, which tp=3 does not"):
        check_pins(
            replace(pinned(plain, "sequence-parallel=yes", "tp=3"), cluster=parse_cluster("6xh100"))
        )
    attention = pinned(plain, "*.attention:tp=heads")
    assert attention.allows(Skeleton.of({"tp": 4}))
    assert not attention.allows(Skeleton.of({"tp": 8}))


def test_every_segment_prices_its_own_form(plain: SearchContext) -> None:
    """ZeRO 3 and full recompute on two segments, a label of their own on two others."""
    context = pinned(
        plain, "layers.0.feed_forward:zero=3", "layers.1:recompute=full", "*.attention:tp=heads"
    )
    base = [s for s in strategies_for(context, TP2) if s.sharding.name == "tensor"][:2]
    space = PlanSpace(context, TP2, base)
    assignment = np.zeros((1, space.num_segments), dtype=np.int64)
    found = space.evaluate(assignment, np.zeros((1, 1), dtype=np.int64))
    decision = space.decision(assignment[0], np.zeros(1, dtype=np.int64))
    exact = price_decision(context, decision)
    written = context.module_pins.strategies(decision.strategies)

    assert [3 if number == 3 else base[0].zero_stage for number in range(7)] == [
        one.zero_stage for one in written
    ]
    assert [number in (4, 5) for number in range(7)] == [
        one.recompute is Recompute.FULL for one in written
    ]
    for number in ATTENTION:
        assert ["heads"] == written[number].sharding.labels_of(2)["tp"]
    assert pytest.approx(exact.time_s, rel=1e-6) == float(found.time_s[0])
    assert exact.time_s != price_decision(replace(context, pins=plain.pins), decision).time_s


def test_what_searches_may_choose_costs_what_its_form_costs(plain: SearchContext) -> None:
    context = pinned(plain, "layers.*.feed_forward:recompute=full", "recompute=none")
    base = strategies_for(context, TP2)
    space = PlanSpace(context, TP2, base)
    costs = linear_costs(space)

    assert {Recompute.NONE} == {strategy.recompute for strategy in base}
    assert base == space.strategies[: len(base)]
    for number, strategy in enumerate(space.strategies):
        other = replace(strategy, recompute=Recompute.NONE)
        same = space.strategies.index(other)
        assert (costs.kept_bytes[:, same] == costs.kept_bytes[:, number]).all()
    free = linear_costs(PlanSpace(plain, TP2, base))
    assert [segment in FEED_FORWARD for segment in range(7)] == (
        costs.kept_bytes[:, 0] < free.kept_bytes[:, 0]
    ).tolist()


def test_labels_for_a_whole_class_are_one_sharding(plain: SearchContext) -> None:
    """No neighbors of unequal sharding, so nothing is estimated between them."""
    base = [s for s in strategies_for(plain, TP2) if s.sharding.name == "tensor"]
    whole, some = (
        PlanSpace(pinned(plain, text), TP2, base)
        for text in ("*.attention:tp=heads", "layers.0.attention:tp=heads")
    )

    assert 1 == len({whole.costs.shardings[k] for k in _used(whole)})
    assert 2 == len({some.costs.shardings[k] for k in _used(some)})


def _used(space: PlanSpace) -> set[int]:
    written = space.context.module_pins.strategies((space.strategies[0],) * space.num_segments)
    return {space.costs.shardings.index(one.sharding) for one in written}


def test_without_module_pins_strategies_stay(plain: SearchContext) -> None:
    strategy = Strategy(sharding=strategies_for(plain, TP2)[0].sharding)

    assert ((strategy,), None) == plain.module_pins.forms([strategy])
    assert (strategy,) * 7 == plain.module_pins.strategies((strategy,) * 7)


def test_names_are_patterns_that_pins_take() -> None:
    names = dict(enumerate(["a.0.x", "a.1.x", "a.3.x", "b.1.2", "", "b.4.2"]))

    assert ["a.0-3.x", "b.1-4.2", "segment.4"] == readable_names(names)
