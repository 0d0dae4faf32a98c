"""Plans for small built-in models, written without a planner."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from meshwright.capture.captured import capture
from meshwright.capture.references import resolve_model
from meshwright.plans.plan import (
    GraphReference,
    JobSpec,
    Mesh,
    ParallelPlan,
    Precision,
    Provenance,
    Recompute,
    ScheduleName,
    SegmentPlan,
    Stage,
)
from meshwright.records.report import Verified
from meshwright.runtime.dryrun import DryRun, dry_run
from meshwright.runtime.job import TORCH_DTYPES, full_state, global_batch, open_plan
from meshwright.runtime.verify import verify_virtual
from meshwright.spmd.prepared import PreparedGraph, prepare

TP_LABELS = ("heads", "ffn", "inner", "kv_heads", "experts", "vocab")


def uniform_plan(
    reference: str,
    mesh: Mesh,
    *,
    global_batch: int = 8,
    num_microbatches: int = 1,
    zero_stage: int = 0,
    recompute: Recompute = Recompute.NONE,
    precision: Precision = Precision.FP64,
    schedule: ScheduleName = ScheduleName.ONE_F_ONE_B,
    tp_labels: Sequence[str] = TP_LABELS,
) -> ParallelPlan:
    """The same choice for every segment; segments dealt evenly to stages."""
    source = resolve_model(reference)
    dtype = TORCH_DTYPES[precision]
    args, kwargs = source.example_inputs(global_batch, None, "meta", dtype=dtype)
    captured = capture(source.build(dtype), args, kwargs, name=reference)
    prepared = prepare(captured.graph)
    num_segments = len(prepared.segmentation.segments)
    return ParallelPlan(
        model=GraphReference(
            reference=reference,
            graph_sha256=prepared.sha256,
            num_parameters=captured.graph.num_parameters,
            num_segments=num_segments,
        ),
        cluster=f"cpu:{mesh.num_devices}",
        job=JobSpec(global_batch=global_batch, precision=precision),
        mesh=mesh,
        num_microbatches=num_microbatches,
        schedule=schedule,
        stages=_stages(mesh, num_segments),
        segments=_segments(prepared, mesh, zero_stage, recompute, tp_labels),
        provenance=Provenance(
            meshwright_version="0.1.0",
            solver="test",
            level="manual",
            torch_version=str(torch.__version__),
        ),
    )


def _stages(mesh: Mesh, num_segments: int) -> list[Stage]:
    firsts = [stage * num_segments // mesh.pp for stage in range(mesh.pp + 1)]
    return [
        Stage(
            first_segment=firsts[stage],
            last_segment=firsts[stage + 1] - 1,
            first_device=stage * mesh.num_devices_per_stage,
            num_devices=mesh.num_devices_per_stage,
        )
        for stage in range(mesh.pp)
    ]


def _segments(
    prepared: PreparedGraph,
    mesh: Mesh,
    zero_stage: int,
    recompute: Recompute,
    tp_labels: Sequence[str],
) -> list[SegmentPlan]:
    labels: dict[int, set[str]] = {}
    for segment, names in zip(
        prepared.segmentation.segments, prepared.labels.by_segment, strict=True
    ):
        labels.setdefault(segment.segment_class, set()).update(names)
    data_axes = {
        axis: ["batch"] for axis in ("dp_replicate", "dp_shard") if getattr(mesh, axis) > 1
    }
    tp = {"tp": list(tp_labels)} if mesh.tp > 1 else {}
    return [
        SegmentPlan(
            segment_class=number,
            name="",
            shard={
                axis: [label for label in wanted if label in labels[number]]
                for axis, wanted in (data_axes | tp).items()
            },
            zero_stage=zero_stage,
            recompute=recompute,
        )
        for number in sorted(labels)
    ]


def verified(plan: ParallelPlan) -> Verified:
    """Differences of all virtual ranks from one device, after three steps."""
    run = open_plan(plan)
    return verify_virtual(
        run.captured.graph,
        run.programs(),
        run.layout,
        full_state(run, seed=0),
        global_batch(run, seed=0),
        schedule=plan.schedule,
        num_microbatches=plan.num_microbatches,
        optimizer=plan.job.optimizer,
    )


def run_dry(plan: ParallelPlan) -> list[DryRun]:
    """The last rank of every stage."""
    run = open_plan(plan)
    return [
        dry_run(
            program,
            run.layout,
            rank=run.layout.rank_of(program.stage, run.layout.coordinates[-1]),
            schedule=plan.schedule,
            num_microbatches=plan.num_microbatches,
        )
        for program in run.programs()
    ]
