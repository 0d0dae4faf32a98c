"""fp8: bf16 training whose linear layers multiply in fp8."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from meshwright.cluster.model import Cluster, Device, Host, Link
from meshwright.cost.calibration import DEFAULTS
from meshwright.cost.model import split_of
from meshwright.cost.precision import CURRENT_CAST, FP8, pricing_for
from meshwright.cost.pricing import ANALYTIC
from meshwright.cost.work import DTYPES, Family
from meshwright.errors import BadRequest, PlanRefused
from meshwright.graph.opgraph import OpGraph
from meshwright.plans.plan import JobSpec, OptimizerName, OptimizerSpec, Precision
from meshwright.plans.runnable import check_runnable, unrunnable_reasons
from meshwright.solvers.planner import make_context, plan_graph
from meshwright.space.search import SearchContext
from tests.cost.graphs import zoo
from tests.cost.plans import context_of, uniform_plan

GPT = "gpt2?num_layers=1&hidden=32&num_heads=2&vocab_size=96&seq_len=16"


@pytest.fixture(scope="module")
def graph() -> OpGraph:
    return zoo(GPT, 8, "bfloat16")


def toy(*, memory_bytes_per_s: float) -> Cluster:
    """A device that multiplies twice as fast in fp8."""
    device = Device(
        name="toy",
        memory_bytes=2**30,
        memory_bytes_per_s=memory_bytes_per_s,
        flop_per_s={"float32": 10.0, "bfloat16": 100.0, FP8: 200.0},
        launch_latency_s=0.0,
        source="test",
    )
    link = Link(name="toy", bytes_per_s=1.0, latency_s=0.0, source="test")
    return Cluster(name="toy", hosts=(Host(device=device, num_devices=1, link=link),), levels=())


def context_on(graph: OpGraph, precision: Precision, memory_bytes_per_s: float) -> SearchContext:
    job = JobSpec(
        global_batch=8, precision=precision, optimizer=OptimizerSpec(name=OptimizerName.SGD)
    )
    cluster = toy(memory_bytes_per_s=memory_bytes_per_s)
    return make_context(graph, reference="toy", cluster=cluster, job=job)


def step_time_s(graph: OpGraph, precision: Precision, memory_bytes_per_s: float) -> float:
    context = context_on(graph, precision, memory_bytes_per_s)
    return context.model.predict(uniform_plan(context)).step_time_s


def test_only_linear_layers_run_at_the_fp8_peak(graph: OpGraph) -> None:
    """Of 12 h^2 parameters of a layer each takes 6 flop a token: half of that time is saved.

    Nothing of logits, embeddings and attention.
    """
    tokens, hidden = 8 * 16, 32
    saved_flop = 6 * tokens * 12 * hidden**2 / 2

    before, after = (step_time_s(graph, p, 1e15) for p in (Precision.BF16, Precision.FP8))

    reached = 100.0 * DEFAULTS.flop_efficiency
    assert saved_flop / reached == pytest.approx(before - after, rel=1e-6)


def test_casts_are_traffic(graph: OpGraph) -> None:
    """Where arithmetic costs nothing the casts are all that fp8 adds."""
    before = context_on(graph, Precision.BF16, 1.0)
    after = context_on(graph, Precision.FP8, 1.0)
    table = after.model.whole_table(1)
    (roofline,) = after.model.pricer.rooflines.values()
    work, _ = table.operator_work(split_of(uniform_plan(after)), roofline)
    cast = work.dtype == DTYPES.index(FP8)

    assert {Family.MATMUL} == {Family(f) for f in work.family[cast]}
    assert CURRENT_CAST == roofline.kernels.cast_bytes
    slower_s = [
        context.model.predict(uniform_plan(context)).breakdown["compute"]
        for context in (before, after)
    ]
    # Three products for each linear layer: inputs, weights and gradients are each in two of them.
    tokens, h = 8 * 16, 32
    sizes = [*[(h, h)] * 4, (h, 4 * h), (4 * h, h)]
    operands = sum(2 * (tokens * k + k * n + tokens * n) for k, n in sizes)
    expected_s = operands * CURRENT_CAST / DEFAULTS.memory_efficiency
    assert expected_s == pytest.approx(slower_s[1] - slower_s[0], rel=1e-6)


def test_memory_and_communication_are_those_of_bf16(graph: OpGraph) -> None:
    predicted = []
    for precision in (Precision.BF16, Precision.FP8):
        context = context_of(graph, "4xh100", 8, precision)
        plan = uniform_plan(context, dp_shard=2, tp=2)
        predicted.append(context.model.predict(plan))

    bf16, fp8 = predicted
    assert bf16.memory_breakdown == fp8.memory_breakdown
    assert 0 < bf16.breakdown["tp_communication"] == fp8.breakdown["tp_communication"]


def test_a_device_without_fp8_is_refused_with_those_that_have(graph: OpGraph) -> None:
    with pytest.raises(BadRequest, match=r"fp8: a100-\S+ has no units for it; .*h100.*b200"):
        context_of(graph, "4xa100", 8, Precision.FP8)


def test_a_plan_is_made_only_where_it_need_not_run(graph: OpGraph) -> None:
    job = JobSpec(global_batch=8, precision=Precision.FP8)
    where = context_of(graph, "2xh100", 8).cluster

    with pytest.raises(BadRequest, match="plan with --allow-unrunnable, or for bf16"):
        plan_graph(graph, reference="toy", cluster=where, job=job)
    plan = plan_graph(graph, reference="toy", cluster=where, job=job, allow_unrunnable=True).plan

    assert Precision.FP8 is plan.job.precision
    assert "$.job.precision: the runtime does not train in fp8" in unrunnable_reasons(plan)
    assert unrunnable_reasons(plan) == plan.unrunnable
    with pytest.raises(PlanRefused, match="plan without it to run"):
        check_runnable(plan)
    bf16 = msgspec.structs.replace(plan, job=msgspec.structs.replace(job, precision=Precision.BF16))
    assert not [line for line in unrunnable_reasons(bf16) if "fp8" in line]


@pytest.mark.parametrize("precision", [one for one in Precision if one is not Precision.FP8])
def test_other_precisions_leave_prices_as_they_are(precision: Precision) -> None:
    assert ANALYTIC is pricing_for(ANALYTIC, precision)
    assert FP8 == pricing_for(ANALYTIC, Precision.FP8).calibration.matmul_dtype
    assert np.isfinite(pricing_for(ANALYTIC, Precision.FP8).calibration.cast_bytes)
