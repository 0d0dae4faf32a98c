"""``meshwright fit``: learn the cost model from measurements, or correct it for a new machine."""

from __future__ import annotations

import shlex
import stat
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meshwright.cli.options import JsonOption, parse_duration_s
from meshwright.cli.output import Output, output_for
from meshwright.cluster import Cluster, parse_cluster
from meshwright.errors import BadRequest
from meshwright.strict_json import one_line
from meshwright.tracking import Tracker, WandbMode, open_tracker

if TYPE_CHECKING:
    from meshwright.cli.fit_sources import Sources
    from meshwright.gnn_cost.fitting import FitResult, FitSettings, Part

__all__ = ["fit"]

_FOLDER = "meshwright-fit"
_PROJECT = "meshwright"
_MAX_THREADS = 256
_TRAINED_SHARE = 0.95
"""Of a budget; the rest is for what a part was in the middle of, and for writing."""

_PathsArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="PATH...", help="More records and tables, told by what they are."),
]
_RecordsOption = Annotated[
    list[str] | None, typer.Option(metavar="DIR...", help="Record stores to learn from.")
]
_TablesOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE...", help="Tables of operators, collectives or runs (Parquet, CSV)."
    ),
]
_OutputOption = Annotated[
    str, typer.Option("--output", "-o", metavar="DIR", help="Folder of weights, cards and index.")
]
_LeaveOutOption = Annotated[
    list[str] | None,
    typer.Option(metavar="DEVICE", help="Judge by a device no network saw; all: each in turn."),
]
_CalibrateOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATH...",
        help="Correct prices of the measured devices only: runs, step reports, or a sweep.",
    ),
]
_LicenseOption = Annotated[
    list[str] | None,
    typer.Option(metavar="SOURCE=LICENSE", help="For the card, where tables do not tell."),
]


