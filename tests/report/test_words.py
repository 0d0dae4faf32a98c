"""Plans and predictions in words, tables and Markdown."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

import msgspec
import pytest
from rich.console import Console, RenderableType

from meshwright.cost.pricing import MemoryMargin
from meshwright.plans import (
    GraphReference,
    JobSpec,
    Mesh,
    ParallelPlan,
    Prediction,
    Provenance,
    Recompute,
    ScheduleName,
    SegmentPlan,
    Stage,
)
from meshwright.records import (
    Machine,
    PredictedStep,
    RankMemory,
    Software,
    StepReport,
    Verified,
    timing_of,
)
from meshwright.report import (
    DemoRun,
    DemoSummary,
    breakdown_tables,
    cause_words,
    demo_markdown,
    measured_table,
    memory_margin_words,
    mesh_words,
    plans_table,
    prediction_words,
    schedule_words,
    segments_table,
    shard_words,
    source_of,
    speed_up_words,
)


def segment(**changes: object) -> SegmentPlan:
    values: dict[str, object] = {"segment_class": 0, "name": "layers.0", "shard": {}}
    return SegmentPlan(**(values | changes))  # type: ignore[arg-type]


def plan_of(*, mesh: Mesh, segments: list[SegmentPlan], num_microbatches: int = 1) -> ParallelPlan:
    per_stage = mesh.num_devices_per_stage
    return ParallelPlan(
        model=GraphReference(
            reference="m", graph_sha256="ab", num_parameters=1, num_segments=mesh.pp
        ),
        cluster="cpu:4",
        job=JobSpec(global_batch=8),
        mesh=mesh,
        num_microbatches=num_microbatches,
        stages=[
            Stage(
                first_segment=number,
                last_segment=number,
                first_device=number * per_stage,
                num_devices=per_stage,
            )
            for number in range(mesh.pp)
        ],
        segments=segments,
        prediction=PREDICTION,
        provenance=Provenance(meshwright_version="0", solver="megatron", level="O1"),
    )


PREDICTION = Prediction(
    step_time_s=0.2,
    step_time_interval_s=(0.1, 0.3),
    peak_memory_bytes=2**20,
    memory_capacity_bytes=2**30,
    fits=True,
    mfu=0.5,
    samples_per_s=40.0,
    source=["analytic"],
    breakdown={"compute": 0.15, "bubble": 0.05, "launch": 0.0},
    memory_breakdown={"parameters": 2**19, "activations": 2**19},
)


def report_of(median_s: float) -> StepReport:
    return StepReport(
        plan_sha256="ab",
        model="m",
        graph_sha256="cd",
        cluster="cpu:4",
        mesh={"tp": 2},
        num_microbatches=1,
        precision="fp32",
        step_time=timing_of([median_s]),
        method="by hand",
        memory=[
            RankMemory(
                rank=0,
                parameter_bytes=2**19,
                gradient_bytes=0,
                optimizer_bytes=0,
                activation_bytes=2**19,
            )
        ],
        predicted=PredictedStep(
            step_time_s=0.2,
            step_time_interval_s=(0.1, 0.3),
            peak_memory_bytes=2**20,
            source=["analytic"],
        ),
        verified=Verified(loss=1e-7, gradients=2e-6, parameters=None),
        samples_per_s=1.0,
        machine=Machine(
            processor="a CPU", num_cores=2, memory_bytes=2**30, accelerators=(), system="Linux"
        ),
        software=Software(python="3.11", packages={"torch": "2.13.0"}),
        measured_utc="2026-01-01T00:00:00+00:00",
    )


def rendered(*parts: RenderableType) -> str:
    text = StringIO()
    console = Console(file=text, width=120)
    for part in parts:
        console.print(part)
    return text.getvalue()


def test_meshes() -> None:
    mesh = Mesh(pp=8, dp_shard=16, tp=4)

    assert "pipeline 8 x sharded data 16 x tensor 4" == mesh_words(
        plan_of(mesh=mesh, segments=[segment()])
    )
    assert "one device" == mesh_words(plan_of(mesh=Mesh(), segments=[segment()]))


def test_schedules() -> None:
    piped = plan_of(mesh=Mesh(pp=2), segments=[segment()], num_microbatches=4)

    assert "4 micro-batches, 1F1B" == schedule_words(piped)
    assert ScheduleName.ONE_F_ONE_B == piped.schedule
    assert "one micro-batch" == schedule_words(plan_of(mesh=Mesh(), segments=[segment()]))
    interleaved = msgspec.structs.replace(
        piped, schedule=ScheduleName.INTERLEAVED, stages=piped.stages * 2
    )
    assert "4 micro-batches, interleaved 1F1B with 2 stages each" == schedule_words(interleaved)
    sliced = msgspec.structs.replace(piped, schedule=ScheduleName.GPIPE, token_slices=[5, 3])
    assert "4 micro-batches, GPipe, 2 token slices" == schedule_words(sliced)


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        (
            "batch over 8 devices; heads, else inner over 2 devices",
            {"shard": {"dp_replicate": ["batch"], "dp_shard": ["batch"], "tp": ["heads", "inner"]}},
        ),
        (
            "batch over 8 devices; replicated along tp",
            {"shard": {"dp_replicate": ["batch"], "dp_shard": ["batch"]}},
        ),
        (
            "batch over 8 devices; inner over 2 devices; optimizer state, gradients and parameters "
            "cut over 4 (ZeRO 3); everything recomputed in the backward pass",
            {
                "shard": {"dp_replicate": ["batch"], "dp_shard": ["batch"], "tp": ["inner"]},
                "zero_stage": 3,
                "recompute": Recompute.FULL,
            },
        ),
        (
            "batch over 8 devices; replicated along tp; optimizer state in the host's memory; "
            "1 operator sharded in another way",
            {
                "shard": {"dp_replicate": ["batch"], "dp_shard": ["batch"]},
                "offload": True,
                "operators": {"3": {"tp": ["inner"]}},
            },
        ),
    ],
)
def test_what_a_segment_does(words: str, changes: dict[str, object]) -> None:
    part = segment(**changes)
    plan = plan_of(mesh=Mesh(dp_replicate=2, dp_shard=4, tp=2), segments=[part])

    assert words == shard_words(plan, part)


def test_a_segment_on_one_device() -> None:
    plan = plan_of(mesh=Mesh(), segments=[segment()])

    assert "whole on one device" == shard_words(plan, plan.segments[0])


def test_an_unknown_cause_keeps_its_name() -> None:
    assert "cosmic rays" == cause_words("cosmic_rays")


def test_a_prediction_names_its_source_and_interval() -> None:
    assert (
        "200 ms a step (100 ms to 300 ms, analytic), 1.0 MiB of 1.0 GiB, 40 samples/s, "
        "50.0% of the peak"
    ) == prediction_words(PREDICTION)


def test_a_memory_margin_says_whether_the_percentile_fits() -> None:
    """1 MiB of 1 GiB is predicted."""
    margin = MemoryMargin(
        level=0.99, margin=0.5, runs=12, configurations=5, sources=("megatron", "other")
    )

    assert (
        "Memory, learned: in 99% of configurations at most 50.0% above the prediction (12 runs, "
        "5 configurations of megatron, other), 1.5 MiB, which fits too."
    ) == memory_margin_words(PREDICTION, margin)
    assert memory_margin_words(PREDICTION, replace(margin, margin=1024.0)).endswith(
        "1.0 GiB, more than 1.0 GiB: it may run out of memory."
    )


def test_breakdowns_sum_and_leave_out_nothing_but_zeros() -> None:
    text = rendered(*breakdown_tables(PREDICTION))

    assert "75.0%" in text
    assert "waiting of pipeline stages" in text
    assert "dispatch" not in text
    assert "200 ms" in text
    assert "1.0 MiB" in text


def test_tables_of_plans_and_segments() -> None:
    plan = plan_of(mesh=Mesh(tp=2), segments=[segment(shard={"tp": ["inner"]})])
    text = rendered(plans_table([plan]), segments_table(plan, [12]))

    assert "tensor 2" in text
    assert "megatron" in text
    assert "inner over 2 devices" in text
    assert "12" in text


def test_predicted_against_measured() -> None:
    text = rendered(measured_table(report_of(0.4)))

    assert "2.00" in text  # 0.4 s measured of 0.2 s predicted
    assert "1.00" in text  # memory as predicted


def test_demo_summary_holds_what_was_measured() -> None:
    plan = plan_of(mesh=Mesh(tp=2), segments=[segment()])
    runs = (
        DemoRun(title="the chosen plan", plan=plan, report=report_of(0.4)),
        DemoRun(title="plain data parallelism", plan=plan, report=report_of(0.6)),
    )
    text = demo_markdown(
        DemoSummary(
            models=(("A model", "tiny", "it is the fastest", runs),),
            large=plan,
            large_planning_s=12.0,
            seconds=90.0,
        )
    )

    assert "| the chosen plan: tensor 2 | 200 ms | 400 ms [400 ms, 400 ms], n = 1 |" in text
    assert "| 1.0e-07 | 2.0e-06 | - |" in text
    assert "the chosen plan is 1.50 times as fast as plain data parallelism" in text
    assert "Captured and planned here in 12.0 s" in text


def test_one_run_has_nothing_to_compare() -> None:
    plan = plan_of(mesh=Mesh(tp=2), segments=[segment()])
    run = DemoRun(title="the chosen plan", plan=plan, report=report_of(0.4))

    assert "Nothing was found to compare the chosen plan with." == speed_up_words([run])


def test_every_line_says_where_its_figure_comes_from() -> None:
    prediction = msgspec.structs.replace(
        PREDICTION,
        breakdown={"compute": 0.1, "dp_communication": 0.06, "bubble": 0.04},
        source=["learned", "analytic"],
        sources={"compute": 0.9, "dp_communication": 0.1},
    )
    found = [source_of(prediction, cause) for cause in prediction.breakdown]
    text = rendered(*breakdown_tables(prediction))

    assert ["learned", "out of distribution", "analytic"] == found
    assert "out of distribution" in text
    assert "learned, analytic" in text
