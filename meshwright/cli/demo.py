"""``meshwright demo``: the whole loop on this machine's CPU, as four processes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from meshwright.cli.options import JsonOption
from meshwright.cli.output import Output, output_for
from meshwright.cli.plan import show_plan
from meshwright.cli.run import check_verified, keep_report, run_plan
from meshwright.errors import PlanRefused
from meshwright.plans import JobSpec, OptimizerSpec, ParallelPlan, Precision, write_plan
from meshwright.strict_json import write_text_atomically

__all__ = ["demo"]

CLUSTER = "cpu:4"
_STEPS = 10
_WARMUP = 2
_VERIFY_STEPS = 3
_OPTIMIZER = OptimizerSpec(learning_rate=1e-4)
_EVERYTHING = 1000
"""Plans to keep: all, so that the baseline is among them wherever it stands."""

CHOSEN = "the chosen plan"
PLAIN = "plain data parallelism"
ANOTHER = "the best plan of another kind"
_FILE_NAMES = {CHOSEN: "chosen", PLAIN: "data-parallel", ANOTHER: "another"}

LARGE_MODEL = "gpt3-175b"
LARGE_CLUSTER = "1024xh100"
LARGE_JOB = JobSpec(global_batch=1536, precision=Precision.BF16)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Example:
    title: str
    name: str
    """Start of the names of its files."""
    reference: str
    global_batch: int


# Sizes at which a step takes some tenths of a second on two slow cores.
_EXAMPLES = (
    _Example(
        title="A small GPT",
        name="gpt",
        reference="tiny-gpt?hidden=256&num_layers=4&seq_len=32&vocab_size=1024",
        global_batch=8,
    ),
    _Example(
        title="Two towers, images and texts",
        name="towers",
        reference="tiny-clip?image_hidden=128&text_hidden=128",
        global_batch=16,
    ),
)


def demo(
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="DIR", help="Where the files go.")
    ] = "demo",
    json_output: JsonOption = False,
) -> None:
    """Plan two models, run them as four processes, check and measure; then plan GPT-3."""
    from meshwright import report

    start_s = time.monotonic()
    folder = Path(output)
    with output_for(as_json=json_output) as out:
        models = []
        runs: list[Any] = []
        for example in _EXAMPLES:
            result, found = _run_example(out, example, folder)
            models.append((example.title, example.reference, result.search.reason, found))
            runs.extend(found)
        out.say()
        out.say(f"The other end: {LARGE_MODEL} on {LARGE_CLUSTER}, which is not here to run on")
        large, large_s = _plan_large(out, folder)
        summary = report.DemoSummary(
            models=tuple(models),
            large=large,
            large_planning_s=large_s,
            seconds=time.monotonic() - start_s,
        )
        write_text_atomically(report.demo_markdown(summary), folder / "README.md")
        out.say()
        out.say(f"{summary.seconds:.0f} s in all; plans, Records and README.md are in {folder}")
        out.document(
            {
                "seconds": summary.seconds,
                "models": [
                    {
                        "title": title,
                        "reference": reference,
                        "reason": reason,
                        "runs": [
                            {"title": run.title, "plan": run.plan, "report": run.report}
                            for run in found
                        ],
                    }
                    for title, reference, reason, found in models
                ],
                "large": {"plan": large, "predicted": large.prediction, "seconds": large_s},
            }
        )
    for run in runs:
        check_verified(run.report)


def _run_example(out: Output, example: _Example, folder: Path) -> tuple[Any, tuple[Any, ...]]:
    """Plan, show, run and compare one model; the ``PlanningResult`` and its runs."""
    from meshwright import report
    from meshwright.api import plan_reference

    out.say()
    out.say(f"{example.title}: {example.reference}, batch {example.global_batch}, on {CLUSTER}")
    result = plan_reference(
        example.reference,
        cluster=CLUSTER,
        job=JobSpec(global_batch=example.global_batch, optimizer=_OPTIMIZER),
        top=_EVERYTHING,
        progress=out.progress,
    ).result
    show_plan(out, result, top=5)
    runs = []
    for title, plan in _to_compare(result):
        path = folder / f"{example.name}-{_FILE_NAMES[title]}.plan.json"
        folder.mkdir(parents=True, exist_ok=True)
        write_plan(plan, path)
        try:
            measured = run_plan(
                out, plan, str(path), steps=_STEPS, warmup=_WARMUP, verify_steps=_VERIFY_STEPS
            )
        except PlanRefused as error:
            if title == CHOSEN:
                raise
            out.progress(f"{title} cannot be run: {error}")
            continue
        keep_report(measured, folder / "records")
        run = report.DemoRun(title=title, plan=plan, report=measured)
        out.say(f"{title}: {report.mesh_words(plan)}; {report.schedule_words(plan)}")
        out.show(report.measured_table(measured))
        out.say(_differences(measured))
        runs.append(run)
    out.say(report.speed_up_words(runs))
    return result, tuple(runs)


def _differences(measured: Any) -> str:
    verified = measured.verified
    found = ", ".join(
        f"{name} {'not finite' if value is None else f'{value:.1e}'}"
        for name, value in (
            ("loss", verified.loss),
            ("gradients", verified.gradients),
            ("parameters", verified.parameters),
        )
    )
    return f"largest relative difference from one process in {_VERIFY_STEPS} steps: {found}"


def _to_compare(result: Any) -> list[tuple[str, ParallelPlan]]:
    """The chosen plan and what it is compared with.

    That is plain data parallelism, or where this was chosen, the best plan of another kind.
    """
    chosen: ParallelPlan = result.plan
    others = [
        runner_up.plan
        for runner_up in result.alternatives
        if runner_up.plan.prediction is not None and runner_up.plan.prediction.fits
    ]
    pairs = [(CHOSEN, chosen)]
    if _is_data_parallel(chosen):
        kinds = [(ANOTHER, plan) for plan in others if _differs(plan)]
    else:
        kinds = [(PLAIN, plan) for plan in others if _is_data_parallel(plan)]
    return pairs + kinds[:1]


def _is_data_parallel(plan: ParallelPlan) -> bool:
    return plan.mesh.dp_replicate > 1 and not _differs(plan)


def _differs(plan: ParallelPlan) -> bool:
    """Whether anything but the batch is split."""
    return plan.mesh.dp_replicate < plan.mesh.num_devices or plan.mesh.num_devices == 1


def _plan_large(out: Output, folder: Path) -> tuple[ParallelPlan, float]:
    """Plan a model for a cluster that is not here; the plan and the seconds it took."""
    from meshwright.api import plan_reference

    start_s = time.monotonic()
    result = plan_reference(
        LARGE_MODEL, cluster=LARGE_CLUSTER, job=LARGE_JOB, progress=out.progress
    ).result
    seconds = time.monotonic() - start_s
    show_plan(out, result)
    write_plan(result.plan, folder / f"{LARGE_MODEL}.plan.json")
    out.say(f"captured and planned in {seconds:.1f} s, on this CPU")
    return result.plan, seconds
