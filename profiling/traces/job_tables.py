"""Job traces of clusters to Records: our own columns, and those of Helios and Alibaba.

Known by other names: ``jobid``, ``job_name``; ``submit_time``, ``creation_time``; ``duration``, or
``start_time`` and ``end_time``; ``gpu_num``, ``num_gpu``, or Alibaba's ``plan_gpu`` (hundredths of
a GPU for each of ``inst_num`` instances); ``gpu_spec``. Times are seconds or dates.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from meshwright.errors import BadRequest
from meshwright.profiling.traces.formats import ImportOptions, TraceFormat, TraceImport
from meshwright.profiling.traces.jobs import JobMixture
from meshwright.profiling.traces.published import (
    UNKNOWN,
    device_name,
    unknown_host,
    unknown_software,
)
from meshwright.profiling.traces.tables import (
    Column,
    ColumnType,
    Table,
    column_names,
    is_parquet,
    read_table,
)
from meshwright.records import Kind, Record, make_record
from meshwright.strict_json import one_line

__all__ = ["import_job_tables"]

_TIME = ("start_time", "end_time")
_SUBMIT_ALIASES = ("submit_time", "submitted_time", "creation_time")
_COLUMNS = (
    Column(
        name="job_id",
        type=ColumnType.TEXT,
        is_required=True,
        aliases=("jobid", "job_name", "name"),
    ),
    *(
        Column(name=name, type=ColumnType.TEXT, aliases=aliases)
        for name, aliases in (
            ("source", ()), ("cluster", ("vc",)), ("gpu_type", ("gpu_spec",)), ("model", ()),
            ("model_synthetic", ()),
        )
    ),
    Column(name="duration_s", type=ColumnType.FLOAT, aliases=("duration",)),
    Column(name="gpus", type=ColumnType.FLOAT, aliases=("gpu_num", "num_gpu"), least=0),
    Column(name="plan_gpu", type=ColumnType.FLOAT, least=0),
    Column(name="inst_num", type=ColumnType.FLOAT, least=0),
    Column(name="total_steps", type=ColumnType.FLOAT, least=0),
    Column(name="is_derived_duration", type=ColumnType.BOOLEAN),
)  # fmt: skip


def import_job_tables(paths: Sequence[Path], options: ImportOptions) -> list[TraceImport]:
    """What traces of cluster jobs tell: a Record a job, and the mixture they make.

    Raises:
        BadRequest: a file is no such table.
    """
    return [_import(path, options) for path in paths]


def _import(path: Path, options: ImportOptions) -> TraceImport:
    names = column_names(path)
    submit = next((item for item in ("submit_s", *_SUBMIT_ALIASES) if item in names), None)
    dated = [item for item in (submit, *_TIME) if item is not None and item in names]
    as_text = not is_parquet(path)
    times = tuple(
        Column(name=name, type=ColumnType.TEXT if as_text else ColumnType.FLOAT) for name in dated
    )
    table = read_table(path, (*_COLUMNS, *times), max_bytes=options.max_bytes)
    skipped: Counter[str] = Counter()
    records = tuple(_records(table, submit, skipped))
    missing = ["how long each stood in the queue", "batch sizes and parallel degrees"]
    summary: dict[str, Any] = {
        "num_rows": table.num_rows,
        "left_out": dict(skipped),
        "unknown_columns": list(table.unknown),
    }
    said: list[str] = []
    if any(record.extra.get("gpus") for record in records):
        mixture = JobMixture.from_records(records)
        summary["mixture"] = mixture.summary()
        said += mixture.lines()
    said += [f"left out: {count} {reason}" for reason, count in skipped.items()]
    if table.unknown:
        said.append(f"columns that are not known, left out: {', '.join(table.unknown)}")
    return TraceImport(
        format=TraceFormat.JOB_TRACE,
        names=(table.name,),
        records=records,
        summary=summary,
        missing=tuple(missing),
        lines=tuple(said),
    )


def _records(table: Table, submit: str | None, skipped: Counter[str]) -> Iterator[Record]:
    sources: dict[str, str] = {}
    for number, row in enumerate(table.rows(), start=1):
        where = f"{table.name}: row {number}"
        if "job_id" not in row:
            skipped["rows without a job"] += 1
            continue
        submit_s, start_s, end_s = (
            _seconds(row.get(key) if key else None, f"{where}: {key}") for key in (submit, *_TIME)
        )
        duration_s = row.get("duration_s")
        if duration_s is None and start_s is not None and end_s is not None:
            duration_s = end_s - start_s
        if duration_s is not None and duration_s < 0:
            skipped["durations below 0 (their jobs are kept without one)"] += 1
            duration_s = None
        num_gpus = _num_gpus(row)
        if duration_s is None and num_gpus is None:
            skipped["jobs of unknown duration and GPUs"] += 1
            continue
        of = row.get("source", "")
        if of not in sources:
            sources[of] = f"{one_line(of)}, {table.source}" if of else table.source
        synthetic = "model" not in row and "model_synthetic" in row
        yield make_record(
            kind=Kind.JOB,
            name=one_line(row.get("model") or row.get("model_synthetic") or UNKNOWN),
            device=device_name(row.get("gpu_type", "")),
            verb="traces import",
            source=sources[of],
            machine=unknown_host((row.get("gpu_type", ""),)),
            software=unknown_software(),
            **_value(duration_s, num_gpus),
            measured_utc="",
            extra={
                "job_id": one_line(row["job_id"]),
                "cluster": row.get("cluster"),
                "submit_s": submit_s if submit_s is not None else start_s,
                "gpus": num_gpus,
                "gpu_type": row.get("gpu_type"),
                "model_is_synthetic": True if synthetic else None,
                "total_steps": row.get("total_steps"),
                "duration_is_derived": row.get("is_derived_duration"),
            },
        )


def _value(duration_s: float | None, num_gpus: int | None) -> dict[str, Any]:
    """The figure of a job: how long it ran or, where nobody knows, on how many GPUs."""
    of = "from a trace of a cluster's jobs"
    if duration_s is not None:
        return {"method": f"{of}: end less start of the job", "unit": "s", "median": duration_s}
    assert num_gpus is not None, "a job of which neither is known is left out"
    return {
        "method": f"{of}: the GPUs it asked for; how long it ran is not known",
        "unit": "gpus",
        "median": float(num_gpus),
    }


def _num_gpus(row: dict[str, Any]) -> int | None:
    """Whole GPUs; a share of one counts as one."""
    if "gpus" in row:
        return math.ceil(row["gpus"])
    if "plan_gpu" in row:
        return math.ceil(row["plan_gpu"] / 100 * row.get("inst_num", 1.0))
    return None


def _seconds(value: str | float | None, where: str) -> float | None:
    """Seconds of a number or a date; dates count from 1970."""
    if value is None or isinstance(value, float):
        return value
    text = value.strip()
    try:
        seconds = float(text)
    except ValueError:
        pass
    else:
        if math.isfinite(seconds):
            return seconds
        raise BadRequest(f"{where}: {one_line(text)[:80]!r} is neither seconds nor a date")
    try:
        date = datetime.fromisoformat(text)
    except ValueError:
        raise BadRequest(
            f"{where}: {one_line(text)[:80]!r} is neither seconds nor a date"
        ) from None
    return date.replace(tzinfo=date.tzinfo or UTC).timestamp()
