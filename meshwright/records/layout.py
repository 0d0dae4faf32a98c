"""How Records stand in a Parquet file: the columns, the checksum of a row, and both directions.

One row is one Record. Machine and software are JSON text, which Parquet stores once for all the
rows that share them; ``extra`` is JSON text with sorted keys. ``uid`` (random, never given twice)
tells two equal measurements apart. ``sha256`` holds the first 16 bytes of the SHA-256 of ``uid``,
the numbers (little endian: int64 repeats, three doubles, int64 count of samples, the samples as
doubles) and the texts in the order of their columns as one JSON array. Rows stand in groups of
``ROWS_PER_GROUP``, so that damage that Parquet cannot decode costs no more than its group; and the
footer, without which Parquet reads nothing, stands twice: without its last copy a file is whole.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import secrets
import struct
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from meshwright.errors import BadRequest
from meshwright.records.record import RECORD_SCHEMA_VERSION, Machine, Record, Scalar, Software
from meshwright.strict_json import one_line

__all__ = [
    "COLUMNS",
    "ROWS_PER_GROUP",
    "VERSION_KEY",
    "Contents",
    "Group",
    "Row",
    "dtype_of",
    "file_of",
    "groups_of",
    "mended_forms",
    "open_contents",
    "rows_of",
    "table_of",
]

ROWS_PER_GROUP = 1024
MAX_ROW_BYTES = 2**20
"""Of the texts and samples of one Record."""
MAX_GROUP_ROWS = 2**16
MAX_GROUP_BYTES = 2**28
"""Of what a file of others may claim for one group, decoded."""
MAX_FOOTER_BYTES = 2**25

_MAGIC = b"PAR1"
VERSION_KEY = b"meshwright.records.schema_version"
_TEXTS = (
    "kind", "name", "device", "dtype", "writer", "source", "machine", "software", "method",
    "unit", "measured_utc", "extra",
)  # fmt: skip
COLUMNS = (
    "uid", "kind", "name", "device", "dtype", "writer", "source", "machine", "software", "method",
    "num_repeats", "median", "p10", "p90", "unit", "samples", "measured_utc", "extra", "sha256",
)  # fmt: skip
_CHECKSUM_BYTES = 16
_NUMBERS = struct.Struct("<q3dq")
_PLAIN = (str, int, float, bool, type(None))
_text_encoder = msgspec.json.Encoder(order="deterministic")
_extra_decoder = msgspec.json.Decoder(dict[str, Scalar])
_machine_decoder = msgspec.json.Decoder(Machine)
_software_decoder = msgspec.json.Decoder(Software)

Row = tuple[bytes, Record]
"""Checksum of the row, which covers its uid and so names it, and its Record."""

Group = tuple[str, str, str, str, str]
"""Kind, name, device, dtype and machine (JSON text) of a row: what is looked for."""


def dtype_of(record: Record) -> str:
    """What the ``dtype`` column holds: ``extra``'s ``dtype`` or ``precision``; else empty."""
    found = record.extra.get("dtype", record.extra.get("precision"))
    return found if isinstance(found, str) else ""


def _checksum(
    uid: bytes, num_repeats: int, values: Sequence[float], samples: array[float], texts: list[str]
) -> bytes:
    hashed = hashlib.sha256(uid)
    hashed.update(_NUMBERS.pack(num_repeats, *values, len(samples)))
    hashed.update(_little_endian(samples))
    hashed.update(_text_encoder.encode(texts))
    return hashed.digest()[:_CHECKSUM_BYTES]


def _little_endian(samples: array[float]) -> bytes:
    if sys.byteorder == "big":
        samples = array("d", samples)
        samples.byteswap()
    return samples.tobytes()


@functools.cache
def _schema() -> Any:
    import pyarrow as pa

    types = {
        "uid": pa.binary(_CHECKSUM_BYTES),
        "sha256": pa.binary(_CHECKSUM_BYTES),
        "num_repeats": pa.int64(),
        "median": pa.float64(),
        "p10": pa.float64(),
        "p90": pa.float64(),
        "samples": pa.list_(pa.field("element", pa.float64(), nullable=False)),
    }
    text = pa.dictionary(pa.int32(), pa.string())
    return pa.schema([pa.field(name, types.get(name, text), nullable=False) for name in COLUMNS])


