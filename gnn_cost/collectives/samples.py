"""Measured collectives, as the learned collective cost is fitted and judged with them.

``samples_from_table`` reads the columns of a published table (docs/cost-model.md), with its traps
known and counted; ``samples_from_records`` reads Records of ``meshwright profile collectives``.
Where a row's links are not stated, ``collective_systems`` holds what is assumed, and why.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.cluster.model import Device, GroupLevel
from meshwright.errors import BadRequest
from meshwright.gnn_cost.collectives.model import KINDS, Groups, stack_groups, system_of
from meshwright.gnn_cost.collectives.systems import Row, placed, reason_to_leave_out

__all__ = [
    "CollectiveSamples",
    "MeasuredGroup",
    "joined",
    "samples_from_records",
    "samples_from_table",
    "thinned",
]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_NEEDED = ("gpu", "collective", "group_size", "bytes", "time_s")
_COLUMNS = (*_NEEDED, "source", "fabric", "hosts", "dtype", "extra")
_FAILED_S = 1e3
_KEYS = ("source", "gpu", "fabric", "collective", "group_size", "hosts", "dtype", "extra")


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredGroup:
    """One collective of one group of ranks on one system, measured over sizes."""

    kind: str
    """One of ``KINDS``."""
    levels: tuple[GroupLevel, ...]
    num_ranks: int
    device: Device
    source: str
    """Whose measurement."""
    gpu: str
    """As the source calls it; what is left out together."""
    ring_bytes_per_s: float | None = None
    """What the wiring of these ranks gives their lowest level, where it is not the data sheet's."""

    @property
    def system(self) -> str:
        """Devices and links that behave alike."""
        return system_of(self.device, self.levels[0].link)


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveSamples:
    """N measurements of G groups."""

    groups: tuple[MeasuredGroup, ...]
    group: IntArray
    """(N,) place in ``groups``."""
    num_bytes: FloatArray
    """(N,) full payloads."""
    time_s: FloatArray
    """(N,)"""

    @property
    def count(self) -> int:
        """N."""
        return len(self.time_s)

    def features(self) -> Groups:
        """The N groups as the formulas see them."""
        items = [(g.kind, g.levels, g.num_ranks, g.device) for g in self.groups]
        return stack_groups(items, [g.ring_bytes_per_s for g in self.groups]).take(self.group)

    def labels(self, name: str) -> NDArray[np.str_]:
        """(N,) one field of each measurement's group, as text."""
        values = np.array([str(getattr(group, name)) for group in self.groups])
        return values[self.group]

    def where(self, chosen: NDArray[np.bool_]) -> CollectiveSamples:
        """Those measurements that ``chosen``, (N,), has."""
        return CollectiveSamples(
            groups=self.groups,
            group=self.group[chosen],
            num_bytes=self.num_bytes[chosen],
            time_s=self.time_s[chosen],
        )


def joined(parts: Sequence[CollectiveSamples]) -> CollectiveSamples:
    """All measurements of ``parts``; none for no parts."""
    groups: list[MeasuredGroup] = []
    places = []
    for part in parts:
        places.append(part.group + len(groups))
        groups += part.groups
    empty = np.zeros(0)
    return CollectiveSamples(
        groups=tuple(groups),
        group=np.concatenate([np.zeros(0, dtype=np.int64), *places]),
        num_bytes=np.concatenate([empty, *(part.num_bytes for part in parts)]),
        time_s=np.concatenate([empty, *(part.time_s for part in parts)]),
    )


def samples_from_table(path: str | Path) -> tuple[CollectiveSamples, dict[str, int]]:
    """What a table of measured collectives (Parquet, CSV) gives, and the rows left out, by reason.

    Raises:
        BadRequest: the file cannot be read or lacks a column.
    """
    table = _read_table(Path(path))
    codes, rows = _distinct_rows(table)
    num_bytes = table["bytes"].to_numpy().astype(np.float64)
    time_s = table["time_s"].to_numpy().astype(np.float64)
    groups: list[MeasuredGroup] = []
    place = np.full(len(rows), -1)
    reasons = np.array([reason_to_leave_out(row) for row in rows], dtype=object)
    usable = np.isfinite(num_bytes) & (num_bytes > 0)
    failed = usable & ~((time_s > 0) & (time_s < _FAILED_S))
    for index, row in enumerate(rows):
        if not reasons[index]:
            groups.append(placed(row, MeasuredGroup))
            place[index] = len(groups) - 1
    least = np.array([row.least_bytes for row in rows])[codes]
    why = reasons[codes]
    why[(why == "") & (num_bytes < least)] = "sizes where the source measured the launching host"
    why[failed] = "failed: no time, or about 1e6 s"
    why[~usable] = "no bytes, a plateau bandwidth only"
    kept = why == ""
    samples = CollectiveSamples(
        groups=tuple(groups),
        group=place[codes[kept]],
        num_bytes=num_bytes[kept],
        time_s=time_s[kept],
    )
    return samples, dict(Counter(why[~kept].tolist()))


