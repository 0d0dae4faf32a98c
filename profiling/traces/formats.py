"""What a file of outsiders is, told from its first bytes; and the one form importers answer in."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from meshwright.errors import BadRequest
from meshwright.profiling.traces.sources import (
    DEFAULT_MAX_BYTES,
    Member,
    Source,
    open_members,
    printable,
)
from meshwright.profiling.traces.tables import column_names, is_parquet
from meshwright.records import Record
from meshwright.strict_json import one_line

__all__ = [
    "ImportOptions",
    "TraceFormat",
    "TraceImport",
    "detect_format",
    "format_of",
    "members_of",
]

_HEAD_BYTES = 2**20


class TraceFormat(StrEnum):
    """The formats ``meshwright traces import`` knows."""

    KINETO = "kineto"
    """A PyTorch profiler trace (Chrome trace events), one file a rank."""
    EXECUTION_TRACE = "execution-trace"
    """A PyTorch execution trace, schemas 1.0.x and 1.x-chakra: operators, no times."""
    CHAKRA_JSON = "chakra-json"
    """A Chakra execution trace as JSON (``workload_graph``)."""
    CHAKRA_PROTOBUF = "chakra-protobuf"
    """A Chakra execution trace as length-delimited protobuf (``.et``)."""
    NCCL_TESTS = "nccl-tests"
    RUN_TABLE = "run-table"
    OPERATOR_TABLE = "operator-table"
    COLLECTIVE_TABLE = "collective-table"
    JOB_TRACE = "job-trace"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """What the user may say about the files."""

    max_bytes: int = DEFAULT_MAX_BYTES
    """Of one file, decompressed."""
    model: str = ""
    """Name of the model that ran; profiler traces do not hold it. Empty if not given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceImport:
    """What one file, or one set of files of the same job, yielded."""

    format: TraceFormat
    names: tuple[str, ...]
    """The files and members of archives it was read from, fit to print."""
    records: tuple[Record, ...]
    summary: dict[str, Any] = field(default_factory=dict)
    """What was found, as JSON; its keys depend on the format."""
    missing: tuple[str, ...] = ()
    """What the file does not tell, one phrase each."""
    lines: tuple[str, ...] = ()
    """The summary for a person."""


_WORDS: tuple[tuple[TraceFormat, re.Pattern[bytes]], ...] = (
    (TraceFormat.EXECUTION_TRACE, re.compile(rb'^\s*\{\s*"schema"\s*:\s*"', re.DOTALL)),
    (TraceFormat.KINETO, re.compile(rb'^\s*\{.*?"(traceEvents|schemaVersion)"\s*:', re.DOTALL)),
    (TraceFormat.KINETO, re.compile(rb'^\s*\[\s*(\]|\{.*?"ph"\s*:)', re.DOTALL)),
    (TraceFormat.CHAKRA_JSON, re.compile(rb'^\s*\{.*?"workload_graph"\s*:', re.DOTALL)),
    (
        TraceFormat.NCCL_TESTS,
        re.compile(rb"^[^\n#]{0,40}#([^\n]*(nThread|nccl-tests)|\s+size\s+count)", re.MULTILINE),
    ),
    (
        TraceFormat.CHAKRA_PROTOBUF,
        re.compile(
            rb"^[\x80-\xff]{0,4}[\x01-\x7f](\x0a[\x05-\x0f]\d+\.\d+\.\d+|\x12.\x0a\x06schema)",
            re.DOTALL,
        ),
    ),
)

_TABLES: tuple[tuple[TraceFormat, frozenset[str]], ...] = (
    (TraceFormat.RUN_TABLE, frozenset({"run_id", "gpu"})),
    (TraceFormat.OPERATOR_TABLE, frozenset({"op", "direction", "dtype", "time_s"})),
    (TraceFormat.COLLECTIVE_TABLE, frozenset({"collective", "group_size", "bytes", "time_s"})),
    (TraceFormat.JOB_TRACE, frozenset({"job_id"})),
    (TraceFormat.JOB_TRACE, frozenset({"jobid"})),
    (TraceFormat.JOB_TRACE, frozenset({"job_name", "plan_gpu"})),
    (TraceFormat.JOB_TRACE, frozenset({"name", "num_gpu"})),
)
"""By the columns each must have; the first that fits."""


def format_of(head: bytes) -> TraceFormat | None:
    """The format of a file that begins with ``head``, decompressed; None if it is none of ours."""
    for format_, pattern in _WORDS:
        if pattern.search(head):
            return format_
    first_line = head.partition(b"\n")[0].decode("utf-8-sig", "replace")
    return _table_format(word.strip(' \r"') for word in first_line.split(","))


def _table_format(names: Iterable[str]) -> TraceFormat | None:
    present = set(names)
    return next((format_ for format_, needed in _TABLES if needed <= present), None)


def detect_format(path: str | os.PathLike[str]) -> TraceFormat:
    """The format of the file at ``path``, or of the first in the archive that has one.

    Raises:
        BadRequest: it cannot be read, or is none of the formats.
    """
    if is_parquet(path):
        found = _table_format(column_names(path))
        if found is None:
            raise BadRequest(
                f"{printable(path)}: a table, but of nothing we know; it has the columns "
                f"{one_line(', '.join(column_names(path)))}"
            )
        return found
    unknown = ""
    for member in open_members(path):
        head = member.head(_HEAD_BYTES)
        found = format_of(head)
        if found is not None:
            return found
        unknown = unknown or member.name
        if not _is_plain_text(head):
            break
    if unknown:
        raise BadRequest(f"{unknown}: not a trace we know; give one of {', '.join(TraceFormat)}")
    raise BadRequest(f"{printable(path)}: the archive holds no file; give one with traces")


def members_of(source: Source, format_: TraceFormat, left_out: list[str]) -> Iterator[Member]:
    """The files of ``source`` that are to be read as ``format_``.

    Of an archive, texts that are no trace (a README) and traces of other formats are passed over
    and named in ``left_out``; what looks like a trace and is damaged is not.
    """
    for member in source.members():
        if member.name != source.name:
            head = member.head(_HEAD_BYTES)
            found = format_of(head)
            if found != format_ and (found is not None or _is_plain_text(head)):
                what = "no trace" if found is None else f"{found}, not {format_}"
                left_out.append(f"{member.name} ({what})")
                continue
        yield member


def _is_plain_text(head: bytes) -> bool:
    """Whether a file begins as words for people, not as JSON or something binary."""
    if not head or b"\0" in head or head.lstrip()[:1] in (b"{", b"[", b""):
        return False
    try:
        head[:-4].decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start > len(head) - 12
    return True