def table_of(records: Iterable[Record]) -> Any:
    """The rows of ``records``, each with a uid of its own, as a ``pyarrow.Table``.

    Raises:
        BadRequest: a Record holds what the store could not give back.
    """
    import pyarrow as pa

    batch = secrets.token_bytes(_CHECKSUM_BYTES - 4)
    shared: dict[int, tuple[object, str]] = {}
    tables = []
    rows: list[tuple[Any, ...]] = []
    for number, record in enumerate(records):
        try:
            rows.append(_cells_of(record, batch + number.to_bytes(4, "big"), shared))
        except (TypeError, ValueError, OverflowError) as exc:
            name = one_line(str(record.name))
            raise BadRequest(f"record {name}: cannot be stored: {one_line(str(exc))}") from exc
        if len(rows) == ROWS_PER_GROUP:
            tables.append(_table(rows))
            rows = []
    return pa.concat_tables([*tables, _table(rows)])


def _table(rows: list[tuple[Any, ...]]) -> Any:
    import pyarrow as pa

    schema = _schema()
    columns = list(zip(*rows, strict=True)) or [()] * len(COLUMNS)
    arrays = [
        pa.array(column, pa.string()).dictionary_encode()
        if name in _TEXTS
        else pa.array(column, schema.field(name).type)
        for name, column in zip(COLUMNS, columns, strict=True)
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _cells_of(record: Record, uid: bytes, shared: dict[int, tuple[object, str]]) -> tuple[Any, ...]:
    for key, value in record.extra.items():
        if type(key) is not str or type(value) not in _PLAIN:
            raise TypeError(f"extra[{key!r}] is a {type(value).__name__}")
        if type(value) is int and not -(2**63) <= value < 2**63:
            raise ValueError(f"extra[{key!r}] is beyond 64 bits")
    values = (float(record.median), float(record.p10), float(record.p90))
    samples = array("d", record.samples)
    texts = [
        str(record.kind),
        record.name,
        record.device,
        dtype_of(record),
        record.writer,
        record.source,
        _shared_text(record.machine, shared),
        _shared_text(record.software, shared),
        record.method,
        record.unit,
        record.measured_utc,
        _text_encoder.encode(record.extra).decode(),
    ]
    num_repeats = int(record.num_repeats)
    if sum(map(len, texts)) + 8 * len(samples) > MAX_ROW_BYTES:
        raise ValueError(f"its texts and samples exceed {MAX_ROW_BYTES} bytes")
    checksum = _checksum(uid, num_repeats, values, samples, texts)
    return (
        uid, *texts[:9], num_repeats, *values, texts[9], samples, texts[10], texts[11], checksum,
    )  # fmt: skip


def _shared_text(value: Machine | Software, shared: dict[int, tuple[object, str]]) -> str:
    """JSON text of what many Records share; ``shared`` holds the objects, so ids stay theirs."""
    known = shared.get(id(value))
    if known is None:
        encoded = _text_encoder.encode(value)
        msgspec.json.decode(encoded, type=type(value))  # what is stored can be read
        known = shared[id(value)] = (value, encoded.decode())
    return known[1]


def file_of(tables: Iterable[Any]) -> bytes:
    """One Parquet file with the rows of ``tables``, in their order, its footer twice."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    unique = ("uid", "sha256", "median", "p10", "p90", "samples")
    options: dict[str, Any] = {
        "use_dictionary": [name for name in COLUMNS if name not in unique],
        "compression": {
            name: "zstd" if name in _TEXTS else "none"
            for name in (*COLUMNS, "samples.list.element")
        },
        "write_statistics": False,
        "store_schema": False,
    }
    with pq.ParquetWriter(sink, _schema(), **options) as writer:
        for group in _regrouped(tables):
            writer.write_table(group)
        writer.add_key_value_metadata({VERSION_KEY: str(RECORD_SCHEMA_VERSION)})
    data = bytes(sink.getvalue())
    return data + data[-_footer_bytes(data) :]


def _regrouped(tables: Iterable[Any]) -> Iterator[Any]:
    """The rows of ``tables`` in tables of ``ROWS_PER_GROUP``, the last one shorter."""
    import pyarrow as pa

    pending: list[Any] = []
    num_missing = ROWS_PER_GROUP
    for table in tables:
        taken = 0
        while taken < table.num_rows:
            part = table.slice(taken, num_missing)
            pending.append(part)
            taken += part.num_rows
            num_missing -= part.num_rows
            if not num_missing:
                yield pa.concat_tables(pending).unify_dictionaries().combine_chunks()
                pending, num_missing = [], ROWS_PER_GROUP
    if pending:
        yield pa.concat_tables(pending).unify_dictionaries().combine_chunks()


def _footer_bytes(data: bytes) -> int:
    """Length of the last footer, with the eight bytes that end the file."""
    return int.from_bytes(data[-8:-4], "little") + 8


def mended_forms(data: bytes) -> Iterator[bytes]:
    """What a damaged file may be read as: without its last footer, with the start it must have."""
    data = _MAGIC + data[len(_MAGIC) :]
    yield data
    end = len(data) - 1
    for _ in range(3):
        end = data.rfind(_MAGIC, 0, end)
        if end < 12:
            return
        yield data[: end + len(_MAGIC)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What could be decoded of one file; rows are not checked yet."""

    tables: tuple[Any, ...]
    """One ``pyarrow.Table`` for each group of rows."""
    num_lost: int
    """Rows of the groups that could not be decoded."""
    problem: str = ""
    """Why nothing could be decoded; empty where something was."""


def open_contents(data: bytes) -> Contents:
    """The groups of rows in the bytes of a file, as far as they can be decoded.

    Never raises: whatever the native decoder says of damaged bytes is a problem of that file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    nothing = Contents(tables=(), num_lost=0, problem="not a Parquet file or its footer is damaged")
    if len(data) < 12 or data[:4] != _MAGIC or data[-4:] != _MAGIC:
        return nothing
    if _footer_bytes(data) > min(MAX_FOOTER_BYTES, len(data) - 4):
        return nothing
    limits = {
        "thrift_string_size_limit": MAX_FOOTER_BYTES,
        "thrift_container_size_limit": 2**20,
    }
    buffer = pa.BufferReader(data)
    try:
        plain = pq.ParquetFile(buffer, **limits)
        problem = _footer_problem(plain)
        if not problem:
            texts = list(_TEXTS)
            file = pq.ParquetFile(buffer, metadata=plain.metadata, read_dictionary=texts, **limits)
    except Exception:  # decoders of damaged bytes raise whatever they like
        return nothing
    if problem:
        return Contents(tables=(), num_lost=0, problem=problem)
    tables: list[Any] = []
    num_lost = 0
    for number in range(file.num_row_groups):
        try:
            table = file.read_row_group(number, columns=list(COLUMNS), use_threads=False)
            table.validate(full=True)
            _refuse_nulls(table)
        except Exception:  # as above
            num_lost += file.metadata.row_group(number).num_rows
        else:
            tables.append(table)
    return Contents(tables=tuple(tables), num_lost=num_lost)


def _refuse_nulls(table: Any) -> None:
    for column in table.columns:
        texts = [chunk.dictionary for chunk in column.chunks if hasattr(chunk, "dictionary")]
        if column.null_count or any(values.null_count for values in texts):
            raise ValueError("a cell is empty")


def _footer_problem(file: Any) -> str:
    """What is wrong with the claims of a footer; empty if nothing is."""
    given = (file.metadata.metadata or {}).get(VERSION_KEY, b"")
    if not given.isdigit() or len(given) > 9:
        return "a Parquet file, but not of a record store"
    if int(given) > RECORD_SCHEMA_VERSION:
        return (
            f"has schema version {int(given)}, this Meshwright reads {RECORD_SCHEMA_VERSION}; "
            "update Meshwright to read it"
        )
    if int(given) < RECORD_SCHEMA_VERSION:
        return f"has schema version {int(given)}, which no Meshwright reads any more"
    for wanted, found in zip(_schema(), file.schema_arrow, strict=False):
        if wanted.name != found.name or not _same_type(wanted.type, found.type):
            return f"its column {one_line(found.name)!r} is not one of a record store"
    if len(file.schema_arrow) != len(COLUMNS):
        return f"has {len(file.schema_arrow)} columns, a record store has {len(COLUMNS)}"
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        if not (0 <= group.num_rows <= MAX_GROUP_ROWS and group.total_byte_size <= MAX_GROUP_BYTES):
            return f"claims {group.num_rows} rows in one group; no record store writes that"
    return ""


def _same_type(wanted: Any, found: Any) -> bool:
    """Whether a column of ``found`` reads as ``wanted``; names inside lists differ by writer."""
    import pyarrow as pa

    if pa.types.is_list(wanted):
        return bool(pa.types.is_list(found) and found.value_type == wanted.value_type)
    return bool(found == getattr(wanted, "value_type", wanted))


def groups_of(table: Any) -> list[Group]:
    """What is looked for, of every row of ``table``, in order."""
    columns = (_texts_of(table, name) for name in ("kind", "name", "device", "dtype", "machine"))
    return list(zip(*columns, strict=True))


def _texts_of(table: Any, name: str) -> list[str]:
    texts: list[str] = []
    for chunk in table.column(name).chunks:
        values = chunk.dictionary.to_pylist()
        texts += [values[index] for index in chunk.indices.to_pylist()]
    return texts


@dataclass(slots=True)
class _Decoded:
    """Objects that many rows share, by their text."""

    machines: dict[str, Machine] = field(default_factory=dict)
    software: dict[str, Software] = field(default_factory=dict)

    def machine(self, text: str) -> Machine:
        found = self.machines.get(text)
        if found is None:
            found = self.machines[text] = _machine_decoder.decode(text)
        return found

    def software_of(self, text: str) -> Software:
        found = self.software.get(text)
        if found is None:
            found = self.software[text] = _software_decoder.decode(text)
        return found


def rows_of(
    table: Any, wanted: Callable[[Group], bool] | None = None
) -> tuple[list[Row | None], int, str]:
    """The rows of ``table`` that ``wanted`` accepts and whose checksum matches.

    Returns:
        For each row of the table its Row, or None where it is not wanted or is damaged; how many
        are damaged; and what is wrong with the first of those.
    """
    rows: list[Row | None] = [None] * table.num_rows
    num_damaged = 0
    problem = ""
    shared = _Decoded()
    try:
        chosen = (
            range(table.num_rows)
            if wanted is None
            else [number for number, group in enumerate(groups_of(table)) if wanted(group)]
        )
        for number, cells in zip(chosen, _chosen_cells(table, chosen), strict=True):
            try:
                rows[number] = _row(cells, shared)
            except (ValueError, TypeError, OverflowError, RecursionError) as exc:
                num_damaged += 1
                problem = problem or one_line(str(exc))
    except Exception as exc:  # as in open_contents
        return [None] * table.num_rows, table.num_rows, one_line(str(exc)) or type(exc).__name__
    return rows, num_damaged, problem


def _chosen_cells(table: Any, chosen: Sequence[int]) -> Iterator[tuple[Any, ...]]:
    if not chosen:
        return iter(())
    if len(chosen) < table.num_rows:
        table = table.take(chosen)
    columns: list[list[Any]] = [
        _samples_of(table)
        if name == "samples"
        else _texts_of(table, name)
        if name in _TEXTS
        else table.column(name).to_pylist()
        for name in COLUMNS
    ]
    return zip(*columns, strict=True)


def _samples_of(table: Any) -> list[tuple[float, ...]]:
    samples: list[tuple[float, ...]] = []
    for chunk in table.column("samples").chunks:
        offsets = chunk.offsets.to_pylist()
        flat = chunk.values.to_pylist()
        samples += [tuple(flat[low:high]) for low, high in itertools.pairwise(offsets)]
    return samples


def _row(cells: tuple[Any, ...], shared: _Decoded) -> Row:
    (
        uid, kind, name, device, dtype, writer, source, machine, software, method,
        num_repeats, median, p10, p90, unit, samples, measured_utc, extra, checksum,
    ) = cells  # fmt: skip
    texts = [
        kind, name, device, dtype, writer, source, machine, software, method,
        unit, measured_utc, extra,
    ]  # fmt: skip
    if sum(map(len, texts)) + 8 * len(samples) > MAX_ROW_BYTES:
        raise ValueError(f"its texts and samples exceed {MAX_ROW_BYTES} bytes")
    if checksum != _checksum(uid, num_repeats, (median, p10, p90), array("d", samples), texts):
        raise ValueError("the checksum does not match")
    record = Record(
        kind=kind,
        name=name,
        device=device,
        writer=writer,
        source=source,
        machine=shared.machine(machine),
        software=shared.software_of(software),
        method=method,
        num_repeats=num_repeats,
        median=median,
        p10=p10,
        p90=p90,
        unit=unit,
        samples=samples,
        measured_utc=measured_utc,
        extra=_extra_decoder.decode(extra),
    )
    return checksum, record
