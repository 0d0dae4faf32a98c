"""Tables of outsiders (CSV, gzipped too, and Parquet) as columns of checked values.

A column that is not asked for is named and left out; a value of the wrong type is an error that
names its row. Rows are counted from 1, the line of names not counted.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from meshwright.errors import BadRequest
from meshwright.profiling.traces.sources import DEFAULT_MAX_BYTES, Member, open_source, printable
from meshwright.strict_json import one_line
from meshwright.units import MIB, format_bytes

__all__ = [
    "Column",
    "ColumnType",
    "Table",
    "column_names",
    "is_parquet",
    "read_cells",
    "read_table",
]

_MAX_COLUMNS = 1000
_HEAD_BYTES = 64 * 2**10
_PARQUET_MAGIC = b"PAR1"


class ColumnType(StrEnum):
    """What the cells of a column hold, where they hold anything."""

    TEXT = "text"
    FLOAT = "a number"
    INTEGER = "a whole number"
    BOOLEAN = "true or false"


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column that is asked for."""

    name: str
    type: ColumnType
    is_required: bool = False
    aliases: tuple[str, ...] = ()
    """Other names of the same thing; the first that is there is taken."""
    least: float | None = None
    """The smallest value that has a sense, for numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Columns of equal length, by the names asked for; None where a cell is empty."""

    name: str
    """Of the file, fit to print."""
    sha256: str
    num_rows: int
    columns: dict[str, list[Any]]
    unknown: tuple[str, ...]
    """Columns of the file that were not asked for."""

    @property
    def source(self) -> str:
        """For ``Record.source``."""
        return f"{self.name} sha256:{self.sha256}"

    def rows(self) -> Iterator[dict[str, Any]]:
        """Each row as a dictionary without its empty cells."""
        names = tuple(self.columns)
        for values in zip(*self.columns.values(), strict=True):
            yield {
                name: value for name, value in zip(names, values, strict=True) if value is not None
            }


def is_parquet(path: str | os.PathLike[str]) -> bool:
    """Whether the file begins as Parquet does.

    Raises:
        BadRequest: it cannot be read, or is a directory, pipe or device.
    """
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise BadRequest(f"{printable(path)}: not a regular file; give a trace or table")
        with Path(path).open("rb") as file:
            return file.read(len(_PARQUET_MAGIC)) == _PARQUET_MAGIC
    except (OSError, ValueError) as exc:
        raise BadRequest(f"{printable(path)}: cannot read the file: {one_line(str(exc))}") from exc


