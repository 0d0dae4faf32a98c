"""Pins: read strictly, respected by what they allow, carried out on modules."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshwright.cluster import parse_cluster
from meshwright.errors import BadRequest
from meshwright.plans.plan import Compression, Recompute, ScheduleName
from meshwright.solvers.exhaustive import Exhaustive
from meshwright.space.decision import Sharding, Skeleton, Strategy
from meshwright.space.pins import ModulePin, parse_pins
from meshwright.space.search import Candidate
from tests.solvers.operator_problems import context_of

GPT = "tiny-gpt?num_layers=2&hidden=256&num_heads=4&vocab_size=512&seq_len=128"


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


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        ("sequence-parallel=yes", "tp"),
        ("layers.0:tp=inner", "tp"),
        ("layers.0:zero=3", "dp_shard"),
        ("zero=1", "dp_shard"),
        ("schedule=gpipe", "pp"),
        ("stage.1:host=0", "pp"),
    ],
)
def test_a_pin_asks_for_the_axis_it_speaks_of(text: str, axis: str) -> None:
    pins = parse_pins([text])
    stages = 2 if axis == "pp" else 1
    sizes = {} if axis == "pp" else {axis: 2}

    assert [axis] == list(pins.needs)
    assert pins.asks_for(axis)
    assert pins.allows_skeleton(Skeleton.of(sizes, num_stages=stages))
    assert not pins.allows_skeleton(Skeleton.of({"dp_replicate": 4}))


@pytest.mark.parametrize(
    "text", ["zero=0", "recompute=full", "sequence-parallel=no", "layers.0:tp=", "stage.0:host=0"]
)
def test_other_pins_ask_for_no_axis(text: str) -> None:
    assert {} == parse_pins([text]).needs


def test_interleaved_stages_take_micro_batches_in_rounds() -> None:
    pins = parse_pins(["schedule=interleaved"])

    assert pins.allows_skeleton(Skeleton.of({}, num_stages=2, num_microbatches=4))
    assert not pins.allows_skeleton(Skeleton.of({}, num_stages=2, num_microbatches=3))


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        (["tp=3"], "multiple of 3 devices"),
        (["stage.0:host=1"], "hosts 0 to 0"),
        (["tp=1", "sequence-parallel=yes"], "needs tp of 2 or more, but tp=1 is pinned"),
        (["no-pipeline", "schedule=1f1b"], "needs pp of 2 or more, but pp=1 is pinned"),
        (["dp=1", "layers.0:zero=2"], "needs dp_shard of 2 or more, but dp=1 is pinned"),
        (["dp_shard=2", "zero=0"], "shards nothing under zero=0"),
    ],
)
def test_pins_the_cluster_or_one_another_rule_out(texts: list[str], problem: str) -> None:
    with pytest.raises(BadRequest, match=problem):
        parse_pins(texts).check(parse_cluster("8xa100-40gb"))


def test_offload_needs_a_way_to_the_host() -> None:
    cluster = parse_cluster("2xa100-40gb")
    cut_off = replace(cluster.hosts[0].device, to_host_bytes_per_s=0.0)
    hosts = tuple(replace(host, device=cut_off) for host in cluster.hosts)
    pins = parse_pins(["layers.0:offload=yes"])

    pins.check(cluster)
    with pytest.raises(BadRequest, match="no way to their host's memory"):
        pins.check(replace(cluster, hosts=hosts))


def test_compression_is_asked_for_and_pays_only_on_slow_links() -> None:
    """Between two hosts int8 is worth its passes over the values."""
    slow = replace(context_of(GPT, 16, "2x1xt4"), allow_unrunnable=True)
    texts = ("pp=2", "microbatches=4")

    def planned(*pins: str) -> list[Candidate]:
        context = replace(slow, pins=parse_pins([*texts, *pins]))
        return list(Exhaustive().propose(context).candidates)

    plain, small = planned()[0], planned("compress-pp=int8")[0]

    assert Compression.INT8 is small.plan.communication.pipeline
    assert small.time_s < plain.time_s
    assert small.plan.unrunnable
    assert all(Compression.NONE is c.plan.communication.pipeline for c in planned())
