"""``meshwright bench runs``: measured training runs against predictions of the plans they had."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meshwright.cli.garbage import few_collections
from meshwright.cli.options import CompareOption, JsonOption, PlotOption
from meshwright.cli.output import Output, output_for
from meshwright.errors import BadRequest
from meshwright.strict_json import dump_json, one_line, write_text_atomically
from meshwright.units import format_seconds

__all__ = ["CostModelOption", "FileArgument", "make_folder", "runs"]

CostModelOption = Annotated[
    str,
    typer.Option(metavar="NAME", help="learned (the package's), analytic, or the folder of a fit."),
]
FileArgument = Annotated[str, typer.Argument(metavar="FILE", help="CSV, gzipped too, or Parquet.")]

_SAY_EVERY_S = 5.0


def runs(
    file: FileArgument,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="DIR",
            help="Write runs.json, predicted.svg and regret.svg into this folder.",
        ),
    ] = None,
    plot: PlotOption = None,
    cost_model: CostModelOption = "learned",
    compare: CompareOption = None,
    by: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Figures by this column of the table too.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Only the first N rows.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, max=64, help="Processes that share the work.")] = 1,
    json_output: JsonOption = False,
) -> None:  # fmt: skip
    """Predict every run of a table with the plan and the cluster it had; error, ranks, regret.

    A row that cannot be predicted is listed with its reason. The columns and every figure are
    explained in docs/bench.md.
    """
    with output_for(as_json=json_output) as out, few_collections():
        from meshwright.bench.evaluation import evaluate
        from meshwright.bench.pricings import names_of
        from meshwright.bench.report import RunsReport
        from meshwright.bench.run_table import read_runs

        table = read_runs(file, limit=limit)
        if by is not None and by not in table.columns:
            raise BadRequest(
                f"--by: {table.name} has no column {one_line(by)!r}; it has "
                f"{one_line(', '.join(table.columns))}"
            )
        folder = None if output is None else make_folder(output)
        names = names_of(cost_model, compare)
        evaluation = evaluate(table, names, num_processes=jobs, tell=_Told(out))
        report = RunsReport(table, evaluation, by=by)
        document = report.document()
        written = {} if plot is None else {Path(plot): report.scatter()}
        if folder is not None:
            written[folder / "runs.json"] = dump_json(document)
            written[folder / "predicted.svg"] = report.scatter()
            written[folder / "regret.svg"] = report.bars()
        for path, text in written.items():
            write_text_atomically(text, path)
        out.say(report.headline())
        out.show(*report.tables())
        for path in written:
            out.say(f"written to {path}")
        out.document(document)


def make_folder(name: str) -> Path:
    """The folder, made where it is not there.

    Raises:
        BadRequest: it cannot be made.
    """
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadRequest(
            f"-o: {one_line(name)}: cannot make the folder: {error.strerror or error}"
        ) from error
    return folder


class _Told:
    """A line now and then: runs done, time spent, time left."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._said_s = 0.0

    def __call__(self, num_done: int, num_total: int, spent_s: float) -> None:
        if spent_s - self._said_s < _SAY_EVERY_S and num_done < num_total:
            return
        self._said_s = spent_s
        left_s = spent_s / num_done * (num_total - num_done)
        left = f", about {format_seconds(left_s)} left" if num_done < num_total else ""
        self._out.progress(
            f"{num_done:,} of {num_total:,} runs predicted in {format_seconds(spent_s)}{left}"
        )
