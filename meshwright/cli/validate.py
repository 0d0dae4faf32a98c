"""``meshwright validate``: will this plan run, and run right?

Asked in order: is the plan well formed; is it for this model and cluster; does it fit; does the
lowered program communicate what the cost model prices; do ranks run dry on fake tensors; and, where
the model is small enough, do all ranks together compute what one device computes, in fp64.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import msgspec

from meshwright.cli.checks import check_against, check_fits, check_traffic, pricing_of_plan
from meshwright.cli.options import JsonOption, PlanArgument
from meshwright.cli.output import Output, output_for
from meshwright.cluster import parse_cluster
from meshwright.errors import PlannerError, PlanRefused
from meshwright.graph import OpGraph
from meshwright.plans import ParallelPlan, Precision, read_plan
from meshwright.units import format_bytes

__all__ = ["MAX_DIFFERENCE", "validate"]

NUM_STEPS = 3
"""Optimizer steps compared on virtual ranks."""

VIRTUAL_FLOP_LIMIT = 10**11
"""Floating-point operations of all steps on virtual ranks; above, they take minutes on a CPU."""

VIRTUAL_BYTES_LIMIT = 4 * 2**30
"""Parameters with gradients and two moments in fp64, on all virtual ranks together."""

MAX_DIFFERENCE = 1e-10
MAX_DIFFERENCE_FP32 = 1e-5
"""Where the model itself casts to fp32."""
"""Largest relative difference from one device, in fp64."""

DRY_RUN_SECONDS = 15.0
"""After this no further ranks are run dry, once every stage had one."""


class _Checks:
    """What was checked so far."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._start_s = time.monotonic()
        self.done: list[dict[str, Any]] = []

    def add(self, name: str, status: str, detail: str) -> None:
        """Note the result of a check: ``passed``, ``skipped`` or ``failed``."""
        now_s = time.monotonic()
        seconds, self._start_s = now_s - self._start_s, now_s
        self.done.append({"name": name, "status": status, "detail": detail, "seconds": seconds})
        if status != "failed":  # what failed is said on stderr
            self._out.say(f"{status:8}{name}: {detail} ({seconds:.1f} s)")


def validate(plan: PlanArgument, json_output: JsonOption = False) -> None:
    """Check a plan without starting a process: schema, memory, program, numerics, dry run."""
    with output_for(as_json=json_output) as out:
        checks = _Checks(out)
        notes: list[str] = []
        verified: Any = None
        try:
            stored = read_plan(plan)
            checks.add("plan file", "passed", "follows the schema and agrees with itself")
            verified, notes = _validate(out, checks, stored)
        except PlannerError as error:
            checks.add("stopped", "failed", str(error))
            out.document({"valid": False, "checks": checks.done, "error": str(error)})
            raise
        for note in notes:
            out.say(f"note: {note}")
        out.say("valid")
        out.document({"valid": True, "checks": checks.done, "verified": verified, "notes": notes})


def _validate(out: Output, checks: _Checks, plan: ParallelPlan) -> tuple[Any, list[str]]:
    """All checks after reading; differences from one device where measured, and notes."""
    from meshwright.cost.model import StepCostModel
    from meshwright.runtime.checks import check_program
    from meshwright.runtime.job import open_plan

    cluster = parse_cluster(plan.cluster)
    out.progress(f"capturing {plan.model.reference}")
    run = open_plan(plan)
    prepared = run.prepared
    check_against(
        plan,
        cluster=cluster,
        segmentation=prepared.segmentation,
        graph_sha256=prepared.sha256,
    )
    checks.add("model and cluster", "passed", f"{plan.mesh.num_devices} devices, same program")
    model = StepCostModel(
        prepared.analysis,
        prepared.segmentation,
        prepared.labels,
        cluster=cluster,
        job=plan.job,
        pricing=pricing_of_plan(plan, None),
    )
    prediction = model.predict(plan)
    check_fits(prediction)
    checks.add(
        "memory",
        "passed",
        f"{format_bytes(prediction.peak_memory_bytes)} of "
        f"{format_bytes(prediction.memory_capacity_bytes)} on the fullest device",
    )
    out.progress("lowering the plan")
    programs = run.programs()
    for program in programs:
        check_program(program)
    checks.add("lowering", "passed", f"{len(programs)} stage programs")
    num_calls, num_bytes = check_traffic(plan, programs, model)
    checks.add(
        "communication",
        "passed",
        f"{num_calls} collectives of {format_bytes(num_bytes)} in all, as the cost model prices",
    )
    verified = _verify(out, checks, plan, run, programs)
    _run_dry(out, checks, plan, run, programs)
    return verified, list(dict.fromkeys(note for program in programs for note in program.notes))


