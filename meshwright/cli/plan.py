"""``meshwright plan``: the fastest plan for a model on a cluster."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from meshwright.cli.garbage import few_collections
from meshwright.cli.options import (
    CostModelOption,
    FixOption,
    JsonOption,
    PlannerOption,
    RuleOption,
    job_of,
    parse_duration_s,
    parse_level,
)
from meshwright.cli.output import Output, output_for
from meshwright.cli.tracked import (
    PROJECT,
    GroupOption,
    ProjectOption,
    WandbOption,
    track_plan,
)
from meshwright.cluster import parse_cluster
from meshwright.errors import BadRequest
from meshwright.plans import OptimizerName, Precision, write_plan
from meshwright.strict_json import JsonValue
from meshwright.tracking import WandbMode, require_wandb
from meshwright.units import format_seconds

__all__ = ["plan", "planning_document", "show_plan"]


_SeqLenOption = Annotated[
    int | None, typer.Option(help="Tokens per sample; the model's own by default.")
]
_LevelOption = Annotated[
    str, typer.Option("-O", metavar="1|2", help="-O1 answers quickly, -O2 searches more.")
]
_BudgetOption = Annotated[
    str | None, typer.Option(help="Longest time to search, such as 10s or 2min.")
]
_OutputOption = Annotated[
    str | None, typer.Option("-o", "--output", metavar="PLAN", help="Write the plan here.")
]


def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="What to train.")],
    cluster: Annotated[str, typer.Option(help="Where: shorthand or a file.", metavar="CLUSTER")],
    global_batch: Annotated[int, typer.Option(help="Samples in one step, over all devices.")],
    seq_len: _SeqLenOption = None,
    precision: Annotated[Precision, typer.Option(help="Element type.")] = Precision.FP32,
    optimizer: Annotated[OptimizerName, typer.Option(help="Optimizer.")] = OptimizerName.ADAMW,
    level: _LevelOption = "1",
    budget: _BudgetOption = None,
    top: Annotated[int, typer.Option(help="How many plans to show.")] = 5,
    fix: FixOption = None,
    rule: RuleOption = None,
    cost_model: CostModelOption = None,
    planner: PlannerOption = None,
    allow_unrunnable: Annotated[
        bool, typer.Option(help="Let plans win that the runtime cannot carry yet.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of searches that draw lots.")] = 0,
    output: _OutputOption = None,
    wandb: WandbOption = WandbMode.DISABLED,
    project: ProjectOption = PROJECT,
    group: GroupOption = None,
    json_output: JsonOption = False,
) -> None:
    """Find the fastest plan that fits, and say why it is the fastest."""
    chosen_level = parse_level(level)
    budget_s = None if budget is None else parse_duration_s(budget)
    job = job_of(
        global_batch=global_batch, seq_len=seq_len, precision=precision, optimizer=optimizer
    )
    _check(top=top, seed=seed, output=output, wandb=wandb)
    with few_collections(), output_for(as_json=json_output) as out:
        from meshwright.api import plan_reference
        from meshwright.gnn_cost.pretrained_pricing import named_pricing

        planned = plan_reference(
            model,
            cluster=cluster,
            job=job,
            level=chosen_level,
            top=top,
            budget_s=budget_s,
            fix=fix or (),
            allow_unrunnable=allow_unrunnable,
            seed=seed,
            rule=rule,
            pricing=named_pricing(cost_model, parse_cluster(cluster)),
            planner=planner,
            progress=out.progress,
        )
        found = planned.result.plan
        if output is not None:
            write_plan(found, output)
        show_plan(out, planned.result)
        figures = _figures(planned.result)
        track_plan(
            found, output, figures, wandb, project=project, group=group, complain=out.progress
        )
        if output is not None:
            out.say(f"written to {output}; next: meshwright explain {output}")
        out.document(planning_document(planned.result))


def _check(*, top: int, seed: int, output: str | None, wandb: WandbMode) -> None:
    require_wandb(wandb)
    if output is None and wandb is not WandbMode.DISABLED:
        raise BadRequest("--wandb: keeps the plan's file; write it with -o")
    for name, value, least in (("--top", top, 1), ("--seed", seed, 0)):
        if value < least:
            raise BadRequest(f"{name}: {value} is too small; give {least} or more")
    if output is not None and not Path(output).absolute().parent.is_dir():
        raise BadRequest(f"--output: no folder {str(Path(output).parent)!r} for {output}; make it")


def _figures(result: Any) -> dict[str, JsonValue]:
    search = result.search
    return {
        "step_time_s": result.plan.prediction.step_time_s,
        "seconds": search.seconds,
        "evaluations": search.evaluations,
        "gap": search.gap if math.isfinite(search.gap) else None,
    }


def show_plan(out: Output, result: Any, *, top: int | None = None) -> None:
    """The best ``top`` plans of a ``PlanningResult``, why the first, where time and memory go."""
    from meshwright import report

    search = result.search
    prediction = result.plan.prediction
    fitting = [
        runner_up.plan
        for runner_up in result.alternatives
        if runner_up.plan.prediction is not None and runner_up.plan.prediction.fits
    ]
    rate = f"{search.evaluations} plans priced in {search.seconds:.1f} s, level {search.level}"
    out.say(f"{result.plan.model.reference} on {result.plan.cluster}: {rate}")
    out.show(report.plans_table([result.plan, *fitting][:top]))
    out.say(f"1 was chosen: {search.reason}.")
    out.say(_how_good(search))
    out.say(report.prediction_words(prediction))
    out.say()
    out.show(*report.breakdown_tables(prediction))


def _how_good(search: Any) -> str:
    """How far the chosen plan can be from the best, and whether the search went to its end."""
    if search.proven_optimal:
        return "No plan is faster by the model: it reaches the lower bound."
    bound = f"No plan is faster than {format_seconds(search.lower_bound_s)} by the model"
    more = f"{search.gap:.1%} more" if search.gap < 1 else f"{search.gap + 1:.1f} times as long"
    gap = f"{bound}; the one chosen takes {more}."
    if search.is_complete:
        return gap
    cut = [one.name for one in search.solvers if one.status == "stopped"]
    who = f" ({', '.join(cut)})" if cut else ""
    return f"{gap} The search was cut short{who}: more --budget may find a faster one."


def planning_document(result: Any) -> dict[str, Any]:
    """The document of ``plan --json`` for a ``PlanningResult``."""
    search = result.search
    return {
        "plan": result.plan,
        "predicted": result.plan.prediction,
        "search": {
            "seconds": search.seconds,
            "evaluations": search.evaluations,
            "level": search.level,
            "lower_bound_s": search.lower_bound_s,
            "gap": search.gap if math.isfinite(search.gap) else None,
            "proven_optimal": search.proven_optimal,
            "is_complete": search.is_complete,
            "reason": search.reason,
            "solvers": [dataclasses.asdict(one) for one in search.solvers],
        },
        "alternatives": [
            {
                "plan": runner_up.plan,
                "predicted": runner_up.plan.prediction,
                "solver": runner_up.solver,
                "reason": runner_up.reason,
            }
            for runner_up in result.alternatives
        ],
    }
