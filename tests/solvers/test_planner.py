"""From a graph to a plan."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field

import pytest

from meshwright.cluster import parse_cluster
from meshwright.cluster.model import Cluster
from meshwright.cost.pricing import Pricing
from meshwright.cost.step import TIME_CAUSES
from meshwright.errors import BadRequest, NoFeasiblePlan
from meshwright.plans import check_plan, plan_text
from meshwright.plans.plan import JobSpec, Precision
from meshwright.solvers.planner import PlanningResult, plan_graph
from meshwright.solvers.rules import RULES
from meshwright.space.search import SearchContext, SolveResult, SolveStatus
from tests.cost.graphs import tiny_gpt, whole_batch, zoo
from tests.cost.learned import CachedOperators


def small_memory(cluster: Cluster, memory_bytes: int) -> Cluster:
    hosts = tuple(
        dataclasses.replace(
            host, device=dataclasses.replace(host.device, memory_bytes=memory_bytes)
        )
        for host in cluster.hosts
    )
    return dataclasses.replace(cluster, hosts=hosts)


def planned(cluster: Cluster | str, *, batch: int = 16, top: int = 5) -> PlanningResult:
    where = parse_cluster(cluster) if isinstance(cluster, str) else cluster
    job = JobSpec(global_batch=batch)
    return plan_graph(tiny_gpt(batch), reference="tiny", cluster=where, job=job, top=top)


def test_one_device_runs_the_model_as_it_is() -> None:
    plan = planned("1xh100").plan

    assert 1 == plan.mesh.num_devices
    assert 0 == plan.segments[0].zero_stage


def test_what_fits_one_device_is_replicated_and_explained() -> None:
    """Two layers of GPT-2 on 8 A100, a large batch: plain data parallelism wins."""
    result = plan_graph(
        zoo("gpt2?num_layers=2", 512, "bfloat16"),
        reference="gpt2",
        cluster=parse_cluster("8xa100"),
        job=JobSpec(global_batch=512, precision=Precision.BF16),
    )

    assert (8, 1, 1, 1) == (
        result.plan.mesh.data_parallel,
        result.plan.mesh.tp,
        result.plan.mesh.pp,
        result.plan.mesh.dp_shard,
    )
    assert "fits one device" in result.search.reason


def test_plans_are_well_formed_and_predicted() -> None:
    result = planned("cpu:4")
    model = result.context.model
    for plan in (result.plan, *(other.plan for other in result.alternatives)):
        plan_text(plan)
        check_plan(
            plan,
            num_devices=4,
            num_segments=len(model.segment_classes),
            segment_classes=model.segment_classes,
        )
        prediction = plan.prediction

        assert prediction is not None
        assert set(TIME_CAUSES) == set(prediction.breakdown)
        assert pytest.approx(prediction.step_time_s) == sum(prediction.breakdown.values())
        assert prediction.peak_memory_bytes == sum(prediction.memory_breakdown.values())
        assert prediction == model.predict(plan)


def test_the_plan_is_not_worse_than_any_rule() -> None:
    """But for the margin that plain data parallelism is given."""
    result = planned("cpu:4")
    rules = [rule.propose(result.context).candidates[0] for rule in RULES]
    fitting = [candidate.time_s for candidate in rules if candidate.cost.fits]

    assert result.plan.prediction is not None
    assert result.plan.prediction.step_time_s <= min(fitting) * 1.25


def test_every_rule_is_shown() -> None:
    result = planned("cpu:4", top=2)
    solvers = {other.solver for other in result.alternatives} | {result.plan.provenance.solver}

    assert {"data-parallel", "zero3", "megatron", "naive-layers"} <= solvers


def test_a_model_that_fits_no_single_device_is_cut() -> None:
    """Parameters and AdamW state of 27,776 elements take 0.33 MB; devices have 0.25 MB."""
    result = planned(small_memory(parse_cluster("cpu:4"), 250_000))
    mesh = result.plan.mesh
    prediction = result.plan.prediction

    assert prediction is not None
    assert prediction.fits
    assert prediction.peak_memory_bytes <= 250_000
    assert mesh.tp * mesh.pp * mesh.dp_shard > 1
    assert any("does not fit" in other.reason for other in result.alternatives)


def test_nothing_fits() -> None:
    cluster = small_memory(parse_cluster("cpu:2"), 10_000)

    with pytest.raises(NoFeasiblePlan, match=r"tiny: nothing fits 2 devices .* needs .* of? ?.*"):
        planned(cluster)


def test_the_batch_must_be_the_captured_one() -> None:
    with pytest.raises(BadRequest, match=r"captured with a batch of 16 .* global batch is 12"):
        plan_graph(
            tiny_gpt(16),
            reference="tiny",
            cluster=parse_cluster("cpu:2"),
            job=JobSpec(global_batch=12),
        )


def test_unknown_level() -> None:
    with pytest.raises(BadRequest, match="O9"):
        plan_graph(
            tiny_gpt(16),
            reference="tiny",
            cluster=parse_cluster("cpu:2"),
            job=JobSpec(global_batch=16),
            level="O9",
        )


def test_a_loss_of_the_whole_batch_is_not_cut_into_micro_batches() -> None:
    result = plan_graph(
        whole_batch(),
        reference="whole",
        cluster=parse_cluster("cpu:2"),
        job=JobSpec(global_batch=8),
    )

    assert not result.context.can_split_step
    assert 1 == result.plan.num_microbatches


def test_a_batch_that_does_not_divide_leaves_devices_idle_or_cuts_the_model() -> None:
    """Three devices, a batch of 16: data parallel over 2 of them, or something over 3."""
    plan = planned("cpu:3").plan

    assert 0 == 16 % (plan.mesh.data_parallel * plan.num_microbatches)
    assert plan.mesh.num_devices <= 3


def test_planning_twice_gives_the_same_plan() -> None:
    assert plan_text(planned("cpu:4").plan) == plan_text(planned("cpu:4").plan)


def test_no_plan_is_faster_than_the_bound() -> None:
    result = planned("cpu:4")
    times_s = [
        plan.prediction.step_time_s
        for plan in (result.plan, *(other.plan for other in result.alternatives))
        if plan.prediction is not None
    ]

    assert 0 < result.search.lower_bound_s <= min(times_s)


@pytest.mark.parametrize("cluster", ["1xh100", "4xh100"])
def test_no_plan_is_faster_than_the_bound_where_parts_fit_a_cache(cluster: str) -> None:
    """A share of an operator may be priced below its share of the whole operator."""
    result = plan_graph(
        tiny_gpt(16),
        reference="tiny",
        cluster=parse_cluster(cluster),
        job=JobSpec(global_batch=16),
        pricing=Pricing(operators=CachedOperators(cache_bytes=65536.0)),
        top=100,
    )
    times_s = [
        plan.prediction.step_time_s
        for plan in (result.plan, *(other.plan for other in result.alternatives))
        if plan.prediction is not None
    ]

    assert 0 < result.search.lower_bound_s <= min(times_s)


@pytest.mark.slow
def test_a_large_gpt_is_cut_in_every_direction() -> None:
    """GPT-3's width, 8 of its layers, on 64 GPUs of 40 GB: too large for one, and it fits."""
    result = plan_graph(
        zoo("gpt3-175b?num_layers=8", 64, "bfloat16"),
        reference="gpt3",
        cluster=parse_cluster("64xa100-40gb"),
        job=JobSpec(global_batch=64, precision=Precision.BF16),
    )
    prediction = result.plan.prediction

    assert prediction is not None
    assert prediction.fits
    assert 64 == result.plan.mesh.num_devices
    assert 0.2 < prediction.mfu < 0.7


@dataclass
class Listening:
    """Has nothing to say, but hears until when it is asked."""

    name: str = "listening"
    left_s: list[float | None] = field(default_factory=list)

    def propose(self, context: SearchContext, deadline_s: float | None = None) -> SolveResult:
        self.left_s.append(None if deadline_s is None else deadline_s - time.monotonic())
        return SolveResult(
            candidates=(), evaluations=0, seconds=0.0, status=SolveStatus.NOT_APPLICABLE
        )


def test_further_proposers_come_after_the_rules_and_leave_others_half_of_the_time() -> None:
    further = Listening()

    def asked(budget_s: float | None) -> list[str]:
        found = plan_graph(
            tiny_gpt(16),
            reference="tiny",
            cluster=parse_cluster("2xa100"),
            job=JobSpec(global_batch=16),
            proposers=[further],
            budget_s=budget_s,
        )
        return [solver.name for solver in found.search.solvers]

    rules = [rule.name for rule in RULES]

    assert [*rules, "listening", "exhaustive", "one-pool"] == asked(None) == asked(1000.0)
    assert further.left_s[0] is None
    assert pytest.approx(500.0, abs=30.0) == further.left_s[1]
