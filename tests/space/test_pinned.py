"""What the user has decided holds for the plan that wins."""

from __future__ import annotations

from typing import Any

import pytest

from meshwright.cluster import parse_cluster
from meshwright.errors import BadRequest, NoFeasiblePlan
from meshwright.plans.plan import JobSpec, ParallelPlan, Recompute, ScheduleName, SegmentPlan
from meshwright.solvers.planner import PlanningResult, plan_graph
from meshwright.space.pins import parse_pins
from tests.cost.graphs import tiny_gpt


def pinned(*texts: str, **options: Any) -> ParallelPlan:
    return planned(*texts, **options).plan


def planned(*texts: str, cluster: str = "4xh100", **options: Any) -> PlanningResult:
    return plan_graph(
        tiny_gpt(16),
        reference="tiny",
        cluster=parse_cluster(cluster),
        job=JobSpec(global_batch=16),
        pins=parse_pins(texts),
        **options,
    )


def test_sizes_and_micro_batches() -> None:
    plan = pinned("tp=2", "pp=2", "microbatches=4", "schedule=gpipe")

    assert (2, 2, 4) == (plan.mesh.tp, plan.mesh.pp, plan.num_microbatches)
    assert plan.schedule is ScheduleName.GPIPE


def test_zero_and_sequence_parallel() -> None:
    plan = pinned("tp=2", "dp=2", "zero=3", "sequence-parallel=yes")

    assert {3} == {segment.zero_stage for segment in plan.segments}
    assert any("sequence" in segment.shard["tp"] for segment in plan.segments)


def test_modules() -> None:
    plan = pinned("layers.0:recompute=full", "layers.*:tp=inner", "tp=2")
    layers = [segment for segment in plan.segments if segment.name.startswith("layers.")]

    assert [["inner"]] * len(layers) == [segment.shard["tp"] for segment in layers]
    assert {segment.name: segment.recompute is Recompute.FULL for segment in layers} == {
        segment.name: segment.name.startswith("layers.0") for segment in layers
    }


def test_a_stage_stays_on_its_host() -> None:
    plan = pinned("pp=2", "dp=4", "stage.0:host=1", cluster="2x4xh100")

    assert [4, 0] == [stage.first_device for stage in plan.stages]


def test_pins_that_leave_nothing_are_named() -> None:
    with pytest.raises(NoFeasiblePlan, match=r"without pp=4 or without zero=3 there is a plan"):
        pinned("pp=4", "zero=3")


def test_pins_of_one_axis_take_it() -> None:
    """Nothing but the pin speaks for more than one device here."""
    sequence = pinned("sequence-parallel=yes")
    inner = pinned("layers.0.feed_forward:tp=inner")
    zero = pinned("layers.0:zero=3")

    assert sequence.mesh.tp > 1
    assert any("sequence" in segment.shard["tp"] for segment in sequence.segments)
    assert inner.mesh.tp > 1
    assert ["inner"] == named(inner, "layers.0.feed_forward").shard["tp"]
    assert zero.mesh.dp_shard > 1
    assert 3 == named(zero, "layers.0.feed_forward").zero_stage
    assert pinned("schedule=gpipe").mesh.pp > 1


def named(plan: ParallelPlan, name: str) -> SegmentPlan:
    return next(segment for segment in plan.segments if segment.name == name)


def test_every_hybrid_grid_can_be_pinned() -> None:
    plan = pinned("dp_replicate=2", "dp_shard=4", cluster="8xh100")
    other = pinned("dp_replicate=4", "dp_shard=2", cluster="2x4xh100")

    assert (2, 4) == (plan.mesh.dp_replicate, plan.mesh.dp_shard)
    assert (4, 2) == (other.mesh.dp_replicate, other.mesh.dp_shard)
    assert 0 not in {segment.zero_stage for segment in (*plan.segments, *other.segments)}


def test_context_and_wide_tensor_parallelism_can_be_pinned() -> None:
    assert 2 == pinned("cp=2").mesh.cp
    assert 8 == pinned("tp=8", cluster="2x4xh100").mesh.tp


def test_module_pins_hold_for_every_plan_of_a_wide_search() -> None:
    result = planned("layers.*.feed_forward:recompute=full", "recompute=none", level="O2", top=50)

    for plan in (result.plan, *(other.plan for other in result.alternatives)):
        for segment in plan.segments:
            is_full = segment.recompute is Recompute.FULL
            assert is_full == segment.name.endswith("feed_forward")


@pytest.mark.parametrize("rule", ["data-parallel", "zero3", "megatron", "naive-layers"])
def test_a_rule_answers_alone(rule: str) -> None:
    result = planned(rule=rule)

    assert rule == result.plan.provenance.solver
    assert () == result.alternatives
    assert [rule] == [solver.name for solver in result.search.solvers]
    assert f"the rule {rule}" in result.search.reason


def test_rules_know_the_pins() -> None:
    with pytest.raises(NoFeasiblePlan, match=r"--rule megatron: .* without zero=3 there is a plan"):
        planned("zero=3", rule="megatron")
    with pytest.raises(BadRequest, match="no rule 'best'; use one of data-parallel, zero3"):
        planned(rule="best")

    assert 2 == planned("tp=2", rule="megatron").plan.mesh.tp


def test_a_plan_remembers_what_it_was_made_with() -> None:
    plan = pinned("pp=2", "schedule=interleaved", allow_unrunnable=True)

    assert plan.provenance.allow_unrunnable
    assert ["pp=2", "schedule=interleaved"] == plan.provenance.pins
    assert not pinned().provenance.allow_unrunnable


def test_a_schedule_the_runtime_cannot_run_wins_only_when_allowed() -> None:
    with pytest.raises(
        NoFeasiblePlan,
        match=r"with --fix schedule=zb-h1 a plan cannot run yet .*--allow-unrunnable",
    ):
        pinned("pp=2", "schedule=zb-h1")

    plan = pinned("pp=2", "schedule=zb-h1", allow_unrunnable=True)

    assert plan.schedule is ScheduleName.ZB_H1
    assert plan.unrunnable
