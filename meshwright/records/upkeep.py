"""Upkeep of a record store: counting, verifying, merging, compacting.

Files are replaced new one first: what a crash leaves between the two steps is rows that stand in
two files, which their checksums tell.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshwright.errors import BadRequest
from meshwright.records.files import (
    clean_temporaries,
    commit_file,
    list_files,
    locked,
    remove_files,
    successor_name,
    temporaries,
)
from meshwright.records.index import INDEX_NAME, read_index, write_index
from meshwright.records.layout import Group, file_of, groups_of
from meshwright.records.query import Query
from meshwright.records.scan import Found, failure, scan, scan_unlocked, stored_files
from meshwright.strict_json import one_line

__all__ = [
    "SMALL_FILE_ROWS",
    "Compacted",
    "Merged",
    "Verification",
    "alone",
    "chosen_rows",
    "compact",
    "count",
    "is_new",
    "join_own",
    "merge",
    "rebuild_index",
    "replace_files",
    "verify",
]

SMALL_FILE_ROWS = 2**16
"""Files with fewer are joined."""
_JOINED_ROWS = 2**17
"""Of a file that joining makes, at most, unless one append was larger."""
_EVERYTHING = Query()


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What a store holds."""

    num_files: int
    num_records: int
    num_repeated_rows: int
    """Rows that stand in a second file, left by an interrupted ``compact``; read once only."""
    num_temporary_files: int
    """Of running or interrupted writers."""
    index: str
    """``"whole"``, ``"damaged"`` or ``"none"``; it is built again when it is needed."""
    problems: tuple[str, ...]
    """One line about each file with damage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """What a merge did."""

    num_added: int
    num_known: int
    """Records that were here before."""
    problems: tuple[str, ...]
    """What was wrong with the other store; those rows were not taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compacted:
    """What compacting did."""

    num_files_before: int
    num_files_after: int
    num_repeated_rows: int
    """Removed: they stood in two files."""
    num_temporary_files: int
    """Removed: left by interrupted writers."""
    problems: tuple[str, ...]
    """One line about each file with damage; those were left."""


def count(folder: Path, query: Query) -> tuple[dict[Group, int], list[str]]:
    """Records of each kind, name, device, dtype and machine; and the problems.

    Raises:
        BadRequest: the folder cannot be read.
    """
    seen: set[bytes] = set()
    counted: Counter[Group] = Counter()
    problems: list[str] = []
    for found in scan(folder, query):
        if found.problem:
            problems.append(found.problem)
        for table, rows in zip(found.tables, found.rows, strict=True):
            for group, row in zip(groups_of(table) if any(rows) else (), rows, strict=False):
                if row is not None and row[0] not in seen:
                    seen.add(row[0])
                    counted[group] += 1
    return dict(counted), problems


def verify(folder: Path) -> Verification:
    """What every file holds, by its own checksum and those of its rows.

    Raises:
        BadRequest: the folder cannot be read.
    """
    seen: set[bytes] = set()
    problems: list[str] = []
    num_rows = 0
    num_files = 0
    for found in scan(folder, _EVERYTHING):
        num_files += 1
        if found.problem:
            problems.append(found.problem)
        for checksum, _ in found.whole_rows:
            num_rows += 1
            seen.add(checksum)
    index = "none"
    if (folder / INDEX_NAME).is_file():
        index = "damaged" if read_index(folder) is None else "whole"
    return Verification(
        num_files=num_files,
        num_records=len(seen),
        num_repeated_rows=num_rows - len(seen),
        num_temporary_files=len(temporaries(folder)),
        index=index,
        problems=tuple(problems),
    )


def join_own(folder: Path, written: Sequence[tuple[str, Any]]) -> None:
    """Join files their writer has just written, as far as nobody else has touched them.

    Does nothing where another process keeps the store or the disk is full: that they are many
    files is no reason for an error, and ``compact`` can join them later.
    """
    with contextlib.suppress(OSError), locked(folder, alone=True, wait=False) as held:
        if held:
            present = set(list_files(folder))
            parts = [(name, table) for name, table in written if name in present]
            if len(parts) > 1:
                replace_files(folder, [name for name, _ in parts], [table for _, table in parts])


def replace_files(folder: Path, names: Sequence[str], tables: Sequence[Any]) -> None:
    """Put one file with the rows of ``tables`` in the place of the files ``names``."""
    if any(table.num_rows for table in tables):
        data = file_of(tables)
        commit_file(folder, successor_name(min(names), data), data)
    remove_files(folder, list(names))


@contextlib.contextmanager
def alone(folder: Path, doing: str) -> Iterator[None]:
    """Holds the store alone; an OSError inside becomes one line."""
    try:
        if not folder.is_dir():
            raise BadRequest(f"{one_line(str(folder))}: no such record store; check the path")
        with locked(folder, alone=True) as held:
            if not held:
                raise BadRequest(
                    f"{one_line(str(folder))}: cannot {doing} records: its file system has no locks"
                )
            yield
    except OSError as exc:
        raise failure(folder, doing, exc) from exc