def fit(
    paths: _PathsArgument = None,
    records: _RecordsOption = None,
    tables: _TablesOption = None,
    output: _OutputOption = _FOLDER,
    seed: Annotated[int, typer.Option(help="Equal seeds and data give bit-equal weights.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what -o holds.")] = False,
    budget: Annotated[
        str | None, typer.Option(help="Longest time, such as 10m; the best so far is kept.")
    ] = None,
    members: Annotated[int, typer.Option(help="Networks in the ensemble.")] = 3,
    epochs: Annotated[int | None, typer.Option(help="Most epochs of each network.")] = None,
    rows_per_cell: Annotated[
        int, typer.Option(help="Most rows of one source, device, operator, direction and dtype.")
    ] = 1500,
    leave_out: _LeaveOutOption = None,
    threads: Annotated[int, typer.Option(help="Of the processor; more may change bits.")] = 1,
    cluster: Annotated[
        str | None, typer.Option(metavar="C", help="Where the records were measured.")
    ] = None,
    license: _LicenseOption = None,
    calibrate: _CalibrateOption = None,
    weights: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Whose prices --calibrate corrects; the package's."),
    ] = None,
    wandb: Annotated[
        WandbMode, typer.Option(help="Mirror the local index in Weights & Biases.")
    ] = WandbMode.DISABLED,
    project: Annotated[str, typer.Option(help="Of Weights & Biases.")] = _PROJECT,
    group: Annotated[str | None, typer.Option(help="Of runs that belong together.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Learn the prices of operators, collectives and steps from measurements.

    --resume goes on after Ctrl-C or a crash. The folder is what --cost-model takes for planning.
    """
    end_s = None if budget is None else time.monotonic() + _TRAINED_SHARE * parse_duration_s(budget)
    given = [*(records or ()), *(tables or ()), *(paths or ())]
    where = None if cluster is None else parse_cluster(cluster)
    with output_for(as_json=json_output) as out:
        _require_readable([*(calibrate or ()), *given])
        if calibrate:
            if records or tables:
                raise BadRequest(
                    "--calibrate: corrects given weights; leave out --records, --tables"
                )
            _correct(out, [*calibrate, *given], weights, output, where)
            return
        if not given:
            raise BadRequest("nothing to learn from; give --records DIR or --tables FILE")
        if weights is not None:
            raise BadRequest("--weights: goes with --calibrate; a fit makes its own")
        settings = _settings(seed, members, epochs, rows_per_cell, leave_out, threads)
        job = _Job(
            out, settings, Path(output), is_resumed=resume, end_s=end_s, wandb=wandb,
            project=project, group=group,
        )  # fmt: skip
        job.run(given, cluster=where, cluster_text=cluster, licenses=license or [])


def _require_readable(paths: Sequence[str]) -> None:
    """Before anything large is imported: whoever mistypes a name need not wait."""
    for text in paths:
        path, name = Path(text), one_line(text)
        try:
            mode = path.stat().st_mode
            if stat.S_ISREG(mode):
                path.open("rb").close()
            elif stat.S_ISDIR(mode):
                next(path.iterdir(), None)
            else:
                raise BadRequest(f"{name}: neither a file nor a folder; give records or tables")
        except (OSError, ValueError) as error:
            said = getattr(error, "strerror", None) or error
            raise BadRequest(f"{name}: cannot be read: {said}; give records or tables") from error


def _correct(
    out: Output, paths: list[str], weights: str | None, output: str, cluster: Cluster | None
) -> None:
    from meshwright.cli.fit_calibrate import calibrate

    folder = None if weights is None else Path(weights)
    calibrate(out, paths, weights=folder, folder=Path(output), cluster=cluster)


def _settings(
    seed: int,
    members: int,
    epochs: int | None,
    rows_per_cell: int,
    leave_out: list[str] | None,
    threads: int,
) -> FitSettings:
    from meshwright.gnn_cost.fitting import FitSettings

    for name, value, least, most in (
        ("--seed", seed, 0, 2**31),
        ("--members", members, 1, 64),
        ("--epochs", epochs, 1, 100_000),
        ("--rows-per-cell", rows_per_cell, 1, 10**9),
        ("--threads", threads, 1, _MAX_THREADS),
    ):
        if value is not None and not least <= value <= most:
            raise BadRequest(f"{name}: {value} is not from {least} to {most}")
    return FitSettings(
        seed=seed,
        num_members=members,
        max_epochs=epochs,
        rows_per_cell=rows_per_cell,
        left_out=tuple(leave_out or ()),
        num_threads=threads,
    )


class _Job:
    """One fit, as the options ask for it."""

    def __init__(
        self,
        out: Output,
        settings: FitSettings,
        folder: Path,
        *,
        is_resumed: bool,
        end_s: float | None,
        wandb: WandbMode,
        project: str,
        group: str | None,
    ) -> None:
        self._out = out
        self._settings = settings
        self._folder = folder
        self._is_resumed = is_resumed
        self._end_s = end_s
        self._wandb = wandb
        self._project = project
        self._group = group
        self._problems: list[str] = []

    def run(
        self,
        paths: list[str],
        *,
        cluster: Cluster | None,
        cluster_text: str | None,
        licenses: list[str],
    ) -> None:
        """Read, train, write; tell what came of it."""
        from meshwright.cli.fit_sources import given_licenses, read_sources
        from meshwright.gnn_cost.fitting import fit as train
        from meshwright.gnn_cost.fitting import require_fresh
        from meshwright.tracking import require_wandb

        require_wandb(self._wandb)
        require_fresh(self._folder, is_resumed=self._is_resumed)
        sources = read_sources(paths, self._out.progress)
        given = given_licenses(licenses)
        sources.licenses |= given
        if sources.reports:
            raise BadRequest("step reports calibrate a fitted model; give them to --calibrate")
        tracker, run_id = self._tracker()
        budget_s = None if self._end_s is None else max(0.0, self._end_s - time.monotonic())
        result = train(
            _parts(),
            sources.fit_data(cluster),
            self._settings,
            folder=self._folder,
            tracker=tracker,
            reproduce=self._command(sources, cluster_text, given),
            budget_s=budget_s,
            is_resumed=self._is_resumed,
            say=self._out.progress,
        )
        self._show(result)
        self._out.document(self._document(result, run_id))

    def _tracker(self) -> tuple[Tracker, str]:
        return open_tracker(
            self._folder,
            self._wandb,
            project=self._project,
            group=self._group,
            complain=self._complain,
            job_type="fit",
        )

    def _complain(self, problem: str) -> None:
        self._problems.append(problem)
        self._out.progress(problem)

    def _command(self, sources: Sources, cluster: str | None, licenses: Mapping[str, str]) -> str:
        """The command line of the card: names of files, for paths are somebody's."""
        settings = self._settings
        words = ["meshwright", "fit"]
        for source in sources.data:
            words += ["--records" if source.kind == "records" else "--tables", source.name]
        words += ["--seed", str(settings.seed), "--members", str(settings.num_members)]
        if settings.max_epochs is not None:
            words += ["--epochs", str(settings.max_epochs)]
        words += ["--rows-per-cell", str(settings.rows_per_cell)]
        words += [word for name in settings.left_out for word in ("--leave-out", name)]
        words += ["--threads", str(settings.num_threads)]
        if cluster is not None:
            words += ["--cluster", cluster]
        for name, text in licenses.items():
            words += ["--license", f"{name}={text}"]
        return shlex.join(words)

    def _show(self, result: FitResult) -> None:
        from rich.table import Table

        table = Table("part", "held out", "measured", "error", "bias", "in 90 % interval")
        for name, part in result.parts.items():
            for item in part.splits:
                if item.group == "all":
                    table.add_row(
                        name,
                        item.split,
                        f"{item.num_samples:,}",
                        f"{item.mape:.1%}",
                        f"{item.bias:+.1%}",
                        "" if item.coverage is None else f"{item.coverage:.1%}",
                    )
        if table.row_count:
            self._out.show(table)
        for name, reason in result.skipped.items():
            self._out.say(f"{name}: not fitted: {reason}")
        for name, part in result.parts.items():
            if part.is_cut:
                self._out.say(f"{name}: stopped by the budget; --resume goes on")
        self._out.say(
            f"written to {result.folder}; use it with `meshwright plan --cost-model "
            f"{result.folder}`"
        )

    def _document(self, result: FitResult, run_id: str) -> dict[str, Any]:
        return {
            "folder": str(result.folder),
            "run_id": run_id,
            "status": "budget" if result.is_cut else "finished",
            "seconds": result.spent_s,
            "parts": {
                name: {
                    "num_parameters": part.num_parameters,
                    "is_cut": part.is_cut,
                    "figures": dict(part.figures),
                    "splits": list(part.splits),
                }
                for name, part in result.parts.items()
            },
            "skipped": dict(result.skipped),
            "tracking_problems": self._problems,
        }


def _parts() -> list[Part]:
    from meshwright.bench.steps_part import StepsPart
    from meshwright.gnn_cost.fitting.collectives import CollectivesPart
    from meshwright.gnn_cost.fitting.operators import OperatorsPart

    return [CollectivesPart(), OperatorsPart(), StepsPart()]
