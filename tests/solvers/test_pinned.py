"""What the user has decided holds for the plan that wins."""

from __future__ import annotations

import pytest

from meshwright.cluster import parse_cluster
from meshwright.errors import NoFeasiblePlan
from meshwright.plans.plan import JobSpec, ParallelPlan, Recompute, ScheduleName
from meshwright.solvers.pins import parse_pins
from meshwright.solvers.planner import plan_graph
from tests.cost.graphs import tiny_gpt


def pinned(*texts: str, cluster: str = "4xh100", **options: bool) -> ParallelPlan:
    return plan_graph(
        tiny_gpt(16),
        reference="tiny",
        cluster=parse_cluster(cluster),
        job=JobSpec(global_batch=16),
        pins=parse_pins(texts),
        **options,
    ).plan


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


def test_a_schedule_the_runtime_cannot_run_wins_only_when_allowed() -> None:
    with pytest.raises(NoFeasiblePlan, match=r"cannot run yet .*zb-h1"):
        pinned("pp=2", "schedule=zb-h1")

    plan = pinned("pp=2", "schedule=zb-h1", allow_unrunnable=True)

    assert plan.schedule is ScheduleName.ZB_H1
    assert plan.unrunnable
