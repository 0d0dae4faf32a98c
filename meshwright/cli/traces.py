"""``meshwright traces``: what other programs measured, read into the record store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meshwright.cli.options import JsonOption
from meshwright.cli.output import Output, output_for
from meshwright.cli.traces_diagnose import diagnose
from meshwright.errors import BadRequest
from meshwright.profiling.traces.formats import ImportOptions, TraceImport
from meshwright.profiling.traces.importing import import_traces, without_stored
from meshwright.profiling.traces.sources import DEFAULT_MAX_BYTES
from meshwright.records import RecordStore

__all__ = ["traces_app"]

traces_app = typer.Typer(
    help="Read traces and tables of other programs; find slow ranks in them.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

FilesArgument = Annotated[
    list[str],
    typer.Argument(metavar="FILE...", help="Traces: plain, .gz, .tar.gz; several ranks at once."),
]
ModelOption = Annotated[
    str, typer.Option(metavar="NAME", help="Name of the model; profiler traces do not hold it.")
]
MaxBytesOption = Annotated[
    int,
    typer.Option(min=1, help="Refuse a file that holds more than this, decompressed."),
]


@traces_app.command(
    "import", epilog="Example: meshwright traces import rank*.json.gz --store records"
)
def import_(
    files: FilesArgument,
    store: Annotated[
        str | None, typer.Option(metavar="DIR", help="Add the records to this store.")
    ] = None,
    model: ModelOption = "",
    max_bytes: MaxBytesOption = DEFAULT_MAX_BYTES,
    json_output: JsonOption = False,
) -> None:
    """Read traces and add what they tell to the record store.

    Nothing is added unless all files could be read. Files the store holds already add nothing.
    """
    with output_for(as_json=json_output) as out:
        if store is None:
            raise BadRequest(
                "traces import: no store to keep the records in; give --store DIR, or use "
                "`meshwright traces show` to look without keeping"
            )
        found = import_traces(
            [Path(name) for name in files], ImportOptions(max_bytes=max_bytes, model=model)
        )
        records = [record for one in found for record in one.records]
        kept = RecordStore(store)
        added, num_known = without_stored(records, kept)
        kept.append(added)
        _show(out, found)
        if num_known:
            out.say(f"{num_known} records left out: {store} holds those of the same files already")
        out.say(f"{len(added)} records added to {store}")
        out.document(
            {
                "imports": [_plain(one) for one in found],
                "num_records": len(added),
                "num_records_stored_before": num_known,
                "store": store,
            }
        )


@traces_app.command("show", epilog="Example: meshwright traces show rank0.json.gz")
def show(
    files: FilesArgument,
    model: ModelOption = "",
    max_bytes: MaxBytesOption = DEFAULT_MAX_BYTES,
    json_output: JsonOption = False,
) -> None:
    """Print what traces tell, and what they do not; keep nothing."""
    with output_for(as_json=json_output) as out:
        found = import_traces(
            [Path(name) for name in files], ImportOptions(max_bytes=max_bytes, model=model)
        )
        _show(out, found)
        out.document({"imports": [_plain(one) for one in found]})


traces_app.command(
    "diagnose", epilog="Example: meshwright traces diagnose steps.csv -o diagnosis.html"
)(diagnose)


def _show(out: Output, found: list[TraceImport]) -> None:
    for one in found:
        out.say(f"{', '.join(one.names)}: {one.format}, {len(one.records)} records")
        for line in one.lines:
            out.say(f"  {line}")
        if one.missing:
            out.say(f"  not in the trace: {'; '.join(one.missing)}")


def _plain(one: TraceImport) -> dict[str, object]:
    return {
        "format": str(one.format),
        "files": list(one.names),
        "num_records": len(one.records),
        "not_in_the_trace": list(one.missing),
        **one.summary,
    }
