"""One process of a run: ``torchrun -m meshwright.runtime.worker JOBFILE``.

Rank 0 writes the StepReport; a rank that fails writes why and exits with another status than 0,
upon which torchrun ends the others.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.plans.io import plan_sha256, read_plan
from meshwright.profiling.parent import end_with_parent
from meshwright.records.record import describe_machine, describe_software, utc_now
from meshwright.records.report import (
    PredictedStep,
    RankMemory,
    StepReport,
    Verified,
    finite_or_none,
)
from meshwright.runtime.checks import draws_random
from meshwright.runtime.job import (
    Job,
    PlannedRun,
    failure_of,
    full_state,
    global_batch,
    open_plan,
    read_job,
)
from meshwright.runtime.measure import METHOD, Measurement, measure_memory, measure_steps
from meshwright.runtime.session import RankSession, process_group
from meshwright.runtime.state import assemble_parameter
from meshwright.runtime.verify import Steps, compare, reference_steps

__all__ = ["main", "run_job"]


def main(arguments: list[str]) -> int:
    """Run the job in the file ``arguments[0]``; the status for the system."""
    job = read_job(arguments[0])
    rank = int(os.environ.get("RANK", "0"))
    end_with_parent()
    try:
        run_job(job)
    except Exception as error:
        # Anything may fail here, in the user's model too; the launcher classifies it.
        failure = failure_of(error, rank=rank, time_s=time.time())
        path = Path(job.result_dir) / f"failure-{rank}.json"
        path.write_bytes(msgspec.json.encode(failure))
        if not failure.is_planner_error:
            raise
        return 1
    return 0


def run_job(job: Job) -> None:
    """Prepare, verify if asked, measure, and report from rank 0.

    Raises:
        PlannerError: if the plan cannot be run.
    """
    device = _device(job.device)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    run = open_plan(read_plan(job.plan))
    plan = run.plan
    batch = global_batch(run, seed=job.seed)
    source = full_state(run, seed=job.seed)
    with process_group(device, timeout_s=job.timeout_s) as (rank, _):
        stage, _ = run.layout.locate(rank)
        session = RankSession(
            run.program(stage),
            run.layout,
            source,
            rank=rank,
            schedule=plan.schedule,
            num_microbatches=plan.num_microbatches,
            optimizer=plan.job.optimizer,
            device=device,
        )
        local = session.local_batch(batch)
        session.seed_draws(job.seed)
        verified = None
        # Every rank must decide alike, so all look at the programs of all stages.
        if job.verify_steps and not any(map(draws_random, run.programs())):
            verified = _verify(run, session, source, batch, job.verify_steps)
        del source
        measured = measure_steps(session, local, warmup=job.warmup, repeats=job.repeats)
        memory = measure_memory(session, local)
        everyone = _gather((memory, measured.losses))
        if everyone is not None:
            report = _report(run, measured, everyone, verified)
            Path(job.result_dir, "report.json").write_text(report.to_json(), encoding="utf-8")


def _device(name: str) -> torch.device:
    if name == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    return torch.device(name)


def _gather(value: Any) -> list[Any] | None:
    """``value`` of every rank, on rank 0."""
    is_first = dist.get_rank() == 0
    gathered: list[Any] | None = [None] * dist.get_world_size() if is_first else None
    dist.gather_object(value, gathered)
    return gathered


def _verify(
    run: PlannedRun,
    session: RankSession,
    source: Any,
    batch: Mapping[str, Tensor],
    num_steps: int,
) -> Verified | None:
    """Differences from one process after ``num_steps`` steps; known to rank 0."""
    local = session.local_batch(batch)
    losses: list[float] = []
    gradients: Mapping[str, Tensor] = {}
    for step in range(num_steps):
        result = session.step(local, keep_gradients=step == 0)
        if result.loss is not None:
            losses.append(float(result.loss))
        if step == 0:
            gradients = result.gradients
    parameters = {
        slot.name: session.state.optimized(slot.name) for slot in session.program.parameters
    }
    everyone = _gather((losses, _on_cpu(gradients), _on_cpu(parameters)))
    if everyone is None:
        return None
    found = Steps(
        losses=tuple(next(losses for losses, _, _ in everyone if losses)),
        gradients=_assembled(run, [gradients for _, gradients, _ in everyone]),
        parameters=_assembled(run, [parameters for _, _, parameters in everyone]),
    )
    expected = reference_steps(
        run.captured.graph,
        source,
        batch,
        optimizer=run.plan.job.optimizer,
        num_steps=num_steps,
    )
    return compare(expected, found)


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies without the rest of the storage they are views of."""
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def _assembled(run: PlannedRun, by_rank: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    layout = run.layout
    full = {}
    for stage, program in enumerate(run.programs()):
        for slot in program.parameters:
            pieces = [
                (coordinate, by_rank[layout.rank_of(stage, coordinate)][slot.name])
                for coordinate in layout.coordinates
                if slot.name in by_rank[layout.rank_of(stage, coordinate)]
            ]
            if pieces:
                full[slot.name] = assemble_parameter(slot, pieces)
    return full


def _report(
    run: PlannedRun,
    measured: Measurement,
    everyone: list[tuple[RankMemory, tuple[float, ...]]],
    verified: Verified | None,
) -> StepReport:
    plan = run.plan
    samples_per_s = plan.job.global_batch / measured.timing.median_s
    prediction = plan.prediction
    return StepReport(
        plan_sha256=plan_sha256(plan),
        model=plan.model.reference,
        graph_sha256=plan.model.graph_sha256,
        cluster=plan.cluster,
        mesh=msgspec.to_builtins(plan.mesh),
        num_microbatches=plan.num_microbatches,
        precision=str(plan.job.precision),
        step_time=measured.timing,
        method=METHOD,
        memory=[memory for memory, _ in everyone],
        predicted=None
        if prediction is None
        else PredictedStep(
            step_time_s=prediction.step_time_s,
            step_time_interval_s=prediction.step_time_interval_s,
            peak_memory_bytes=prediction.peak_memory_bytes,
            source=[str(source) for source in prediction.source],
        ),
        losses=[
            finite_or_none(loss) for loss in next((losses for _, losses in everyone if losses), ())
        ],
        verified=verified,
        samples_per_s=samples_per_s,
        tokens_per_s=plan.job.seq_len and samples_per_s * plan.job.seq_len,
        machine=describe_machine(),
        software=describe_software(),
        measured_utc=utc_now(),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
