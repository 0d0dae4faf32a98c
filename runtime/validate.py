"""Will this plan run, and run right? Asked before any process starts.

In order: the plan lowers; ranks of every stage are run dry on fake tensors, where each operator's
own shape rule and the counts of collectives are checked; and where the model is small enough, all
ranks are run for real as virtual ranks and compared with one device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshwright.plans.plan import ParallelPlan
from meshwright.records.report import Verified
from meshwright.runtime.checks import check_program, draws_random
from meshwright.runtime.dryrun import DryRun, dry_run
from meshwright.runtime.job import PlannedRun, full_state, global_batch, open_plan
from meshwright.runtime.verify import verify_virtual
from meshwright.spmd.program import StageProgram

__all__ = ["Validation", "validate_plan"]

VIRTUAL_FLOP_LIMIT = 10**11
"""Steps above this are too slow to compute on virtual ranks; about a minute on two CPU cores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """What was checked of a plan that passed."""

    dry_runs: tuple[DryRun, ...]
    """Of the first and last rank of every stage."""
    verified: Verified | None
    """Differences of virtual ranks from one device; ``None`` where the model is too large or draws
    random numbers, whose order is not that of one device."""
    notes: tuple[str, ...]
    """What the lowering has to say, once each."""


def validate_plan(
    plan: ParallelPlan,
    *,
    seed: int = 0,
    num_steps: int = 3,
    virtual_flop_limit: int = VIRTUAL_FLOP_LIMIT,
) -> Validation:
    """Check ``plan`` in this process; the default process group must not exist.

    Raises:
        PlannerError: the plan cannot be run; the message says why.
    """
    run = open_plan(plan)
    programs = run.programs()
    for program in programs:
        check_program(program)
    dry_runs = []
    for stage, program in enumerate(programs):
        first = run.layout.first_devices[stage]
        for rank in sorted({first, first + run.layout.num_ranks_per_stage - 1}):
            dry_runs.append(
                dry_run(
                    program,
                    run.layout,
                    rank=rank,
                    schedule=plan.schedule,
                    num_microbatches=plan.num_microbatches,
                )
            )
    is_small = run.captured.graph.num_flop * num_steps <= virtual_flop_limit
    is_random = any(draws_random(program) for program in programs)
    return Validation(
        dry_runs=tuple(dry_runs),
        verified=_virtual(run, programs, seed=seed, num_steps=num_steps)
        if is_small and not is_random
        else None,
        notes=_once([note for program in programs for note in program.notes]),
    )


def _virtual(
    run: PlannedRun, programs: Sequence[StageProgram], *, seed: int, num_steps: int
) -> Verified:
    return verify_virtual(
        run.captured.graph,
        programs,
        run.layout,
        full_state(run, seed=seed),
        global_batch(run, seed=seed),
        schedule=run.plan.schedule,
        num_microbatches=run.plan.num_microbatches,
        optimizer=run.plan.job.optimizer,
        num_steps=num_steps,
    )


def _once(notes: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(notes))