def column_names(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """The names of the columns of a table.

    Raises:
        BadRequest: it cannot be read.
    """
    if is_parquet(path):
        return tuple(_parquet_file(path).schema_arrow.names)
    with open_source(path) as source:
        for member in source.members():
            head = member.head(_HEAD_BYTES).partition(b"\n")[0] + b"\n"
            return tuple(_read_csv(head, name=member.name).column_names)
    raise BadRequest(f"{printable(path)}: holds no table")


def read_cells(
    path: str | os.PathLike[str], *, max_bytes: int = DEFAULT_MAX_BYTES
) -> tuple[pa.Table, str]:
    """All cells of a CSV (all text) or Parquet file as they are, and the SHA-256 of the file.

    Raises:
        BadRequest: it cannot be read, is too large, or has two columns of one name.
    """
    table, sha256 = (
        _whole_parquet(path, max_bytes) if is_parquet(path) else _whole_csv(path, max_bytes)
    )
    names = table.column_names
    if len(set(names)) < len(names):
        twice = next(item for item in names if names.count(item) > 1)
        raise BadRequest(
            f"{printable(path)}: has two columns {one_line(twice)!r}; keep one of them"
        )
    return table, sha256


def read_table(
    path: str | os.PathLike[str],
    columns: Sequence[Column],
    *,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> Table:
    """The columns asked for of a CSV or Parquet file.

    Raises:
        BadRequest: it cannot be read, is too large, lacks a required column, or a cell is not of
            its column's type.
    """
    name = printable(path)
    table, sha256 = read_cells(path, max_bytes=max_bytes)
    names = table.column_names
    taken: dict[str, list[Any]] = {}
    used: set[str] = set()
    for column in columns:
        found = next((item for item in (column.name, *column.aliases) if item in names), None)
        if found is not None:
            used.add(found)
            taken[column.name] = _values(table[found], column, where=f"{name}: {one_line(found)}")
        elif column.is_required:
            raise BadRequest(
                f"{name}: has no column {column.name}; it has {one_line(', '.join(names))}"
            )
    return Table(
        name=name,
        sha256=sha256,
        num_rows=table.num_rows,
        columns=taken,
        unknown=tuple(one_line(item) for item in names if item not in used),
    )


def _parquet_file(path: str | os.PathLike[str]) -> pa.parquet.ParquetFile:
    try:
        file = pa.parquet.ParquetFile(os.fspath(path))
        list(file.schema_arrow.names)  # ValueError where they are not UTF-8
    except (pa.ArrowException, OSError, ValueError) as exc:
        raise BadRequest(f"{printable(path)}: not a whole Parquet file; copy it again") from exc
    return file


def _whole_parquet(path: str | os.PathLike[str], max_bytes: int) -> tuple[pa.Table, str]:
    name = printable(path)
    file = _parquet_file(path)
    if len(file.schema_arrow) > _MAX_COLUMNS:
        raise BadRequest(f"{name}: has {len(file.schema_arrow)} columns; {_MAX_COLUMNS} at most")
    batches, num_bytes = [], 0
    try:
        for batch in file.iter_batches(batch_size=2**16):
            num_bytes += batch.nbytes
            if num_bytes > max_bytes:
                raise BadRequest(
                    f"{name}: holds more than {format_bytes(max_bytes)}; raise --max-bytes if it "
                    "is right"
                )
            batches.append(batch)
        table = pa.Table.from_batches(batches, schema=file.schema_arrow)
        table.validate(full=True)  # that texts are UTF-8
        with Path(path).open("rb") as raw:
            sha256 = hashlib.file_digest(raw, "sha256").hexdigest()
    except (pa.ArrowException, OSError, ValueError) as exc:
        raise BadRequest(f"{name}: damaged Parquet: {one_line(str(exc))}") from exc
    return table, sha256


def _whole_csv(path: str | os.PathLike[str], max_bytes: int) -> tuple[pa.Table, str]:
    with open_source(path, max_bytes=max_bytes) as source:
        tables = []
        for member in source.members():
            tables.append(_read_csv(b"".join(_pieces(member)), name=member.name))
        if len(tables) != 1:
            raise BadRequest(f"{source.name}: holds {len(tables)} files; give each table alone")
        return tables[0], source.sha256()


def _pieces(member: Member) -> Iterator[bytes]:
    while data := member.read(MIB):
        yield data


def _read_csv(data: bytes, *, name: str) -> pa.Table:
    """Every column as text, empty cells as nulls."""
    try:
        reader_names = pa.csv.open_csv(
            io.BytesIO(data.partition(b"\n")[0] + b"\n"),
            read_options=pa.csv.ReadOptions(use_threads=False),
        ).schema.names
        if len(reader_names) > _MAX_COLUMNS:
            raise BadRequest(f"{name}: has {len(reader_names)} columns; {_MAX_COLUMNS} at most")
        return pa.csv.read_csv(
            io.BytesIO(data),
            read_options=pa.csv.ReadOptions(use_threads=False),
            parse_options=pa.csv.ParseOptions(newlines_in_values=True),
            convert_options=pa.csv.ConvertOptions(
                column_types={item: pa.string() for item in reader_names},
                strings_can_be_null=True,
            ),
        )
    except (pa.ArrowException, UnicodeDecodeError, KeyError) as exc:
        raise BadRequest(f"{name}: not a table: {one_line(str(exc))}") from exc


def _values(cells: pa.ChunkedArray, column: Column, *, where: str) -> list[Any]:
    """The cells as Python values of the column's type."""
    kind = cells.type
    if pa.types.is_null(kind):
        return [None] * len(cells)
    if pa.types.is_dictionary(kind):
        cells = cells.cast(kind.value_type)
        kind = kind.value_type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if column.type == ColumnType.TEXT:
        if not (is_text or pa.types.is_integer(kind)):
            raise BadRequest(f"{where}: is {kind}, where text is needed")
        return list(cells.cast(pa.string()).to_pylist())
    if column.type == ColumnType.BOOLEAN:
        if not (is_text or pa.types.is_boolean(kind)):
            raise BadRequest(f"{where}: is {kind}, where true or false is needed")
        return list(_cast(cells, pa.bool_(), column, where).to_pylist())
    if not (is_text or pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise BadRequest(f"{where}: is {kind}, where {column.type} is needed")
    return _numbers(cells, column, where)


def _numbers(cells: pa.ChunkedArray, column: Column, where: str) -> list[Any]:
    numbers = _cast(cells, pa.float64(), column, where)
    # An empty number is NaN in many tables; an infinite one is nobody's measurement.
    numbers = pc.if_else(pc.is_nan(numbers), pa.scalar(None, pa.float64()), numbers)
    wrong = pc.is_inf(numbers)
    if column.least is not None:
        wrong = pc.or_(wrong, pc.less(numbers, column.least))
    if column.type == ColumnType.INTEGER:
        wrong = pc.or_(wrong, pc.not_equal(numbers, pc.round(numbers)))
        wrong = pc.or_(wrong, pc.greater(pc.abs(numbers), 2.0**53))
    at = pc.index(wrong, True).as_py()
    if at >= 0:
        least = "" if column.least is None else f" of {column.least:g} or more"
        raise BadRequest(
            f"{where}: row {at + 1}: {numbers[at].as_py():g} is not {column.type}{least}"
        )
    if column.type == ColumnType.INTEGER:
        return list(numbers.cast(pa.int64()).to_pylist())
    return list(numbers.to_pylist())


def _cast(cells: pa.ChunkedArray, to: pa.DataType, column: Column, where: str) -> pa.ChunkedArray:
    try:
        if pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type):
            cells = pc.utf8_trim_whitespace(cells)
            if to == pa.bool_():
                cells = pc.utf8_lower(cells)
        return cells.cast(to, safe=False)
    except pa.ArrowException:
        for row, cell in enumerate(cells, start=1):
            try:
                cell.cast(to)
            except pa.ArrowException:
                said = one_line(str(cell.as_py()))[:80]
                raise BadRequest(f"{where}: row {row}: {said!r} is not {column.type}") from None
        raise