def _read_table(path: Path) -> Any:
    """The columns in use, those that may be absent empty."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    try:
        if path.name.endswith((".csv", ".csv.gz")):
            table = pyarrow.csv.read_csv(path)
        else:
            table = pyarrow.parquet.read_table(path)
        columns = {name: table[name] for name in table.column_names if name in _COLUMNS}
        for name, kind in (("bytes", pa.float64()), ("time_s", pa.float64())):
            columns[name] = columns[name].cast(kind)
        for name in ("group_size", "hosts"):
            columns[name] = columns[name].cast(pa.int64()) if name in columns else None
        for name in _COLUMNS:
            if columns.get(name) is None and name not in _NEEDED:
                columns[name] = pa.nulls(table.num_rows)
        return pa.table({name: columns[name] for name in _COLUMNS})
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as exc:
        said = (str(exc).splitlines() or [""])[0]
        raise BadRequest(
            f"{path}: cannot be read as a table of collectives ({said}); it needs the columns "
            f"{', '.join(_NEEDED)} of docs/cost-model.md"
        ) from exc


def _distinct_rows(table: Any) -> tuple[IntArray, list[Row]]:
    """(N,) place of each row's keys, and the keys."""
    columns = [np.asarray(table[key].to_pylist(), dtype=object) for key in _KEYS]
    codes = np.zeros(table.num_rows, dtype=np.int64)
    for column in columns:
        _, part = np.unique(column.astype(str), return_inverse=True)
        codes = codes * (part.max(initial=0) + 1) + part
    _, first, codes = np.unique(codes, return_index=True, return_inverse=True)
    rows: dict[Row, int] = {}
    places = []
    for index in first:
        values: dict[str, Any] = dict(zip(_KEYS, (c[index] for c in columns), strict=True))
        extra = _extra(values.pop("extra"))
        row = Row.of(values, extra)
        places.append(rows.setdefault(row, len(rows)))
    return np.array(places, dtype=np.int64)[codes], list(rows)


def _extra(text: Any) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except (TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def samples_from_records(
    records: Iterable[Any],
    levels_of: Mapping[tuple[int, int], tuple[GroupLevel, ...]],
    device: Device,
) -> CollectiveSamples:
    """Records of collectives (``meshwright.records``) of one cluster.

    Args:
        records: of any kind; others than collectives, and those that no formula knows, are passed
            over.
        levels_of: by ``(group_size, hosts)``, how such a group spreads over the cluster's links.
        device: type of its devices.
    """
    groups: dict[tuple[str, int, int], int] = {}
    found: list[MeasuredGroup] = []
    rows = []
    for record in records:
        size, hosts = record.extra.get("group_size"), record.extra.get("hosts") or 1
        payload = record.extra.get("bytes")
        levels = levels_of.get((size, hosts))
        if record.kind != "collective" or record.name not in KINDS or not levels or not payload:
            continue
        key = (record.name, size, hosts)
        if key not in groups:
            groups[key] = len(found)
            found.append(
                MeasuredGroup(
                    kind=record.name,
                    levels=levels,
                    num_ranks=size,
                    device=device,
                    source="records",
                    gpu=device.name,
                )
            )
        rows.append((groups[key], float(payload), record.median))
    columns = np.array(rows, dtype=np.float64).reshape(-1, 3)
    return CollectiveSamples(
        groups=tuple(found),
        group=columns[:, 0].astype(np.int64),
        num_bytes=columns[:, 1],
        time_s=columns[:, 2],
    )


def thinned(samples: CollectiveSamples, *, bins_per_octave: int = 2) -> CollectiveSamples:
    """One measurement for each group and bin of sizes: the medians of size and time in the bin."""
    place = np.floor(np.log2(samples.num_bytes) * bins_per_octave + 0.25).astype(np.int64)
    keys = np.stack([samples.group, place])
    unique, codes = np.unique(keys, axis=1, return_inverse=True)
    order = np.argsort(codes.ravel(), kind="stable")
    starts = np.flatnonzero(np.diff(codes.ravel()[order], prepend=-1))
    parts = np.split(order, starts[1:])
    return CollectiveSamples(
        groups=samples.groups,
        group=unique[0],
        num_bytes=np.array([np.median(samples.num_bytes[part]) for part in parts]),
        time_s=np.array([np.median(samples.time_s[part]) for part in parts]),
    )
