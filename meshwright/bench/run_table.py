"""A file of measured runs as runs, and the rows that are none, each with its reason.

CSV (gzipped too) or Parquet, with the columns of docs/bench.md. Cells are read kindly: blanks
around a word, ``8.0`` for 8, ``yes`` for true; empty, ``None`` and ``NaN`` are an empty cell. A
cell that makes no sense costs its row, never the file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields

import pyarrow as pa

from meshwright.bench.runs import MeasuredRun, Skipped, run_of_row
from meshwright.errors import BadRequest
from meshwright.profiling.traces.sources import printable
from meshwright.profiling.traces.tables import read_cells
from meshwright.strict_json import one_line

__all__ = ["MAX_TABLE_BYTES", "RunTable", "read_runs"]

MAX_TABLE_BYTES = 2**30
_MEASURES = ("step_time_s", "samples_per_s", "peak_memory_bytes", "oom")
_EMPTY = frozenset(("", "none", "nan", "null", "n/a", "na", "<na>"))
_SWITCH_WORDS = {"true": True, "yes": True, "t": True, "false": False, "no": False, "f": False}
_KINDS = {item.name: str(item.type).split(" ")[0] for item in fields(MeasuredRun)}
_NOT_NEEDED = frozenset(
    ("citation", "licence", "mfu", "mfu_calc", "quoted_tflops_gpu", "quoted_flops_kind")
)
_MAX_SHOWN = 60

Cell = str | float | bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTable:
    """What a file holds."""

    name: str
    """Of the file, fit to print."""
    sha256: str
    num_rows: int
    runs: tuple[MeasuredRun, ...]
    labels: tuple[Mapping[str, str], ...]
    """Of each run, all its cells as text, by column; empty cells left out."""
    skipped: tuple[Skipped, ...]
    columns: tuple[str, ...]
    """All of the file, fit to print."""
    unknown: tuple[str, ...]
    """Those that are not read."""


def read_runs(path: str | os.PathLike[str], *, limit: int | None = None) -> RunTable:
    """The measured runs of a file, the first ``limit`` rows of it.

    Raises:
        BadRequest: it cannot be read, or lacks ``run_id``, ``gpu`` or anything measured.
    """
    name = printable(path)
    table, sha256 = read_cells(path, max_bytes=MAX_TABLE_BYTES)
    columns = table.column_names
    missing = [needed for needed in ("run_id", "gpu") if needed not in columns]
    if missing:
        raise BadRequest(
            f"{name}: no table of measured runs: it has no column {' and no '.join(missing)}; it "
            f"has {one_line(', '.join(columns))}"
        )
    if not set(_MEASURES) & set(columns):
        raise BadRequest(
            f"{name}: holds nothing measured: give one of the columns {', '.join(_MEASURES)}"
        )
    table = table if limit is None else table.slice(0, limit)
    runs: list[MeasuredRun] = []
    labels: list[Mapping[str, str]] = []
    skipped: list[Skipped] = []
    cells = {column: _plain(table[column]) for column in columns}
    for index in range(table.num_rows):
        row = {column: values[index] for column, values in cells.items()}
        shown = {
            column: one_line(str(value)).strip()
            for column, value in row.items()
            if not _is_empty(value)
        }
        run_id = shown.get("run_id", "")[:200] or f"row {index + 1}"
        try:
            runs.append(run_of_row({"run_id": run_id, **_typed(row, run_id)}))
        except BadRequest as error:
            skipped.append(Skipped(run_id=run_id, reason=f"row {index + 1}: {error}"))
        else:
            labels.append(shown)
    return RunTable(
        name=name,
        sha256=sha256,
        num_rows=table.num_rows,
        runs=tuple(runs),
        labels=tuple(labels),
        skipped=tuple(skipped),
        columns=tuple(one_line(column) for column in columns),
        unknown=tuple(one_line(c) for c in columns if c not in _KINDS and c not in _NOT_NEEDED),
    )


def _plain(cells: pa.ChunkedArray) -> list[object]:
    try:
        return list(cells.to_pylist())
    except (pa.ArrowException, ValueError, OverflowError):  # dates and such outside Python's range
        return list(cells.cast(pa.string()).to_pylist())


def _is_empty(value: object) -> bool:
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and value.strip().lower() in _EMPTY)


def _typed(row: Mapping[str, object], run_id: str) -> dict[str, Cell]:
    """The cells of the columns of a run, of the type of their column."""
    typed: dict[str, Cell] = {}
    for name, kind in _KINDS.items():
        value = row.get(name)
        if not _is_empty(value):
            typed[name] = run_id if name == "run_id" else _cell(name, kind, value)
    return typed


def _cell(name: str, kind: str, value: object) -> Cell:
    """One cell as text, number or switch.

    Raises:
        BadRequest: it is none of its column's kind.
    """
    if kind == "str":
        return one_line(str(value)).strip()
    if isinstance(value, str):
        word = value.strip()
        if kind == "bool" and word.lower() in _SWITCH_WORDS:
            return _SWITCH_WORDS[word.lower()]
        try:
            value = float(word.replace("_", "?"))  # Python's 1_000 is nobody's table
        except ValueError:
            value = word
    if isinstance(value, bool) and kind == "bool":
        return value
    try:
        if not isinstance(value, str | bool | bytes):
            return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        pass
    needed = "true or false" if kind == "bool" else "a number"
    shown = one_line(str(value))[:_MAX_SHOWN]
    raise BadRequest(f"{name} is {shown!r}; it must be {needed}")
