"""``meshwright run``: starts the processes of a plan on this machine, and measures."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from meshwright.cli.checks import check_fits
from meshwright.cli.options import JsonOption, PlanArgument
from meshwright.cli.output import Output, output_for
from meshwright.cli.tracked import PROJECT, GroupOption, ProjectOption, WandbOption, track_run
from meshwright.cluster import parse_cluster
from meshwright.cluster.detect import detect_gpus
from meshwright.errors import BadRequest, PlannerError, PlanRefused
from meshwright.plans import ParallelPlan, Precision, read_plan
from meshwright.records import RecordStore, StepReport
from meshwright.strict_json import write_text_atomically
from meshwright.tracking import WandbMode, require_wandb

__all__ = ["TOLERANCE", "check_verified", "keep_report", "run", "run_plan"]

TOLERANCE = {Precision.FP64: 1e-10, Precision.FP32: 1e-5}
"""Largest relative difference from one process with ``--verify``. In bf16 and fp16 it is reported
and not judged: rounding alone makes it as large as a mistake could be."""

_VERIFY_STEPS = 3


def run(
    plan: PlanArgument,
    steps: Annotated[int, typer.Option(help="Steps to measure.")] = 10,
    warmup: Annotated[int, typer.Option(help="Steps before those.")] = 2,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare loss, gradients, parameters with one process.")
    ] = False,
    store: Annotated[
        str, typer.Option(metavar="DIR", help="Where the StepReport and the Records go.")
    ] = "meshwright-records",
    seed: Annotated[int, typer.Option(help="Of parameters and data.")] = 0,
    wandb: WandbOption = WandbMode.DISABLED,
    project: ProjectOption = PROJECT,
    group: GroupOption = None,
    json_output: JsonOption = False,
) -> None:
    """Run a plan as local processes under torchrun and compare it with its prediction."""
    if steps < 1:
        raise BadRequest(f"--steps: {steps} is too few; measure at least 1")
    if warmup < 0:
        raise BadRequest(f"--warmup: {warmup} is below 0")
    require_wandb(wandb)
    stored = read_plan(plan)
    with output_for(as_json=json_output) as out:
        report = run_plan(
            out,
            stored,
            plan,
            steps=steps,
            warmup=warmup,
            verify_steps=_VERIFY_STEPS if verify else 0,
            seed=seed,
        )
        kept = keep_report(report, Path(store))
        track_run(report, kept, wandb, project=project, group=group, complain=out.progress)
        from meshwright import report as reports

        out.show(reports.measured_table(report))
        if report.verified is not None:
            differences = report.verified
            out.say(
                f"against one process, largest relative difference: loss {differences.loss}, "
                f"gradients {differences.gradients}, parameters {differences.parameters}"
            )
        elif verify:
            out.progress(
                "not compared with one process: the model draws random numbers (dropout), in "
                "another order on many ranks"
            )
        out.say(f"written to {kept}, and as Records to {store}")
        out.document(report)
    check_verified(report)


def run_plan(
    out: Output,
    plan: ParallelPlan,
    path: str,
    *,
    steps: int,
    warmup: int,
    verify_steps: int,
    seed: int = 0,
) -> StepReport:
    """Launch the plan in ``path`` and wait for what it measured.

    Raises:
        DoesNotFit: by its own prediction.
        BadRequest: this machine has not the devices of the plan's cluster.
        PlannerError: the first error of any process; names the file with what they wrote.
    """
    if plan.prediction is not None:
        check_fits(plan.prediction)
    device = _device_of(plan)
    from meshwright.runtime.launch import launch

    out.progress(f"starting {plan.mesh.num_devices} processes")
    lines: list[str] = []
    try:
        return launch(
            path,
            warmup=warmup,
            repeats=steps,
            verify_steps=verify_steps,
            seed=seed,
            device=device,
            on_line=lines.append,
        )
    except PlannerError as error:
        if not lines:
            raise
        with tempfile.NamedTemporaryFile(
            "w", prefix="meshwright-run-", suffix=".log", delete=False, encoding="utf-8"
        ) as file:
            file.write("\n".join(lines) + "\n")
        said = str(error).removesuffix("; see the lines above")
        raise type(error)(f"{said}; what the processes wrote is in {file.name}") from error


def _device_of(plan: ParallelPlan) -> str:
    """``cpu`` or ``cuda``, where this machine has as many devices of the cluster's kind."""
    cluster = parse_cluster(plan.cluster)
    if all(device.name == "cpu" for device in cluster.devices):
        return "cpu"
    num_gpus = len(detect_gpus())
    if num_gpus < plan.mesh.num_devices:
        raise BadRequest(
            f"the plan is for {plan.mesh.num_devices} devices of {plan.cluster} but this machine "
            f"has {num_gpus} GPUs; run it there, or plan for cpu:4 to try it here"
        )
    return "cuda"


def keep_report(report: StepReport, store: Path) -> Path:
    """Add the report's Records to ``store`` and write the report beside them; its path."""
    when = "".join(character for character in report.measured_utc if character.isalnum())
    name = f"report-{report.plan_sha256[:12]}-{when[:15]}"
    path = store / f"{name}.json"
    number = 1
    while path.exists():
        number += 1
        path = store / f"{name}-{number}.json"
    RecordStore(store).append(report.to_records())
    write_text_atomically(report.to_json(), path)
    return path


def check_verified(report: StepReport) -> None:
    """Check the differences from one process, where they were measured and can be judged.

    Raises:
        PlanRefused: they are larger than rounding.
    """
    precision, verified = Precision(report.precision), report.verified
    if verified is None or precision not in TOLERANCE:
        return
    limit = TOLERANCE[precision]
    if verified.within(limit):
        return
    raise PlanRefused(
        f"the run differs from one process by more than {limit}: "
        f"loss {verified.loss}, gradients {verified.gradients}, parameters {verified.parameters}; "
        "do not use this plan, and please report it"
    )