def _verify(out: Output, checks: _Checks, plan: ParallelPlan, run: Any, programs: Any) -> Any:
    """Compare virtual ranks with one device in fp64, where that is quick; else say why not."""
    from meshwright.runtime.checks import draws_random
    from meshwright.runtime.job import full_state, global_batch, open_plan
    from meshwright.runtime.verify import verify_virtual

    reason = _too_large(plan, run)
    if reason is None and any(draws_random(program) for program in programs):
        reason = "the model draws random numbers (dropout), in another order on many ranks"
    if reason is not None:
        checks.add("numerics", "skipped", reason)
        return None
    out.progress(f"computing {NUM_STEPS} steps on {plan.mesh.num_devices} virtual ranks in fp64")
    job = msgspec.structs.replace(plan.job, precision=Precision.FP64)
    double = open_plan(msgspec.structs.replace(plan, job=job))
    reference = msgspec.structs.replace(plan.model, graph_sha256=double.prepared.sha256)
    double = dataclasses.replace(double, plan=msgspec.structs.replace(double.plan, model=reference))
    verified = verify_virtual(
        double.captured.graph,
        double.programs(),
        double.layout,
        full_state(double, seed=0),
        global_batch(double, seed=0),
        schedule=plan.schedule,
        num_microbatches=plan.num_microbatches,
        optimizer=plan.job.optimizer,
        num_steps=NUM_STEPS,
    )
    limit = _limit(double.captured.graph)
    if not verified.within(limit):
        raise PlanRefused(
            f"virtual ranks differ from one device (loss {verified.loss}, gradients "
            f"{verified.gradients}, parameters {verified.parameters}; at most {limit} in fp64 "
            "is allowed); this is a mistake of ours, please report it"
        )
    checks.add(
        "numerics",
        "passed",
        f"{NUM_STEPS} steps on virtual ranks in fp64 equal one device: loss {verified.loss:.1e}, "
        f"gradients {verified.gradients:.1e}, parameters {verified.parameters:.1e}",
    )
    return verified


def _limit(graph: OpGraph) -> float:
    """Largest difference that is rounding.

    It is fp32's where the model itself computes in less than fp64 (a norm or loss that casts).
    """
    made = {graph.values[value].dtype for op in graph.ops for value in op.results}
    return MAX_DIFFERENCE_FP32 if made & {"float32", "bfloat16", "float16"} else MAX_DIFFERENCE


def _too_large(plan: ParallelPlan, run: Any) -> str | None:
    graph = run.captured.graph
    flop = graph.num_flop * NUM_STEPS
    if flop > VIRTUAL_FLOP_LIMIT:
        return f"{flop:.1e} flop in {NUM_STEPS} steps; the limit is {VIRTUAL_FLOP_LIMIT:.0e}"
    num_bytes = 4 * 8 * graph.num_parameters * plan.mesh.num_devices
    if num_bytes > VIRTUAL_BYTES_LIMIT:
        limit = format_bytes(VIRTUAL_BYTES_LIMIT)
        return f"up to {format_bytes(num_bytes)} on all virtual ranks; the limit is {limit}"
    return None


def _run_dry(out: Output, checks: _Checks, plan: ParallelPlan, run: Any, programs: Any) -> None:
    """Run the first rank of every stage on fake tensors, and the last while there is time."""
    from meshwright.runtime.dryrun import dry_run

    layout = run.layout
    firsts = [(stage, first) for stage, first in enumerate(layout.first_devices)]
    lasts = [(stage, first + layout.num_ranks_per_stage - 1) for stage, first in firsts]
    start_s = time.monotonic()
    done: dict[int, int] = {}
    for number, (stage, rank) in enumerate((*firsts, *lasts)):
        is_late = number >= len(firsts) and time.monotonic() - start_s > DRY_RUN_SECONDS
        if rank in done or is_late:
            continue
        out.progress(f"dry run of rank {rank} of {layout.num_ranks}")
        found = dry_run(
            programs[stage],
            layout,
            rank=rank,
            schedule=plan.schedule,
            num_microbatches=plan.num_microbatches,
        )
        done[rank] = sum(item.num_calls for item in found.collectives.values())
    ranks = "all ranks"
    if len(done) < layout.num_ranks:
        ranks = (
            f"{len(done)} of {layout.num_ranks} ranks, the others of their stages run the same "
            "program"
        )
    checks.add(
        "dry run",
        "passed",
        f"{ranks}; {sum(done.values())} collectives dispatched on a fake process group as "
        "the programs say",
    )
