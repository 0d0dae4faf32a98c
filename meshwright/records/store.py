"""An append-only store of Records: one JSON object a line, each with its own checksum.

A line is ``{"sha256": "<first 16 digits>", "record": {...}}``; the checksum is of the record's
canonical form (keys sorted, no blanks), so a tool may reformat the line. Appending is one
``write`` to a file opened with ``O_APPEND``, then ``fsync``: processes may append at once, and a
crash can tear only the last line, which reading skips and names.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from meshwright.errors import BadRequest, PlannerError
from meshwright.records.record import Record
from meshwright.strict_json import JsonValue, convert, load_json, one_line

__all__ = ["RecordStore"]

_MAX_LINE_BYTES = 2**20
_CHECKSUM_DIGITS = 16


class RecordStore:
    """Records in a file (``*.jsonl``) or in ``records.jsonl`` of a directory."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        given = Path(path)
        self.path = given if given.suffix == ".jsonl" else given / "records.jsonl"

    def append(self, *records: Record) -> None:
        """Add ``records`` at the end; they are on disk when this returns.

        Raises:
            BadRequest: the file cannot be written.
        """
        if not records:
            return
        data = b"".join(_line(record) for record in records)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                _append(descriptor, data)
            finally:
                os.close(descriptor)
        except (OSError, ValueError) as exc:
            raise BadRequest(
                f"{one_line(str(self.path))}: cannot add records: {one_line(str(exc))}"
            ) from exc

    def read(self) -> tuple[list[Record], list[str]]:
        """All records that are whole, and one line about each that is not.

        A store that does not exist yet is empty.

        Raises:
            BadRequest: the file cannot be read.
        """
        records: list[Record] = []
        problems: list[str] = []
        try:
            with self.path.open("rb") as file:
                for number, line in enumerate(_lines(file), start=1):
                    name = f"{one_line(str(self.path))}: line {number}"
                    if not line.strip():
                        continue
                    try:
                        records.append(_record(line, name))
                    except PlannerError as exc:
                        problems.append(f"{exc}; skipped")
        except FileNotFoundError:
            return [], []
        except (OSError, ValueError) as exc:
            raise BadRequest(
                f"{one_line(str(self.path))}: cannot read records: {one_line(str(exc))}"
            ) from exc
        return records, problems


def _append(descriptor: int, data: bytes) -> None:
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        data = b"\n" + data  # a crash tore the last line; keep ours apart from it
    written = os.write(descriptor, data)
    if written != len(data):
        raise OSError(f"only {written} of {len(data)} bytes were written; is the disk full?")
    os.fsync(descriptor)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines of ``file``; of one that is too long, as much as shows that it is."""
    while line := file.readline(_MAX_LINE_BYTES + 1):
        rest = line
        while len(rest) > _MAX_LINE_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(_MAX_LINE_BYTES + 1)
        yield line


def _line(record: Record) -> bytes:
    # Read back before it is written: what the store holds, the store can read.
    plain = load_json(msgspec.json.encode(record), error=BadRequest, name="record")
    line = json.dumps(
        {"sha256": _checksum(plain), "record": plain}, ensure_ascii=False, separators=(",", ":")
    )
    data = line.encode("utf-8") + b"\n"
    if len(data) > _MAX_LINE_BYTES:
        raise BadRequest(f"record {one_line(record.name)}: {len(data)} bytes are too many for one")
    return data


def _record(line: bytes, name: str) -> Record:
    if len(line) > _MAX_LINE_BYTES:
        raise BadRequest(f"{name}: longer than {_MAX_LINE_BYTES} bytes")
    value = load_json(line, error=BadRequest, name=name)
    if not isinstance(value, dict) or set(value) != {"sha256", "record"}:
        raise BadRequest(f"{name}: not a line of a record store")
    if value["sha256"] != _checksum(value["record"]):
        raise BadRequest(f"{name}: the checksum does not match")
    return convert(value["record"], Record, error=BadRequest, name=name)


def _checksum(value: JsonValue) -> str:
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()[:_CHECKSUM_DIGITS]
