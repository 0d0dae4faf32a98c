"""Which Records of a store are worth keeping, and removing the others."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from meshwright.errors import BadRequest
from meshwright.records.files import clean_temporaries
from meshwright.records.kinds import RESULT_KEYS
from meshwright.records.layout import Row
from meshwright.records.query import Query
from meshwright.records.record import Record
from meshwright.records.scan import Found, scan_unlocked
from meshwright.records.upkeep import alone, chosen_rows, rebuild_index, replace_files
from meshwright.strict_json import one_line

__all__ = ["Pruned", "identity_of", "prune"]

_encoder = msgspec.json.Encoder(order="deterministic")
_LONG_AGO = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What pruning did."""

    num_removed: int
    num_kept: int
    num_temporary_files: int
    """Removed: left by interrupted writers."""
    set_aside: tuple[str, ...]
    """Damaged files that were replaced; they stay beside the store's as ``NAME.damaged``."""
    problems: tuple[str, ...]
    """One line about each file with damage; its Records are not among the kept ones, unless it was
    asked to replace such files."""


def identity_of(record: Record) -> bytes:
    """Equal for Records that measure the same thing the same way on the same hardware.

    Versions of software and driver, clocks, and the keys in ``RESULT_KEYS`` do not count.
    """
    machine = record.machine
    extra = {key: value for key, value in record.extra.items() if key not in RESULT_KEYS}
    return _encoder.encode(
        (
            (record.kind, record.name, record.device, record.unit, record.method, record.source),
            (machine.processor, machine.num_cores, machine.accelerators, machine.system),
            extra,
        )
    )


def prune(
    folder: Path,
    *,
    keep_newest: int | None,
    before_utc: str | None,
    duplicates: bool,
    damaged: bool,
) -> Pruned:
    """Remove Records, and what interrupted writers left; see ``RecordStore.prune``.

    Raises:
        BadRequest: the store cannot be read or written, or a condition has no sense.
    """
    if keep_newest is not None and keep_newest < 1:
        raise BadRequest(f"prune: cannot keep the newest {keep_newest}; keep at least 1")
    before = None if before_utc is None else _time_of(before_utc)
    if before_utc is not None and before is None:
        raise BadRequest(f"prune: {one_line(before_utc)!r} is no time; write it like 2026-01-31")
    with alone(folder, "prune"):
        num_temporary = clean_temporaries(folder)
        files = list(scan_unlocked(folder, Query()))
        changeable = [
            found for found in files if not found.problem or (damaged and found.is_damaged)
        ]
        rows = {row[0]: row for found in changeable for row in found.whole_rows}
        kept = list(rows.values())
        if before is not None:
            kept = [row for row in kept if _time_or(row[1], before) >= before]
        if duplicates:
            kept = list({_encoder.encode(row[1]): row for row in reversed(kept)}.values())[::-1]
        if keep_newest is not None:
            kept = _newest(kept, keep_newest)
        remaining = {checksum for checksum, _ in kept}
        set_aside = [_set_aside(folder, found.name) for found in changeable if found.problem]
        for found in changeable:
            _rewrite(folder, found, remaining)
        rebuild_index(folder)
        return Pruned(
            num_removed=len(rows) - len(kept),
            num_kept=len(kept),
            num_temporary_files=num_temporary,
            set_aside=tuple(set_aside),
            problems=tuple(found.problem for found in files if found.problem),
        )


def _set_aside(folder: Path, name: str) -> str:
    """Keep a damaged file under a name the store does not read; that name."""
    aside = f"{name}.damaged"
    try:
        os.link(folder / name, folder / aside)
    except FileExistsError:
        pass
    except OSError as exc:
        raise BadRequest(
            f"{one_line(str(folder / name))}: cannot be set aside: {one_line(str(exc))}"
        ) from exc
    return aside


def _rewrite(folder: Path, found: Found, remaining: set[bytes]) -> None:
    """Leave of a file the rows that remain, each in the first file that holds it."""
    keep: list[list[bool]] = []
    for rows in found.rows:
        keep.append([row is not None and row[0] in remaining for row in rows])
        remaining -= {row[0] for row in rows if row is not None}
    if found.problem or not all(map(all, keep)):
        replace_files(folder, [found.name], chosen_rows(found.tables, keep))


def _newest(rows: Sequence[Row], num_kept: int) -> list[Row]:
    by_identity: dict[bytes, list[tuple[datetime, int]]] = {}
    for number, (_, record) in enumerate(rows):
        when = _time_or(record, _LONG_AGO)
        by_identity.setdefault(identity_of(record), []).append((when, number))
    chosen = {number for found in by_identity.values() for _, number in sorted(found)[-num_kept:]}
    return [row for number, row in enumerate(rows) if number in chosen]


def _time_or(record: Record, unknown: datetime) -> datetime:
    return _time_of(record.measured_utc) or unknown


def _time_of(text: str) -> datetime | None:
    """A time in ISO 8601, UTC where it does not say; None where it is none."""
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return None
    try:
        return when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)
    except (OverflowError, ValueError):
        return None
