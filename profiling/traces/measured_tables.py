"""Tables of published measurements to Records: training runs, operators, collectives.

A column that is not known is named and left out. Figures stand as their source prints them: a
median without its repeats, so that p10 and p90 equal it and one repeat is counted; the method says
so.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from meshwright.profiling.traces.formats import ImportOptions, TraceFormat, TraceImport
from meshwright.profiling.traces.published import (
    UNKNOWN,
    device_name,
    unknown_host,
    unknown_software,
)
from meshwright.profiling.traces.tables import Column, ColumnType, Table, read_table
from meshwright.profiling.traces.words import collective_of, direction_of, dtype_of
from meshwright.records import Kind, Record, make_record
from meshwright.records.kinds import KINDS
from meshwright.records.record import Scalar
from meshwright.strict_json import one_line
from meshwright.units import format_seconds

__all__ = ["import_collective_tables", "import_operator_tables", "import_run_tables"]

_VERB = "traces import"
_LONGEST_S = 86_400.0
"""Of one operator or collective; tables print numbers such as 1e6 where a run failed."""
_MAX_NAMED = 20
_METHOD = "as published: median over repeats, their number and spread not kept"
_TEXT, _FLOAT, _INTEGER, _BOOLEAN = (
    ColumnType.TEXT, ColumnType.FLOAT, ColumnType.INTEGER, ColumnType.BOOLEAN,
)  # fmt: skip


def _columns(kind: ColumnType, *names: str, least: float | None = None) -> tuple[Column, ...]:
    return tuple(Column(name=name, type=kind, least=least) for name in names)


_RUN_COLUMNS = (
    Column(name="run_id", type=_TEXT, is_required=True),
    Column(name="gpu", type=_TEXT, is_required=True),
    *_columns(
        _TEXT, "source", "citation", "licence", "arch", "model_name", "precision", "schedule",
        "recompute", "framework", "quoted_flops_kind", "trust", "notes",
    ),
    *_columns(
        _INTEGER, "layers", "hidden", "heads", "kv_heads", "head_dim", "ffn_hidden", "vocab",
        "seq_len", "experts", "experts_per_token", "moe_ffn_hidden", "gpus_per_host", "hosts",
        "gpus", "nvlink_domain_gpus", "global_batch", "micro_batch", "dp", "tp", "pp", "cp", "ep",
        "virtual_stages", "zero_stage", least=0,
    ),
    *_columns(
        _FLOAT, "params_b", "intra_host_GBps", "inter_host_GBps", "step_time_s", "mfu", "mfu_calc",
        "quoted_tflops_gpu", "samples_per_s", "peak_memory_bytes", least=0,
    ),
    *_columns(
        _BOOLEAN, "gated_mlp", "tied_embeddings", "sequence_parallel", "flash_attention", "oom",
        "is_derived_time",
    ),
)  # fmt: skip

_OPERATOR_COLUMNS = (
    *(
        Column(name=name, type=_TEXT, is_required=True)
        for name in ("gpu", "op", "direction", "dtype")
    ),
    Column(name="time_s", type=_FLOAT, is_required=True, least=0),
    *_columns(_TEXT, "source", "extra"),
    *_columns(
        _INTEGER, "b", "m", "n", "k", "seq_q", "seq_k", "heads", "kv_heads", "head_dim", "experts",
        "top_k", "tp", least=0,
    ),
    *_columns(_FLOAT, "flops", "bytes", "time_rel_std", "memory_bytes", least=0),
    *_columns(_BOOLEAN, "causal"),
)  # fmt: skip

_COLLECTIVE_COLUMNS = (
    *(Column(name=name, type=_TEXT, is_required=True) for name in ("gpu", "collective")),
    Column(name="group_size", type=_INTEGER, is_required=True, least=1),
    Column(name="bytes", type=_FLOAT, is_required=True, least=0),
    Column(name="time_s", type=_FLOAT, is_required=True, least=0),
    *_columns(_TEXT, "source", "fabric", "dtype", "extra"),
    *_columns(_INTEGER, "ranks_per_host", "hosts", least=0),
    *_columns(_FLOAT, "time_rel_std", "algbw_GBps", "busbw_GBps", least=0),
)

_RowMaker = Callable[[dict[str, Any], str, Counter[str]], Record | None]
"""A row and the table's source to a Record; None where it is left out, with the reason counted."""


