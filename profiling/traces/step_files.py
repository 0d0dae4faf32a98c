"""Per-rank step times from files: tables, a record store, imported traces."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from meshwright.errors import BadRequest
from meshwright.profiling.traces.formats import ImportOptions, TraceFormat, format_of
from meshwright.profiling.traces.importing import import_traces
from meshwright.profiling.traces.sources import DEFAULT_MAX_BYTES, open_members, printable
from meshwright.profiling.traces.step_table import StepTable, step_table, step_table_of_records
from meshwright.profiling.traces.tables import Column, ColumnType, is_parquet, read_table
from meshwright.records import Record, RecordStore
from meshwright.strict_json import load_json, one_line, read_source
from meshwright.units import format_seconds

__all__ = ["read_step_table"]

_HEAD_BYTES = 2**20
_COLUMNS = (
    Column(name="rank", type=ColumnType.INTEGER, is_required=True, least=0),
    Column(name="iteration", type=ColumnType.INTEGER, is_required=True, aliases=("step",), least=0),
    Column(name="step_s", type=ColumnType.FLOAT, aliases=("step_time_s",), least=0),
    Column(name="wait_s", type=ColumnType.FLOAT, aliases=("communication_s",), least=0),
    Column(name="compute_s", type=ColumnType.FLOAT, least=0),
)
_MATRICES = ("step_s", "wait_s", "compute_s")
_Row = tuple[int, int, float | None, float | None, float | None]


def read_step_table(
    paths: Sequence[str | os.PathLike[str]],
    *,
    max_bytes: int = DEFAULT_MAX_BYTES,
    source: str = "",
) -> StepTable:
    """The times of all ranks in ``paths``, files of one form or one directory.

    A file is a table (CSV or Parquet) of rank, iteration and two of step_s, wait_s, compute_s;
    JSON, either such rows or ``{"step_s": [[...], ...], "wait_s": ...}`` with one list for each
    rank; or a profiler trace of one rank. A directory is a record store or holds such files.
    ``source`` is a part of the source, or the model, of the job that is meant where a store or the
    traces hold several.

    Raises:
        BadRequest: something cannot be read or holds no times of ranks.
    """
    if len(paths) == 1 and Path(paths[0]).is_dir():
        directory = Path(paths[0])
        records = _stored(directory)
        if records:
            return step_table_of_records(records, name=printable(directory), choice=source)
        paths = sorted(item for item in directory.iterdir() if item.is_file())
    if not paths:
        raise BadRequest("traces diagnose: no files; give the step times of two or more ranks")
    name = printable(paths[0]) if len(paths) == 1 else f"{len(paths)} files"
    rows: list[_Row] = []
    traces: list[Path] = []
    for path in paths:
        found = _rows_of(Path(path), max_bytes)
        if found is None:
            traces.append(Path(path))
        else:
            rows += found
    if traces and rows:
        raise BadRequest(
            f"{name}: {printable(traces[0])} is a trace and others are tables; give one sort"
        )
    if traces:
        found_traces = import_traces(traces, ImportOptions(max_bytes=max_bytes))
        table = step_table_of_records(
            [record for one in found_traces for record in one.records], name=name, choice=source
        )
        notes = [note for one in found_traces if (note := _last_to_come(one.summary.get("set")))]
        return replace(table, notes=(*table.notes, *notes))
    return step_table(rows, name=name)


def _last_to_come(found: dict[str, Any] | None) -> str:
    """What matched collectives of a set of ranks say of who came last; empty where nothing."""
    if found is None or found["slowest_rank"] is None or not found["collectives"]:
        return ""
    rank = found["slowest_rank"]
    last = sum(call["last_rank"] == rank for call in found["collectives"])
    return (
        f"in the collectives of ranks {', '.join(map(str, found['ranks'][:8]))}"
        f"{', ...' if len(found['ranks']) > 8 else ''} the others waited longest for rank {rank}: "
        f"{format_seconds(found['held_up_s'][str(rank)])}, last in {last} of "
        f"{len(found['collectives'])}; `meshwright traces show` lists them"
    )


def _stored(directory: Path) -> list[Record]:
    """Records of a store at ``directory``; empty where it is none."""
    try:
        return RecordStore(directory).read()[0]
    except BadRequest:
        return []


def _rows_of(path: Path, max_bytes: int) -> list[_Row] | None:
    """Rows of a table; None where the file is a trace, to be imported."""
    if not is_parquet(path):
        for member in open_members(path, max_bytes=max_bytes):
            head = member.head(_HEAD_BYTES)
            if format_of(head) not in (None, TraceFormat.JOB_TRACE, TraceFormat.RUN_TABLE):
                return None
            if head.lstrip()[:1] in (b"{", b"["):
                return _rows_of_json(path)
            break
    table = read_table(path, _COLUMNS, max_bytes=max_bytes)
    rows: list[_Row] = []
    for number, row in enumerate(table.rows(), start=1):
        if "rank" not in row or "iteration" not in row:
            raise BadRequest(f"{table.name}: row {number}: has no rank or no iteration")
        times = (row.get("step_s"), row.get("wait_s"), row.get("compute_s"))
        rows.append((row["rank"], row["iteration"], *times))
    return rows


def _rows_of_json(path: Path) -> list[_Row]:
    data, name = read_source(os.fspath(path), error=BadRequest, what="table of step times")
    value = load_json(data, error=BadRequest, name=name)
    if isinstance(value, list):
        return [_row_of_json(item, f"{name}: $[{index}]") for index, item in enumerate(value)]
    if not isinstance(value, dict):
        raise BadRequest(f"{name}: not a table of step times; give an array of rows or matrices")
    if "step_time" in value and "plan_sha256" in value:
        raise BadRequest(
            f"{name}: is a StepReport, which holds the step time of the whole run and none by "
            "rank; give a table of rank, iteration, compute_s, wait_s, or the traces of the ranks"
        )
    unknown = [one_line(key) for key in value if key not in _MATRICES]
    if unknown or not value:
        raise BadRequest(
            f"{name}: has {', '.join(unknown) or 'no keys'}; give step_s, wait_s, compute_s, "
            "each with one list of numbers for each rank"
        )
    return _rows_of_matrices(value, name)


def _rows_of_matrices(value: dict[str, Any], name: str) -> list[_Row]:
    shapes = set()
    for key, matrix in value.items():
        if not isinstance(matrix, list) or not all(isinstance(row, list) for row in matrix):
            raise BadRequest(f"{name}: $.{key}: is no list of lists of numbers")
        shapes.add(tuple(map(len, matrix)))
    if len(shapes) != 1:
        raise BadRequest(f"{name}: its matrices differ in their numbers of ranks or iterations")
    (lengths,) = shapes

    def cell(key: str, rank: int, at: int) -> float | None:
        if key not in value:
            return None
        return _number(value[key][rank][at], f"{name}: $.{key}[{rank}][{at}]")

    return [
        (rank, at, cell("step_s", rank, at), cell("wait_s", rank, at), cell("compute_s", rank, at))
        for rank, length in enumerate(lengths)
        for at in range(length)
    ]


def _row_of_json(item: Any, where: str) -> _Row:
    if not isinstance(item, dict):
        raise BadRequest(f"{where}: is no object with rank, iteration and times")
    rank = _index(item.get("rank"), f"{where}.rank")
    iteration = _index(item.get("iteration", item.get("step")), f"{where}.iteration")
    step_s, wait_s, compute_s = (
        None if item.get(key) is None else _number(item[key], f"{where}.{key}") for key in _MATRICES
    )
    return rank, iteration, step_s, wait_s, compute_s


def _index(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise BadRequest(f"{where}: must be a whole number of 0 or more")
    return value


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRequest(f"{where}: is no number")
    return float(value)
