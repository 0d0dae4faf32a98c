"""``meshwright records``: what a record store holds, and its upkeep."""

from __future__ import annotations

import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.table import Table

from meshwright.cli.options import JsonOption
from meshwright.cli.output import Output, output_for
from meshwright.errors import BadRequest
from meshwright.records import Query, Record, RecordStore
from meshwright.records.export import ExportFormat, export_records
from meshwright.records.query import machine_words
from meshwright.strict_json import one_line, write_bytes_atomically
from meshwright.units import format_bytes, format_seconds

__all__ = ["records_app"]

records_app = typer.Typer(
    help="List, inspect, verify, merge, prune, export and compact stores of measurements.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DirArgument = Annotated[str, typer.Argument(metavar="DIR", help="The record store.")]
KindOption = Annotated[
    str | None, typer.Option(metavar="KIND", help="Of this kind: operator, collective...")
]
NameOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="Of this operator, collective or model.")
]
DeviceOption = Annotated[str | None, typer.Option(metavar="DEVICE", help="Measured on this.")]
DtypeOption = Annotated[str | None, typer.Option(metavar="DTYPE", help="Of this dtype.")]
MachineOption = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="Whose processor, accelerators or system hold this."),
]

_AGE = re.compile(r"(\d{1,5}) *(d|h)")


@records_app.command("list", epilog="Example: meshwright records list meshwright-records")
def list_(
    path: DirArgument,
    kind: KindOption = None,
    name: NameOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    machine: MachineOption = None,
    json_output: JsonOption = False,
) -> None:
    """Say how many records there are of each kind, name, device and dtype."""
    with output_for(as_json=json_output) as out:
        query = Query(kind=kind, name=name, device=device, dtype=dtype, machine=machine)
        counted, problems = _store(path).count(query)
        _tell(out, problems)
        by_row: dict[tuple[str, ...], int] = {}
        for group, number in counted.items():
            by_row[group[:4]] = by_row.get(group[:4], 0) + number
        table = Table(box=None, pad_edge=False)
        for column in ("kind", "name", "device", "dtype"):
            table.add_column(column)
        table.add_column("records", justify="right")
        for row, number in sorted(by_row.items()):
            table.add_row(*map(one_line, row), str(number))
        machines = sorted({machine_words(group[4]) for group in counted})
        total = sum(counted.values())
        out.show(*[table] * bool(by_row))
        out.say(f"{total} records of {len(machines)} machines")
        for words in machines:
            out.say(f"machine: {one_line(words)}")
        groups = [
            dict(zip(("kind", "name", "device", "dtype"), group[:4], strict=True))
            | {"machine": machine_words(group[4]), "num_records": number}
            for group, number in sorted(counted.items())
        ]
        out.document({"num_records": total, "groups": groups, "problems": problems})


@records_app.command(epilog="Example: meshwright records show meshwright-records --name linear")
def show(
    path: DirArgument,
    kind: KindOption = None,
    name: NameOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    machine: MachineOption = None,
    limit: Annotated[int, typer.Option(min=1, help="Show the last so many.")] = 20,
    json_output: JsonOption = False,
) -> None:
    """Show records; one alone is shown in full."""
    with output_for(as_json=json_output) as out:
        query = Query(kind=kind, name=name, device=device, dtype=dtype, machine=machine)
        records, problems = _store(path).read(query)
        _tell(out, problems)
        last = records[-limit:]
        if len(last) == 1:
            for key, value in msgspec.to_builtins(last[0], order="deterministic").items():
                out.say(f"{key}: {one_line(str(value))}")
        elif last:
            out.show(_table(last))
        out.say(f"{len(last)} of {len(records)} records")
        out.document({"num_records": len(records), "records": last, "problems": problems})