def import_run_tables(paths: Sequence[Path], options: ImportOptions) -> list[TraceImport]:
    """Measured training runs: a Record of each step time, and of each run out of memory.

    Raises:
        BadRequest: a file is no such table.
    """
    return [
        _import(path, options, TraceFormat.RUN_TABLE, _RUN_COLUMNS, _run, ("name", "device"))
        for path in paths
    ]


def import_operator_tables(paths: Sequence[Path], options: ImportOptions) -> list[TraceImport]:
    """Measured operators, one Record a row.

    Raises:
        BadRequest: a file is no such table.
    """
    return [
        _import(
            path, options, TraceFormat.OPERATOR_TABLE, _OPERATOR_COLUMNS, _operator,
            ("name", "device"),
        )
        for path in paths
    ]  # fmt: skip


def import_collective_tables(paths: Sequence[Path], options: ImportOptions) -> list[TraceImport]:
    """Measured collectives, one Record a row.

    Raises:
        BadRequest: a file is no such table.
    """
    return [
        _import(
            path, options, TraceFormat.COLLECTIVE_TABLE, _COLLECTIVE_COLUMNS, _collective,
            ("name", "device"),
        )
        for path in paths
    ]  # fmt: skip


def _import(
    path: Path,
    options: ImportOptions,
    format_: TraceFormat,
    columns: Sequence[Column],
    record_of: _RowMaker,
    keys: tuple[str, ...],
) -> TraceImport:
    table = read_table(path, columns, max_bytes=options.max_bytes)
    skipped: Counter[str] = Counter()
    records = tuple(_records(table, record_of, skipped))
    counts = {key: Counter(getattr(record, key) for record in records) for key in keys}
    oom = sum(record.unit == "ranks" for record in records)
    summary: dict[str, Any] = {
        "num_rows": table.num_rows,
        "left_out": dict(skipped),
        "unknown_columns": list(table.unknown),
        "by_name": dict(counts["name"].most_common()),
        "by_device": dict(counts["device"].most_common()),
    }
    said = [
        f"{table.num_rows} rows of {len(counts['name'])} names on {len(counts['device'])} devices"
        + (f", {oom} of them out of memory" if oom else "")
    ]
    times_s = sorted(record.median for record in records if record.unit == "s")
    if times_s:
        said.append(f"times from {format_seconds(times_s[0])} to {format_seconds(times_s[-1])}")
    said += [f"left out: {count} {reason}" for reason, count in skipped.items()]
    if table.unknown:
        said.append(f"columns that are not known, left out: {', '.join(table.unknown)}")
    return TraceImport(
        format=format_,
        names=(table.name,),
        records=records,
        summary=summary,
        missing=("the repeats and their spread", "host, software and time of the measurement"),
        lines=tuple(said),
    )


def _records(table: Table, record_of: _RowMaker, skipped: Counter[str]) -> Iterator[Record]:
    sources: dict[str, str] = {}
    for row in table.rows():
        of = row.pop("source", "")
        if of not in sources:
            sources[of] = f"{one_line(of)}, {table.source}" if of else table.source
        record = record_of(row, sources[of], skipped)
        if record is not None:
            yield record


def _make(
    kind: Kind, name: str, row: dict[str, Any], source: str, extra: dict[str, Scalar], **more: Any
) -> Record:
    gpu = row["gpu"]
    return make_record(
        kind=kind,
        name=name,
        device=device_name(gpu),
        verb=_VERB,
        source=source,
        machine=unknown_host((gpu,)),
        software=unknown_software(),
        measured_utc="",
        extra=extra,
        **{"method": _METHOD, "unit": "s"} | more,
    )