@dataclass(frozen=True, slots=True)
class _Part:
    """A file with its tables, and the checksum of each of their rows."""

    name: str
    tables: tuple[Any, ...]
    checksums: tuple[tuple[bytes, ...], ...]
    num_rows: int


def compact(folder: Path) -> Compacted:
    """Join small files, drop rows that stand twice.

    Raises:
        BadRequest: the store cannot be read or written.
    """
    with alone(folder, "compact"):
        num_temporary = clean_temporaries(folder)
        num_before = len(list_files(folder))
        problems: list[str] = []
        seen: set[bytes] = set()
        runs: list[list[_Part]] = [[]]
        for found in scan_unlocked(folder, _EVERYTHING):
            if found.problem:
                problems.append(found.problem)
            elif found.num_rows < SMALL_FILE_ROWS:
                runs[-1].append(_part_of(found))
                continue
            else:
                seen.update(checksum for checksum, _ in found.whole_rows)
            runs.append([])  # what stands on both sides of this file must not change places
        num_dropped = sum(_join(folder, batch, seen) for run in runs for batch in _batches(run))
        rebuild_index(folder)
        return Compacted(
            num_files_before=num_before,
            num_files_after=len(list_files(folder)),
            num_repeated_rows=num_dropped,
            num_temporary_files=num_temporary,
            problems=tuple(problems),
        )


def _part_of(found: Found) -> _Part:
    checksums = tuple(tuple(row[0] for row in rows if row is not None) for rows in found.rows)
    return _Part(found.name, found.tables, checksums, found.num_rows)


def _batches(parts: Sequence[_Part]) -> Iterator[list[_Part]]:
    batch: list[_Part] = []
    num_rows = 0
    for part in parts:
        if batch and num_rows + part.num_rows > _JOINED_ROWS:
            yield batch
            batch, num_rows = [], 0
        batch.append(part)
        num_rows += part.num_rows
    if batch:
        yield batch


def _join(folder: Path, batch: Sequence[_Part], seen: set[bytes]) -> int:
    """Join files, without rows whose checksum was ``seen``; how many rows those were."""
    tables = [
        table
        for part in batch
        for table in chosen_rows(
            part.tables, [[is_new(item, seen) for item in group] for group in part.checksums]
        )
    ]
    num_kept: int = sum(table.num_rows for table in tables)
    num_dropped = sum(part.num_rows for part in batch) - num_kept
    if len(batch) > 1 or num_dropped:
        replace_files(folder, [part.name for part in batch], tables)
    return num_dropped


def chosen_rows(tables: Sequence[Any], keep: Sequence[Sequence[bool]]) -> list[Any]:
    """``tables`` with only the rows to keep; those without any are left out."""
    import pyarrow as pa

    return [
        table if all(kept) else table.filter(pa.array(kept, pa.bool_()))
        for table, kept in zip(tables, keep, strict=True)
        if any(kept)
    ]


def is_new(checksum: bytes | None, seen: set[bytes]) -> bool:
    """Whether there is a checksum and it was not ``seen``; it is from now on."""
    if checksum is None or checksum in seen:
        return False
    seen.add(checksum)
    return True


def rebuild_index(folder: Path) -> None:
    """Drop the entries of files that are gone; a query adds those of new ones."""
    known = read_index(folder) or {}
    write_index(folder, {name: known[name] for name in stored_files(folder, known)})


def merge(folder: Path, other: Path) -> Merged:
    """Add the whole rows of ``other`` that are not in ``folder``.

    Raises:
        BadRequest: one of the two cannot be read, or ``folder`` not be written.
    """
    if not other.is_dir():
        raise BadRequest(f"{one_line(str(other))}: no such record store; check the path")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if folder.samefile(other):
            raise BadRequest(f"{one_line(str(folder))}: a store cannot be merged into itself")
    except OSError as exc:
        raise failure(folder, "add", exc) from exc
    with alone(folder, "add"):
        seen = {
            checksum
            for found in scan_unlocked(folder, _EVERYTHING)
            for checksum, _ in found.whole_rows
        }
        problems: list[str] = []
        num_rows = num_added = 0
        for found in scan(other, _EVERYTHING):
            if found.problem:
                problems.append(found.problem)
            num_rows += sum(1 for _ in found.whole_rows)
            keep = [[is_new(row and row[0], seen) for row in rows] for rows in found.rows]
            tables = chosen_rows(found.tables, keep)
            if tables:
                num_added += sum(table.num_rows for table in tables)
                data = file_of(tables)
                commit_file(folder, successor_name(found.name, data), data)
        return Merged(num_added=num_added, num_known=num_rows - num_added, problems=tuple(problems))