def _table(records: list[Record]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("kind", "name", "device", "of"):
        table.add_column(column)
    table.add_column("median [p10, p90]", justify="right")
    table.add_column("n", justify="right")
    table.add_column("measured")
    for record in records:
        median, p10, p90 = (
            _figure(value, record.unit) for value in (record.median, record.p10, record.p90)
        )
        table.add_row(
            *map(one_line, (record.kind, record.name, record.device)),
            one_line(", ".join(f"{key}={value}" for key, value in sorted(record.extra.items()))),
            f"{median} [{p10}, {p90}]",
            str(record.num_repeats),
            one_line(record.measured_utc),
        )
    return table


def _figure(value: float, unit: str) -> str:
    if unit == "s" and value >= 0:
        return format_seconds(value)
    if unit == "bytes" and value >= 0:
        return format_bytes(value)
    return f"{value:.4g} {unit}"


@records_app.command(epilog="Example: meshwright records verify meshwright-records")
def verify(path: DirArgument, json_output: JsonOption = False) -> None:
    """Check every file and every record against its checksum; status 1 where one is damaged."""
    with output_for(as_json=json_output) as out:
        found = _store(path).verify()
        _tell(out, found.problems)
        out.say(f"{found.num_records} records in {found.num_files} files are whole")
        if found.num_repeated_rows or found.num_temporary_files:
            out.say(
                f"{found.num_repeated_rows} rows and {found.num_temporary_files} temporary files "
                "were left by interrupted processes; `meshwright records compact` removes them"
            )
        out.say(f"index: {found.index}")
        out.document(found)
    if found.problems:
        raise BadRequest(
            f"{one_line(path)}: {len(found.problems)} of {found.num_files} files have problems; "
            f"`meshwright records prune {one_line(path)} --damaged` keeps what is whole of them"
        )


@records_app.command(epilog="Example: meshwright records merge all-records node1 node2")
def merge(
    path: DirArgument,
    sources: Annotated[list[str], typer.Argument(metavar="FROM...", help="Stores to add.")],
    json_output: JsonOption = False,
) -> None:
    """Add the records of other stores that are not in DIR yet; DIR is made where it is missing."""
    with output_for(as_json=json_output) as out:
        others = [_store(source) for source in sources]
        answer = {}
        for source, other in zip(sources, others, strict=True):
            done = RecordStore(path).merge(other)
            _tell(out, done.problems)
            out.say(f"{source}: {done.num_added} records added, {done.num_known} were here already")
            answer[source] = done
        out.document({"merged": answer})


@records_app.command(epilog="Example: meshwright records prune meshwright-records --keep 3")
def prune(
    path: DirArgument,
    keep: Annotated[
        int | None, typer.Option(min=1, help="Newest to keep of equal measurements.")
    ] = None,
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help="Remove older ones: 90d, 12h or 2026-01-31.")
    ] = None,
    duplicates: Annotated[
        bool, typer.Option("--duplicates", help="Of records equal in everything keep one.")
    ] = False,
    damaged: Annotated[
        bool, typer.Option("--damaged", help="Replace damaged files by what is whole in them.")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Remove records, and what interrupted processes left."""
    with output_for(as_json=json_output) as out:
        done = _store(path).prune(
            keep_newest=keep,
            before_utc=None if older_than is None else _time_before(older_than),
            duplicates=duplicates,
            damaged=damaged,
        )
        _tell(out, done.problems)
        out.say(f"{done.num_removed} records removed, {done.num_kept} kept")
        for name in done.set_aside:
            out.say(f"damaged: replaced by what is whole in it, and kept as {name}")
        out.document(done)


def _time_before(text: str) -> str:
    """ISO 8601 of a time, or of so long ago."""
    age = _AGE.fullmatch(text.strip())
    if age is None:
        return text
    ago = timedelta(days=int(age[1])) if age[2] == "d" else timedelta(hours=int(age[1]))
    return (datetime.now(UTC) - ago).isoformat()


@records_app.command(epilog="Example: meshwright records export meshwright-records -o all.csv")
def export(
    path: DirArgument,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Else to stdout.")
    ] = None,
    form: Annotated[
        ExportFormat | None,
        typer.Option("--format", help="Else by the name of the file, or jsonl."),
    ] = None,
    kind: KindOption = None,
    name: NameOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    machine: MachineOption = None,
    json_output: JsonOption = False,
) -> None:
    """Write records as json, jsonl, csv or parquet, for other programs."""
    with output_for(as_json=json_output) as out:
        query = Query(kind=kind, name=name, device=device, dtype=dtype, machine=machine)
        chosen = form or _format_of(output)
        if output is None and (json_output or chosen == ExportFormat.PARQUET):
            raise BadRequest("records export: give a file with -o for parquet or with --json")
        records, problems = _store(path).read(query)
        _tell(out, problems)
        data = export_records(records, chosen)
        if output is None:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
            return
        write_bytes_atomically(data, output)
        out.say(f"{len(records)} records written to {output}")
        out.document({"num_records": len(records), "file": output, "problems": problems})


def _format_of(output: str | None) -> ExportFormat:
    if output is None:
        return ExportFormat.JSONL
    suffix = Path(output).suffix.lower().removeprefix(".")
    if suffix not in list(ExportFormat):
        raise BadRequest(
            f"records export: {one_line(output)}: no format is called {suffix!r}; give --format"
        )
    return ExportFormat(suffix)


@records_app.command(epilog="Example: meshwright records compact meshwright-records")
def compact(path: DirArgument, json_output: JsonOption = False) -> None:
    """Join small files, and remove what interrupted processes left; no record changes."""
    with output_for(as_json=json_output) as out:
        done = _store(path).compact()
        _tell(out, done.problems)
        out.say(f"{done.num_files_before} files became {done.num_files_after}")
        out.document(done)


def _store(path: str) -> RecordStore:
    if not Path(path).is_dir():
        raise BadRequest(f"{one_line(path)}: no such record store; check the path")
    return RecordStore(path)


def _tell(out: Output, problems: list[str] | tuple[str, ...]) -> None:
    for problem in problems:
        out.progress(problem)
