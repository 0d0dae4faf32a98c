"""Records as files other programs read: JSON (whole Records), CSV and Parquet (flat tables).

A table has one row for each Record. Its columns are ``TABLE_COLUMNS`` and, for each key of
``extra`` that occurs, ``extra.KEY``; what a Record does not have is empty.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any

import msgspec

from meshwright.records.record import Record

__all__ = ["TABLE_COLUMNS", "ExportFormat", "export_records"]

_encoder = msgspec.json.Encoder(order="deterministic")


class ExportFormat(StrEnum):
    """What Records are written as."""

    JSON = "json"
    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"


def _json_text(value: object) -> str:
    return _encoder.encode(value).decode()


TABLE_COLUMNS: dict[str, Callable[[Record], Any]] = {
    "kind": lambda record: str(record.kind),
    "name": lambda record: record.name,
    "device": lambda record: record.device,
    "median": lambda record: record.median,
    "p10": lambda record: record.p10,
    "p90": lambda record: record.p90,
    "unit": lambda record: record.unit,
    "num_repeats": lambda record: record.num_repeats,
    "samples": lambda record: _json_text(record.samples),
    "method": lambda record: record.method,
    "measured_utc": lambda record: record.measured_utc,
    "writer": lambda record: record.writer,
    "source": lambda record: record.source,
    "machine.processor": lambda record: record.machine.processor,
    "machine.num_cores": lambda record: record.machine.num_cores,
    "machine.memory_bytes": lambda record: record.machine.memory_bytes,
    "machine.accelerators": lambda record: _json_text(record.machine.accelerators),
    "machine.system": lambda record: record.machine.system,
    "machine.driver": lambda record: record.machine.driver,
    "machine.clocks_hz": lambda record: _json_text(record.machine.clocks_hz),
    "software.python": lambda record: record.software.python,
    "software.packages": lambda record: _json_text(record.software.packages),
}
"""Cell of each column of a table; lists and mappings are JSON text."""


def export_records(records: Sequence[Record], form: ExportFormat) -> bytes:
    """A file that holds ``records``, in their order."""
    if form == ExportFormat.JSON:
        return msgspec.json.format(_encoder.encode(records), indent=2) + b"\n"
    if form == ExportFormat.JSONL:
        return b"".join(_encoder.encode(record) + b"\n" for record in records)
    keys = sorted({key for record in records for key in record.extra})
    columns: dict[str, list[Any]] = {
        name: [cell(record) for record in records] for name, cell in TABLE_COLUMNS.items()
    }
    columns |= {f"extra.{key}": [record.extra.get(key) for record in records] for key in keys}
    return _csv(columns) if form == ExportFormat.CSV else _parquet(columns)


def _csv(columns: dict[str, list[Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue().encode("utf-8")


def _parquet(columns: dict[str, list[Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = [pa.array(cells, _type_of(name, cells)) for name, cells in columns.items()]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(arrays, names=list(columns)), sink, compression="zstd")
    return bytes(sink.getvalue())


def _type_of(name: str, cells: list[Any]) -> Any:
    """Type of a column; the cells of one whose scalars differ in type become text."""
    import pyarrow as pa

    types = {type(cell) for cell in cells if cell is not None}
    if name in ("median", "p10", "p90") or types == {int, float} or types == {float}:
        cells[:] = [cell if cell is None else float(cell) for cell in cells]
        return pa.float64()
    if types in ({int}, {bool}):
        return pa.int64() if int in types else pa.bool_()
    cells[:] = [cell if cell is None else str(cell) for cell in cells]
    return pa.string()