def _run(row: dict[str, Any], source: str, skipped: Counter[str]) -> Record | None:
    if "run_id" not in row or "gpu" not in row:
        skipped["rows without run_id or gpu"] += 1
        return None
    name = one_line(row.get("model_name") or row.get("arch") or UNKNOWN)
    time_s = row.pop("step_time_s", None)
    if row.get("oom"):
        if not row.get("gpus"):
            skipped["runs out of memory on an unknown number of GPUs"] += 1
            return None
        return _make(
            Kind.RUN, name, row, source, row, unit="ranks", median=row["gpus"],
            method="as published: the run failed for memory; the figure is its number of ranks",
        )  # fmt: skip
    if time_s is None and row.get("samples_per_s") and row.get("global_batch"):
        time_s = row["global_batch"] / row["samples_per_s"]
        row["is_derived_time"] = True
    if not time_s:
        skipped["runs without a step time"] += 1
        return None
    return _make(
        Kind.RUN, name, row, source, row, median=time_s,
        method="as published: time of one optimizer step"
        + (", from a printed throughput" if row.get("is_derived_time") else ""),
    )  # fmt: skip


@lru_cache(maxsize=2**16)
def _of_extra(text: str) -> dict[str, Scalar]:
    """What our kinds know of the column ``extra``: model and role."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(value, dict):
        return {}
    return {
        key: one_line(value[key]) for key in ("model", "role") if isinstance(value.get(key), str)
    }


_OPERATOR_KEYS = frozenset((*KINDS[Kind.OPERATOR].required, *KINDS[Kind.OPERATOR].optional))


def _has_time(row: dict[str, Any], skipped: Counter[str]) -> bool:
    if not row.get("time_s"):
        skipped["rows without a time"] += 1
        return False
    if row["time_s"] > _LONGEST_S:
        skipped["rows whose time, over a day, stands for a failure"] += 1
        return False
    return True


def _are_known(said: dict[str, str | None], row: dict[str, Any], skipped: Counter[str]) -> bool:
    """Whether all words of a row are ours, or others for ours; the first that is not is counted."""
    for key, word in said.items():
        if word is None:
            named = f" such as {one_line(row[key])[:40]!r}" if len(skipped) < _MAX_NAMED else ""
            skipped[f"rows of unknown {key}{named}"] += 1
            return False
    return True


def _operator(row: dict[str, Any], source: str, skipped: Counter[str]) -> Record | None:
    if not _has_time(row, skipped):
        return None
    if any(key not in row for key in ("gpu", "op", "direction", "dtype")):
        skipped["rows without gpu, op, direction or dtype"] += 1
        return None
    said = {"direction": direction_of(row["direction"]), "dtype": dtype_of(row["dtype"])}
    if not _are_known(said, row, skipped):
        return None
    row |= said
    extra: dict[str, Scalar] = _of_extra(row["extra"]) if "extra" in row else {}
    extra = extra | {key: value for key, value in row.items() if key in _OPERATOR_KEYS}
    if "memory_bytes" in row:
        key = "saved_bytes" if row["direction"] == "fwd" else "peak_memory_bytes"
        extra[key] = int(row["memory_bytes"])
    return _make(Kind.OPERATOR, row["op"], row, source, extra, median=row["time_s"])


def _collective(row: dict[str, Any], source: str, skipped: Counter[str]) -> Record | None:
    if not _has_time(row, skipped):
        return None
    if any(not row.get(key) for key in ("gpu", "collective", "group_size", "bytes")):
        skipped["rows without gpu, collective, group_size or bytes"] += 1
        return None
    said = {"collective": collective_of(row["collective"])}
    if "dtype" in row:
        said["dtype"] = dtype_of(row["dtype"])
    if not _are_known(said, row, skipped):
        return None
    row |= said
    if row["group_size"] < 2 and row["collective"] != "send_recv":
        skipped["rows of a collective of one rank alone"] += 1
        return None
    extra: dict[str, Scalar] = {
        key: row.get(key) for key in ("group_size", "dtype", "fabric", "ranks_per_host", "hosts")
    } | {"bytes": int(row["bytes"])}
    return _make(Kind.COLLECTIVE, row["collective"], row, source, extra, median=row["time_s"])
