"""Pins: read strictly, respected by what they allow, carried out on modules."""

from __future__ import annotations

import pytest

from meshwright.cluster import parse_cluster
from meshwright.errors import BadRequest
from meshwright.plans.plan import Recompute, ScheduleName, SegmentPlan
from meshwright.solvers.decision import Sharding, Skeleton, Strategy
from meshwright.solvers.pins import ModulePin, parse_pins


def test_every_kind_of_pin_is_read() -> None:
    pins = parse_pins(
        [
            "tp=8",
            "no-pipeline",
            "microbatches=4",
            "schedule=gpipe",
            "zero=3",
            "recompute=full",
            "sequence-parallel=no",
            "layers.*.mlp:tp=inner, heads",
            "layers.0-3:zero=1",
            "stage.1:host=2",
        ]
    )

    assert dict(pins.sizes) == {"tp": 8, "pp": 1}
    assert pins.num_microbatches == 4
    assert pins.schedule is ScheduleName.GPIPE
    assert pins.zero_stage == 3
    assert pins.recompute is Recompute.FULL
    assert pins.sequence_parallel is False
    assert [pin.labels for pin in pins.modules] == [("tp", ("inner", "heads")), None]
    assert pins.modules[1].zero_stage == 1
    assert pins.hosts == ((1, 2),)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("tp", "write KEY=VALUE"),
        ("tp=0", "no whole number"),
        ("tp=two", "no whole number"),
        ("zero=4", "no whole number from 0 to 3"),
        ("color=red", "cannot pin 'color'"),
        ("layers:pp=2", "cannot pin 'pp' for a module"),
        ("stage.0:rack=1", "to a host only"),
        ("schedule=fast", "is not one of"),
        ("sequence-parallel=maybe", "neither yes nor no"),
    ],
)
def test_a_bad_pin_is_explained(text: str, problem: str) -> None:
    with pytest.raises(BadRequest, match=problem):
        parse_pins([text])


def test_pins_that_disagree_are_refused() -> None:
    with pytest.raises(BadRequest, match="keep one of them"):
        parse_pins(["tp=2", "tp=4"])


def test_skeletons_and_strategies() -> None:
    pins = parse_pins(["tp=2", "dp=4", "microbatches=2", "zero=3"])
    fits = Skeleton.of({"tp": 2, "dp_replicate": 2, "dp_shard": 2}, num_microbatches=2)
    sharding = Sharding(name="any", by_class=())

    assert pins.allows_skeleton(fits)
    assert not pins.allows_skeleton(Skeleton.of({"tp": 2, "dp_shard": 2}, num_microbatches=2))
    assert not pins.allows_skeleton(Skeleton.of({"tp": 2, "dp_shard": 4}, num_microbatches=1))
    assert pins.allows_strategy(Strategy(sharding=sharding, zero_stage=3))
    assert not pins.allows_strategy(Strategy(sharding=sharding))


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("layers.*.mlp", "layers.3.mlp", True),
        ("layers.*.mlp", "layers.3.mlp.up", True),
        ("layers.*.mlp", "layers.3.attention", False),
        ("layers.0-3", "layers.3.mlp", True),
        ("layers.0-3", "layers.4.mlp", False),
        ("*", "anything", True),
        ("encoder", "encoder2", False),
    ],
)
def test_module_patterns(pattern: str, name: str, expected: bool) -> None:
    assert ModulePin(text="", pattern=pattern).matches(name) is expected


def test_a_module_pin_changes_only_what_it_names() -> None:
    before = SegmentPlan(
        segment_class=0, name="a", shard={"tp": ["heads"], "dp_shard": ["batch"]}, zero_stage=1
    )

    labels = parse_pins(["a:tp=inner"]).modules[0].applied(before)
    recompute = parse_pins(["a:recompute=full"]).modules[0].applied(before)

    assert labels.shard == {"tp": ["inner"], "dp_shard": ["batch"]}
    assert (labels.zero_stage, labels.recompute) == (1, Recompute.NONE)
    assert recompute.recompute is Recompute.FULL
    assert recompute.shard == before.shard


def test_pins_nothing_can_meet_are_named() -> None:
    cluster = parse_cluster("8xa100-40gb")
    names = ["embedding", "layers.0"]

    with pytest.raises(BadRequest, match="multiple of 3 devices"):
        parse_pins(["tp=3"]).check(cluster=cluster, names=names, known_labels={"heads"})
    with pytest.raises(BadRequest, match="no module matches 'head'"):
        parse_pins(["head:zero=1"]).check(cluster=cluster, names=names, known_labels={"heads"})
    with pytest.raises(BadRequest, match="no dimension class 'wings'"):
        parse_pins(["layers:tp=wings"]).check(cluster=cluster, names=names, known_labels={"heads"})
    with pytest.raises(BadRequest, match="hosts 0 to 0"):
        parse_pins(["stage.0:host=1"]).check(cluster=cluster, names=names, known_labels=set())
