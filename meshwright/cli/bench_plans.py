"""``meshwright bench plans``: a planner on instances whose optima are known."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from meshwright.cli.options import JsonOption
from meshwright.cli.output import Output, output_for
from meshwright.cli.tracked import PROJECT, GroupOption, ProjectOption, WandbOption
from meshwright.cluster import parse_cluster
from meshwright.errors import BadRequest
from meshwright.strict_json import dump_json, one_line, write_text_atomically
from meshwright.tracking import WandbMode, file_sha256, open_tracker, require_wandb, source_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meshwright.bench.plans_report import PlansReport
    from meshwright.cost.pricing import Pricing
    from meshwright.env.generator import InstanceSpec

__all__ = ["plans"]

_LARGEST = {"--processes": 256, "--samples": 2**16, "--evaluations": 2**24}

_PlannerOption = Annotated[
    str,
    typer.Option(
        metavar="NAME|DIR|FILE",
        help="pretrained (the package's), the folder of a training, or its weights.",
    ),
]
_PricesOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|DIR",
        help="What prices: analytic (usual), learned (usual with a trace), or a fit's folder.",
    ),
]
_ClusterOption = Annotated[
    str | None, typer.Option(metavar="C", help="Where a trace's collectives were measured.")
]
_OutputOption = Annotated[
    str | None,
    typer.Option("--output", "-o", metavar="FILE", help="Keep the document, and an index beside."),
]


def plans(
    instances_of: Annotated[
        str,
        typer.Argument(
            metavar="[SET]", help="A frozen set, or the record store of a trace.", show_default=True
        ),
    ] = "test-in",
    planner: _PlannerOption = "pretrained",
    instances: Annotated[int | None, typer.Option(help="Only the first of the set.")] = None,
    samples: Annotated[int, typer.Option(help="Plans drawn for each instance.")] = 64,
    evaluations: Annotated[
        int, typer.Option(help="Plans that local search looks up, samples included.")
    ] = 256,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    cost_model: _PricesOption = None,
    cluster: _ClusterOption = None,
    processes: Annotated[
        int | None, typer.Option(help="That make instances; all cores by default.")
    ] = None,
    cache: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where instances are kept, for all runs.")
    ] = None,
    output: _OutputOption = None,
    wandb: WandbOption = WandbMode.DISABLED,
    project: ProjectOption = PROJECT,
    group: GroupOption = None,
    json_output: JsonOption = False,
) -> None:
    """Plan instances whose optima are known; how far the plans are from them.

    Instances that the cache lacks are made first, which takes minutes for the larger sets. Sets and
    figures are explained in docs/bench.md.
    """
    asked = _Asked(
        set_name=instances_of, planner=planner, num_instances=instances, num_samples=samples,
        max_evaluations=evaluations, seed=seed, cost_model=cost_model, cluster=cluster,
        num_processes=processes, cache=cache, output=output,
        wandb=wandb, project=project, group=group,
    )  # fmt: skip
    with output_for(as_json=json_output) as out:
        asked.check()
        if output is None:
            report = _judged(asked, out)
            _show(out, report)
            out.document(report.document())
        else:
            _tracked(asked, Path(output), out)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """The options."""

    set_name: str
    planner: str
    num_instances: int | None
    num_samples: int
    max_evaluations: int
    seed: int
    cost_model: str | None
    cluster: str | None
    num_processes: int | None
    cache: str | None
    output: str | None
    wandb: WandbMode
    project: str
    group: str | None

    def check(self) -> None:
        """Refuse what cannot be, before anything large is imported.

        Raises:
            BadRequest: numbers out of range, or options that do not go together.
        """
        for name, value, least in (
            ("--instances", self.num_instances, 1),
            ("--samples", self.num_samples, 1),
            ("--evaluations", self.max_evaluations, 1),
            ("--seed", self.seed, 0),
            ("--processes", self.num_processes, 1),
        ):
            most = _LARGEST.get(name, 2**31)
            if value is not None and not least <= value <= most:
                raise BadRequest(f"{name}: {value} is not from {least} to {most}")
        if self.cluster is not None:
            if not Path(self.set_name).is_dir():
                raise BadRequest("--cluster: says where a trace was measured; give its store")
            parse_cluster(self.cluster)
        require_wandb(self.wandb)
        if self.output is None and self.wandb is not WandbMode.DISABLED:
            raise BadRequest("--wandb: keeps the document's file; write it with -o")


def _tracked(asked: _Asked, path: Path, out: Output) -> None:
    """Judge, write ``path``, and tell the index beside it and its mirror."""
    from meshwright.bench.plans_report import BEST_METRICS

    if not path.absolute().parent.is_dir():
        raise BadRequest(f"-o: {one_line(str(path))}: there is no such folder; make it first")
    report = _judged(asked, out)
    problems: list[str] = []

    def complain(problem: str) -> None:
        problems.append(problem)
        out.progress(problem)

    tracker, run_id = open_tracker(
        Path(f"{path}.tracking"),
        asked.wandb,
        project=asked.project,
        group=asked.group,
        complain=complain,
        job_type="evaluate",
        best=BEST_METRICS,
    )
    status = "failed"
    try:
        document = {"run_id": run_id, **report.document()}
        report.tell_inputs(tracker)
        write_text_atomically(dump_json(document), path)
        report.tell_outcome(tracker, path)
        status = "finished"
    finally:
        tracker.finish(status)
    _show(out, report)
    out.say(f"written to {path}")
    out.document({**document, "tracking_problems": problems})


def _show(out: Output, report: PlansReport) -> None:
    out.say(report.headline())
    out.show(*report.tables())


def _judged(asked: _Asked, out: Output) -> PlansReport:
    import torch

    from meshwright.agents.planner import PolicyDecider, planner_file
    from meshwright.agents.weights import load_policy
    from meshwright.bench.plans import judge_planner
    from meshwright.bench.plans_report import PlansReport, Told, is_in_sample
    from meshwright.env.frozen import frozen_sets, specs_sha256
    from meshwright.env.maker import Maker
    from meshwright.env.models import cache_folder
    from meshwright.solvers.reference import rule_time_s

    torch.set_num_threads(1)  # so small a network is slower with more
    path = planner_file(asked.planner)
    policy, card = load_policy(path)
    is_trace = asked.set_name not in frozen_sets()
    specs = _specs(asked)
    with TemporaryDirectory() as folder:
        # Of this name, as a training's: instances made there are kept by it.
        pricing = _pricing(asked, specs, Path(folder) / "cost-model", out)
        maker = Maker(
            cache=cache_folder() if asked.cache is None else Path(asked.cache),
            reference=rule_time_s,
            pricing=pricing,
        )
        made = maker.many(
            specs,
            num_processes=asked.num_processes or len(os.sched_getaffinity(0)),
            progress=out.progress,
        )
        judged = judge_planner(
            PolicyDecider.of(policy, card),
            (instance for _, instance in made),
            num_samples=asked.num_samples,
            max_evaluations=asked.max_evaluations,
            seed=asked.seed,
            tell=out.progress,
        )
    records = source_of(asked.set_name, kind="records", num_rows=0) if is_trace else None
    told = Told(
        set_name=asked.set_name if records is None else records.name,
        set_sha256=specs_sha256(specs),
        num_asked=len(specs),
        planner=os.path.basename(os.path.abspath(asked.planner)),
        planner_sha256=file_sha256(path),
        is_in_sample=is_in_sample(card, asked.set_name, is_trace=is_trace),
        cost_model=pricing.label,
        cost_model_sha256=pricing.sha256,
        records_sha256="" if records is None else records.sha256,
    )
    return PlansReport(judged, told)


def _specs(asked: _Asked) -> Sequence[InstanceSpec]:
    """What to plan: of a set, or of a trace what training on it chooses weights by."""
    from meshwright.agents.syllabus import traced_syllabus
    from meshwright.env.frozen import frozen_sets, frozen_specs

    if asked.set_name in frozen_sets():
        return frozen_specs(asked.set_name, asked.num_instances)
    if not Path(asked.set_name).is_dir():
        raise BadRequest(
            f"{one_line(asked.set_name)}: no set and no folder; give one of "
            f"{', '.join(frozen_sets())}, or the store that `meshwright traces import` wrote"
        )
    return traced_syllabus(Path(asked.set_name)).validation[: asked.num_instances]


def _pricing(asked: _Asked, specs: Sequence[InstanceSpec], folder: Path, out: Output) -> Pricing:
    """As ``train`` prices: learned ones are corrected by what a trace's store measured."""
    from meshwright.bench.pricings import pricing_of
    from meshwright.cli.fit_calibrate import corrected_pricing
    from meshwright.env.frozen import frozen_sets

    is_trace = asked.set_name not in frozen_sets()
    name = asked.cost_model or ("learned" if is_trace else "analytic")
    if name == "analytic" or not is_trace:
        return pricing_of(name)
    return corrected_pricing(
        asked.set_name,
        weights=None if name == "learned" else Path(name),
        folder=folder,
        cluster=None if asked.cluster is None else parse_cluster(asked.cluster),
        devices={part.device for spec in specs for part in spec.cluster.parts},
        say=out.progress,
    )
