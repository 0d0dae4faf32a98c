"""Which choices of a plan the runtime cannot carry yet."""

from __future__ import annotations

from meshwright.errors import BadRequest, PlanRefused
from meshwright.graph.dimensions import exchanges_rows
from meshwright.plans.plan import Compression, JobSpec, ParallelPlan, Precision, ScheduleName

__all__ = ["RUNNABLE_SCHEDULES", "check_job_runnable", "check_runnable", "unrunnable_reasons"]

RUNNABLE_SCHEDULES = (ScheduleName.GPIPE, ScheduleName.ONE_F_ONE_B)


def unrunnable_reasons(plan: ParallelPlan) -> list[str]:
    """Why the runtime cannot carry ``plan``, one line with its path for each choice.

    It speaks of choices the runtime lacks for every graph. What a graph itself forbids, such as a
    stage that needs a value of a later one, lowering refuses.
    """
    reasons = []
    sizes = [plan.stage_sizes(index) for index in range(len(plan.stages))]
    for index, stage in enumerate(plan.stages):
        if sizes[index] != sizes[0]:
            own = ", ".join(f"{axis} {size}" for axis, size in sorted(stage.mesh.items()))
            reasons.append(
                f"$.stages[{index}].mesh: {own or 'the mesh of the plan'} is not the mesh of stage "
                "0; the runtime carries stages of one mesh"
            )
        if len(set(stage.batch_shares)) > 1:
            reasons.append(
                f"$.stages[{index}].batch_shares: the runtime gives every device as many samples"
            )
    if plan.schedule not in RUNNABLE_SCHEDULES:
        reasons.append(
            f"$.schedule: the runtime does not run {plan.schedule}; it runs "
            f"{' and '.join(RUNNABLE_SCHEDULES)}"
        )
    if plan.token_slices:
        reasons.append("$.token_slices: the runtime runs whole sequences")
    if plan.job.precision is Precision.FP8:
        reasons.append("$.job.precision: the runtime does not train in fp8")
    for index, entry in enumerate(plan.segments):
        shards = {"shard": entry.shard}
        shards |= {f"operators.{number}": own for number, own in entry.operators.items()}
        for field, shard in shards.items():
            for axis, labels in shard.items():
                rows = [label for label in labels if exchanges_rows(label)]
                if rows:
                    reasons.append(
                        f"$.segments[{index}].{field}.{axis}: the runtime does not exchange the "
                        f"rows that {rows[0]} needs of other devices"
                    )
    for field in ("tensor_parallel", "pipeline"):
        how: Compression = getattr(plan.communication, field)
        if how is not Compression.NONE:
            reasons.append(f"$.communication.{field}: the runtime sends values as they are")
    return reasons


def check_job_runnable(job: JobSpec, *, allow_unrunnable: bool) -> None:
    """Check, before any search, that some plan for ``job`` can run, or that none has to.

    Raises:
        BadRequest: none can.
    """
    if job.precision is Precision.FP8 and not allow_unrunnable:
        raise BadRequest(
            "precision fp8: plans can be priced but not run yet; "
            "plan with --allow-unrunnable, or for bf16"
        )


def check_runnable(plan: ParallelPlan) -> None:
    """Check that the runtime can carry every choice of ``plan``.

    Raises:
        PlanRefused: it cannot; names the first.
    """
    reasons = unrunnable_reasons(plan)
    if reasons:
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        raise PlanRefused(f"{reasons[0]}; plan without it to run{more}")
