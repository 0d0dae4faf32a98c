"""Reading the files of a record store: what each gives, and one line about what it does not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshwright.errors import BadRequest
from meshwright.records.files import file_problem, has_store_name, list_files, locked, read_file
from meshwright.records.index import Summary, read_index, summary_of, write_index
from meshwright.records.layout import (
    Contents,
    Group,
    Row,
    groups_of,
    mended_forms,
    open_contents,
    rows_of,
)
from meshwright.records.query import Query
from meshwright.strict_json import one_line

__all__ = ["Found", "failure", "scan", "scan_unlocked", "stored_files"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One file of a store."""

    name: str
    tables: tuple[Any, ...] = ()
    """Its groups of rows that could be decoded, each a ``pyarrow.Table``."""
    rows: tuple[tuple[Row | None, ...], ...] = ()
    """For each row of each table its Row, or None where it was not wanted or is damaged."""
    problem: str = ""
    """One line that begins with the path; empty where every row is whole."""
    is_damaged: bool = False
    """Whether it is a file of the store that has changed since it was written."""

    @property
    def whole_rows(self) -> Iterator[Row]:
        """The rows that were wanted and are not damaged."""
        return (row for rows in self.rows for row in rows if row is not None)

    @property
    def num_rows(self) -> int:
        """Of all tables."""
        return sum(table.num_rows for table in self.tables)


def failure(folder: Path, doing: str, exc: Exception) -> BadRequest:
    """The one line about a store that cannot be used."""
    reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
    return BadRequest(f"{one_line(str(folder))}: cannot {doing} records: {one_line(reason)}")


def scan(folder: Path, query: Query) -> Iterator[Found]:
    """Every file that may hold what is wanted, in the order of their names.

    The index spares reading those that hold nothing wanted, and is brought up to date. Files that
    were compacted meanwhile are given again in their new form, so a row may be given twice; its
    checksum tells.

    Raises:
        BadRequest: the folder cannot be read.
    """
    try:
        with locked(folder, alone=False):
            if query.is_open:
                yield from scan_unlocked(folder, query)
            else:
                yield from _scan_by_index(folder, query)
    except OSError as exc:
        raise failure(folder, "read", exc) from exc


def _scan_by_index(folder: Path, query: Query) -> Iterator[Found]:
    known = read_index(folder) or {}
    fresh: dict[str, Summary] = {}

    def note(name: str, groups: list[Group]) -> None:
        summary = summary_of(groups)
        if summary is not None:
            fresh[name] = summary

    spared = {
        name for name, groups in known.items() if not any(query.accepts(group) for group in groups)
    }
    yield from scan_unlocked(folder, query, spared=spared, note=note)
    if not fresh.keys() <= known.keys():
        summaries = known | fresh
        write_index(folder, {name: summaries[name] for name in stored_files(folder, summaries)})


def stored_files(folder: Path, names: Collection[str]) -> list[str]:
    """Those of ``names`` that are in the store."""
    return [name for name in list_files(folder) if name in names]


def scan_unlocked(
    folder: Path,
    query: Query,
    *,
    spared: Collection[str] = (),
    note: Callable[[str, list[Group]], None] | None = None,
) -> Iterator[Found]:
    """As ``scan``, for who holds the lock.

    Args:
        folder: The store.
        query: What is wanted.
        spared: Names of files not to read.
        note: Told the groups of all rows of each file that is whole.

    Raises:
        OSError: the folder cannot be read.
    """
    seen = set(spared)
    vanished = True
    while vanished:
        vanished = False
        for name in list_files(folder):
            if name in seen:
                continue
            seen.add(name)
            path = folder / name
            try:
                data = read_file(path)
            except FileNotFoundError:
                if path.is_symlink():
                    yield Found(name=name, problem=f"{one_line(str(path))}: leads nowhere; skipped")
                vanished = True  # compacted by somebody who has no lock; look again
            except OSError as exc:
                reason = one_line(exc.strerror or str(exc))
                problem = f"{one_line(str(path))}: cannot be read: {reason}; skipped"
                yield Found(name=name, problem=problem)
            else:
                yield _found(path, data, query, note)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """The rows of one file that were wanted, beside its tables."""

    contents: Contents
    rows: tuple[tuple[Row | None, ...], ...]
    num_rows: int
    num_bad: int
    said: str
    """What is wrong with the first bad row."""


def _found(
    path: Path, data: bytes, query: Query, note: Callable[[str, list[Group]], None] | None
) -> Found:
    doubt = file_problem(path.name, data)
    is_named = has_store_name(path.name)
    # Of a file in doubt every row is checked, so that the line can say how many are lost.
    accepts = None if query.is_open or doubt else _remembering(query.accepts)
    found = _rows_in(data, accepts)
    if doubt and is_named:
        found = _best_of(found, data)
    where = one_line(str(path))
    contents = found.contents
    if contents.problem:
        why = f"{doubt}; {contents.problem}" if doubt and is_named else contents.problem
        problem = f"{where}: {why}; skipped"
        return Found(name=path.name, problem=problem, is_damaged=bool(doubt) and is_named)
    if note is not None and not doubt and not contents.num_lost:
        note(path.name, [group for table in contents.tables for group in groups_of(table)])
    rows = found.rows
    if doubt and not query.is_open:
        pairs = zip(rows, contents.tables, strict=True)
        rows = tuple(_only(some, table, query) for some, table in pairs)
    problem = ""
    if doubt or found.num_bad:
        why = doubt or f"a row is damaged: {found.said}"
        problem = f"{where}: {why}; {found.num_bad} of its {found.num_rows} rows are lost"
    return Found(
        name=path.name,
        tables=contents.tables,
        rows=rows,
        problem=problem,
        is_damaged=bool(problem) and is_named,
    )


def _rows_in(data: bytes, accepts: Callable[[Group], bool] | None) -> _Rows:
    contents = open_contents(data)
    num_rows = num_bad = contents.num_lost
    rows: list[tuple[Row | None, ...]] = []
    said = ""
    for table in contents.tables:
        some, num_damaged, why = rows_of(table, accepts)
        num_rows += table.num_rows
        num_bad += num_damaged
        said = said or why
        rows.append(tuple(some))
    return _Rows(contents=contents, rows=tuple(rows), num_rows=num_rows, num_bad=num_bad, said=said)


def _best_of(found: _Rows, data: bytes) -> _Rows:
    """Of a damaged file the reading that gives most rows: its footer may be what is damaged."""
    for mended in mended_forms(data):
        if found.num_bad or found.contents.problem:
            other = _rows_in(mended, None)
            if other.num_rows - other.num_bad > found.num_rows - found.num_bad:
                found = other
    return found


def _only(found: tuple[Row | None, ...], table: Any, query: Query) -> tuple[Row | None, ...]:
    if not any(found):
        return found
    wanted = map(_remembering(query.accepts), groups_of(table))
    return tuple(row if want else None for row, want in zip(found, wanted, strict=True))


def _remembering(accepts: Callable[[Group], bool]) -> Callable[[Group], bool]:
    known: dict[Group, bool] = {}

    def remembered(group: Group) -> bool:
        found = known.get(group)
        if found is None:
            found = known[group] = accepts(group)
        return found

    return remembered
