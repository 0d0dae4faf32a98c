"""Plans and runs in the same tracking as fits and trainings: options, and what is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from meshwright.plans import ParallelPlan, plan_sha256
from meshwright.records import StepReport
from meshwright.strict_json import JsonValue
from meshwright.tracking import Tracker, WandbMode, made, open_tracker, used

__all__ = ["PROJECT", "GroupOption", "ProjectOption", "WandbOption", "track_plan", "track_run"]

PROJECT = "meshwright"

WandbOption = Annotated[WandbMode, typer.Option(help="Mirror the local index in Weights & Biases.")]
ProjectOption = Annotated[str, typer.Option(help="Of Weights & Biases.")]
GroupOption = Annotated[str | None, typer.Option(help="Of runs that belong together.")]

_ANALYTIC = "analytic"


def track_plan(
    plan: ParallelPlan,
    path: str | None,
    figures: Mapping[str, JsonValue],
    mode: WandbMode,
    *,
    project: str,
    group: str | None,
    complain: Callable[[str], None],
) -> None:
    """Tell what was planned with what, into ``PATH.tracking`` beside the plan's file.

    Nothing where the mirror is disabled or the plan is not written.
    """
    if mode is WandbMode.DISABLED or path is None:
        return
    folder = Path(f"{path}.tracking")
    tracker, _ = open_tracker(
        folder, mode, project=project, group=group, complain=complain, job_type="plan"
    )
    _tell_inputs(tracker, plan)
    tracker.config(
        {
            "model": plan.model.reference,
            "cluster": plan.cluster,
            "global_batch": plan.job.global_batch,
            "level": plan.provenance.level,
            "seed": plan.provenance.seed,
        }
    )
    tracker.summary({**figures, "solver": plan.provenance.solver})
    sha256 = plan_sha256(plan)
    sources = [item for item in (_prices(plan), plan.provenance.planner) if item]
    tracker.artifact(
        "meshwright-plan",
        kind="plan-file",
        files=[Path(path)],
        metadata={"sha256": sha256},
        made_from=sources,
    )
    made(tracker, "plan", sha256)
    tracker.finish("finished")


def track_run(
    report: StepReport,
    kept: Path,
    mode: WandbMode,
    *,
    project: str,
    group: str | None,
    complain: Callable[[str], None],
) -> None:
    """Tell what a run of a plan measured, into ``REPORT.tracking``; nothing if disabled."""
    if mode is WandbMode.DISABLED:
        return
    tracker, _ = open_tracker(
        kept.with_suffix(".tracking"),
        mode,
        project=project,
        group=group,
        complain=complain,
        job_type="run",
    )
    used(tracker, "plan", report.plan_sha256)
    tracker.config(
        {
            "model": report.model,
            "cluster": report.cluster,
            "mesh": {**report.mesh},
            "num_microbatches": report.num_microbatches,
            "precision": report.precision,
        }
    )
    predicted = report.predicted
    tracker.summary(
        {
            "step_time_s": report.step_time.median_s,
            "predicted_step_time_s": None if predicted is None else predicted.step_time_s,
            "samples_per_s": report.samples_per_s,
            "peak_memory_bytes": report.peak_memory_bytes,
        }
    )
    tracker.artifact(
        "meshwright-run",
        kind="run-report",
        files=[kept],
        metadata={"plan_sha256": report.plan_sha256},
        made_from=[report.plan_sha256],
    )
    tracker.finish("finished")


def _tell_inputs(tracker: Tracker, plan: ParallelPlan) -> None:
    """Markers carry the start of a hash, as plans do."""
    if _prices(plan):
        used(tracker, "cost-model", _prices(plan))
    if plan.provenance.planner:
        used(tracker, "planner", plan.provenance.planner)


def _prices(plan: ParallelPlan) -> str:
    """The start of the hash in the label of a cost model; empty where it has none."""
    name, _, sha256 = plan.provenance.cost_model.rpartition(" ")
    return sha256 if name and plan.provenance.cost_model != _ANALYTIC else ""
